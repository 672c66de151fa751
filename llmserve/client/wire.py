"""What the frontend and the engine say to each other: two msgspec tagged unions, encoded as MessagePack.

Token ids, scalars and text only: no pickle, no tensors. Messages of one direction arrive in the order they were sent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import zmq

from llmserve import errors
from llmserve.config import EngineConfig
from llmserve.types import EngineInfo, EngineStats, Output, Request


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Take a request."""

    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """End these requests."""

    request_ids: list[str]


class Control(msgspec.Struct, frozen=True, tag="control"):
    """Run a command and answer with a `ControlReply` of the same id."""

    control_id: int
    command: str
    args: dict[str, Any]


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """End all requests with `abort`, then the process."""


ToEngine = Submit | Abort | Control | Shutdown


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """How far loading is: `done` of `total` units of `phase`."""

    phase: str
    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine takes requests from now on."""

    info: EngineInfo


class StepMessage(msgspec.Struct, frozen=True, tag="step"):
    """All outputs of one step."""

    outputs: list[Output]
    stats: EngineStats


class ControlReply(msgspec.Struct, frozen=True, tag="reply"):
    """The answer to a `Control`; `error_kind` names the class of `errors` that `error` belongs to."""

    control_id: int
    result: dict[str, Any]
    error: str | None = None
    error_kind: str = ""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Loading failed; the process ends. `error_kind` as in `ControlReply`."""

    error: str
    error_kind: str = ""


FromEngine = Progress | Ready | StepMessage | ControlReply | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def has_message(inbox: zmq.Socket[bytes]) -> bool:
    """Whether `recv` would return at once. Cheaper than the exception of one call too many: it is asked every step."""
    events = inbox.getsockopt(zmq.EVENTS)
    return isinstance(events, int) and bool(events & zmq.POLLIN)


def error_kind(error: Exception) -> str:
    """The name under which `restore_error` finds the class again; empty for errors that are not ours."""
    return type(error).__name__ if isinstance(error, errors.LLMServeError) else ""


def restore_error(message: str, kind: str) -> errors.LLMServeError:
    """The error a peer raised. Unknown kinds become `EngineFault`."""
    found = getattr(errors, kind, None) if kind else None
    if isinstance(found, type) and issubclass(found, errors.LLMServeError):
        return found(message)
    return errors.EngineFault(message)


def encode_config(config: EngineConfig) -> str:
    """The configuration as one JSON line, for the engine child's command line."""
    return msgspec.json.encode(config, enc_hook=str).decode()


def decode_config(text: str) -> EngineConfig:
    """Inverse of `encode_config`."""
    return msgspec.json.decode(text, type=EngineConfig, dec_hook=_decode_path)


def _decode_path(kind: type, value: Any) -> Any:
    if issubclass(kind, Path):
        return kind(value)
    raise NotImplementedError(f"no wire form for {kind}")

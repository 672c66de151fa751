"""Reading and decoding request bodies.

Invariants: no more than the limit is ever held; whatever bytes come in, the outcome is a valid struct or an
InvalidRequest that says where the fault is (never another error).
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec
from starlette.types import Receive, Scope

from llmserve.errors import ClientDisconnected, InvalidRequest
from llmserve.server.http.errors import BodyTooLarge

_Body = TypeVar("_Body", bound=msgspec.Struct)
_LOCATION = re.compile(r"^(?P<what>.*) - at (?:`key` in )?`\$\.?(?P<where>.*)`$", re.DOTALL)
_UNKNOWN_FIELD = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_MISSING_FIELD = re.compile(r"^Object missing required field `(?P<name>.*)`$", re.DOTALL)
_CONTENT_TYPE = re.compile(r"^messages\[\d+\]\.content\[\d+\]\.type$")


async def read_body(scope: Scope, receive: Receive, *, max_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLarge, as soon as that is known, and ClientDisconnected."""
    too_large = BodyTooLarge(f"the body is longer than {max_bytes} bytes")
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > max_bytes:
            raise too_large
    parts: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected("the client left before its request was complete")
        part = message.get("body", b"")
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise too_large
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def decode_body(decoder: msgspec.json.Decoder[_Body], body: bytes) -> _Body:
    """Decode and check against the schema. Raises InvalidRequest naming the parameter."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8: {error.reason}", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply", code="invalid_json") from None


def _invalid(text: str) -> InvalidRequest:
    """`Expected `int`, got `str` - at `$.n`` and its kin, as our error."""
    located = _LOCATION.match(text)
    what, where = (located["what"], located["where"]) if located else (text, "")
    unknown = _UNKNOWN_FIELD.match(what)
    if unknown is not None:
        param = _join(where, unknown["name"])
        return InvalidRequest(f"unknown parameter: {param}", param=param, code="unknown_parameter")
    missing = _MISSING_FIELD.match(what)
    if missing is not None:
        param = _join(where, missing["name"])
        return InvalidRequest(f"missing parameter: {param}", param=param, code="missing_parameter")
    if _CONTENT_TYPE.match(where):
        return InvalidRequest(f"{where}: this model takes parts of type 'text' only", param=where)
    message = what[:1].lower() + what[1:]
    return InvalidRequest(f"{where}: {message}" if where else f"the body: {message}", param=where or None)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name

"""The share of an engine process's time that is not computing, its messages included.

The child's own loop over its own sockets, in this process: what it sends goes through ZMQ to the other end, which is
read here between two measurements. Shares are medians over steps: a step that a neighbour held up moves nothing.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq

from llmserve.cli.engine_main import Link
from llmserve.client import wire
from llmserve.client.loop import drive
from llmserve.config import EngineConfig
from llmserve.engine.engine import Engine
from llmserve.engine.loader import load_engine
from llmserve.types import EngineStats, Output, Request, SamplingParams

PROMPT_TOKENS: Final = 128
_FIRST_ID: Final = 1000
_WARM_UP_STEPS: Final = 8


class LoopShare(msgspec.Struct, frozen=True, kw_only=True):
    """Steps in which all sequences decode."""

    num_sequences: int
    num_steps: int
    step_ms: float
    """From the start of a step to the start of the next; all are medians."""
    other_us: float
    """Of it, outside the nodes of the compiled program: plan, arrays, collect, encoding and sending."""
    other_share: float
    max_share: float


class _Watched:
    """An engine that notes, whenever a step begins, what the step before took."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._program: Any = engine._executor.program  # type: ignore[attr-defined]
        self._started_s = 0.0
        self.steps: list[tuple[int, float, float]] = []
        """Number of outputs, seconds from start to start, seconds within nodes."""
        self._num_outputs = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> list[Output]:
        now_s = time.perf_counter()
        nodes_s = sum(seconds for seconds, _ in self._program.take_times().values())
        looked_s = time.perf_counter() - now_s  # looking is no part of the loop
        if self._started_s:
            self.steps.append((self._num_outputs, now_s - self._started_s, nodes_s))
        self._started_s = now_s + looked_s
        outputs = self._engine.step()
        self._num_outputs = len(outputs)
        return outputs

    def stats(self) -> EngineStats:
        return self._engine.stats()


def measure(model: Path, max_shares: dict[int, float], *, num_steps: int) -> list[LoopShare]:
    """One measurement for each batch size in `max_shares`."""
    config = EngineConfig(model_path=model, max_model_len=2048, itl_target_ms=0.0)
    engine = load_engine(config, progress=lambda phase, done, total: None)
    return [_measure(engine, size, share, num_steps=num_steps) for size, share in max_shares.items()]


def _measure(engine: Engine, num_sequences: int, max_share: float, *, num_steps: int) -> LoopShare:
    watched = _Watched(engine)
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        endpoint = Path(folder) / "engine"
        inbox, outbox = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        with inbox, outbox:
            for sock, suffix in ((inbox, ".in"), (outbox, ".out")):
                sock.set_hwm(0)
                sock.bind(f"ipc://{endpoint.with_suffix(suffix)}")
            link = Link(endpoint)
            for number in range(num_sequences):
                inbox.send(wire.encode(wire.Submit(_request(number, num_steps + 2 * num_sequences))))
            drive(watched, _until_done(link, watched), link.send, on_idle=lambda: None)
            outbox.close(linger=0)
            inbox.close(linger=0)
            link.close()
    pure = [(wall_s, nodes_s) for num_outputs, wall_s, nodes_s in watched.steps if num_outputs == num_sequences]
    pure = pure[_WARM_UP_STEPS:-1]
    other_s = statistics.median(wall_s - nodes_s for wall_s, nodes_s in pure)
    return LoopShare(
        num_sequences=num_sequences,
        num_steps=len(pure),
        step_ms=round(statistics.median(wall_s for wall_s, _ in pure) * 1e3, 3),
        other_us=round(other_s * 1e6, 1),
        other_share=round(statistics.median((wall_s - nodes_s) / wall_s for wall_s, nodes_s in pure), 4),
        max_share=max_share,
    )


def _until_done(link: Link, engine: _Watched) -> Any:
    """The link's `receive`, which ends the loop when the requests have ended."""

    def receive(*, wait: bool) -> list[wire.ToEngine]:
        if wait and engine.stats().num_steps and engine.steps:
            return [wire.Shutdown()]
        return link.receive(wait=wait)

    return receive


def _request(number: int, max_tokens: int) -> Request:
    rng = random.Random(number)
    prompt = [rng.randrange(_FIRST_ID, 40_000) for _ in range(PROMPT_TOKENS)]
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return Request(request_id=f"{number:032x}", prompt_token_ids=prompt, sampling=sampling)

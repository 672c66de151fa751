"""An engine driven step by step in this process, every output stamped with its time.

What the proofs of the engine share. Invariants: a stream has as many tokens as it was asked for, as the model's own
end-of-generation tokens end none unless they are given; a probe's engine does not speculate unless asked to, so that
times between tokens are those of steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.peers.results import RESULTS, ModelFile, save_json
from llmserve.checkpoints import pull
from llmserve.config import EngineConfig, Speculation
from llmserve.engine.engine import Engine
from llmserve.engine.loader import load_engine
from llmserve.errors import EngineFault
from llmserve.tools.bench_host import Host, describe_host
from llmserve.types import Request, SamplingParams


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """Where, on what and beside what a proof ran."""

    host: Host
    model: ModelFile
    others_cores: float
    """Cores that other processes kept busy meanwhile; of several measurements the most."""


@dataclass(slots=True)
class Stream:
    """One request of a probe. Times are `time.perf_counter()`."""

    submitted_s: float
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    """Of each token."""
    num_cached_tokens: int = 0
    ended: bool = False

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.submitted_s


class Probe:
    """One loaded engine and its requests."""

    def __init__(self, model: Path, *, speculation: Speculation = "off", **options: Any) -> None:
        self.engine: Engine = load_engine(
            EngineConfig(model_path=model, speculation=speculation, **options), progress=lambda phase, done, total: None
        )
        self._streams: dict[str, Stream] = {}
        self._num_requests = 0

    def submit(
        self,
        prompt: list[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop_token_ids: tuple[int, ...] = (),
    ) -> Stream:
        """A request; greedy, if no temperature is given."""
        self._num_requests += 1
        request_id = str(self._num_requests)
        stream = self._streams[request_id] = Stream(time.perf_counter())
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, seed=seed, stop_token_ids=stop_token_ids
        )
        self.engine.submit(Request(request_id=request_id, prompt_token_ids=prompt, sampling=sampling))
        return stream

    def step(self) -> None:
        """One step of the engine. Raises `EngineFault` when a request failed."""
        outputs = self.engine.step()
        now_s = time.perf_counter()
        for output in outputs:
            if output.finish_reason == "error":
                raise EngineFault(output.error or "the engine failed")
            stream = self._streams[output.request_id]
            stream.num_cached_tokens = stream.num_cached_tokens or output.num_cached_tokens
            stream.token_ids += output.token_ids
            stream.times_s += [now_s] * len(output.token_ids)
            if output.finish_reason is not None:
                stream.ended = True
                del self._streams[output.request_id]

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Step until it is, or there is no work left."""
        while not is_done() and self.engine.has_work:
            self.step()

    def end_all(self) -> None:
        """Abort what runs."""
        self.engine.abort_all()
        while self.engine.has_work:
            self.step()


def arguments_of(description: str | None, result_name: str) -> argparse.ArgumentParser:
    """Options that all proofs have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="what `llmserve serve` takes (default: smollm2)")
    parser.add_argument("--output", type=Path, default=RESULTS / result_name, help="result file")
    return parser


def conditions(model: Path, others_cores: float) -> Conditions:
    """Describe them now."""
    return Conditions(host=describe_host(), model=ModelFile.of(model), others_cores=others_cores)


def resolve(model: str) -> Path:
    """The model's file."""
    return pull.resolve(model)


def conclude(result: msgspec.Struct, path: Path, misses: list[str]) -> int:
    """Save the result and say what missed its bound; the exit status."""
    save_json(result, path)
    for miss in misses:
        print(f"MISSED: {miss}")
    return 1 if misses else 0

"""The engine without HTTP and without a second process: prefill of one long prompt, and decode at fixed batch sizes.

The counterpart of what llama-bench and llama-batched-bench measure. A decode figure counts only steps in which every
sequence of the batch decodes and none prefills, one token each; a step's time is the engine's whole step, scheduling
included.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from llmserve.config import EngineConfig
from llmserve.engine.engine import Engine
from llmserve.engine.loader import load_engine
from llmserve.errors import EngineFault, InvalidRequest
from llmserve.tools.bench_prompts import random_token_ids
from llmserve.types import Request, SamplingParams


class PrefillReport(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts of `num_tokens` tokens, one after another; each samples one token."""

    num_tokens: int
    seconds: list[float]
    tokens_per_s: float
    """By the median."""
    kernel_share: float | None
    """Time within the nodes of the compiled program / time of the steps; None where the executor does not count."""


class DecodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """Sequences that decode together, greedily, from a context of `prompt_tokens` on."""

    num_sequences: int
    prompt_tokens: int
    num_steps: int
    seconds: list[float]
    """Of all these steps, in each repetition."""
    tokens_per_s: float
    """By the median."""
    kernel_share: float | None


class OfflineReport(msgspec.Struct, frozen=True, kw_only=True):
    """One run of `run_offline`."""

    isa: str
    num_threads: int
    exact: bool
    load_s: float
    prefill: list[PrefillReport]
    decode: list[DecodeReport]


class OfflineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured."""

    prefill_tokens: tuple[int, ...] = (512,)
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 128
    output_tokens: int = 64
    repetitions: int = 1
    seed: int = 0


def run_offline(
    model: Path,
    load: OfflineLoad,
    *,
    num_threads: int = 0,
    exact: bool = False,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> OfflineReport:
    """Load a model into this process and measure it. Raises what loading raises, `InvalidRequest`, `EngineFault`."""
    longest = max((*load.prefill_tokens, load.prompt_tokens + 4 * load.output_tokens)) + 64
    # Random prompts soon repeat themselves: drafts would say more about those than about the engine.
    config = EngineConfig(
        model_path=model,
        max_model_len=longest,
        num_threads=num_threads,
        exact=exact,
        speculation="off",
        itl_target_ms=0.0,  # no stream waits for its tokens here: prompts are computed in whole steps
    )
    engine = load_engine(config, progress=progress)
    return _Bench(engine, config, load).run()


class _Bench:
    """One engine under measurement."""

    def __init__(self, engine: Engine, config: EngineConfig, load: OfflineLoad) -> None:
        if max(load.batch_sizes, default=0) > config.max_num_seqs:
            raise InvalidRequest(f"at most {config.max_num_seqs} sequences can decode together")
        self._engine = engine
        self._config = config
        self._load = load
        self._random = random.Random(load.seed)
        self._num_requests = 0
        # The one thing that an engine does not offer: who measures nodes has to look at its executor.
        self._program = getattr(engine._executor, "program", None)

    def run(self) -> OfflineReport:
        self._decode_once(1, num_steps=2)  # warm-up: pages, threads
        self._end_all()
        return OfflineReport(
            isa=self._engine.info.isa,
            num_threads=self._engine.info.num_threads,
            exact=self._config.exact,
            load_s=round(self._engine.info.load_s, 3),
            prefill=[self._prefill(num_tokens) for num_tokens in self._load.prefill_tokens],
            decode=[self._decode(size) for size in self._load.batch_sizes],
        )

    def _prefill(self, num_tokens: int) -> PrefillReport:
        self._take_kernel_s()
        seconds = []
        for _ in range(self._load.repetitions):
            self._submit(num_tokens, max_tokens=1)
            started_s = time.perf_counter()
            self._drain()
            seconds.append(time.perf_counter() - started_s)
        return PrefillReport(
            num_tokens=num_tokens,
            seconds=_rounded(seconds),
            tokens_per_s=round(num_tokens / statistics.median(seconds), 1),
            kernel_share=self._share(sum(seconds)),
        )

    def _decode(self, num_sequences: int) -> DecodeReport:
        seconds, shares = [], []
        for _ in range(self._load.repetitions):
            took_s = self._decode_once(num_sequences, num_steps=self._load.output_tokens)
            shares.append(self._share(took_s))
            seconds.append(took_s)
            self._end_all()
        known = [share for share in shares if share is not None]
        return DecodeReport(
            num_sequences=num_sequences,
            prompt_tokens=self._load.prompt_tokens,
            num_steps=self._load.output_tokens,
            seconds=_rounded(seconds),
            tokens_per_s=round(num_sequences * self._load.output_tokens / statistics.median(seconds), 1),
            kernel_share=round(statistics.mean(known), 4) if known else None,
        )

    def _decode_once(self, num_sequences: int, *, num_steps: int) -> float:
        """Seconds of `num_steps` pure decode steps; the sequences still run afterwards."""
        for _ in range(num_sequences):
            self._submit(self._load.prompt_tokens, max_tokens=self._load.prompt_tokens + 4 * num_steps)
        num_prefilled = 0
        while num_prefilled < num_sequences:
            outputs = self._step()
            num_prefilled = len(outputs)  # each running sequence gives one token a step
        self._take_kernel_s()
        started_s = time.perf_counter()
        for _ in range(num_steps):
            if len(self._step()) != num_sequences:
                raise EngineFault("a sequence left the batch while it was measured")
        return time.perf_counter() - started_s

    def _submit(self, num_tokens: int, *, max_tokens: int) -> None:
        ids = random_token_ids(self._random, num_tokens, self._engine.info.vocab_size)
        self._num_requests += 1
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self._engine.submit(Request(request_id=str(self._num_requests), prompt_token_ids=ids, sampling=sampling))

    def _step(self) -> Sequence[object]:
        outputs = self._engine.step()
        for output in outputs:
            if output.finish_reason == "error":
                raise EngineFault(output.error or "the engine failed")
        return outputs

    def _drain(self) -> None:
        while self._engine.has_work:
            self._step()

    def _end_all(self) -> None:
        self._engine.abort_all()
        self._drain()

    def _take_kernel_s(self) -> float | None:
        """Seconds in nodes since the last call."""
        if self._program is None:
            return None
        times: dict[str, tuple[float, int]] = self._program.take_times()
        return sum(seconds for seconds, _ in times.values())

    def _share(self, wall_s: float) -> float | None:
        kernel_s = self._take_kernel_s()
        return None if kernel_s is None else round(kernel_s / wall_s, 4)


def _rounded(seconds: Sequence[float]) -> list[float]:
    return [round(value, 6) for value in seconds]

"""The engine: requests in, outputs out, one synchronous step at a time.

Invariants: every request that `submit` took ends in exactly one output with a `finish_reason`, whatever happens to
its step; an ended sequence holds no block; no request can stop the loop. Not thread-safe: one thread owns an engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from llmserve.engine.admission import AdmissionLimits, refusal
from llmserve.engine.kv_cache import KVCacheManager, PagedExecutor
from llmserve.engine.runner import ModelRunner, StepResult
from llmserve.engine.scheduler import Chunk, Plan, Scheduler, SchedulerConfig
from llmserve.engine.sequence import Sequence
from llmserve.errors import EngineFault, InvalidRequest
from llmserve.types import EngineInfo, EngineStats, FinishReason, Output, Request

_log = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one executor whose KV cache has been allocated."""

    def __init__(self, executor: PagedExecutor, config: SchedulerConfig, info: EngineInfo) -> None:
        self.info = info
        self._executor = executor
        self._kv_cache = KVCacheManager(executor.block_pool)
        self._scheduler = Scheduler(config, self._kv_cache)
        self._runner = ModelRunner(executor)
        self._limits = AdmissionLimits(
            vocab_size=info.vocab_size,
            max_model_len=min(info.max_model_len, self._kv_cache.capacity_tokens),
        )
        self._sequences: dict[str, Sequence] = {}
        self._pending: list[Output] = []
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._last_step_tokens = 0
        self._last_step_s = 0.0

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute or to report."""
        return bool(self._pending) or self._scheduler.has_work

    def submit(self, request: Request) -> None:
        """Take a request; one that can never be served ends with `error` at the next step.

        Raises `InvalidRequest`, and does not take the request, when its id is in use.
        """
        if request.request_id in self._sequences:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", param="request_id")
        reason = refusal(request, self._limits)
        if reason is not None:
            self._pending.append(Output(request_id=request.request_id, finish_reason="error", error=reason))
            return
        seq = Sequence.of(request, max_model_len=self._limits.max_model_len)
        self._sequences[seq.request_id] = seq
        self._scheduler.add(seq)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End these requests with `abort` at the next step; unknown and ended ids are ignored."""
        sequences = [seq for seq in map(self._sequences.get, request_ids) if seq is not None]
        self._pending += self._end(sequences, "abort")

    def abort_all(self) -> None:
        """End every request with `abort` at the next step."""
        self.abort(list(self._sequences))

    def step(self) -> list[Output]:
        """Plan, launch, collect. Returns the outputs since the last call; blocks while the executor computes."""
        started = time.perf_counter()
        outputs, self._pending = self._pending, []
        if self._scheduler.has_work:
            plan = self._scheduler.plan()
            self._last_step_tokens = plan.num_tokens
            outputs += self._run(plan)
            self._num_steps += 1
            self._last_step_s = time.perf_counter() - started
        return outputs

    def stats(self) -> EngineStats:
        """Gauges now and totals since the start."""
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_blocks_used=self._kv_cache.num_used,
            num_blocks=self._kv_cache.num_blocks,
            num_steps=self._num_steps,
            num_preemptions=self._scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generation_tokens=self._num_generation_tokens,
            last_step_tokens=self._last_step_tokens,
            last_step_s=self._last_step_s,
        )

    def control(self, command: str, args: dict[str, Any]) -> dict[str, Any]:
        """Run a command: `stats`, `info`, `check_integrity`.

        Raises `InvalidRequest` for an unknown one, `EngineFault` for a broken invariant.
        """
        commands: dict[str, Callable[[], dict[str, Any]]] = {
            "stats": lambda: msgspec.structs.asdict(self.stats()),
            "info": lambda: msgspec.structs.asdict(self.info),
            "check_integrity": self._check_integrity,
        }
        if command not in commands:
            raise InvalidRequest(f"unknown engine command {command!r}; known: {', '.join(commands)}", param="command")
        if args:
            raise InvalidRequest(f"engine command {command!r} takes no arguments", param=next(iter(args)))
        return commands[command]()

    def attach_progress(self, cell: Any) -> None:
        """Let the executor count its progress in a `_C.ProgressCell`, if it can."""
        attach = getattr(self._executor, "attach_progress", None)
        if attach is not None:
            attach(cell)

    def _check_integrity(self) -> dict[str, Any]:
        try:
            self._kv_cache.check_integrity()
        except RuntimeError as error:
            raise EngineFault(str(error)) from error
        return {"num_blocks_used": self._kv_cache.num_used}

    def _run(self, plan: Plan) -> list[Output]:
        try:
            self._runner.launch(plan)
            result = self._runner.collect()
        except Exception as error:  # noqa: BLE001  # the step is lost, the loop is not
            _log.exception("step failed num_sequences=%d", len(plan.sequences()))
            message = f"the engine failed on this step: {type(error).__name__}: {error}"
            return self._end(plan.sequences(), "error", error=" ".join(message.split()))
        return self._apply(plan, result)

    def _apply(self, plan: Plan, result: StepResult) -> list[Output]:
        outputs: list[Output] = []
        ended: list[Sequence] = []
        row = 0
        for seq in plan.decodes:
            seq.num_computed_tokens += 1
            output = self._take_token(seq, result, row)
            row += 1
            outputs.append(output)
            if output.finish_reason is not None:
                ended.append(seq)
        for chunk in plan.chunks:
            chunk_output = self._apply_chunk(chunk, result, row)
            row += chunk.num_score_rows + chunk.samples
            if chunk_output is not None:
                outputs.append(chunk_output)
                if chunk_output.finish_reason is not None:
                    ended.append(chunk.seq)
        if ended:
            self._forget(ended)
        return outputs

    def _apply_chunk(self, chunk: Chunk, result: StepResult, row: int) -> Output | None:
        """Advance a sequence by a chunk whose first logit row is `row`; None while its prompt is unfinished."""
        seq = chunk.seq
        if chunk.num_score_rows:
            scores, num_top = seq.prompt_logprobs, seq.sampling.num_prompt_logprobs or 0
            assert scores is not None
            scores += [result.logprob(row + i, num_top) for i in range(chunk.num_score_rows)]
            seq.num_scored += chunk.num_score_rows
        seq.num_computed_tokens += chunk.num_tokens
        if seq.num_computed_tokens == seq.num_prompt_tokens == seq.num_tokens:  # once, also after a preemption
            self._num_prompt_tokens += seq.num_prompt_tokens
        if chunk.samples:
            return self._take_token(seq, result, row + chunk.num_score_rows)
        if seq.num_computed_tokens < seq.num_tokens:
            return None
        return Output(request_id=seq.request_id, prompt_logprobs=seq.take_prompt_logprobs(), finish_reason="length")

    def _take_token(self, seq: Sequence, result: StepResult, row: int) -> Output:
        token_id = result.token_ids[row]
        finish_reason = seq.append(token_id)
        self._num_generation_tokens += 1
        num_top = seq.sampling.num_logprobs
        if num_top is None and finish_reason is None and seq.prompt_logprobs is None:
            return Output(request_id=seq.request_id, token_ids=(token_id,))
        return Output(
            request_id=seq.request_id,
            token_ids=(token_id,),
            logprobs=None if num_top is None else (result.logprob(row, num_top),),
            prompt_logprobs=seq.take_prompt_logprobs(),
            finish_reason=finish_reason,
            stop_token_id=token_id if finish_reason == "stop" else None,
        )

    def _end(self, sequences: list[Sequence], reason: FinishReason, *, error: str | None = None) -> list[Output]:
        """End living sequences; returns their terminal outputs."""
        living = {seq.request_id: seq for seq in sequences}
        self._forget(list(living.values()))
        return [Output(request_id=request_id, finish_reason=reason, error=error) for request_id in living]

    def _forget(self, sequences: list[Sequence]) -> None:
        self._scheduler.remove(sequences)
        for seq in sequences:
            del self._sequences[seq.request_id]

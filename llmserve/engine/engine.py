"""The engine: requests in, outputs out, one synchronous step at a time.

Invariants: every request that `submit` took ends in exactly one output with a `finish_reason`, whatever happens to
its step; an ended sequence holds no block; no request can stop the loop, and one that makes a step fail fails alone; a
request past its deadline ends before the next step. Not thread-safe: one thread owns an engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from llmserve.engine.admission import AdmissionLimits, refusal
from llmserve.engine.cache_salt import CacheSalts
from llmserve.engine.collector import Collector
from llmserve.engine.deadlines import Deadlines
from llmserve.engine.forks import shares_prompt
from llmserve.engine.isolation import attempt, run_apart
from llmserve.engine.kv_cache import KVCacheManager, PagedExecutor
from llmserve.engine.plan import Plan
from llmserve.engine.run_ahead import AheadRunner
from llmserve.engine.runner import ModelRunner, StepResult
from llmserve.engine.scheduler import Scheduler, SchedulerConfig
from llmserve.engine.sequence import Sequence
from llmserve.engine.trace import StepTrace, TracedRunner
from llmserve.errors import EngineFault, InvalidRequest, LLMServeError, Overloaded
from llmserve.types import EngineInfo, EngineStats, FinishReason, Output, Request

_log = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one executor whose KV cache has been allocated."""

    def __init__(
        self,
        executor: PagedExecutor,
        config: SchedulerConfig,
        info: EngineInfo,
        *,
        clock: Callable[[], float] = time.monotonic,
        trace: StepTrace | None = None,
    ) -> None:
        self.info = info
        self._clock = clock
        self._trace = trace
        self._executor = executor
        self._kv_cache = KVCacheManager(executor.block_pool, shares_prefixes=config.enable_prefix_cache)
        self._scheduler = Scheduler(config, self._kv_cache)
        self._runner = self._make_runner(executor)
        self._collector = Collector()
        self._deadlines = Deadlines()
        self._salts = CacheSalts()
        self._limits = AdmissionLimits(
            vocab_size=info.vocab_size,
            max_model_len=min(info.max_model_len, self._kv_cache.capacity_tokens),
        )
        self._sequences: dict[str, Sequence] = {}
        self._pending: list[Output] = []
        self._num_accepted = 0
        self._num_steps = 0
        self._last_step_tokens = 0
        self._last_step_s = 0.0

    def _make_runner(self, executor: PagedExecutor) -> ModelRunner:
        if self._trace is not None:
            return TracedRunner(executor, self._trace)
        if getattr(executor, "runs_ahead", False):
            return AheadRunner(executor, self._scheduler.can_follow)
        return ModelRunner(executor)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute or to report."""
        return bool(self._pending) or self._scheduler.has_work

    def submit(self, request: Request) -> None:
        """Take a request; one that can never be served, or finds the queue full, ends with `error` at the next step.

        Raises `InvalidRequest`, and does not take the request, when its id is in use.
        """
        if request.request_id in self._sequences:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", param="request_id")
        reason = refusal(request, self._limits)
        if reason is not None:
            self._refuse(request, reason, InvalidRequest)
        elif self._scheduler.is_full:
            self._refuse(request, f"{self._scheduler.num_waiting} requests are waiting already", Overloaded)
        else:
            self._accept(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End these requests with `abort` at the next step; unknown and ended ids are ignored."""
        sequences = [seq for seq in map(self._sequences.get, request_ids) if seq is not None]
        self._pending += self._end(sequences, "abort")

    def abort_all(self) -> None:
        """End every request with `abort` at the next step."""
        self.abort(list(self._sequences))

    def step(self) -> list[Output]:
        """Plan, launch, collect. Returns the outputs since the last call; blocks while the executor computes."""
        outputs, self._pending = self._pending, []
        now_s = self._clock()
        outputs += self._end(self._deadlines.take_expired(now_s), "deadline")
        if self._scheduler.has_work:
            started = time.monotonic()
            plan = self._runner.next_plan() or self._scheduler.plan(now_s)
            if self._trace is not None:
                self._trace.begin_step(plan, started)
            self._last_step_tokens = plan.num_tokens
            outputs += self._run(plan)
            self._num_steps += 1
            self._last_step_s = time.monotonic() - started
        if self._trace is not None:
            self._trace.end_step(outputs, self.stats())
        return outputs

    def close(self) -> None:
        """Write the end of the trace, if there is one. The engine computes nothing any more."""
        if self._trace is not None:
            self._trace.close()

    def stats(self) -> EngineStats:
        """Gauges now and totals since the start."""
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=self._scheduler.num_waiting,
            num_blocks_used=self._kv_cache.num_used,
            num_blocks=self._kv_cache.num_blocks,
            num_steps=self._num_steps,
            num_preemptions=self._scheduler.num_preemptions,
            num_cache_queries=self._scheduler.num_cache_queries,
            num_cache_hits=self._scheduler.num_cache_hits,
            num_host_cache_hits=self._kv_cache.num_host_hits,
            num_prompt_tokens=self._collector.num_prompt_tokens,
            num_generation_tokens=self._collector.num_generation_tokens,
            drafts=self._collector.drafts,
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

    def attach_lease(self, lease: Any) -> None:
        """Let the executor compute only while it holds a `_C.StepLease`, if it can."""
        attach = getattr(self._executor, "attach_lease", None)
        if attach is not None:
            attach(lease)

    def _check_integrity(self) -> dict[str, Any]:
        try:
            self._kv_cache.check_integrity()
        except RuntimeError as error:
            raise EngineFault(str(error)) from error
        return {"num_blocks_used": self._kv_cache.num_used}

    def _refuse(self, request: Request, reason: str, kind: type[LLMServeError]) -> None:
        self._pending.append(
            Output(request_id=request.request_id, finish_reason="error", error=reason, error_kind=kind.__name__)
        )

    def _accept(self, request: Request) -> None:
        seq = Sequence.of(
            request,
            self._scheduler.fair_share.enter(request.tenant),
            max_model_len=self._limits.max_model_len,
            vocab_size=self.info.vocab_size,
            order=self._num_accepted,
            now_s=self._clock(),
            cache_salt=self._salts.of(request),
        )
        parent = self._sequences.get(request.parent_id) if request.parent_id is not None else None
        if parent is not None and shares_prompt(seq, parent):
            seq.parent = parent
        self._num_accepted += 1
        self._sequences[seq.request_id] = seq
        self._scheduler.add(seq)
        self._deadlines.watch(seq)
        if self._trace is not None:
            self._trace.accept(seq)

    def _run(self, plan: Plan) -> list[Output]:
        started = time.perf_counter()
        outcome = attempt(plan, self._runner.run)
        if isinstance(outcome, Exception):
            return self._recover(plan, outcome)
        seconds = time.perf_counter() - started
        self._scheduler.observe(plan, seconds)
        return self._apply(plan, outcome)

    def _recover(self, plan: Plan, error: Exception) -> list[Output]:
        """A step was lost: nothing in it has advanced. An aborted one is planned again; a failed one is taken apart."""
        if isinstance(error, InterruptedError):
            return []
        _log.error("step failed num_sequences=%d", plan.num_sequences, exc_info=error)
        outputs: list[Output] = []
        for part, outcome in run_apart(plan, error, self._runner.run):
            if isinstance(outcome, StepResult):
                outputs += self._apply(part, outcome)
            elif not isinstance(outcome, InterruptedError):
                message = f"the engine failed on this request: {type(outcome).__name__}: {outcome}"
                outputs += self._end(part.sequences(), "error", error=" ".join(message.split()))
        return outputs

    def _apply(self, plan: Plan, result: StepResult) -> list[Output]:
        outputs, ended, spoiled = self._collector.apply(plan, result, self._clock())
        for seq in spoiled:
            _log.warning("drafts made logits that are not finite request_id=%s", seq.request_id)
            seq.may_draft = False
            self._scheduler.preempt(seq)
        for chunk in plan.chunks:
            self._kv_cache.commit(chunk.seq)
        for seq in ended:
            if seq.is_poisoned:
                _log.error("logits are not finite request_id=%s num_tokens=%d", seq.request_id, seq.num_tokens)
        if ended:
            self._forget(ended)
        return outputs

    def _end(self, sequences: list[Sequence], reason: FinishReason, *, error: str | None = None) -> list[Output]:
        """End living sequences; returns their terminal outputs."""
        living = {seq.request_id: seq for seq in sequences}
        if not living:
            return []
        self._forget(list(living.values()))
        now_s = self._clock()
        return [
            Output(request_id=seq.request_id, finish_reason=reason, error=error, timing=seq.timing(now_s))
            for seq in living.values()
        ]

    def _forget(self, sequences: list[Sequence]) -> None:
        self._scheduler.remove(sequences)
        for seq in sequences:
            seq.ended = True
            seq.parent = None
            del self._sequences[seq.request_id]

"""Which tokens the next step computes.

One rule: there is no prefill and no decode phase, only `num_computed_tokens` catching up with `num_tokens` under the
budgets of a step. Running sequences go first, oldest first, each owed at least one token and one logit row; then
waiting ones by arrival. Out of blocks: the newest running sequence is preempted and later recomputed.

Invariants: a sequence is in exactly one of `running` and `waiting` until `remove`; a plan never exceeds a budget; a
waiting sequence that was never running, or was preempted, holds no block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from llmserve.engine.kv_cache import KVCacheManager
from llmserve.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The budgets of one step. max_num_tokens and max_logit_rows must be at least max_num_seqs."""

    max_num_tokens: int = 512
    max_num_seqs: int = 128
    max_logit_rows: int = 128


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence in a step that is not a plain decode."""

    seq: Sequence
    num_tokens: int
    num_score_rows: int
    """Logit rows that score prompt tokens."""
    samples: bool
    """Whether the last token's row samples the next token."""


@dataclass(slots=True)
class Plan:
    """One step's work. Rows of the step: all decodes in order, then all chunks in order."""

    decodes: list[Sequence] = field(default_factory=list)
    """Sequences with one token to compute and one to sample."""
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_rows(self) -> int:
        return len(self.decodes) + sum(chunk.num_score_rows + chunk.samples for chunk in self.chunks)

    def sequences(self) -> list[Sequence]:
        """All sequences of the step, in row order."""
        return self.decodes + [chunk.seq for chunk in self.chunks]


def cut_chunk(seq: Sequence, max_tokens: int, max_rows: int) -> Chunk:
    """The longest next chunk of a sequence within a token and a logit-row budget; it may be empty."""
    start = seq.num_computed_tokens
    end = min(seq.num_tokens, start + max_tokens)
    first_score = max(start, seq.num_scored)
    if first_score + max_rows < seq.score_end:
        end = min(end, first_score + max_rows)
    num_score_rows = max(0, min(end, seq.score_end) - first_score)
    samples = end == seq.num_tokens and seq.generates
    if samples and num_score_rows >= max_rows:
        end, samples = end - 1, False
    return Chunk(seq, max(0, end - start), num_score_rows, samples)


class Scheduler:
    """Holds the running and the waiting sequences and plans each step."""

    def __init__(self, config: SchedulerConfig, kv_cache: KVCacheManager) -> None:
        if min(config.max_num_tokens, config.max_logit_rows) < config.max_num_seqs:
            raise ValueError("max_num_tokens and max_logit_rows must be at least max_num_seqs")
        self._config = config
        self._kv_cache = kv_cache
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence behind all others."""
        self.waiting.append(seq)

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Forget ended sequences and give back their blocks."""
        ended = {id(seq): seq for seq in sequences}
        self.running = [seq for seq in self.running if id(seq) not in ended]
        if any(id(seq) in ended for seq in self.waiting):
            self.waiting = deque(seq for seq in self.waiting if id(seq) not in ended)
        for seq in ended.values():
            self._kv_cache.release(seq)

    def plan(self) -> Plan:
        """The next step. Blocks for it are reserved; the plan is empty only when there is no work."""
        plan = Plan()
        tokens, rows = self._plan_running(plan)
        admitted = self._plan_waiting(plan, tokens, rows)
        growing = [seq for seq in self.running if seq.num_tokens > seq.num_reserved_tokens]
        num_fitting = self._kv_cache.reserve(growing + admitted) if growing or admitted else 0
        if num_fitting < len(growing):
            self._drop(plan, admitted)
            self._drop(plan, self._make_room(growing[num_fitting:]))
        elif num_fitting < len(growing) + len(admitted):
            self._drop(plan, admitted[num_fitting - len(growing) :])
        for _ in range(max(0, num_fitting - len(growing))):
            self.running.append(self.waiting.popleft())
        return plan

    def _plan_running(self, plan: Plan) -> tuple[int, int]:
        """Plan all running sequences; returns the tokens and the logit rows left of the budgets."""
        tokens, rows = self._config.max_num_tokens, self._config.max_logit_rows
        num_owed = len(self.running)
        decodes = plan.decodes
        for seq in self.running:
            num_owed -= 1
            # One token left, and a generated one: the prompt is computed and scored.
            if seq.num_tokens - seq.num_computed_tokens == 1 and seq.num_tokens > seq.num_prompt_tokens:
                decodes.append(seq)
                tokens -= 1
                rows -= 1
                continue
            chunk = cut_chunk(seq, tokens - num_owed, rows - num_owed)
            plan.chunks.append(chunk)
            tokens -= chunk.num_tokens
            rows -= chunk.num_score_rows + chunk.samples
        return tokens, rows

    def _plan_waiting(self, plan: Plan, tokens: int, rows: int) -> list[Sequence]:
        """Plan waiting sequences into what is left of the budgets; returns those planned."""
        admitted: list[Sequence] = []
        num_places = self._config.max_num_seqs - len(self.running)
        for seq in self.waiting:
            if len(admitted) == num_places or tokens == 0:
                break
            chunk = cut_chunk(seq, tokens, rows)
            if chunk.num_tokens == 0:
                break
            plan.chunks.append(chunk)
            admitted.append(seq)
            tokens -= chunk.num_tokens
            rows -= chunk.num_score_rows + chunk.samples
        return admitted

    def _make_room(self, growing: list[Sequence]) -> list[Sequence]:
        """Preempt running sequences, newest first, until the others of `growing` fit. Returns the preempted ones."""
        preempted: list[Sequence] = []
        while growing:
            victim = self.running.pop()
            self._kv_cache.release(victim)
            self.waiting.appendleft(victim)
            preempted.append(victim)
            if victim is growing[-1]:
                growing.pop()
            del growing[: self._kv_cache.reserve(growing) if growing else 0]
        self.num_preemptions += len(preempted)
        return preempted

    def _drop(self, plan: Plan, sequences: list[Sequence]) -> None:
        """Take sequences that got no blocks out of a plan; a table that was opened for one is closed."""
        dropped = {id(seq) for seq in sequences}
        plan.decodes = [seq for seq in plan.decodes if id(seq) not in dropped]
        plan.chunks = [chunk for chunk in plan.chunks if id(chunk.seq) not in dropped]
        for seq in sequences:
            self._kv_cache.release(seq)

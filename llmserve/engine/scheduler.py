"""Which tokens the next step computes.

One rule: there is no prefill and no decode phase, only `num_computed_tokens` catching up with `num_tokens` under the
budgets of a step. Running sequences go first, each owed at least one token and one logit row; then waiting ones as
`waiting_queue` orders them, as long as the first of them fits. Out of blocks: the least urgent, newest running
sequence is preempted and later recomputed. Beside decodes, prompts get as many tokens as the target for the latency
between tokens allows. What is left of a step without prompts may go to drafts (`speculation`).

Invariants: a sequence is in exactly one of `running`, `waiting` and the fork book until `remove`; a plan never
exceeds a budget; a sequence that is not running holds no block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llmserve.engine.fair_share import FairShare
from llmserve.engine.forks import ForkBook, can_fork
from llmserve.engine.kv_cache import KVCacheManager
from llmserve.engine.plan import Plan, cut_chunk
from llmserve.engine.sequence import Sequence
from llmserve.engine.speculation import Speculation
from llmserve.engine.step_time import StepTimeModel
from llmserve.engine.waiting_queue import WaitingQueue


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The budgets of one step. max_num_tokens and max_logit_rows must be at least max_num_seqs."""

    max_num_tokens: int = 512
    max_num_seqs: int = 128
    max_logit_rows: int = 128
    max_num_waiting: int = 0
    """Sequences that may wait; 0: any number."""
    itl_target_ms: float = 0.0
    """Time a step with decodes should take at most, when prompts are computed beside them; 0: no target."""
    ageing_s: float = 10.0
    """Waiting time that counts as much as one priority; 0: priorities are strict."""
    enable_prefix_cache: bool = True
    max_draft_tokens: int = 0
    """Tokens guessed ahead for one sequence, verified in one step; 0: no speculation."""


class Scheduler:
    """Holds the running and the waiting sequences and plans each step."""

    def __init__(self, config: SchedulerConfig, kv_cache: KVCacheManager) -> None:
        if min(config.max_num_tokens, config.max_logit_rows) < config.max_num_seqs:
            raise ValueError("max_num_tokens and max_logit_rows must be at least max_num_seqs")
        self._config = config
        self._kv_cache = kv_cache
        self._forks = ForkBook()
        self.running: list[Sequence] = []
        self.waiting = WaitingQueue(
            ageing_s=config.ageing_s, num_cached=kv_cache.num_cached if config.enable_prefix_cache else None
        )
        self.fair_share = FairShare()
        self.step_times = StepTimeModel()
        self.speculation = Speculation(config.max_draft_tokens, kv_cache)
        self.num_preemptions = 0
        self.num_cache_queries = 0
        self.num_cache_hits = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.num_waiting)

    @property
    def num_waiting(self) -> int:
        """Sequences that are not running, those that wait for a parent included."""
        return len(self.waiting) + len(self._forks)

    @property
    def is_full(self) -> bool:
        """Whether no more sequences may wait. Free places count: who will run in the next step does not wait.

        A frontend that counts its requests comes to the same, and refuses without the time of a step.
        """
        limit = self._config.max_num_waiting
        return limit > 0 and self.num_waiting + len(self.running) >= self._config.max_num_seqs + limit

    def add(self, seq: Sequence) -> None:
        """Queue a fresh sequence."""
        if not self._forks.add(seq):
            self.waiting.add(seq)

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Forget ended sequences and give back their blocks."""
        ended = {id(seq): seq for seq in sequences}
        self.running = [seq for seq in self.running if id(seq) not in ended]
        for seq in ended.values():
            if not self.waiting.remove(seq):
                self._forks.remove(seq)
            self._kv_cache.release(seq)
            self.fair_share.leave(seq.account)

    def plan(self, now_s: float) -> Plan:
        """The next step. Blocks for it are reserved; the plan is empty only when there is no work."""
        for seq in self._forks.take_ready():
            self.waiting.add(seq)
        was_short = self._grow_running(now_s)
        plan = Plan()
        tokens, rows = self._plan_running(plan)
        if not was_short:
            self._admit_waiting(plan, tokens, rows, now_s)
            left = min(self._config.max_num_tokens, self._config.max_logit_rows) - len(plan.decodes)
            self.speculation.extend(plan, self.step_times, max_rows=left, num_running=len(self.running))
        return plan

    def can_follow(self, plan: Plan, ahead: bool) -> bool:
        """Whether all work is the decodes of a plan, which go on whatever they sample; then each has a slot for it.

        Where drafts may be made every second step is planned, so that they get their turn.
        """
        goes_on = (
            not plan.chunks
            and not plan.verifications
            and not (ahead and self._config.max_draft_tokens)
            and self.num_waiting == 0
            and len(plan.decodes) == len(self.running) > 0
            and all(seq.state is None and seq.num_tokens + 1 < seq.max_num_tokens for seq in plan.decodes)
        )
        return goes_on and all(self._kv_cache.reserve_drafts(seq, 1, num_kept_free=0) for seq in plan.decodes)

    def observe(self, plan: Plan, seconds: float) -> None:
        """Learn from the time of a step that succeeded; before anything in it has advanced."""
        num_decodes = len(plan.decodes) + len(plan.verifications)
        if plan.verifications:
            self.step_times.observe_drafts(num_decodes, plan.num_draft_tokens, seconds)
        else:
            self.step_times.observe(num_decodes, plan.num_chunk_tokens, seconds, context=plan.chunk_context)

    def preempt(self, seq: Sequence) -> None:
        """Take a running sequence's blocks; it queues to be computed again."""
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.running.remove(seq)
        self._kv_cache.release(seq)
        self.waiting.add(seq)

    def _grow_running(self, now_s: float) -> bool:
        """Reserve what running sequences need for this step. Says whether some had to be preempted."""
        growing = [seq for seq in self.running if seq.num_tokens > seq.num_reserved_tokens]
        if not growing:
            return False
        for seq in growing:  # its blocks are full
            self._kv_cache.commit(seq)
        del growing[: self._kv_cache.grow(growing)]
        if not growing:
            return False
        top = min(seq.priority for seq in [*self.running, *self.waiting])
        while growing:
            victim = max(self.running, key=lambda seq: (self.waiting.urgency(seq, top, now_s), seq.order))
            self.preempt(victim)
            if victim in growing:
                growing.remove(victim)
            del growing[: self._kv_cache.grow(growing)]
        return True

    def _plan_running(self, plan: Plan) -> tuple[int, int]:
        """Plan all running sequences; returns the tokens and the logit rows left of the budgets."""
        decodes = plan.decodes
        unfinished: list[Sequence] = []
        for seq in self.running:
            # One token left, and a generated one: the prompt is computed and scored.
            if seq.num_tokens - seq.num_computed_tokens == 1 and seq.num_tokens > seq.num_prompt_tokens:
                decodes.append(seq)
            else:
                unfinished.append(seq)
        num_owed = len(unfinished)
        rows = self._config.max_logit_rows - len(decodes)
        context = max((seq.num_computed_tokens for seq in unfinished), default=0)
        tokens = max(num_owed, self._max_chunk_tokens(len(decodes), context))
        if num_owed > 1:
            unfinished.sort(key=lambda seq: (seq.priority, seq.order))
        for seq in unfinished:
            num_owed -= 1
            chunk = cut_chunk(seq, tokens - num_owed, rows - num_owed)
            plan.chunks.append(chunk)
            tokens -= chunk.num_tokens
            rows -= chunk.num_score_rows + chunk.samples
        return tokens, rows

    def _max_chunk_tokens(self, num_decodes: int, context: int) -> int:
        """Tokens of this step that are not decodes, when so many are before them."""
        left = self._config.max_num_tokens - num_decodes
        if num_decodes == 0 or self._config.itl_target_ms <= 0:
            return left
        fitting = self.step_times.max_chunk_tokens(self._config.itl_target_ms / 1000, num_decodes, context)
        return left if fitting is None else min(left, fitting)

    def _admit_waiting(self, plan: Plan, tokens: int, rows: int, now_s: float) -> None:
        """Plan waiting sequences into what is left of the budgets, while the first of them fits."""
        while tokens > 0 and rows > 0 and len(self.running) < self._config.max_num_seqs:
            seq = self.waiting.first(now_s)
            if seq is None or not self._take_blocks(seq):
                return
            self.waiting.admit(seq, now_s)
            self.running.append(seq)
            if seq.num_cached_tokens < 0:
                self._note_first_admission(seq, now_s)
            if seq.num_computed_tokens:  # cached: less fits after them than after none
                fitting = self._max_chunk_tokens(len(plan.decodes), seq.num_computed_tokens)
                tokens = max(1, min(tokens, fitting - plan.num_chunk_tokens))
            chunk = cut_chunk(seq, tokens, rows)
            plan.chunks.append(chunk)
            tokens -= chunk.num_tokens
            rows -= chunk.num_score_rows + chunk.samples

    def _take_blocks(self, seq: Sequence) -> bool:
        kv_cache = self._kv_cache
        if can_fork(seq):
            assert seq.parent is not None
            return kv_cache.fork(seq, seq.parent)
        if seq.num_preemptions and self.running:
            # Not as long as the others are about to take the blocks away again.
            num_wanted = kv_cache.num_blocks_of(seq.num_tokens) + len(self.running)
            if num_wanted > kv_cache.num_free:
                return False
        return kv_cache.admit(seq)

    def _note_first_admission(self, seq: Sequence, now_s: float) -> None:
        seq.scheduled_s = now_s
        seq.num_cached_tokens = seq.num_computed_tokens
        seq.account.num_tokens += seq.num_tokens - seq.num_computed_tokens
        if self._config.enable_prefix_cache and seq.reads_cache:
            self.num_cache_queries += seq.num_tokens
            self.num_cache_hits += seq.num_computed_tokens

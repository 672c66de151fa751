"""Which decoding sequences verify drafts in a step, and how many.

A draft is worth its row when the tokens it is expected to bring make up for the time it takes: of all drafts that could
be made, the likeliest come first, and as many are taken as give the step the highest rate of tokens, by the measured
times of `step_time`. So a single sequence drafts far into a repeated passage, and a full batch, whose rows cost time
each, drafts nothing but what is nearly certain. Verifying samples the target at each position with its own Philox
counter and keeps what agrees: results are the same bits with and without.

Not drafted for: sequences whose sampling remembers tokens (penalties, bad words, …), as their rows would need each
other's results; steps that compute prompts, whose rows are better spent on those. Invariants: drafts never exceed the
budgets of a step, nor the length at which a sequence ends, and never cost another sequence its blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from llmserve.engine.drafter import Drafter, SuffixDrafter
from llmserve.engine.kv_cache import KVCacheManager
from llmserve.engine.plan import Plan, Verification
from llmserve.engine.sequence import Sequence
from llmserve.engine.step_time import StepTimeModel

MIN_GAIN: Final = 1.05
"""How much higher the expected rate must be: estimates are not exact, and a loss is worse than a small gain missed."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A decode that could be a verification."""

    index: int
    """Among the plan's decodes."""
    seq: Sequence
    drafter: Drafter
    chances: list[float]


class Speculation:
    """Turns decodes of a plan into verifications, where that pays."""

    def __init__(
        self,
        max_draft_tokens: int,
        kv_cache: KVCacheManager,
        *,
        make_drafter: Callable[[Sequence], Drafter] = lambda seq: SuffixDrafter(seq.token_ids),
    ) -> None:
        """`max_draft_tokens` is the most for one sequence in one step; 0: there are none."""
        self._max_draft_tokens = max_draft_tokens
        self._kv_cache = kv_cache
        self._make_drafter = make_drafter

    def extend(self, plan: Plan, times: StepTimeModel, *, max_rows: int, num_running: int) -> None:
        """Draft for the decodes of a plan, into at most `max_rows` more tokens and logit rows."""
        if not self._max_draft_tokens or not plan.decodes:
            return
        candidates = self._candidates(plan.decodes)  # also beside chunks: drafters must see every token
        if plan.chunks or not candidates or max_rows <= 0:
            return
        lengths = _choose_lengths(candidates, times, len(plan.decodes), max_rows)
        verified: set[int] = set()
        for candidate, length in zip(candidates, lengths, strict=True):
            draft_ids = self._draft(candidate, length, num_running) if length else []
            if draft_ids:
                plan.verifications.append(Verification(candidate.seq, draft_ids))
                verified.add(candidate.index)
        if verified:
            plan.decodes = [seq for index, seq in enumerate(plan.decodes) if index not in verified]

    def _candidates(self, decodes: list[Sequence]) -> list[_Candidate]:
        found = []
        for index, seq in enumerate(decodes):
            if not seq.may_draft:
                continue
            drafter = seq.drafter
            if drafter is None:
                drafter = seq.drafter = self._make_drafter(seq)
            drafter.catch_up()
            # The last token it may have comes of the last draft's row.
            chances = drafter.chances(min(self._max_draft_tokens, seq.max_num_tokens - seq.num_tokens - 1))
            if chances:
                found.append(_Candidate(index, seq, drafter, chances))
        return found

    def _draft(self, candidate: _Candidate, length: int, num_running: int) -> list[int]:
        seq = candidate.seq
        draft_ids = candidate.drafter.draft(length)
        for number, token_id in enumerate(draft_ids):
            if token_id in seq.stop_token_ids:  # nothing can follow
                del draft_ids[number + 1 :]
                break
        fitting = self._kv_cache.reserve_drafts(seq, len(draft_ids), num_kept_free=num_running)
        return draft_ids[:fitting]


def _choose_lengths(candidates: list[_Candidate], times: StepTimeModel, num_decodes: int, max_rows: int) -> list[int]:
    """How many drafts each verifies, so that the step yields most tokens a second."""
    offers = sorted(
        ((chance, number) for number, candidate in enumerate(candidates) for chance in candidate.chances), reverse=True
    )
    decode_s = times.decode_s(num_decodes)
    lengths = [0] * len(candidates)
    if decode_s <= 0.0:
        return lengths
    best, num_chosen, tokens = MIN_GAIN * num_decodes / decode_s, 0, float(num_decodes)
    for num_drafts, (chance, _) in enumerate(offers[:max_rows], 1):
        tokens += chance
        rate = tokens / (decode_s + num_drafts * times.draft_token_s(num_decodes + num_drafts))
        if rate > best:
            best, num_chosen = rate, num_drafts
    for _, number in offers[:num_chosen]:
        lengths[number] += 1
    return lengths

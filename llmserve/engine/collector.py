"""From what a step computed to what each sequence and each client gets.

Invariant: a sequence advances here and nowhere else, and only by steps that succeeded.
"""

from __future__ import annotations

from typing import NamedTuple

from llmserve.engine.draft_counts import DraftCounts
from llmserve.engine.plan import Chunk, Plan, Verification
from llmserve.engine.runner import StepResult
from llmserve.engine.sequence import Sequence
from llmserve.ops.protocol import NO_TOKEN, NOT_FINITE
from llmserve.types import DraftStats, FinishReason, Output

_REASONS = {
    NO_TOKEN: "the parameters of the request leave no token that may be sampled",
    NOT_FINITE: "the model produced a value that is not a number, or infinite, for this request",
}


class Collected(NamedTuple):
    """What came of a step."""

    outputs: list[Output]
    ended: list[Sequence]
    """The sequences whose last output is among them."""
    spoiled: list[Sequence]
    """Those that have not advanced: a draft, or what it wrote into their blocks, is not finite."""


class Collector:
    """Advances sequences and counts tokens."""

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self._draft_counts = DraftCounts()

    @property
    def drafts(self) -> DraftStats:
        """What became of drafts so far."""
        return self._draft_counts.stats

    def apply(self, plan: Plan, result: StepResult, now_s: float) -> Collected:
        """Advance every sequence of a plan, as of `now_s`."""
        outputs: list[Output] = []
        ended: list[Sequence] = []
        spoiled: list[Sequence] = []
        row = 0
        for seq in plan.decodes:
            seq.num_computed_tokens += 1
            output = self._take_token(seq, result, row, now_s)
            row += 1
            outputs.append(output)
            if output.finish_reason is not None:
                ended.append(seq)
        for part in plan.verifications:
            verified = self._apply_verification(part, result, row, now_s)
            row += part.num_rows
            if verified is None:
                spoiled.append(part.seq)
                continue
            outputs.append(verified)
            if verified.finish_reason is not None:
                ended.append(part.seq)
        for chunk in plan.chunks:
            chunk_output = self._apply_chunk(chunk, result, row, now_s)
            row += chunk.num_score_rows + chunk.samples
            if chunk_output is not None:
                outputs.append(chunk_output)
                if chunk_output.finish_reason is not None:
                    ended.append(chunk.seq)
        return Collected(outputs, ended, spoiled)

    def _apply_verification(self, part: Verification, result: StepResult, row: int, now_s: float) -> Output | None:
        """Advance a sequence by what was sampled up to the first wrong draft; None when a row is not finite."""
        sampled = result.token_ids[row : row + part.num_rows]
        if NOT_FINITE in sampled:
            return None
        num_accepted = 0
        while num_accepted < len(part.draft_ids) and part.draft_ids[num_accepted] == sampled[num_accepted]:
            num_accepted += 1
        self._draft_counts.note(len(part.draft_ids), num_accepted)
        return self._take_tokens(part.seq, result, row, num_accepted + 1, now_s)

    def _take_tokens(self, seq: Sequence, result: StepResult, row: int, max_tokens: int, now_s: float) -> Output:
        """Append the tokens of consecutive rows, up to one that ends the sequence. None of them is its first."""
        taken: list[int] = []
        finish_reason: FinishReason | None = None
        while finish_reason is None and len(taken) < max_tokens:
            taken.append(result.token_ids[row + len(taken)])
            finish_reason = seq.append(taken[-1])
        seq.num_computed_tokens += len(taken)
        seq.account.num_tokens += len(taken)
        self.num_generation_tokens += len(taken)
        num_top = seq.sampling.num_logprobs
        return Output(
            request_id=seq.request_id,
            token_ids=tuple(taken),
            logprobs=None if num_top is None else tuple(result.logprob(row + i, num_top) for i in range(len(taken))),
            finish_reason=finish_reason,
            stop_token_id=taken[-1] if finish_reason == "stop" else None,
            timing=seq.timing(now_s) if finish_reason else None,
        )

    def _apply_chunk(self, chunk: Chunk, result: StepResult, row: int, now_s: float) -> Output | None:
        """Advance a sequence by a chunk whose first logit row is `row`; None while its prompt is unfinished."""
        seq = chunk.seq
        if NOT_FINITE in result.token_ids[row : row + chunk.num_score_rows]:
            return _failure(seq, NOT_FINITE, now_s)
        if chunk.num_score_rows:
            scores, num_top = seq.prompt_logprobs, seq.sampling.num_prompt_logprobs or 0
            assert scores is not None
            scores += [result.logprob(row + i, num_top) for i in range(chunk.num_score_rows)]
            seq.num_scored += chunk.num_score_rows
        seq.num_computed_tokens += chunk.num_tokens
        if seq.num_computed_tokens == seq.num_prompt_tokens == seq.num_tokens:  # once, also after a preemption
            self.num_prompt_tokens += seq.num_prompt_tokens
        if chunk.samples:
            return self._take_token(seq, result, row + chunk.num_score_rows, now_s)
        if seq.num_computed_tokens < seq.num_tokens:
            return None
        return Output(
            request_id=seq.request_id,
            prompt_logprobs=seq.take_prompt_logprobs(),
            num_cached_tokens=seq.num_cached_tokens,
            finish_reason="length",
            timing=seq.timing(now_s),
        )

    def _take_token(self, seq: Sequence, result: StepResult, row: int, now_s: float) -> Output:
        token_id = result.token_ids[row]
        if token_id < 0:
            return _failure(seq, token_id, now_s)
        finish_reason = seq.append(token_id)
        seq.account.num_tokens += 1
        self.num_generation_tokens += 1
        num_top = seq.sampling.num_logprobs
        is_first = seq.num_tokens == seq.num_prompt_tokens + 1
        if is_first:
            seq.first_token_s = now_s
        elif num_top is None and finish_reason is None:
            return Output(request_id=seq.request_id, token_ids=(token_id,))
        return Output(
            request_id=seq.request_id,
            token_ids=(token_id,),
            logprobs=None if num_top is None else (result.logprob(row, num_top),),
            prompt_logprobs=seq.take_prompt_logprobs(),
            num_cached_tokens=seq.num_cached_tokens if is_first else 0,
            finish_reason=finish_reason,
            stop_token_id=token_id if finish_reason == "stop" else None,
            timing=seq.timing(0.0 if finish_reason is None else now_s) if is_first or finish_reason else None,
        )


def _failure(seq: Sequence, outcome: int, now_s: float) -> Output:
    """The end of a sequence that got no token."""
    seq.is_poisoned = outcome == NOT_FINITE
    return Output(request_id=seq.request_id, finish_reason="error", error=_REASONS[outcome], timing=seq.timing(now_s))

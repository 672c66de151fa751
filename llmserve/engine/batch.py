"""From a plan to the arrays of a step.

Invariant: an array handed out is never written again, so steps may share arrays: while the same sequences decode,
only their tokens and positions are built anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmserve.engine.plan import Chunk, Plan, Verification
from llmserve.engine.sequence import Sequence
from llmserve.ops.protocol import SamplingState, StepInput

_SAMPLING = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("seed", np.uint64),
        ("num_logprobs", np.int32),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class _DecodeRows:
    """The arrays of decoding sequences that stay the same from step to step."""

    sequences: list[Sequence]
    block_tables: NDArray[np.int64]
    query_start: NDArray[np.int32]
    logit_rows: NDArray[np.int32]
    targets: NDArray[np.int32]
    temperature: NDArray[np.float32]
    top_k: NDArray[np.int32]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    seed: NDArray[np.uint64]
    num_logprobs: NDArray[np.int32]
    states: list[SamplingState | None]
    """Empty when no sequence has one."""

    @classmethod
    def of(cls, sequences: list[Sequence]) -> _DecodeRows:
        num_seqs = len(sequences)
        query_start = np.arange(num_seqs + 1, dtype=np.int32)
        rows = np.array([seq.sampling_row for seq in sequences], dtype=_SAMPLING)
        states = [seq.state for seq in sequences]
        return cls(
            sequences=list(sequences),
            block_tables=np.array([seq.block_table for seq in sequences], dtype=np.int64),
            query_start=query_start,
            logit_rows=query_start[:-1],
            targets=np.full(num_seqs, -1, dtype=np.int32),
            states=states if any(states) else [],
            **{name: np.ascontiguousarray(rows[name]) for name in _SAMPLING.names or ()},
        )


class BatchBuilder:
    """Builds `StepInput`s; remembers the decoding sequences of the step before."""

    def __init__(self) -> None:
        self._rows = _DecodeRows.of([])

    def build(self, plan: Plan) -> StepInput:
        """The arrays of one step: decodes first, then verifications, then chunks."""
        # Also where none decodes: a sequence may come back with another block table before the next step that has one.
        decodes = self._build_decodes(plan.decodes)
        parts = [decodes] if plan.decodes else []
        parts += [_build_verification(part) for part in plan.verifications]
        if len(parts) == 1 and not plan.chunks:
            return parts[0]
        return _concatenate([*parts, *(_build_chunk(chunk) for chunk in plan.chunks)])

    def build_following(self, sequences: list[Sequence], previous_rows: list[int]) -> StepInput:
        """The step behind one that is not collected: each sequence's token is the sampled one of a row of that."""
        step = self._build_decodes(sequences)
        step.previous_rows = np.array(previous_rows, dtype=np.int32)
        step.token_ids = np.zeros_like(step.token_ids)
        step.positions = step.positions + np.int32(1)
        step.seq_lens = step.seq_lens + np.int32(1)
        step.sample_position = step.sample_position + 1
        return step

    def _build_decodes(self, sequences: list[Sequence]) -> StepInput:
        rows = self._rows
        if rows.sequences != sequences:
            rows = self._rows = _DecodeRows.of(sequences)
        seq_lens = np.array([seq.num_tokens for seq in sequences], dtype=np.int32)
        return StepInput(
            token_ids=np.array([seq.token_ids[-1] for seq in sequences], dtype=np.int32),
            positions=seq_lens - np.int32(1),
            query_start=rows.query_start,
            seq_lens=seq_lens,
            block_tables=rows.block_tables,
            logit_rows=rows.logit_rows,
            targets=rows.targets,
            temperature=rows.temperature,
            top_k=rows.top_k,
            top_p=rows.top_p,
            min_p=rows.min_p,
            seed=rows.seed,
            sample_position=seq_lens.astype(np.int64),
            num_logprobs=rows.num_logprobs,
            states=rows.states,
        )


def _build_verification(part: Verification) -> StepInput:
    """The arrays of one sequence with its drafts, as if it were alone in the step."""
    seq, num_rows = part.seq, part.num_rows
    start, end = seq.num_tokens - 1, seq.num_tokens - 1 + num_rows
    rows = np.array([seq.sampling_row] * num_rows, dtype=_SAMPLING)
    positions = np.arange(start, end, dtype=np.int32)
    return StepInput(
        token_ids=np.array([seq.token_ids[-1], *part.draft_ids], dtype=np.int32),
        positions=positions,
        query_start=np.array([0, num_rows], dtype=np.int32),
        seq_lens=np.array([end], dtype=np.int32),
        block_tables=np.array([seq.block_table], dtype=np.int64),
        logit_rows=np.arange(num_rows, dtype=np.int32),
        targets=np.full(num_rows, -1, dtype=np.int32),
        sample_position=positions.astype(np.int64) + 1,
        temperature=np.ascontiguousarray(rows["temperature"]),
        top_k=np.ascontiguousarray(rows["top_k"]),
        top_p=np.ascontiguousarray(rows["top_p"]),
        min_p=np.ascontiguousarray(rows["min_p"]),
        seed=np.ascontiguousarray(rows["seed"]),
        num_logprobs=np.ascontiguousarray(rows["num_logprobs"]),
    )


def _build_chunk(chunk: Chunk) -> StepInput:
    """The arrays of one sequence, as if it were alone in the step."""
    seq, start = chunk.seq, chunk.seq.num_computed_tokens
    end = start + chunk.num_tokens
    first_score = max(start, seq.num_scored)
    scored = np.arange(first_score, first_score + chunk.num_score_rows, dtype=np.int32)
    targets = seq.token_ids[first_score + 1 : first_score + 1 + chunk.num_score_rows].tolist()
    logit_positions = np.append(scored, np.int32(end - 1)) if chunk.samples else scored
    rows = np.array([seq.sampling_row] * len(logit_positions), dtype=_SAMPLING)
    rows["num_logprobs"][: len(scored)] = seq.sampling.num_prompt_logprobs or 0
    return StepInput(
        token_ids=np.array(seq.token_ids[start:end], dtype=np.int32),
        positions=np.arange(start, end, dtype=np.int32),
        query_start=np.array([0, chunk.num_tokens], dtype=np.int32),
        seq_lens=np.array([end], dtype=np.int32),
        block_tables=np.array([seq.block_table], dtype=np.int64),
        logit_rows=logit_positions - np.int32(start),
        targets=np.array(targets + [-1] * chunk.samples, dtype=np.int32),
        temperature=rows["temperature"],
        top_k=rows["top_k"],
        top_p=rows["top_p"],
        min_p=rows["min_p"],
        seed=rows["seed"],
        sample_position=logit_positions.astype(np.int64) + 1,
        num_logprobs=rows["num_logprobs"],
        states=[] if seq.state is None else [None] * len(scored) + [seq.state] * chunk.samples,
    )


def _concatenate(parts: list[StepInput]) -> StepInput:
    """One step of several, in order; row indices are shifted to the joint token axis."""
    num_tokens = np.array([len(part.token_ids) for part in parts], dtype=np.int32)
    offsets = np.cumsum(num_tokens, dtype=np.int32) - num_tokens
    starts = [part.query_start[:-1] + offset for part, offset in zip(parts, offsets, strict=True)]
    rows = [part.logit_rows + offset for part, offset in zip(parts, offsets, strict=True)]
    return StepInput(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        positions=np.concatenate([part.positions for part in parts]),
        query_start=np.concatenate([*starts, num_tokens.sum(dtype=np.int32, keepdims=True)]),
        seq_lens=np.concatenate([part.seq_lens for part in parts]),
        block_tables=np.concatenate([part.block_tables for part in parts]),
        logit_rows=np.concatenate(rows),
        targets=np.concatenate([part.targets for part in parts]),
        temperature=np.concatenate([part.temperature for part in parts]),
        top_k=np.concatenate([part.top_k for part in parts]),
        top_p=np.concatenate([part.top_p for part in parts]),
        min_p=np.concatenate([part.min_p for part in parts]),
        seed=np.concatenate([part.seed for part in parts]),
        sample_position=np.concatenate([part.sample_position for part in parts]),
        num_logprobs=np.concatenate([part.num_logprobs for part in parts]),
        states=_join_states(parts),
    )


def _join_states(parts: list[StepInput]) -> list[SamplingState | None]:
    """One entry per row of all parts, or none where no part has a state."""
    if not any(part.states for part in parts):
        return []
    return [state for part in parts for state in part.states or [None] * len(part.logit_rows)]

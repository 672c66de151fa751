"""What requests ask for before sampling, as arrays that `edit_logits` takes.

Owns the reading of sampling states for the device: the order of steps is that of `reference_sampler.edit`. Everything
that forbids single tokens becomes entries, everything that allows a set becomes a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmserve.ops.cuda.upload import send_once
from llmserve.ops.protocol import SamplingState, StepInput

SEEN: Final = 1
FORBIDDEN: Final = 2
"""Flags of an entry: csrc/cuda/edit_logits.h."""

Int32s = NDArray[np.int32]
Float32s = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Edits:
    """E edited rows, N entries: `csrc/cuda/edit_logits.h` has a drawing."""

    edited_rows: Int32s  # [R] which edited row a row of logits is sampled from; -1: the raw one
    rows: Int32s  # [E] of logits
    entry_start: Int32s  # [E + 1]
    tokens: Int32s  # [N]
    flags: Int32s  # [N]
    counts: Int32s  # [N]
    bias_start: Int32s  # [N + 1]
    biases: Float32s
    repetition: Float32s  # [E]
    frequency: Float32s  # [E]
    presence: Float32s  # [E]
    mask_rows: Int32s  # [E]
    masks: NDArray[np.uint32]  # [num_masks, ceil(vocab / 32)]


@dataclass(frozen=True, slots=True)
class DeviceEdits:
    """The same on a device. masks is int32 there: torch has no arithmetic on uint32."""

    edited_rows: Tensor
    rows: Tensor
    entry_start: Tensor
    tokens: Tensor
    flags: Tensor
    counts: Tensor
    bias_start: Tensor
    biases: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    mask_rows: Tensor
    masks: Tensor


@dataclass(frozen=True, slots=True)
class _Entries:
    """Of one row, by token ascending."""

    tokens: Ids
    flags: Ids
    counts: Ids
    num_biases: Ids  # of each token
    biases: Float32s


def build_edits(step: StepInput, vocab: int) -> Edits | None:
    """The edits of all rows that are sampled and not scored; None when there are none.

    Rewinds the states of those rows to where they are sampled. Raises `ValueError` for states or masks that do not fit.
    """
    if not step.states and not len(step.mask_rows):
        return None
    masks = _Masks(step.masks, vocab)
    edited_rows = np.full(len(step.logit_rows), -1, np.int32)
    rows: list[int] = []
    entries: list[_Entries] = []
    states: list[SamplingState | None] = []
    mask_rows: list[int] = []
    for row in np.flatnonzero(step.targets < 0).tolist():
        state = step.states[row] if step.states else None
        if state is not None:
            state.rewind(int(step.sample_position[row]))
        own = _NOTHING if state is None else _entries(state)
        mask = masks.row(int(step.mask_rows[row]) if len(step.mask_rows) else -1, state)
        if len(own.tokens) == 0 and mask < 0:
            continue
        edited_rows[row] = len(rows)
        rows.append(row)
        entries.append(own)
        states.append(state)
        mask_rows.append(mask)
    if not rows:
        return None
    return Edits(
        edited_rows=edited_rows,
        rows=np.array(rows, np.int32),
        entry_start=_starts([len(own.tokens) for own in entries]),
        tokens=_join([own.tokens for own in entries]),
        flags=_join([own.flags for own in entries]),
        counts=_join([own.counts for own in entries]),
        bias_start=_starts(np.concatenate([own.num_biases for own in entries])),
        biases=np.concatenate([own.biases for own in entries]),
        repetition=np.array([1.0 if state is None else state.repetition_penalty for state in states], np.float32),
        frequency=np.array([0.0 if state is None else state.frequency_penalty for state in states], np.float32),
        presence=np.array([0.0 if state is None else state.presence_penalty for state in states], np.float32),
        mask_rows=np.array(mask_rows, np.int32),
        masks=masks.stacked(),
    )


def typical_ps(step: StepInput) -> Float32s | None:
    """`typical_p` of every row, [R]; None when it is 1 in all."""
    values = [
        1.0 if state is None or target >= 0 else state.typical_p
        for state, target in zip(step.states, step.targets.tolist(), strict=bool(step.states))
    ]
    return np.array(values, np.float32) if any(value < 1.0 for value in values) else None


def to_device(edits: Edits, device: torch.device) -> DeviceEdits:
    """Copies of the arrays."""
    names = list(Edits.__dataclass_fields__)
    tensors = send_once([getattr(edits, name) for name in names], device)
    return DeviceEdits(**dict(zip(names, tensors, strict=True)))


def _starts(sizes: Any) -> Int32s:
    return np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))]).astype(np.int32)


def _join(parts: list[Ids]) -> Int32s:
    return np.concatenate(parts).astype(np.int32)


def _entries(state: SamplingState) -> _Entries:
    """Everything the state asks for but `allowed_token_ids` and `typical_p`."""
    penalizes = (state.repetition_penalty, state.frequency_penalty, state.presence_penalty) != (1.0, 0.0, 0.0)
    words, bias = state.bad_words, state.logit_bias
    if not (penalizes or words or bias or state.min_tokens):
        return _NOTHING
    ids = np.asarray(state.token_ids, np.int64)
    generated = ids[state.num_prompt_tokens :]
    forbidden = np.array(_forbidden(state, generated.tolist()), np.int64)
    bias_ids = np.array([token for token, _ in bias], np.int64)
    tokens = np.unique(np.concatenate([bias_ids, forbidden, ids if penalizes else ids[:0]]))
    if len(tokens) == 0:
        return _NOTHING
    flags = np.zeros(len(tokens), np.int64)
    counts = np.zeros(len(tokens), np.int64)
    if penalizes:
        flags[np.searchsorted(tokens, np.unique(ids))] |= SEEN
        counted, times = np.unique(generated, return_counts=True)
        counts[np.searchsorted(tokens, counted)] = times
    flags[np.searchsorted(tokens, forbidden)] |= FORBIDDEN
    order = np.argsort(bias_ids, kind="stable")  # the biases of one token keep their order
    return _Entries(
        tokens=tokens,
        flags=flags,
        counts=counts,
        num_biases=np.bincount(np.searchsorted(tokens, bias_ids), minlength=len(tokens)),
        biases=np.array([value for _, value in bias], np.float32)[order],
    )


def _forbidden(state: SamplingState, generated: list[int]) -> list[int]:
    """Ends of bad words whose other tokens are the last generated ones, and stop tokens that come too early."""
    last = [last for *before, last in state.bad_words if not before or generated[-len(before) :] == before]
    return last + (list(state.stop_token_ids) if len(generated) < state.min_tokens else [])


class _Masks:
    """The masks that rows use, each once, and those of allowed tokens."""

    def __init__(self, given: NDArray[np.uint32], vocab: int) -> None:
        self._given = given
        self._num_words = -(-vocab // 32)
        self._indices: dict[int, int] = {}
        self._rows: list[NDArray[np.uint32]] = []

    def row(self, given: int, state: SamplingState | None) -> int:
        """The row of `stacked` that allows what row `given` of the step's masks and the state do; -1: all."""
        allowed = None if state is None else state.allowed_token_ids
        if given >= 0 and self._given.shape[1] != self._num_words:
            raise ValueError(f"masks: {self._given.shape[1]} words a row, not {self._num_words}")
        if allowed is None:
            if given >= 0 and given not in self._indices:
                self._indices[given] = self._add(self._given[given])
            return self._indices[given] if given >= 0 else -1
        bits = np.zeros(self._num_words * 32, np.uint8)
        bits[list(allowed)] = 1
        mask = np.packbits(bits, bitorder="little").view(np.uint32)
        return self._add(mask if given < 0 else mask & self._given[given])

    def _add(self, mask: NDArray[np.uint32]) -> int:
        self._rows.append(mask)
        return len(self._rows) - 1

    def stacked(self) -> NDArray[np.uint32]:
        return np.stack(self._rows) if self._rows else np.empty((0, self._num_words), np.uint32)


_NO_IDS: Final = np.empty(0, np.int64)
_NOTHING: Final = _Entries(_NO_IDS, _NO_IDS, _NO_IDS, _NO_IDS, np.empty(0, np.float32))

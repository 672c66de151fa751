"""Sampling (`csrc/cuda/sample.cu`)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from llmserve.ops.cuda.library import CudaLibrary, check, check_dense, check_device, pointer

MOST_VOCAB: Final = 1 << 20
MOST_ROWS: Final = 65535
_CHUNK: Final = 4096
_BINS: Final = 2048
_FACTS_BYTES: Final = 24
_SEGMENTS: Final = 16
"""Of a chunk."""


@dataclass(frozen=True, slots=True)
class SampleRows:
    """What each row of logits is sampled with, as in `StepInput`: [R], dense, on the device."""

    targets: Tensor  # int32
    temperature: Tensor  # float32
    top_k: Tensor  # int32
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    seed: Tensor  # int64: the bits of uint64
    sample_position: Tensor  # int64
    typical_p: Tensor | None = None
    """float32; None: 1 everywhere."""


class Sample(Protocol):
    """The launcher."""

    def __call__(
        self,
        logits: Tensor,
        rows: SampleRows,
        token_ids: Tensor,
        workspace: Tensor,
        *,
        edited: Tensor | None = None,
        edited_rows: Tensor | None = None,
    ) -> None:
        """One token of each row, by `reference_sampler`: the token, the target, NO_TOKEN or NOT_FINITE.

        logits is float32 [R, vocab] with dense rows, token_ids int32 [R]. Row r is sampled from
        `edited[edited_rows[r]]` (float32 [E, vocab], int32 [R]) where that index is not -1, as `EditLogits` writes it;
        whether it is void is seen in the raw logits too. The workspace is uint8, `workspace_bytes` long.

        A token differs from the reference's only where the draw or a threshold lies within about 1e-11 of a boundary
        between tokens, relative to the sum of weights; it depends on nothing else in the batch.
        """


class _Args(ctypes.Structure):
    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("edited", ctypes.c_void_p),
        ("edited_rows", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("temperature", ctypes.c_void_p),
        ("top_k", ctypes.c_void_p),
        ("top_p", ctypes.c_void_p),
        ("min_p", ctypes.c_void_p),
        ("typical_p", ctypes.c_void_p),
        ("seed", ctypes.c_void_p),
        ("sample_position", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("logits_stride", ctypes.c_int64),
        ("edited_stride", ctypes.c_int64),
    )


def launcher(library: CudaLibrary) -> Sample:
    """The compiled kernels."""

    def sample(
        logits: Tensor,
        rows: SampleRows,
        token_ids: Tensor,
        workspace: Tensor,
        *,
        edited: Tensor | None = None,
        edited_rows: Tensor | None = None,
    ) -> None:
        check_arguments(logits, rows, token_ids, workspace, edited, edited_rows)
        arguments = _Args(
            logits=pointer(logits),
            edited=pointer(edited),
            edited_rows=pointer(edited_rows),
            targets=pointer(rows.targets),
            temperature=pointer(rows.temperature),
            top_k=pointer(rows.top_k),
            top_p=pointer(rows.top_p),
            min_p=pointer(rows.min_p),
            typical_p=pointer(rows.typical_p),
            seed=pointer(rows.seed),
            sample_position=pointer(rows.sample_position),
            token_ids=pointer(token_ids),
            workspace=pointer(workspace),
            rows=logits.shape[0],
            vocab=logits.shape[1],
            logits_stride=logits.stride(0),
            edited_stride=0 if edited is None else edited.stride(0),
        )
        library.call("sample", arguments)

    return sample


def workspace_bytes(num_rows: int, vocab: int) -> int:
    """What `Sample` works in: facts and sums of each chunk, a histogram of each row (csrc/cuda/sample.cu)."""
    chunks = -(-vocab // _CHUNK)
    return num_rows * (chunks * (_FACTS_BYTES + 8 + 4 * _SEGMENTS) + _BINS * 12)


def check_arguments(
    logits: Tensor,
    rows: SampleRows,
    token_ids: Tensor,
    workspace: Tensor,
    edited: Tensor | None,
    edited_rows: Tensor | None,
) -> None:
    """Raises `ValueError` naming the argument that the kernels could not take."""
    num_rows, vocab = logits.shape
    check("logits", logits, dtypes=(torch.float32,), shape=(num_rows, vocab))
    if not 0 < vocab <= MOST_VOCAB or num_rows > MOST_ROWS:
        raise ValueError(f"logits: {num_rows} rows of {vocab}; {MOST_ROWS} of {MOST_VOCAB} at most")
    fields = {name: getattr(rows, name) for name in SampleRows.__dataclass_fields__}
    for name, tensor in fields.items():
        if tensor is not None:
            check_dense(name, tensor, dtypes=(_DTYPES[name],), shape=(num_rows,))
    check_dense("token_ids", token_ids, dtypes=(torch.int32,), shape=(num_rows,))
    check_dense("workspace", workspace, dtypes=(torch.uint8,), shape=workspace.shape[:1])
    if workspace.numel() < workspace_bytes(num_rows, vocab) or workspace.data_ptr() % 16 != 0:
        raise ValueError("workspace: too small, or not aligned to 16 bytes")
    check_edited(logits, edited, edited_rows)
    check_device(logits=logits, token_ids=token_ids, workspace=workspace, **fields)


def check_edited(logits: Tensor, edited: Tensor | None, edited_rows: Tensor | None) -> None:
    """Rows of edited logits and which row of logits has which. Raises `ValueError`."""
    if (edited is None) != (edited_rows is None):
        raise ValueError("edited: it and edited_rows come together")
    if edited is not None and edited_rows is not None:
        check("edited", edited, dtypes=(torch.float32,), shape=(edited.shape[0], logits.shape[1]))
        check_dense("edited_rows", edited_rows, dtypes=(torch.int32,), shape=(logits.shape[0],))
        check_device(logits=logits, edited=edited, edited_rows=edited_rows)


_DTYPES: Final = {
    "targets": torch.int32,
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seed": torch.int64,
    "sample_position": torch.int64,
    "typical_p": torch.float32,
}

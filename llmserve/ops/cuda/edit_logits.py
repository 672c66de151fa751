"""Edits of logits before sampling (`csrc/cuda/edit_logits.cu`)."""

from __future__ import annotations

import ctypes
from typing import Final, Protocol

import torch
from torch import Tensor

from llmserve.ops.cuda.edits import DeviceEdits
from llmserve.ops.cuda.library import CudaLibrary, check, check_dense, check_device, pointer


class EditLogits(Protocol):
    """The launcher."""

    def __call__(self, logits: Tensor, edits: DeviceEdits, edited: Tensor) -> None:
        """`edited[e]` = row `edits.rows[e]` of logits with its edits, bit for bit as `reference_sampler.edit`.

        logits is float32 [R, vocab] and edited float32 [E, vocab], both with dense rows. A row of -1 in `edits.rows`
        is left as it is. Tokens, rows and starts are not checked on a GPU: `edits.build_edits` makes right ones.
        """


_POINTERS: Final = (
    "rows",
    "entry_start",
    "tokens",
    "flags",
    "counts",
    "bias_start",
    "biases",
    "repetition",
    "frequency",
    "presence",
    "mask_rows",
    "masks",
)
_FLOATS: Final = ("biases", "repetition", "frequency", "presence")


class _Args(ctypes.Structure):
    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("edited", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("edited_rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("logits_stride", ctypes.c_int64),
        ("edited_stride", ctypes.c_int64),
    )


def launcher(library: CudaLibrary) -> EditLogits:
    """The compiled kernel."""

    def edit_logits(logits: Tensor, edits: DeviceEdits, edited: Tensor) -> None:
        check_arguments(logits, edits, edited)
        arguments = _Args(
            logits=pointer(logits),
            edited=pointer(edited),
            **{name: pointer(getattr(edits, name)) for name in _POINTERS},
            edited_rows=edited.shape[0],
            vocab=logits.shape[1],
            logits_stride=logits.stride(0),
            edited_stride=edited.stride(0),
        )
        library.call("edit_logits", arguments)

    return edit_logits


def check_arguments(logits: Tensor, edits: DeviceEdits, edited: Tensor) -> None:
    """Raises `ValueError` naming the argument that the kernel could not take."""
    num_rows, vocab = logits.shape
    num_edited, num_entries = edits.rows.shape[0], edits.tokens.shape[0]
    check("logits", logits, dtypes=(torch.float32,), shape=(num_rows, vocab))
    check("edited", edited, dtypes=(torch.float32,), shape=(num_edited, vocab))
    shapes: dict[str, tuple[int, ...]] = {
        "rows": (num_edited,),
        "entry_start": (num_edited + 1,),
        "tokens": (num_entries,),
        "flags": (num_entries,),
        "counts": (num_entries,),
        "bias_start": (num_entries + 1,),
        "biases": tuple(edits.biases.shape[:1]),
        "repetition": (num_edited,),
        "frequency": (num_edited,),
        "presence": (num_edited,),
        "mask_rows": (num_edited,),
        "masks": (edits.masks.shape[0], -(-vocab // 32)),
    }
    for name, shape in shapes.items():
        dtype = torch.float32 if name in _FLOATS else torch.int32
        check_dense(name, getattr(edits, name), dtypes=(dtype,), shape=shape)
    check_device(logits=logits, edited=edited, **{name: getattr(edits, name) for name in shapes})

"""Log-probabilities of tokens (`csrc/cuda/token_logprobs.cu`)."""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch
from torch import Tensor

from llmserve.ops.cuda.library import CudaLibrary, check, check_dense, check_device, pointer
from llmserve.ops.cuda.sample import MOST_VOCAB


class TokenLogprobs(Protocol):
    """The launcher."""

    def __call__(
        self,
        logits: Tensor,
        token_ids: Tensor,
        num_logprobs: Tensor,
        logprobs: Tensor,
        ranks: Tensor,
        top_ids: Tensor,
        top_logprobs: Tensor,
    ) -> None:
        """What `StepOutput` says of tokens that were sampled or scored, from the raw logits.

        logits is float32 [R, vocab] with dense rows; token_ids and num_logprobs are int32 [R]; logprobs float32 and
        ranks int32 [R]; top_ids int32 and top_logprobs float32 [R, K], dense. A row whose token is below 0, or that
        asks for -1, gets NaN and rank 0; top rows are padded with -1 and NaN. Log-probabilities are right to about
        3e-7 and a rounding.
        """


class _Args(ctypes.Structure):
    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("num_logprobs", ctypes.c_void_p),
        ("logprobs", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("top_ids", ctypes.c_void_p),
        ("top_logprobs", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("logits_stride", ctypes.c_int64),
        ("most", ctypes.c_int64),
    )


def launcher(library: CudaLibrary) -> TokenLogprobs:
    """The compiled kernel."""

    def token_logprobs(
        logits: Tensor,
        token_ids: Tensor,
        num_logprobs: Tensor,
        logprobs: Tensor,
        ranks: Tensor,
        top_ids: Tensor,
        top_logprobs: Tensor,
    ) -> None:
        check_arguments(logits, token_ids, num_logprobs, logprobs, ranks, top_ids, top_logprobs)
        arguments = _Args(
            logits=pointer(logits),
            token_ids=pointer(token_ids),
            num_logprobs=pointer(num_logprobs),
            logprobs=pointer(logprobs),
            ranks=pointer(ranks),
            top_ids=pointer(top_ids),
            top_logprobs=pointer(top_logprobs),
            rows=logits.shape[0],
            vocab=logits.shape[1],
            logits_stride=logits.stride(0),
            most=top_ids.shape[1],
        )
        library.call("token_logprobs", arguments)

    return token_logprobs


def check_arguments(
    logits: Tensor,
    token_ids: Tensor,
    num_logprobs: Tensor,
    logprobs: Tensor,
    ranks: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
) -> None:
    """Raises `ValueError` naming the argument that the kernel could not take."""
    num_rows, vocab = logits.shape
    check("logits", logits, dtypes=(torch.float32,), shape=(num_rows, vocab))
    if not 0 < vocab <= MOST_VOCAB:
        raise ValueError(f"logits: a vocabulary of {vocab}; {MOST_VOCAB} at most")
    for name, tensor in (("token_ids", token_ids), ("num_logprobs", num_logprobs), ("ranks", ranks)):
        check_dense(name, tensor, dtypes=(torch.int32,), shape=(num_rows,))
    check_dense("logprobs", logprobs, dtypes=(torch.float32,), shape=(num_rows,))
    check_dense("top_ids", top_ids, dtypes=(torch.int32,), shape=(num_rows, top_ids.shape[-1]))
    check_dense("top_logprobs", top_logprobs, dtypes=(torch.float32,), shape=tuple(top_ids.shape))
    check_device(
        logits=logits,
        token_ids=token_ids,
        num_logprobs=num_logprobs,
        logprobs=logprobs,
        ranks=ranks,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
    )

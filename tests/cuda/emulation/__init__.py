"""Launchers that need no GPU: in torch, with reference arithmetic; and the kernels' own sources on the CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Final

import torch

from llmserve.ops.cuda.launchers import Launchers, of_library
from llmserve.ops.cuda.library import CudaLibrary
from tests.cuda.emulation.act import act
from tests.cuda.emulation.copy_blocks import copy_blocks
from tests.cuda.emulation.decode_attention import decode_attention
from tests.cuda.emulation.dequantize import dequantize
from tests.cuda.emulation.edit_logits import edit_logits
from tests.cuda.emulation.embed import embed
from tests.cuda.emulation.fixed_linear import fixed_linear
from tests.cuda.emulation.gather_columns import gather_columns
from tests.cuda.emulation.int8_linear import int8_linear
from tests.cuda.emulation.kv_append import kv_append
from tests.cuda.emulation.layer_norm import layer_norm
from tests.cuda.emulation.prefill_attention import prefill_attention
from tests.cuda.emulation.quantize_rows import quantize_rows
from tests.cuda.emulation.quantized_linear import quantized_linear
from tests.cuda.emulation.rms_norm import rms_norm
from tests.cuda.emulation.sample import sample
from tests.cuda.emulation.token_logprobs import token_logprobs

EMULATOR: Final = Path(__file__).resolve().parents[3] / "build" / "cuda-emulator" / "libllmserve_cuda_emulator.so"


class EmulatedLibrary(CudaLibrary):
    """The kernels compiled for the host, on tensors of the CPU (`csrc/cuda/emulator`)."""

    def __init__(self) -> None:
        super().__init__(EMULATOR, torch.device("cpu"))

    def stream(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(None)


def emulated_launchers() -> Launchers:
    """The kernels themselves, slowly."""
    return of_library(EmulatedLibrary())


def torch_launchers() -> Launchers:
    """The same signatures and arithmetic in torch, on the CPU: whole networks run."""
    return Launchers(
        device=torch.device("cpu"),
        rms_norm=rms_norm,
        layer_norm=layer_norm,
        act=act,
        embed=embed,
        kv_append=kv_append,
        decode_attention=decode_attention,
        prefill_attention=prefill_attention,
        quantized_linear=quantized_linear,
        int8_linear=int8_linear,
        fixed_linear=fixed_linear,
        quantize_rows=quantize_rows,
        dequantize=dequantize,
        gather_columns=gather_columns,
        copy_blocks=copy_blocks,
        edit_logits=edit_logits,
        sample=sample,
        token_logprobs=token_logprobs,
    )

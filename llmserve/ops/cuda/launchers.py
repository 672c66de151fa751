"""All launchers that the executor calls, of the compiled library; tests have others of the same signatures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmserve.ops.cuda import decode_attention, kv_append, rms_norm
from llmserve.ops.cuda import quantized_linear, rms_norm
from llmserve.ops.cuda import act, layer_norm, rms_norm
from llmserve.ops.cuda import act, copy_blocks, embed, layer_norm, rms_norm
from llmserve.ops.cuda import act, copy_blocks, embed, layer_norm, rms_norm, sample
from llmserve.ops.cuda.library import CudaLibrary


@dataclass(frozen=True, slots=True)
class Launchers:
    """One per op; each says in its own file what it takes."""

    device: torch.device
    quantized_linear: quantized_linear.QuantizedLinear
    rms_norm: rms_norm.RmsNorm
    kv_append: kv_append.KvAppend
    decode_attention: decode_attention.DecodeAttention
    layer_norm: layer_norm.LayerNorm
    act: act.Act
    embed: embed.Embed
    copy_blocks: copy_blocks.CopyBlocks
    sample: sample.Sample


def of_library(library: CudaLibrary) -> Launchers:
    """The compiled kernels."""
    return Launchers(
        device=library.device,
        rms_norm=rms_norm.launcher(library),
        kv_append=kv_append.launcher(library),
        decode_attention=decode_attention.launcher(library),
        quantized_linear=quantized_linear.launcher(library),
        rms_norm=rms_norm.launcher(library),
        layer_norm=layer_norm.launcher(library),
        act=act.launcher(library),
        embed=embed.launcher(library),
        copy_blocks=copy_blocks.launcher(library),
        sample=sample.launcher(library),
    )

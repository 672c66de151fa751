"""All launchers that the executor calls, of the compiled library; tests have others of the same signatures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmserve.ops.cuda import (
    act,
    copy_blocks,
    decode_attention,
    dequantize,
    edit_logits,
    embed,
    fixed_linear,
    gather_columns,
    int8_linear,
    kv_append,
    layer_norm,
    prefill_attention,
    quantize_rows,
    quantized_linear,
    rms_norm,
    sample,
    token_logprobs,
)
from llmserve.ops.cuda.library import CudaLibrary


@dataclass(frozen=True, slots=True)
class Launchers:
    """One per op; each says in its own file what it takes."""

    device: torch.device
    rms_norm: rms_norm.RmsNorm
    layer_norm: layer_norm.LayerNorm
    act: act.Act
    embed: embed.Embed
    kv_append: kv_append.KvAppend
    decode_attention: decode_attention.DecodeAttention
    prefill_attention: prefill_attention.PrefillAttention
    quantized_linear: quantized_linear.QuantizedLinear
    int8_linear: int8_linear.Int8Linear
    fixed_linear: fixed_linear.FixedLinear
    quantize_rows: quantize_rows.QuantizeRows
    dequantize: dequantize.Dequantize
    gather_columns: gather_columns.GatherColumns
    copy_blocks: copy_blocks.CopyBlocks
    edit_logits: edit_logits.EditLogits
    sample: sample.Sample
    token_logprobs: token_logprobs.TokenLogprobs


def of_library(library: CudaLibrary) -> Launchers:
    """The compiled kernels."""
    return Launchers(
        device=library.device,
        rms_norm=rms_norm.launcher(library),
        layer_norm=layer_norm.launcher(library),
        act=act.launcher(library),
        embed=embed.launcher(library),
        kv_append=kv_append.launcher(library),
        decode_attention=decode_attention.launcher(library),
        prefill_attention=prefill_attention.launcher(library),
        quantized_linear=quantized_linear.launcher(library),
        int8_linear=int8_linear.launcher(library),
        fixed_linear=fixed_linear.launcher(library),
        quantize_rows=quantize_rows.launcher(library),
        dequantize=dequantize.launcher(library),
        gather_columns=gather_columns.launcher(library),
        copy_blocks=copy_blocks.launcher(library),
        edit_logits=edit_logits.launcher(library),
        sample=sample.launcher(library),
        token_logprobs=token_logprobs.launcher(library),
    )

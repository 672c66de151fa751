"""Single kernels on the GPU, each beside what cuBLAS or torch does with the same work and beside the copy bandwidth."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.timing import Ceilings, num_copies, seconds
from llmserve.ops.cuda.decode_attention import (
    AttentionRule,
    SplitWork,
    SplitWorkspace,
    choose_split,
    ctas_per_sm,
    plan_work,
)
from llmserve.ops.cuda.kv_cache import KvCache
from llmserve.ops.cuda.launchers import Launchers, of_library
from llmserve.ops.cuda.library import open_library
from llmserve.ops.cuda.linear import make_workspace
from llmserve.ops.cuda.quantized_linear import QuantizedWeight

HEADS: Final = 32
KV_HEADS: Final = 8
HEAD_DIM: Final = 128
BLOCK: Final = 16
ATTENTION_CASES: Final = ((64, 4096), (8, 32768), (1, 1024), (1, 32768), (256, 1024))
"""(sequences, tokens of each)."""
LINEAR_SHAPES: Final = ((4096, 14336), (14336, 4096))
"""(outputs, inputs)."""
ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def attention(launchers: Launchers, limits: Ceilings, batch: int, context: int) -> dict[str, Any]:
    """Decode attention over a shuffled paged cache, and torch's over contiguous memory."""
    num_bytes = 2 * batch * context * KV_HEADS * HEAD_DIM * 2
    blocks = context // BLOCK
    tables = torch.randperm(batch * blocks, device="cuda").to(torch.int32).view(batch, blocks)
    lens = np.full(batch, context, np.int32)
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    split_tokens = choose_split(lens, KV_HEADS, num_sms)
    work, start = plan_work(lens, split_tokens=split_tokens, window=0, max_work=1 << 20)
    split = SplitWork(
        torch.from_numpy(work).cuda(),
        torch.tensor([len(work), split_tokens], dtype=torch.int32, device="cuda"),
        torch.from_numpy(start).cuda(),
    )
    workspace = SplitWorkspace(
        torch.empty((len(work), HEADS, HEAD_DIM), device="cuda"), torch.empty((len(work), HEADS, 2), device="cuda")
    )
    q = torch.randn((batch, HEADS, HEAD_DIM), device="cuda", dtype=torch.bfloat16)
    out, seq_lens, rule = torch.empty_like(q), torch.from_numpy(lens).cuda(), AttentionRule(HEAD_DIM**-0.5)
    shape = batch * blocks, KV_HEADS, BLOCK, HEAD_DIM
    caches = [KvCache(_randn(shape), _randn(shape)) for _ in range(num_copies(num_bytes))]

    def attend(cache: KvCache) -> None:
        launchers.decode_attention(
            q, out, cache, tables, seq_lens, split, workspace, rule, num_ctas=num_sms * ctas_per_sm(cache)
        )

    ours = seconds([partial(attend, cache) for cache in caches])
    del caches
    flat = [tuple(_randn((batch, KV_HEADS, context, HEAD_DIM)) for _ in range(2)) for _ in range(num_copies(num_bytes))]
    query = q.view(batch, HEADS, 1, HEAD_DIM)
    torchs = seconds([partial(F.scaled_dot_product_attention, query, *kv, enable_gqa=True) for kv in flat])
    return {
        "batch": batch, "context": context, "split_tokens": split_tokens, "us": ours * 1e6,
        "share_of_copy": num_bytes / ours / limits.copy_bytes_s, "sdpa_us": torchs * 1e6, "of_sdpa": torchs / ours,
    }  # fmt: skip


def _randn(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _packed(bits: int, group: int, outputs: int, inputs: int) -> QuantizedWeight:
    """Random codes; whole tiles in both directions."""
    strips, tiles = outputs // 16, inputs // 64
    codes = torch.randint(0, 256, (strips, tiles, bits // 4, 32, 16), device="cuda", dtype=torch.uint8)
    dtype = torch.float16 if group else torch.float32
    scales = torch.full((strips, inputs // group if group else 1, 8, 2), 0.01, device="cuda", dtype=dtype)
    return QuantizedWeight(bits, group, outputs, inputs, codes, scales, None, None)


def linear(launchers: Launchers, limits: Ceilings, outputs: int, inputs: int) -> list[dict[str, Any]]:
    """W4A16 in groups of 128, W8A16 in groups of 32 and W8A8 beside cuBLAS in bfloat16, by rows of the batch."""
    kinds = {"w4a16": (4, 128), "w8a16": (8, 32), "w8a8": (8, 0)}
    workspace = make_workspace(32 << 20, torch.device("cuda"))
    dense = [_randn((outputs, inputs)) for _ in range(num_copies(outputs * inputs * 2))]
    results = []
    for rows in ROWS:
        x = _randn((rows, inputs))
        x8 = torch.empty((rows, inputs), dtype=torch.int8, device="cuda")
        out = torch.empty((rows, outputs), dtype=torch.bfloat16, device="cuda")
        cublas = seconds([partial(F.linear, x, weight) for weight in dense])

        def as_int8(weight: QuantizedWeight, x: Tensor = x, x8: Tensor = x8, out: Tensor = out) -> None:
            scales = torch.empty(len(x), device="cuda")
            launchers.quantize_rows(x, x8, scales)
            launchers.int8_linear(x8, scales, weight, out, workspace=workspace)

        def as_bf16(weight: QuantizedWeight, x: Tensor = x, out: Tensor = out) -> None:
            launchers.quantized_linear(x, weight, out, workspace=workspace)

        result: dict[str, Any] = {"outputs": outputs, "inputs": inputs, "rows": rows, "cublas_us": cublas * 1e6}
        for name, (bits, group) in kinds.items():
            num_bytes = outputs * inputs * bits // 8
            weights = [_packed(bits, group, outputs, inputs) for _ in range(num_copies(num_bytes))]

            call = as_int8 if name == "w8a8" else as_bf16
            ours = seconds([partial(call, weight) for weight in weights])
            result[name] = {
                "us": ours * 1e6, "of_cublas": cublas / ours,
                "share_of_copy": num_bytes / ours / limits.copy_bytes_s,
            }  # fmt: skip
        results.append(result)
    return results


def run(limits: Ceilings) -> dict[str, Any]:
    """All cases."""
    launchers = of_library(open_library())
    return {
        "attention": [attention(launchers, limits, *case) for case in ATTENTION_CASES],
        "linear": [case for shape in LINEAR_SHAPES for case in linear(launchers, limits, *shape)],
    }

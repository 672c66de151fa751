"""One layer's attention: head norms, rotation and the cache in one kernel, then attention over the paged cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmserve.ops.cuda.decode_attention import AttentionRule, SplitWorkspace
from llmserve.ops.cuda.kv_append import HeadNorm, Rotation
from llmserve.ops.cuda.step import DeviceStep
from llmserve.ops.cuda.weights import DTYPE
from llmserve.ops.protocol import AttentionSpec


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's."""

    spec: AttentionSpec
    layer: int
    rotation: Rotation | None
    norm: HeadNorm | None
    sinks: Tensor | None  # float32 [heads]
    fold_tokens: int
    """Not 0: prefill and decode give the same bits (the split of decode attention)."""

    def __call__(self, step: DeviceStep, qkv: Tensor) -> Tensor:
        """[T, (heads + 2 kv_heads) * head_dim] → [T, heads * head_dim]."""
        spec, cache, launchers, decodes = self.spec, step.caches[self.layer], step.launchers, step.num_decodes
        q = torch.empty((step.num_tokens, spec.heads * spec.head_dim), dtype=DTYPE, device=qkv.device)
        launchers.kv_append(qkv, q, cache, step.positions, step.slots, rotation=self.rotation, norm=self.norm)
        out = torch.empty_like(q)
        heads = (-1, spec.heads, spec.head_dim)
        rule = AttentionRule(spec.scale, spec.softcap, spec.window, self.sinks)
        if decodes:
            split = step.decode[spec.window]
            max_work = len(split.work)
            workspace = SplitWorkspace(
                torch.empty((max_work, spec.heads, spec.head_dim), device=q.device),
                torch.empty((max_work, spec.heads, 2), device=q.device),
            )
            launchers.decode_attention(
                q[:decodes].view(heads), out[:decodes].view(heads), cache, step.block_tables[:decodes],
                step.seq_lens[:decodes], split, workspace, rule, num_ctas=step.num_ctas,
            )  # fmt: skip
        if step.prefill is not None:
            launchers.prefill_attention(
                q[decodes:].view(heads), out[decodes:].view(heads), cache, step.block_tables[decodes:],
                step.prefill.query_start, step.seq_lens[decodes:], step.prefill.queries, rule,
                num_ctas=step.num_ctas, fold_tokens=self.fold_tokens,
            )  # fmt: skip
        return out

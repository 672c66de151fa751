"""One layer's attention: head norms, rotation and the cache in one kernel, then attention over the paged cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmserve.ops.cuda import decode_attention, prefill_attention
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
                step.seq_lens[:decodes], split, workspace, rule,
                num_ctas=step.num_sms * decode_attention.ctas_per_sm(cache),
            )  # fmt: skip
        if step.prefill is not None:
            launchers.prefill_attention(
                q[decodes:].view(heads), out[decodes:].view(heads), cache, step.block_tables[decodes:],
                step.prefill.query_start, step.seq_lens[decodes:], step.prefill.queries, rule,
                num_ctas=step.num_sms * prefill_attention.ctas_per_sm(cache, self.fold_tokens),
                fold_tokens=self.fold_tokens, is_bidirectional=spec.mask == "bidirectional",
            )  # fmt: skip
        return out


@dataclass(frozen=True, slots=True)
class FallbackAttention:
    """One layer whose heads the kernels do not take: norm and rotation come before it, attention is Triton's."""

    spec: AttentionSpec
    layer: int
    sinks: Tensor | None  # float32 [heads]

    def __call__(self, step: DeviceStep, qkv: Tensor) -> Tensor:
        """As `Attention`, for steps without decodes of their own and without padding."""
        from llmserve.ops.cuda.fallback_attention import paged_attention  # Triton, which other networks do not need

        spec, cache = self.spec, step.caches[self.layer]
        assert step.prefill is not None, "no sequence counts as a decode here"
        q, k, v = (part.unflatten(1, (-1, spec.head_dim)) for part in self._split(qkv))
        block, offset = step.slots // cache.block_size, step.slots % cache.block_size
        cache.k[block, :, offset], cache.v[block, :, offset] = k, v
        out = torch.empty((len(qkv), spec.heads, spec.head_dim), dtype=DTYPE, device=qkv.device)
        paged_attention(
            q, cache.k, cache.v, out, block_tables=step.block_tables, seq_lens=step.seq_lens,
            query_start=step.prefill.query_start, scale=spec.scale, softcap=spec.softcap, window=spec.window,
            sinks=self.sinks, causal=spec.mask == "causal",
        )  # fmt: skip
        return out.flatten(1)

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        widths = [heads * self.spec.head_dim for heads in (self.spec.heads, self.spec.kv_heads, self.spec.kv_heads)]
        return tuple(part.contiguous() for part in qkv.split(widths, dim=1))

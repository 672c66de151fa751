"""Llama and its kin: Llama 2/3, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3.

Pre-norm decoder with RMS norm, rotary grouped-query attention and a gated SiLU feed-forward. What sets the family's
members apart is read from the checkpoint: biases are there or not, window and rotary scaling are in `ModelConfig`, the
output matrix is the embedding when the checkpoint ties them. What a member cannot do without is demanded by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from llmserve.config import ModelConfig
from llmserve.models.tensors import TensorReader
from llmserve.ops.protocol import AttentionSpec, Ops, RopeSpec, Value
from llmserve.ops.rope import rope_spec
from llmserve.types import CheckpointTensor

QKV_BIASED: Final = frozenset({"qwen2"})
"""Architectures whose q, k and v always have a bias."""
QK_NORMED: Final = frozenset({"qwen3"})
"""Architectures that normalize each head of q and k before rotating it."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight `[out, in]`, its bias if it has one, and its LoRA site."""

    weight: CheckpointTensor
    bias: CheckpointTensor | None
    site: str

    def __call__(self, ops: Ops, x: Value, *, residual: Value | None = None) -> Value:
        return ops.linear(x, self.weight, bias=self.bias, residual=residual, site=self.site)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer."""

    attn_norm: CheckpointTensor
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: CheckpointTensor | None
    k_norm: CheckpointTensor | None
    ffn_norm: CheckpointTensor
    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Llama:
    """The network. Calling it says one forward pass: logits `[R, vocab]` of the step's logit rows."""

    embed: CheckpointTensor
    layers: tuple[Layer, ...]
    final_norm: CheckpointTensor
    head: CheckpointTensor
    rope: RopeSpec
    attention: AttentionSpec
    norm_eps: float

    def __call__(self, ops: Ops) -> Value:
        x = ops.embed(self.embed)  # [T, hidden]
        for index, layer in enumerate(self.layers):
            h = ops.norm(x, layer.attn_norm, kind="rms", eps=self.norm_eps)
            q = self._rotate(ops, layer.q(ops, h), layer.q_norm, heads=self.attention.heads)
            k = self._rotate(ops, layer.k(ops, h), layer.k_norm, heads=self.attention.kv_heads)
            a = ops.attention(q, k, layer.v(ops, h), self.attention, layer=index)  # [T, heads * head_dim]
            x = layer.o(ops, a, residual=x)
            h = ops.norm(x, layer.ffn_norm, kind="rms", eps=self.norm_eps)
            x = layer.down(ops, ops.act(layer.up(ops, h), "silu", gate=layer.gate(ops, h)), residual=x)
        return ops.logits(ops.norm(x, self.final_norm, kind="rms", eps=self.norm_eps), self.head)

    def _rotate(self, ops: Ops, x: Value, norm: CheckpointTensor | None, *, heads: int) -> Value:
        if norm is not None:
            x = ops.norm(x, norm, kind="rms", eps=self.norm_eps, heads=heads)
        return ops.rope(x, self.rope, heads=heads)


def build(config: ModelConfig, tensors: Mapping[str, CheckpointTensor]) -> Callable[[Ops], Value]:
    """Bind the network to a checkpoint's tensors.

    Raises `CheckpointError` naming a tensor that is missing, has another shape than `config` says, or has no use here.
    """
    reader = TensorReader(tensors)
    embed = reader.take("embed", config.vocab_size, config.hidden_size)
    model = Llama(
        embed=embed,
        layers=tuple(_layer(config, reader, f"layers.{index}") for index in range(config.num_layers)),
        final_norm=reader.take("final_norm", config.hidden_size),
        head=embed if config.tie_word_embeddings else reader.take("head", config.vocab_size, config.hidden_size),
        rope=rope_spec(config.rope, config.head_dim),
        # A windowed layer keeps all its blocks: so all layers read one group of tables.
        attention=AttentionSpec(
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            window=config.sliding_window,
        ),
        norm_eps=config.norm_eps,
    )
    reader.finish(ignore=frozenset({"rope_factors"}))  # their values are in config.rope
    return model


def _layer(config: ModelConfig, reader: TensorReader, prefix: str) -> Layer:
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim

    qkv_bias, qk_norm = config.architecture in QKV_BIASED, config.architecture in QK_NORMED

    def linear(name: str, num_out: int, num_in: int, *, biased: bool = False) -> Linear:
        site = f"{prefix}.{name}"
        take_bias = reader.take if biased else reader.maybe
        return Linear(reader.take(site, num_out, num_in), take_bias(f"{site}_bias", num_out), site)

    return Layer(
        attn_norm=reader.take(f"{prefix}.attn_norm", hidden),
        q=linear("q", q_size, hidden, biased=qkv_bias),
        k=linear("k", kv_size, hidden, biased=qkv_bias),
        v=linear("v", kv_size, hidden, biased=qkv_bias),
        o=linear("o", hidden, q_size),
        q_norm=reader.take(f"{prefix}.q_norm", head_dim) if qk_norm else None,
        k_norm=reader.take(f"{prefix}.k_norm", head_dim) if qk_norm else None,
        ffn_norm=reader.take(f"{prefix}.ffn_norm", hidden),
        gate=linear("gate", inner, hidden),
        up=linear("up", inner, hidden),
        down=linear("down", hidden, inner),
    )

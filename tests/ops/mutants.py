"""Wrong networks: each ignores or mistakes one feature. The bounds of the agreement test must reject every one of them.

A mutant changes the configuration or the tensors between checkpoint and model file, or is a model file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np

from llmserve.checkpoints.dequantize import dequantize
from llmserve.config import ModelConfig
from llmserve.models import llama
from llmserve.ops import Forward
from llmserve.ops.protocol import Ops, Value
from llmserve.types import CheckpointTensor

Tensors = dict[str, CheckpointTensor]
Mutation = Callable[[ModelConfig, Tensors], tuple[ModelConfig, Tensors]]
Builder = Callable[[ModelConfig, Mapping[str, CheckpointTensor]], Forward]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mistake, on the tiny networks where it shows."""

    models: tuple[str, ...]
    mutate: Mutation = lambda config, tensors: (config, tensors)
    build: Builder = llama.build


def _rope(**changes: Any) -> Mutation:
    return lambda config, tensors: (replace(config, rope=replace(config.rope, **changes)), tensors)


def _config(**changes: Any) -> Mutation:
    return lambda config, tensors: (replace(config, **changes), tensors)


def _window(by: int) -> Mutation:
    return lambda config, tensors: (replace(config, sliding_window=config.sliding_window + by), tensors)


def _drop(*parts: str) -> Mutation:
    """Forget tensors. The architecture that demands them is passed off as one that does not."""

    def mutate(config: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, Tensors]:
        kept = {name: tensor for name, tensor in tensors.items() if name.rsplit(".", 1)[-1] not in parts}
        return replace(config, architecture="llama"), kept

    return mutate


def _ones(part: str) -> Mutation:
    """Ignore a norm's weight."""
    return lambda config, tensors: (config, _changed(tensors, part, np.ones_like))


def _regrouped(config: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, Tensors]:
    """Query head h reads key-value head h % kv_heads instead of h // group."""
    order = [head for kv in range(config.num_kv_heads) for head in range(kv, config.num_heads, config.num_kv_heads)]
    channels = np.concatenate([np.arange(config.head_dim) + head * config.head_dim for head in order])
    mutated = _changed(tensors, "q", lambda weight: weight[channels])
    mutated = _changed(mutated, "q_bias", lambda bias: bias[channels])
    return config, _changed(mutated, "o", lambda weight: weight[:, channels])


def _head_is_embedding(config: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, Tensors]:
    kept = {name: tensor for name, tensor in tensors.items() if name != "head"}
    return replace(config, tie_word_embeddings=True), kept


def _head_shifted(config: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, Tensors]:
    """A tied head that is off by one row."""
    embed = dequantize(tensors["embed"])
    return replace(config, tie_word_embeddings=False), {**tensors, "head": _tensor("head", np.roll(embed, 1, axis=0))}


def _changed(tensors: Tensors, part: str, change: Callable[[Any], Any]) -> Tensors:
    return {
        name: _tensor(name, change(dequantize(tensor))) if name.rsplit(".", 1)[-1] == part else tensor
        for name, tensor in tensors.items()
    }


def _tensor(name: str, values: Any) -> CheckpointTensor:
    stored = np.ascontiguousarray(values, np.float32)
    return CheckpointTensor(name, "f32", stored.shape, memoryview(stored.tobytes()))


class NormAfterRope(llama.Llama):
    """Qwen3 with the norms of q and k after the rotation."""

    def _rotate(self, ops: Ops, x: Value, norm: CheckpointTensor | None, *, heads: int) -> Value:
        x = ops.rope(x, self.rope, heads=heads)
        return x if norm is None else ops.norm(x, norm, kind="rms", eps=self.norm_eps, heads=heads)


class NormOverWidth(llama.Llama):
    """Qwen3 with one norm over all heads together."""

    def _rotate(self, ops: Ops, x: Value, norm: CheckpointTensor | None, *, heads: int) -> Value:
        if norm is not None:
            wide = _tensor(norm.name, np.tile(dequantize(norm), heads))
            x = ops.norm(x, wide, kind="rms", eps=self.norm_eps)
        return ops.rope(x, self.rope, heads=heads)


class WrongScale(llama.Llama):
    """Scores scaled by hidden_size / heads although heads are wider."""

    def __call__(self, ops: Ops) -> Value:
        spec = replace(self.attention, scale=(self.embed.shape[1] / self.attention.heads) ** -0.5)
        return llama.Llama(**{**_values(self), "attention": spec})(ops)


def _values(model: llama.Llama) -> dict[str, Any]:
    return {entry.name: getattr(model, entry.name) for entry in fields(llama.Llama)}


def _as(kind: type[llama.Llama]) -> Builder:
    def build(config: ModelConfig, tensors: Mapping[str, CheckpointTensor]) -> Forward:
        model = llama.build(config, tensors)
        assert isinstance(model, llama.Llama)
        return kind(**_values(model))

    return build


MUTANTS: Final = {
    "rope_style_interleaved": Mutant(("llama", "qwen2", "qwen3", "mistral"), _rope(style="interleaved")),
    "rope_style_half": Mutant(("llama_gguf_f32", "llama_gguf_q4_1", "llama_gguf_q8_0"), _rope(style="half")),
    "rope_theta_ignored": Mutant(("llama", "qwen2", "qwen3"), _rope(theta=10000.0)),
    "rope_partial": Mutant(("llama", "qwen2"), _rope(rotary_dim=8)),
    "rope_scaling_ignored": Mutant(("llama_linear", "llama_llama3", "llama_factors"), _rope(scaling="none")),
    "rope_llama3_as_linear": Mutant(("llama_llama3",), _rope(scaling="linear")),
    "rope_llama3_other_length": Mutant(("llama_llama3",), _rope(original_max_len=8192)),
    "window_ignored": Mutant(("mistral",), _config(sliding_window=0)),
    "window_too_short": Mutant(("mistral",), _window(-1)),
    "window_too_long": Mutant(("mistral",), _window(1)),
    "q_bias_missing": Mutant(("qwen2", "qwen2_d64", "qwen2_q4_0"), _drop("q_bias")),
    "k_bias_missing": Mutant(("qwen2", "qwen2_d64", "qwen2_q4_0"), _drop("k_bias")),
    "v_bias_missing": Mutant(("qwen2", "qwen2_d64", "qwen2_q4_0"), _drop("v_bias")),
    "qk_norm_missing": Mutant(("qwen3", "qwen3_q8_0"), _drop("q_norm", "k_norm")),
    "q_norm_weight_ignored": Mutant(("qwen3", "qwen3_q8_0"), _ones("q_norm")),
    "k_norm_weight_ignored": Mutant(("qwen3", "qwen3_q8_0"), _ones("k_norm")),
    "qk_norm_after_rope": Mutant(("qwen3", "qwen3_q8_0"), build=_as(NormAfterRope)),
    "qk_norm_over_width": Mutant(("qwen3", "qwen3_q8_0"), build=_as(NormOverWidth)),
    "attention_scale": Mutant(("qwen3",), build=_as(WrongScale)),
    "heads_regrouped": Mutant(("llama", "llama_bf16", "qwen2", "qwen3", "llama_gguf_q4_0"), _regrouped),
    "head_untied_ignored": Mutant(("llama", "qwen3"), _head_is_embedding),
    "head_tied_shifted": Mutant(("llama_tied", "qwen2_d64", "llama_gguf_q4_1"), _head_shifted),
    "attn_norm_weight_ignored": Mutant(("llama",), _ones("attn_norm")),
    "ffn_norm_weight_ignored": Mutant(("llama",), _ones("ffn_norm")),
    "final_norm_weight_ignored": Mutant(("llama",), _ones("final_norm")),
    "norm_eps_ignored": Mutant(("llama_eps",), _config(norm_eps=1e-6)),
}

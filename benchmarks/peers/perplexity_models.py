"""The model files of `benchmarks.peers.perplexity`: one for each weight type, all from the default model.

K-quants and IQ4_XS have blocks of 256 along a row; the default model is 576 wide. Such types get the widened model:
every width is padded with zeros to a multiple of 256, heads that write zeros included. A norm over more channels of
which the new ones are zero differs by the factor sqrt(old / new), which its weight and epsilon take back. So the
widened model computes what the original does, with the same activations, and each of its matrices can have each type.
"""

from __future__ import annotations

import math
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.llama_cpp import PEER
from llmserve.errors import EngineFault

BLOCK: Final = 256
TYPES: Final = {
    "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32, "IQ4_NL": 32, "BF16": 1, "F16": 1,
    "Q2_K": BLOCK, "Q3_K_S": BLOCK, "Q4_K_S": BLOCK, "Q5_K_S": BLOCK, "Q6_K": BLOCK, "IQ4_XS": BLOCK,
}  # fmt: skip
"""The quantizer's names, and the values of a block."""
MIXED: Final = ("Q2_K",)
"""Nothing of so small a model is left (a perplexity of 1e5) when all its matrices have this type: the file is the
quantizer's own mixture with larger ones."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Widths:
    """Channels of a Llama model."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, reader: gguf.GGUFReader) -> Widths:
        def number(name: str, default: int = 0) -> int:
            field = reader.get_field(f"llama.{name}")
            return default if field is None else int(field.contents())

        hidden, heads = number("embedding_length"), number("attention.head_count")
        head_dim = number("attention.key_length", hidden // heads)
        return cls(hidden, number("feed_forward_length"), heads, number("attention.head_count_kv"), head_dim)

    def widened(self) -> Widths:
        """The least that are at least as large and whole blocks, with as many query heads to a KV head."""
        group, kv_heads = self.heads // self.kv_heads, self.kv_heads
        while kv_heads * self.head_dim % BLOCK or kv_heads * group * self.head_dim % BLOCK:
            kv_heads += 1
        hidden, inner = (-(-size // BLOCK) * BLOCK for size in (self.hidden, self.inner))
        return Widths(hidden, inner, kv_heads * group, kv_heads, self.head_dim)

    def shape(self, name: str, vocab: int) -> tuple[int, ...]:
        """Of a tensor by its name in the file, as [rows, columns]."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        part = name.removesuffix(".weight").rsplit(".", 1)[-1]
        return {
            "token_embd": (vocab, self.hidden), "output": (vocab, self.hidden),
            "attn_q": (queries, self.hidden), "attn_k": (keys, self.hidden), "attn_v": (keys, self.hidden),
            "attn_output": (self.hidden, queries), "ffn_gate": (self.inner, self.hidden),
            "ffn_up": (self.inner, self.hidden), "ffn_down": (self.hidden, self.inner),
            "attn_norm": (self.hidden,), "ffn_norm": (self.hidden,), "output_norm": (self.hidden,),
        }[part]  # fmt: skip


def write_float32(source: Path, target: Path, *, widen: bool) -> None:
    """A Llama GGUF file with all tensors dequantized, widened if asked for."""
    reader = gguf.GGUFReader(source)
    old = Widths.of(reader)
    new = old.widened() if widen else old
    writer = gguf.GGUFWriter(target, "llama")
    changed = _changed_fields(reader, old, new)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, changed.get(field.name, field.contents()), kind, sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        vocab = values.shape[0] if tensor.name in ("token_embd.weight", "output.weight") else 0
        writer.add_tensor(tensor.name, _padded(values, new.shape(tensor.name, vocab), old, new))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _changed_fields(reader: gguf.GGUFReader, old: Widths, new: Widths) -> dict[str, Any]:
    eps = reader.get_field("llama.attention.layer_norm_rms_epsilon")
    assert eps is not None
    return {
        "general.file_type": int(gguf.LlamaFileType.ALL_F32),
        "llama.embedding_length": new.hidden,
        "llama.feed_forward_length": new.inner,
        "llama.attention.head_count": new.heads,
        "llama.attention.head_count_kv": new.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": float(eps.contents()) * old.hidden / new.hidden,
    }


def _padded(values: Floats, shape: tuple[int, ...], old: Widths, new: Widths) -> Floats:
    if values.ndim == 1:  # a norm
        values = values * np.float32(math.sqrt(old.hidden / new.hidden))
    wide = np.zeros(shape, np.float32)
    wide[tuple(slice(size) for size in values.shape)] = values
    return wide


def quantize(binaries: Path, source: Path, target: Path, kind: str) -> None:
    """All matrices of `source` in one type, but for `MIXED`, by the peer's quantizer. Raises `EngineFault`."""
    pure = [] if kind in MIXED else ["--pure"]
    command = [binaries / "llama-quantize", *pure, source, target, kind]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineFault(f"{PEER}: no {kind}: {done.stderr[-1000:] or done.stdout[-1000:]}")


def count_types(path: Path) -> dict[str, int]:
    """Tensors of each type that the file holds, norms (float32) included."""
    counts: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + 1
    return counts

"""GGUF files with the shapes of real models and random content: as large and as regular as the real ones.

    python -m benchmarks.random_gguf qwen2.5-0.5b qwen2.5-0.5b.Q4_0.gguf
    python -m benchmarks.random_gguf qwen2.5-0.5b qwen2.5-0.5b.Q8_0.gguf --type Q8_0

Speed does not depend on the values of weights. Codes are random bytes, scales are random half-precision numbers of the
size that real weights have, so that nothing overflows and every byte counts. Names and metadata are written by the
`gguf` package, the matrices by this file; the tokenizer is the default model's, with tokens added up to the vocabulary.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gguf
import numpy as np
from numpy.typing import NDArray

from llmserve.checkpoints import pull

Type = gguf.GGMLQuantizationType
BLOCK: Final = 32
_KINDS: Final = {"Q4_0": Type.Q4_0, "Q8_0": Type.Q8_0}
_CHUNK_BLOCKS: Final = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a model; its sizes in channels."""

    architecture: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    """The head is the embedding."""
    biased: bool = False
    """Q, K and V have biases."""

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes as [rows, columns], in the order of the file."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "token_embd.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            for part, rows, columns in (
                ("attn_q", queries, self.hidden), ("attn_k", keys, self.hidden), ("attn_v", keys, self.hidden),
                ("attn_output", self.hidden, queries), ("ffn_gate", self.inner, self.hidden),
                ("ffn_up", self.inner, self.hidden), ("ffn_down", self.hidden, self.inner),
            ):  # fmt: skip
                yield f"blk.{layer}.{part}.weight", (rows, columns)
                if self.biased and part in ("attn_q", "attn_k", "attn_v"):
                    yield f"blk.{layer}.{part}.bias", (rows,)
            yield f"blk.{layer}.attn_norm.weight", (self.hidden,)
            yield f"blk.{layer}.ffn_norm.weight", (self.hidden,)
        yield "output_norm.weight", (self.hidden,)
        if not self.tied:
            yield "output.weight", (self.vocab, self.hidden)


LLAMA_2_7B: Final = Shape(
    architecture="llama", layers=32, hidden=4096, inner=11008, heads=32, kv_heads=32, vocab=32000, tied=False
)
QWEN_05B: Final = Shape(
    architecture="qwen2", layers=24, hidden=896, inner=4864, heads=14, kv_heads=2, vocab=151936, tied=True, biased=True
)
SHAPES: Final = {"llama-2-7b": LLAMA_2_7B, "qwen2.5-0.5b": QWEN_05B}


def write_random(
    path: Path, shape: Shape, matrices: Type = Type.Q4_0, embedding: Type = Type.Q4_0, *, tokenizer: Path | None = None
) -> Path:
    """Write the file; `tokenizer` is a GGUF file whose tokenizer it gets."""
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_name("random")
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{matrices.name}"])
    if tokenizer is not None:
        _add_tokenizer(writer, gguf.GGUFReader(tokenizer), shape.vocab)
    kinds = {}
    for name, size in shape.tensors():
        kinds[name] = Type.F32 if len(size) == 1 else embedding if name == "token_embd.weight" else matrices
        writer.add_tensor_info(name, size, np.dtype(np.float32), _num_bytes(size, kinds[name]), raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    rng = np.random.default_rng(7)
    with path.open("r+b") as file:
        file.seek(0, 2)
        for name, size in shape.tensors():
            file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
            for content in _contents(rng, size, kinds[name], is_norm="norm" in name):
                file.write(content.data)
    return path


def random_blocks(rng: np.random.Generator, count: int, kind: Type) -> NDArray[np.uint8]:
    """Blocks of 32 weights in Q4_0 or Q8_0, [count, bytes]: a half-precision scale, then bytes of codes."""
    num_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = np.frombuffer(rng.bytes(count * num_bytes), np.uint8).reshape(count, num_bytes).copy()
    largest = 0.003 if kind == Type.Q4_0 else 0.0002
    scales = rng.uniform(largest / 3, largest, count).astype(np.float16)
    blocks[:, :2] = scales.view(np.uint8).reshape(count, 2)
    return blocks


def _contents(
    rng: np.random.Generator, size: tuple[int, ...], kind: Type, *, is_norm: bool
) -> Iterator[NDArray[np.uint8]]:
    if len(size) == 1:
        values = np.ones(size, np.float32) if is_norm else rng.normal(0.0, 0.1, size).astype(np.float32)
        yield values.view(np.uint8)
        return
    left = size[0] * size[1] // BLOCK
    while left:
        count = min(left, _CHUNK_BLOCKS)
        yield random_blocks(rng, count, kind)
        left -= count


def _num_bytes(size: tuple[int, ...], kind: Type) -> int:
    values, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(size)) // values * num_bytes


def _add_tokenizer(writer: gguf.GGUFWriter, reader: gguf.GGUFReader, vocab: int) -> None:
    for field in reader.fields.values():
        if not field.name.startswith("tokenizer."):
            continue
        content = field.contents()
        if field.name == "tokenizer.ggml.tokens":
            content = [*content, *(f"<|added {number}|>" for number in range(len(content), vocab))]
        elif field.name == "tokenizer.ggml.token_type":
            content = [*content, *[int(gguf.TokenType.UNUSED)] * (vocab - len(content))]
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, content, kind, sub_type=inner)


def main() -> int:
    """Write one file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.random_gguf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("path", type=Path, help="where to write")
    parser.add_argument("--type", choices=_KINDS, default="Q4_0", help="of the matrices (Q4_0)")
    parser.add_argument("--embedding", choices=_KINDS, default="Q8_0", help="and of the embedding (Q8_0)")
    args = parser.parse_args()
    write_random(
        args.path, SHAPES[args.shape], _KINDS[args.type], _KINDS[args.embedding], tokenizer=pull.resolve("smollm2")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

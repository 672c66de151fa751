"""A GGUF file with the shapes of Llama-2-7B in Q4_0 and random content: as large and as regular as the real one.

Codes are random bytes, scales are random half-precision numbers of the size that real weights have, so that nothing
overflows and every byte counts. Names and metadata are written by the `gguf` package, the matrices by this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import gguf
import numpy as np
from numpy.typing import NDArray

LAYERS: Final = 32
HIDDEN: Final = 4096
INNER: Final = 11008
HEADS: Final = 32
VOCAB: Final = 32000
_BLOCK: Final = 32
_CHUNK_BLOCKS: Final = 1 << 16


def write_7b(path: Path, *, layers: int = LAYERS) -> Path:
    """Write the file; fewer `layers` make it smaller."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random 7B")
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(layers)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    shapes = _shapes(layers)
    for name, shape in shapes.items():
        quantized = len(shape) == 2
        num_bytes = shape[0] * shape[1] // _BLOCK * 18 if quantized else shape[0] * 4
        kind = gguf.GGMLQuantizationType.Q4_0 if quantized else gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.seek(0, 2)
        file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
        rng = np.random.default_rng(7)
        for shape in shapes.values():
            if len(shape) == 1:
                file.write(np.ones(shape, np.float32).tobytes())
                continue
            left = shape[0] * shape[1] // _BLOCK
            while left:
                blocks = random_q4_0(rng, min(left, _CHUNK_BLOCKS))
                file.write(blocks.data)
                left -= len(blocks)
    return path


def random_q4_0(rng: np.random.Generator, count: int) -> NDArray[np.uint8]:
    """Blocks of 32 weights, [count, 18]: a half-precision scale, then sixteen bytes of codes."""
    blocks = np.frombuffer(rng.bytes(count * 18), np.uint8).reshape(count, 18).copy()
    scales = rng.uniform(0.001, 0.003, count).astype(np.float16)
    blocks[:, :2] = scales.view(np.uint8).reshape(count, 2)
    return blocks


def _shapes(layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{part}.weight"] = (HIDDEN, HIDDEN)
        shapes[f"blk.{layer}.ffn_gate.weight"] = (INNER, HIDDEN)
        shapes[f"blk.{layer}.ffn_up.weight"] = (INNER, HIDDEN)
        shapes[f"blk.{layer}.ffn_down.weight"] = (HIDDEN, INNER)
        shapes[f"blk.{layer}.attn_norm.weight"] = (HIDDEN,)
        shapes[f"blk.{layer}.ffn_norm.weight"] = (HIDDEN,)
    shapes["output_norm.weight"] = (HIDDEN,)
    shapes["output.weight"] = (VOCAB, HIDDEN)
    return shapes

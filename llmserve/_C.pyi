"""Types of the compiled extension; csrc/bindings is the source."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

class TensorView:
    def __init__(self, data: memoryview, dtype: str, rows: int, columns: int, name: str) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def dtype(self) -> str: ...

class BlockPool:
    def __init__(self, num_blocks: int, block_size: int) -> None: ...
    def create(self) -> int: ...
    def reserve(self, handles: Sequence[int], num_tokens: Sequence[int]) -> int: ...
    def truncate(self, handle: int, num_tokens: int) -> None: ...
    def release(self, handle: int) -> None: ...
    def table(self, handle: int) -> list[int]: ...
    def check_integrity(self) -> None: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    @property
    def block_size(self) -> int: ...

class ProgressCell:
    abort: bool
    def __init__(self, path: str, create: bool) -> None: ...
    def bump(self) -> None: ...
    @property
    def value(self) -> int: ...

class Value: ...

class PackedMatrix:
    @property
    def num_bytes(self) -> int: ...

class RopeTable: ...

class Program:
    def __init__(
        self,
        isa: str,
        num_threads: int,
        *,
        max_num_tokens: int,
        max_num_seqs: int,
        max_logit_rows: int,
        max_position: int,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    def reserve_arena(self, num_bytes: int) -> None: ...
    def add_value(self, rows: str, columns: int, forms: int, offset: int) -> Value: ...
    def reserve_weights(self, num_bytes: int) -> None: ...
    def add_matrix(
        self, packed_type: str, tensors: Sequence[TensorView], sources: NDArray[np.int32]
    ) -> PackedMatrix: ...
    def pack(self, matrix: PackedMatrix) -> None: ...
    def add_rope(
        self, cosine: NDArray[np.float32], sine: NDArray[np.float32], rotary_dim: int, interleaved: bool
    ) -> RopeTable: ...
    def add_zero_blocks(self) -> None: ...
    def add_embed(self, table: TensorView, positions: TensorView | None, factor: float, out: Value | None) -> None: ...
    def add_norm(
        self,
        kind: str,
        x: Value,
        out: Value | None,
        weight: NDArray[np.float32] | None,
        bias: NDArray[np.float32] | None,
        eps: float,
    ) -> None: ...
    def add_gather(self, x: Value, out: Value | None) -> None: ...
    def add_elementwise(
        self, op: str, x: Value, y: Value | None, out: Value | None, activation: str = "silu", by: float = 1.0
    ) -> None: ...
    def add_gemm(
        self,
        matrix: PackedMatrix,
        x: Value,
        out: Value | None,
        items: NDArray[np.int32],
        exact: bool,
        bias: NDArray[np.float32] | None = None,
        residual: Value | None = None,
        activation: str = "silu",
        factor: float = 1.0,
        softcap: float = 0.0,
    ) -> None: ...
    def add_heads(
        self,
        matrix: PackedMatrix,
        x: Value,
        out: Value | None,
        items: NDArray[np.int32],
        exact: bool,
        bias: NDArray[np.float32] | None,
        rope: RopeTable | None,
        query_norm: NDArray[np.float32] | None,
        key_norm: NDArray[np.float32] | None,
        norm_eps: float,
        head_dim: int,
        layer: int,
    ) -> None: ...
    def add_attention(
        self,
        q: Value,
        out: Value | None,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int,
        layer: int,
        scale: float,
    ) -> None: ...
    def add_sample(self, logits: Value) -> None: ...
    def allocate_kv(self, num_layers: int, num_blocks: int, kv_heads: int, head_dim: int) -> None: ...
    def attach_progress(self, cell: ProgressCell) -> None: ...
    def run(
        self,
        blocks: BlockPool,
        token_ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        query_start: NDArray[np.int32],
        seq_lens: NDArray[np.int32],
        block_tables: NDArray[np.int64],
        logit_rows: NDArray[np.int32],
        targets: NDArray[np.int32],
        temperature: NDArray[np.float32],
        top_k: NDArray[np.int32],
        top_p: NDArray[np.float32],
        min_p: NDArray[np.float32],
        seed: NDArray[np.uint64],
        sample_position: NDArray[np.int64],
        num_logprobs: NDArray[np.int32],
        out_token_ids: NDArray[np.int32],
        out_logprobs: NDArray[np.float32],
        out_ranks: NDArray[np.int32],
        out_top_ids: NDArray[np.int32],
        out_top_logprobs: NDArray[np.float32],
        /,
    ) -> bool: ...
    def read(self, value: Value, num_rows: int) -> NDArray[np.float32]: ...
    def take_times(self) -> dict[str, tuple[float, int]]: ...

def num_available_cores() -> int: ...
def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def value_bytes(num_rows: int, columns: int, forms: int) -> int: ...
def matrix_bytes(packed_type: str, columns: int, num_tiles: int) -> int: ...
def best_isa(limit: str = "") -> str: ...

"""Types of the compiled extension; csrc/bindings is the source."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

LAYOUT_VERSION: int
"""Version of the packed layout: whatever changes packed bytes raises it."""

class TensorView:
    def __init__(self, data: memoryview, dtype: str, rows: int, columns: int, name: str) -> None: ...
    def prefetch(self) -> None:
        """Have the system read its bytes from their file."""
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def dtype(self) -> str: ...

class BlockPool:
    """Block tables of the paged KV cache and its prefix cache. Only the engine thread may call it.

    `num_free` counts blocks that can be handed out: unused ones, and cached ones that no sequence holds (the one
    touched longest ago goes first, and only when no unused block is left). Unknown handles, tables that do not fit a
    call and negative counts raise `ValueError` and change nothing.

    With host blocks, the content of a cached block that is handed out moves to the host (the one used longest ago makes
    room), is found there like any other, and is brought back into a new block by the admission that finds it.
    """

    def __init__(self, num_blocks: int, block_size: int, hash_key: int = 0, num_host_blocks: int = 0) -> None:
        """`hash_key` (128 bits, secret, per deployment) keys the prefix hashes: without it, collisions can be made.

        An executor of a pool with host blocks executes the transfers of every step.
        """
    def create(self) -> int:
        """Handle of a new, empty table."""
    def reserve(self, handles: Sequence[int], num_tokens: Sequence[int]) -> int:
        """Grow each table, in order, to hold num_tokens; stop at the first that does not fit. How many succeeded."""
    def admit(
        self,
        handles: Sequence[int],
        token_ids: Sequence[NDArray[np.int32] | Sequence[int]],
        salts: Sequence[int],
        num_tokens: Sequence[int],
        reads_cache: Sequence[bool],
    ) -> list[int]:
        """Fill empty tables, in one ordered transaction: the longest cached prefix, then new blocks up to num_tokens.

        The prefix is of whole blocks and leaves at least one of `token_ids` to compute; `reads_cache` false skips it.
        `salts` (64 bits, unsigned) separate tenants, adapters and versions; a table keeps its salt. Stops at the first
        table that does not fit and leaves it untouched. Returns the cached tokens of each admitted one.
        """
    def match(self, token_ids: NDArray[np.int32] | Sequence[int], salt: int) -> int:
        """Tokens that `admit` would find now; touches nothing."""
    def commit(self, handle: int, token_ids: NDArray[np.int32] | Sequence[int], num_computed: int) -> None:
        """Let others match the full blocks among the first num_computed tokens, which must be computed and accepted.

        Cheap when no block became full. Does nothing for a table that is older than the last `reset_cache`.
        """
    def fork(self, handle: int, num_tokens: int) -> int:
        """Handle of a new table that shares the blocks of the first num_tokens (computed) tokens.

        A partial last block gets a block of its own and a queued copy. Raises `MemoryError` when there is none free.
        """
    def truncate(self, handle: int, num_tokens: int) -> None:
        """Give back the blocks past num_tokens. Raises `ValueError` when it cuts into a block that others hold."""
    def release(self, handle: int) -> None:
        """Give back a table and its blocks."""
    def discard(self, handle: int) -> None:
        """Like `release`, and nobody matches the blocks of the table any more: what they hold is wrong."""
    def reset_cache(self) -> None:
        """Nothing computed so far can be matched any more, nor what present tables compute from now on."""
    def take_transfers(self) -> list[tuple[Literal["to_host", "to_device"], int, int]]:
        """Moves of whole blocks between the device and the host, as (kind, source, target).

        For executors: `launch` takes them and executes them in this order, after all that steps before have written and
        before it zeroes `take_new_blocks`, does `take_copies` and writes. A target of an earlier one may be the source
        or target of a later one.
        """
    def take_copies(self) -> list[tuple[int, int]]:
        """Queued (source, destination) block copies; sources are never destinations.

        For executors: `launch` takes and executes them before anything of the step is written. Until then a copy keeps
        its source.
        """
    def take_new_blocks(self) -> list[int]:
        """Blocks handed out since the last call, without destinations of copies. For executors that zero them."""
    def table(self, handle: int) -> list[int]:
        """Block ids in order."""
    def sync_tables(self, handles: Sequence[int], tables: NDArray[np.int32]) -> NDArray[np.int64]:
        """Write each handle's blocks into its row of `tables`, [rows, blocks]; returns the flat indices that changed.

        Raises `ValueError` where a row is too short.
        """
    def check_integrity(self) -> None:
        """Raises `RuntimeError` when tables, references, free blocks and index disagree."""
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    @property
    def num_cached(self) -> int:
        """Blocks that can be matched, held or not."""
    @property
    def num_host_blocks(self) -> int: ...
    @property
    def num_host_cached(self) -> int:
        """Host blocks that can be matched; the device may have the same content."""
    @property
    def num_host_hits(self) -> int:
        """Blocks brought back from the host so far."""
    @property
    def block_size(self) -> int: ...

class ProgressCell:
    abort: bool
    def __init__(self, path: str, create: bool) -> None: ...
    def bump(self) -> None: ...
    def take(self) -> None: ...
    def abandon(self, num_requests: int) -> None: ...
    @property
    def value(self) -> int: ...
    @property
    def moved_s(self) -> float: ...

class StepLease:
    def __init__(
        self,
        path: str,
        *,
        cores: Sequence[int] = (),
        watched: ProgressCell | None = None,
        patience_s: float = 2.0,
    ) -> None: ...
    def __enter__(self) -> bool: ...
    def __exit__(self, *error: object) -> None: ...
    @property
    def held(self) -> bool: ...

class SamplingState:
    """What the sampling of one sequence remembers; see `ops.protocol.SamplingState`."""

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        *,
        vocab_size: int,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        logit_bias: Sequence[tuple[int, float]] = (),
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
        allowed_token_ids: Sequence[int] | None = None,
        typical_p: float = 1.0,
    ) -> None:
        """Raises `ValueError` for a token outside the vocabulary or a value out of range."""
    def rewind(self, position: int) -> None: ...
    def record(self, token_id: int) -> None: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def typical_p(self) -> float: ...
    @property
    def min_tokens(self) -> int: ...
    @property
    def logit_bias(self) -> list[tuple[int, float]]: ...
    @property
    def stop_token_ids(self) -> list[int]: ...
    @property
    def bad_words(self) -> list[list[int]]: ...
    @property
    def allowed_token_ids(self) -> list[int] | None: ...

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
    def value_bytes(self, rows: str, columns: int, forms: int) -> int: ...
    def add_value(self, rows: str, columns: int, forms: int, offset: int) -> Value: ...
    def reserve_weights(self, num_bytes: int) -> None: ...
    def add_matrix(
        self, packed_type: str, tensors: Sequence[TensorView], sources: NDArray[np.int32]
    ) -> PackedMatrix: ...
    def pack(self, matrix: PackedMatrix) -> None: ...
    def prefetch(self, matrix: PackedMatrix, *, sample: bool) -> None:
        """Have the system read what packing the matrix, or its sample, will read."""
    def write(self, matrix: PackedMatrix, descriptor: int, offset: int) -> int:
        """Pack aside, write to a file, return the checksum. Raises `OSError`."""
    def map_weights(self, descriptor: int, offset: int) -> None:
        """Have all matrices lie in a file, one after the other. Raises `OSError`."""
    def checksum(self, matrix: PackedMatrix) -> int: ...
    def checksum_sample(self, matrix: PackedMatrix) -> int:
        """The checksum of its first and last tile packed aside."""
    def add_rope(
        self, cosine: NDArray[np.float32], sine: NDArray[np.float32], rotary_dim: int, interleaved: bool
    ) -> RopeTable: ...
    def add_zero_blocks(self) -> None: ...
    def add_copy_blocks(self) -> None: ...
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
        self,
        op: str,
        x: Value,
        y: Value | None,
        out: Value | None,
        activation: str = "silu",
        by: float = 1.0,
        order: NDArray[np.int32] | None = None,
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
        maxima: Value | None = None,
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
        bidirectional: bool,
        softcap: float,
        sinks: NDArray[np.float32] | None,
    ) -> None: ...
    def add_sample(self, logits: Value, maxima: Value | None = None) -> None: ...
    def allocate_kv(
        self, num_layers: int, num_blocks: int, kv_heads: int, head_dim: int, int8: bool = False
    ) -> None: ...
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
        *,
        states: Sequence[SamplingState | None] = (),
        mask_rows: NDArray[np.int32] | None = None,
        masks: NDArray[np.uint32] | None = None,
    ) -> bool: ...
    def read(self, value: Value, num_rows: int) -> NDArray[np.float32]: ...
    def take_times(self) -> dict[str, tuple[float, int]]: ...
    @property
    def last_start_s(self) -> float:
        """When the last run began, after any wait for its turn; `time.monotonic()`."""

def num_available_cores() -> int: ...
def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def matrix_bytes(packed_type: str, columns: int, num_tiles: int) -> int: ...
def kv_block_bytes(num_layers: int, kv_heads: int, head_dim: int, int8: bool) -> int: ...
def best_isa(limit: str = "") -> str: ...

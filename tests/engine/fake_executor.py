"""An executor without a network: the token after a prefix is a hash of that prefix.

It keeps a paged cache of (token, position) and reads the prefix back from it through the block tables, so a step with
a wrong position, table, slot or length yields another token, and recomputing a sequence yields the same ones. It also
checks each step against its own limits.
"""

from __future__ import annotations

import zlib
from collections import Counter

import numpy as np

from llmserve.config import ExecutorConfig
from llmserve.ops.protocol import StepInput, StepOutput
from llmserve.types import EngineInfo, WeightsOrigin
from tests.engine.block_pool_twin import BlockPoolTwin

VOCAB_SIZE = 97


def next_token(prefix: list[int], seed: int = 0) -> int:
    """The token this 'network' samples after a prefix, at position `len(prefix)`."""
    return zlib.crc32(np.array([seed, *prefix], dtype=np.int64).tobytes()) % VOCAB_SIZE


def score(prefix: list[int], token_id: int) -> float:
    """Its log-probability of a token after a prefix."""
    return -float(zlib.crc32(np.array([token_id, *prefix], dtype=np.int64).tobytes()) % 1000) / 8


class FakeExecutor:
    """Implements the executor protocol over a Python block pool."""

    weight_bytes = 0
    isa = "python"
    num_threads = 1
    weights_origin: WeightsOrigin = "memory"
    image_path = ""

    def __init__(self, config: ExecutorConfig, num_blocks: int, num_host_blocks: int = 0) -> None:
        self.config = config
        self.num_moved: Counter[str] = Counter()
        """Blocks moved to the host and to the device."""
        self._num_host_blocks = num_host_blocks
        self.steps: list[StepInput] = []
        self.fail_next = False
        self.abort_next = False
        """Raise in the middle of the next step, its KV written in part, as an aborted program does."""
        self.poison: set[int] = set()
        """Seeds of sequences that make every step fail in which they have a row."""
        self.allocate_kv(num_blocks)

    def kv_bytes_per_block(self) -> int:
        return 16 * self.config.block_size

    def allocate_kv(self, num_blocks: int) -> None:
        self.block_pool = BlockPoolTwin(num_blocks, self.config.block_size, num_host_blocks=self._num_host_blocks)
        self._cache, self._host = (
            np.full((count, self.config.block_size, 2), -1, dtype=np.int64)
            for count in (num_blocks, self._num_host_blocks)
        )

    def launch(self, step: StepInput) -> None:
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("made to fail")
        self._check(step)
        for kind, source, target in self.block_pool.take_transfers():
            self.num_moved[kind] += 1
            if kind == "to_host":
                self._host[target] = self._cache[source]
            else:
                self._cache[target] = self._host[source]
        for source, target in self.block_pool.take_copies():
            self._cache[target] = self._cache[source]
        self._output = self._compute(step)
        if self.abort_next:
            self.abort_next = False
            raise InterruptedError("the step was aborted")
        if self.poison.intersection(step.seed.tolist()):
            raise RuntimeError("made to fail")
        self.steps.append(step)

    def collect(self) -> StepOutput:
        return self._output

    def _check(self, step: StepInput) -> None:
        num_tokens, num_seqs, num_rows = len(step.token_ids), len(step.seq_lens), len(step.logit_rows)
        assert 0 < num_tokens <= self.config.max_num_tokens
        assert 0 < num_seqs <= self.config.max_num_seqs
        assert num_rows <= self.config.max_logit_rows
        assert len(step.positions) == num_tokens == step.query_start[-1]
        assert step.query_start[0] == 0
        assert np.all(np.diff(step.query_start) > 0)
        assert len(step.query_start) == num_seqs + 1 == len(step.block_tables) + 1
        assert np.all(np.diff(step.logit_rows) > 0)
        dtypes = {name: getattr(step, name).dtype for name in StepInput.__slots__ if name != "states"}
        assert len(step.states) in (0, num_rows)
        assert {name: str(kind) for name, kind in dtypes.items() if kind != np.int32} == {
            "block_tables": "int64",
            "temperature": "float32",
            "top_p": "float32",
            "min_p": "float32",
            "seed": "uint64",
            "masks": "uint32",
            "sample_position": "int64",
        }
        for name in ("targets", "temperature", "top_k", "top_p", "min_p", "seed", "sample_position", "num_logprobs"):
            array = getattr(step, name)
            assert len(array) == num_rows, name
            assert array.flags.c_contiguous, name

    def _compute(self, step: StepInput) -> StepOutput:
        prefixes: dict[int, list[int]] = {}
        wanted = set(step.logit_rows.tolist())
        for index in range(len(step.seq_lens)):
            start, end = step.query_start[index], step.query_start[index + 1]
            table = self.block_pool.table(int(step.block_tables[index]))
            assert step.seq_lens[index] == step.positions[end - 1] + 1
            for row in range(start, end):
                position = int(step.positions[row])
                block, offset = divmod(position, self.config.block_size)
                self._cache[table[block], offset] = step.token_ids[row], position
                if row in wanted:
                    prefixes[row] = self._read(table, position + 1)
        return self._sample(step, prefixes)

    def _read(self, table: list[int], length: int) -> list[int]:
        entries = self._cache[table].reshape(-1, 2)[:length]
        assert entries[:, 1].tolist() == list(range(length)), "a position was never written, or overwritten"
        tokens: list[int] = entries[:, 0].tolist()
        return tokens

    def _sample(self, step: StepInput, prefixes: dict[int, list[int]]) -> StepOutput:
        num_top = max([0, *step.num_logprobs.tolist()])
        tokens, logprobs = [], []
        for index, row in enumerate(step.logit_rows.tolist()):
            prefix = prefixes[row]
            assert step.sample_position[index] == len(prefix)
            target = int(step.targets[index])
            tokens.append(target if target >= 0 else next_token(prefix, int(step.seed[index])))
            wants = step.num_logprobs[index] >= 0
            logprobs.append(score(prefix, tokens[-1]) if wants else np.nan)
        num_rows = len(tokens)
        return StepOutput(
            token_ids=np.array(tokens, dtype=np.int32),
            logprobs=np.array(logprobs, dtype=np.float32),
            ranks=np.ones(num_rows, dtype=np.int32),
            top_ids=np.zeros((num_rows, num_top), dtype=np.int32),
            top_logprobs=np.zeros((num_rows, num_top), dtype=np.float32),
        )


def fake_info(config: ExecutorConfig, num_blocks: int) -> EngineInfo:
    """What an engine over a fake executor says of itself."""
    return EngineInfo(
        model_path="fake",
        architecture="fake",
        vocab_size=VOCAB_SIZE,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        num_blocks=num_blocks,
        block_size=config.block_size,
        kv_cache_bytes=0,
        weight_bytes=0,
        device="fake",
        isa="python",
        num_threads=1,
        load_s=0.0,
    )

"""One step's metadata on the device: what the nodes of a program read.

A step's sequences come in the order of its rows: first those with one token each whose attention is decode attention,
then all others. Padding rows, which make a step as large as the graph it replays, have no slot and no tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmserve import _C
from llmserve.config import ExecutorConfig
from llmserve.ops.cuda.decode_attention import SplitWork, choose_split, plan_work
from llmserve.ops.cuda.kv_cache import KvCache
from llmserve.ops.cuda.launchers import Launchers
from llmserve.ops.cuda.prefill_attention import QueryWork, plan_query_tiles
from llmserve.ops.cuda.upload import Upload, upload_bytes
from llmserve.ops.protocol import StepInput

SPARE_WORK: Final = 2048
"""Splits beyond one for each sequence: `choose_split` makes fewer than four for each multiprocessor."""
DETERMINISTIC_SPLIT: Final = 256
_EMULATED_SMS: Final = 4
_ANY_WORK: Final = 1 << 30
_TABLE_CHANGES: Final = 1 << 16
"""Changed entries of the block tables that are sent at once."""


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """Of the sequences behind the decodes."""

    query_start: Tensor  # int32 [S + 1], of the rows behind the decodes
    queries: QueryWork


@dataclass(slots=True)
class DeviceStep:
    """T tokens, S sequences, R logit rows."""

    launchers: Launchers
    caches: Mapping[int, KvCache]
    token_ids: Tensor  # int32 [T]
    positions: Tensor  # int32 [T]
    slots: Tensor  # int64 [T], -1: padding
    logit_rows: Tensor | None  # int64 [R]; None: every row
    num_decodes: int
    """Leading sequences of one token for decode attention."""
    seq_lens: Tensor  # int32 [S]
    block_tables: Tensor  # int32 [S, max_blocks]
    decode: Mapping[int, SplitWork]
    """By attention window; empty without decodes."""
    prefill: PrefillWork | None
    num_sms: int
    """Multiprocessors of the GPU."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What the work lists depend on, the same in all layers but for the window."""

    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...]
    """Each that some layer has, ascending."""
    has_decodes: bool
    """Whether sequences of one token go to decode attention."""

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


class StepBuilder:
    """Turns `StepInput`s into `DeviceStep`s. The tensors of a step are valid until the next one is built."""

    def __init__(
        self, launchers: Launchers, config: ExecutorConfig, shape: AttentionShape, caches: Mapping[int, KvCache]
    ) -> None:
        self._launchers = launchers
        self._shape = shape
        self._caches = caches
        self._block_size = config.block_size
        self._deterministic = config.deterministic
        max_blocks = -(-config.max_model_len // config.block_size)
        self._max_tiles = config.max_num_tokens + config.max_num_seqs
        self._mirror = np.zeros((config.max_num_seqs, max_blocks), np.int32)
        self.device = device = launchers.device
        is_gpu = device.type == "cuda"
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else _EMULATED_SMS
        self._tables = torch.zeros(self._mirror.shape, dtype=torch.int32, device=device)
        work = config.max_num_seqs + SPARE_WORK
        if config.deterministic:
            work += config.max_num_seqs * (config.max_model_len // DETERMINISTIC_SPLIT + 1)
        self._upload = Upload(
            device,
            upload_bytes([
                *[(config.max_num_tokens, 4)] * 2, *[(config.max_num_tokens, 8)] * 2,
                *[(config.max_num_seqs + 1, 4)] * 2,
                *[(2 * work, 4), (2, 4), (config.max_num_seqs, 4)] * len(shape.windows),
                (2 * self._max_tiles, 4), (2, 4), (config.max_num_seqs, 4),
            ]),
        )  # fmt: skip
        self._changes = Upload(device, upload_bytes([(_TABLE_CHANGES, 8), (_TABLE_CHANGES, 4)]))

    def fits_graph(self, seq_lens: NDArray[np.int32]) -> bool:
        """Whether the splits of a step of decodes have room in a graph; only fixed splits may have none."""
        return not self._deterministic or int((-(-seq_lens // DETERMINISTIC_SPLIT)).sum()) <= SPARE_WORK

    def sync_tables(self, pool: _C.BlockPool, handles: Iterable[int]) -> None:
        """Bring the block tables on the device up to date for these sequences, in this order."""
        changed = pool.sync_tables(list(handles), self._mirror)
        for first in range(0, len(changed), _TABLE_CHANGES):
            indices = changed[first : first + _TABLE_CHANGES]
            where, blocks = self._changes.send([indices, self._mirror.reshape(-1)[indices]])
            self._tables.view(-1)[where] = blocks

    def build(self, step: StepInput, previous: Tensor | None = None, *, pad_to: int = 0) -> DeviceStep:
        """The step on the device; its tables must be in sync. With `pad_to` it must be one of decodes alone.

        `previous` are the sampled tokens that `previous_rows` speaks of.
        """
        lengths = np.diff(step.query_start)
        others = np.flatnonzero(lengths != 1)
        num_decodes = (int(others[0]) if len(others) else len(lengths)) if self._shape.has_decodes else 0
        padding = max(0, pad_to - len(lengths))
        tokens = [_padded(step.token_ids, padding, 0), _padded(step.positions, padding, 0)]
        slots = _padded(self._slots(step, lengths), padding, -1)
        seq_lens = _padded(step.seq_lens, padding, 0)
        decode_lens = seq_lens[: num_decodes + padding]
        is_whole = len(step.logit_rows) == len(step.token_ids)
        rows = np.empty(0, np.int64) if is_whole else step.logit_rows.astype(np.int64)
        split = self._split(decode_lens)
        decode = self._decode_arrays(decode_lens, split, is_padded=pad_to > 0)
        prefill = self._prefill_arrays(step, num_decodes)
        flat = [*tokens, slots, rows, seq_lens, *decode, *prefill, step.previous_rows]
        token_ids, positions, slots_, rows_, lens, *work, previous_rows = self._upload.send(flat)
        if previous is not None:
            # A row without a token has -1 or -2, which no table has.
            token_ids[: len(previous_rows)] = previous[previous_rows].clamp_(min=0)
        return DeviceStep(
            launchers=self._launchers,
            caches=self._caches,
            token_ids=token_ids,
            positions=positions,
            slots=slots_,
            logit_rows=None if is_whole else rows_,
            num_decodes=num_decodes + padding,
            seq_lens=lens,
            block_tables=self._tables[: len(seq_lens)],
            decode=self._decode_work(work[: len(decode)]),
            prefill=_prefill_work(*work[len(decode) :]) if prefill else None,
            num_sms=self._num_sms,
        )

    def _slots(self, step: StepInput, lengths: NDArray[Any]) -> NDArray[np.int64]:
        """Where each token's key and value lie."""
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        blocks = self._mirror[sequence, step.positions // self._block_size].astype(np.int64)
        return np.asarray(blocks * self._block_size + step.positions % self._block_size)

    def _split(self, seq_lens: NDArray[np.int32]) -> int:
        if self._deterministic:
            return DETERMINISTIC_SPLIT
        return choose_split(seq_lens, self._shape.kv_heads, self._num_sms)

    def _decode_arrays(self, seq_lens: NDArray[np.int32], split: int, *, is_padded: bool) -> list[NDArray[np.int32]]:
        if not len(seq_lens):
            return []
        arrays: list[NDArray[np.int32]] = []
        for window in self._shape.windows:
            work, start = plan_work(seq_lens, split_tokens=split, window=window, max_work=_ANY_WORK)
            extent = np.array([len(work), split], np.int32)
            if is_padded:  # of a size that depends on the number of sequences alone: what comes behind stays in place
                work = np.concatenate((work, np.zeros((len(seq_lens) + SPARE_WORK - len(work), 2), np.int32)))
            arrays += [work, extent, start]
        return arrays

    def _decode_work(self, tensors: list[Tensor]) -> dict[int, SplitWork]:
        triples = zip(*(tensors[part::3] for part in range(3)), strict=True)
        return {window: SplitWork(*triple) for window, triple in zip(self._shape.windows, triples, strict=False)}

    def _prefill_arrays(self, step: StepInput, num_decodes: int) -> list[NDArray[np.int32]]:
        query_start = step.query_start[num_decodes:] - step.query_start[num_decodes]
        if len(query_start) == 1:
            return []
        shape = self._shape
        work = plan_query_tiles(
            query_start, step.seq_lens[num_decodes:], group=shape.group, head_dim=shape.head_dim,
            max_work=self._max_tiles,
        )  # fmt: skip
        return [query_start.astype(np.int32), work, np.array([len(work)], np.int32)]


def _prefill_work(query_start: Tensor, work: Tensor, num_work: Tensor) -> PrefillWork:
    return PrefillWork(query_start, QueryWork(work, num_work))


def _padded(array: NDArray[Any], count: int, value: int) -> NDArray[Any]:
    return array if count == 0 else np.concatenate((array, np.full(count, value, array.dtype)))

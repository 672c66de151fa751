"""Prefill attention by every kind of launchers against float64, and to the bit against decode attention."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest

from tests.cuda.attention_cases import TYPES, Paged, attention, paged, torch, visible
from tests.cuda.test_decode_attention import decode, rule_of
from tests.ops.seeds import fresh_seed

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from llmserve.ops.cuda.decode_attention import AttentionRule
    from llmserve.ops.cuda.launchers import Launchers
    from llmserve.ops.cuda.prefill_attention import QueryWork

CHUNKS: Final = ((1, 1), (15, 15), (65, 3), (64, 17), (257, 1), (300, 5), (35, 35), (0, 0))
"""Tokens in the cache, and how many of them are queries."""
SLACK: Final = 3


class Case:
    """Chunks, their queries, and what is to come out, with rows of no sequence behind."""

    def __init__(
        self,
        launchers: Launchers,
        kind: dtype,
        chunks: list[tuple[int, int]],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 64,
        rule: AttentionRule | None = None,
        is_bidirectional: bool = False,
    ) -> None:
        self.random = np.random.default_rng(fresh_seed())
        self.launchers, self.chunks, self.is_bidirectional = launchers, chunks, is_bidirectional
        self.rule = rule or rule_of(scale=2 / head_dim**0.5)
        on, window = launchers.device, self.rule.window
        first = [max(0, length - count - window + 1) if window else 0 for length, count in chunks]
        self.paged = paged(
            self.random, on, kind, [length for length, _ in chunks],
            kv_heads=kv_heads, head_dim=head_dim, first_visible=first,
        )  # fmt: skip
        self.start = np.cumsum([0, *(count for _, count in chunks)])
        tokens, columns = int(self.start[-1]), heads * head_dim
        memory = torch.full((tokens + SLACK, columns + 8), float("nan"), dtype=torch.bfloat16, device=on)
        self.q = memory[:, :columns].view(tokens + SLACK, heads, head_dim)
        self.q[:tokens] = torch.from_numpy(self.random.standard_normal((tokens, heads, head_dim))).bfloat16().to(on)

    def work(self) -> QueryWork:
        from llmserve.ops.cuda.prefill_attention import QueryWork, plan_query_tiles

        heads, cache, on = self.q.shape[1], self.paged.cache, self.launchers.device
        lens = np.array([length for length, _ in self.chunks])
        group = heads // cache.kv_heads
        work = plan_query_tiles(self.start, lens, group=group, head_dim=cache.head_dim, max_work=1000)
        room = torch.full((len(work) + SLACK, 2), 2**30, dtype=torch.int32, device=on)
        room[: len(work)] = torch.from_numpy(work)
        return QueryWork(room, torch.tensor([len(work)], dtype=torch.int32, device=on))

    def run(self, *, num_ctas: int = 3, fold_tokens: int = 0) -> Tensor:
        rows, heads, head_dim = self.q.shape
        memory = torch.full((rows, heads * head_dim + 8), float("nan"), dtype=torch.bfloat16, device=self.q.device)
        out = memory[:, : heads * head_dim].view(self.q.shape)
        self.launchers.prefill_attention(
            self.q, out, self.paged.cache, self.paged.tables,
            torch.tensor(self.start, dtype=torch.int32, device=self.q.device), self.paged.seq_lens, self.work(),
            self.rule, num_ctas=num_ctas, fold_tokens=fold_tokens, is_bidirectional=self.is_bidirectional,
        )  # fmt: skip
        assert memory[:, heads * head_dim :].isnan().all(), "it wrote behind a row"
        assert out[-SLACK:].isnan().all(), "it wrote rows of no sequence"
        return out[:-SLACK]

    def check(self, out: Tensor, rule: AttentionRule | None = None) -> None:
        rule = rule or self.rule
        for i, (length, count) in enumerate(self.chunks):
            rows = slice(int(self.start[i]), int(self.start[i + 1]))
            seen = visible(length, count, rule, self.q.device, is_causal=not self.is_bidirectional)
            kind = self.paged.cache.k.dtype
            want, bound = attention(self.q[rows], self.paged.sequences[i], seen, rule, kind)
            assert ((out[rows].double() - want).abs() <= bound).all(), f"sequence {i} of {self.chunks}"


def shuffled(chunks: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    order = np.random.default_rng(fresh_seed()).permutation(len(chunks))
    return [chunks[i] for i in order]


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128, 256])
def test_agrees_with_float64(launchers: Launchers, head_dim: int, kind: dtype) -> None:
    case = Case(launchers, kind, shuffled(CHUNKS), head_dim=head_dim, kv_heads=1)
    case.check(case.run())


@pytest.mark.parametrize("head_dim", [8, 24, 72, 192])
def test_heads_of_odd_widths(launchers: Launchers, head_dim: int) -> None:
    case = Case(launchers, torch.bfloat16, [(70, 3), (9, 9)], head_dim=head_dim)
    case.check(case.run())


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 7, 17, 33])
def test_any_number_of_queries_for_a_key(launchers: Launchers, group: int, kind: dtype) -> None:
    case = Case(launchers, kind, [(70, 3), (20, 2)], heads=2 * group)
    case.check(case.run())


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("window", [1, 20, 100])
@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_what_is_outside_the_window_is_not_read(
    launchers: Launchers, is_bidirectional: bool, window: int, kind: dtype
) -> None:
    chunks = [(1, 1), (35, 35), (200, 3), (130, 18)]
    rule = rule_of(window=window)
    case = Case(launchers, kind, chunks, kv_heads=1, heads=3, rule=rule, is_bidirectional=is_bidirectional)
    case.check(case.run())


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"sinks": True}, {"softcap": 30.0, "sinks": True, "window": 90}])
def test_options(launchers: Launchers, options: dict[str, Any], kind: dtype) -> None:
    if "sinks" in options:
        sinks = np.random.default_rng(fresh_seed()).uniform(-3, 3, 4)
        options = {**options, "sinks": torch.from_numpy(sinks).float().to(launchers.device)}
    case = Case(launchers, kind, [(1, 1), (130, 10)], rule=rule_of(**options))
    out = case.run()
    case.check(out)
    changes: tuple[tuple[str, Any], ...] = (("sinks", None), ("softcap", 0.0))
    for name, other in changes:
        if name in options:
            with pytest.raises(AssertionError):
                case.check(out, replace(case.rule, **{name: other}))


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_all_see_all_where_it_is_bidirectional(launchers: Launchers, kind: dtype) -> None:
    case = Case(launchers, kind, [(70, 20), (33, 33), (1, 1)], is_bidirectional=True)
    out = case.run()
    case.check(out)
    case.is_bidirectional = False
    with pytest.raises(AssertionError):
        case.check(out)


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_a_mistake_would_be_seen(launchers: Launchers, kind: dtype) -> None:
    case = Case(launchers, kind, [(150, 25)], rule=rule_of(scale=0.05))
    out = case.run()
    case.check(out)
    right = case.paged.sequences[0]
    for token in (0, 64, 149):
        changed = replace(right, v=right.v.clone())
        changed.v[token] = 0.0
        case.paged.sequences[0] = changed
        with pytest.raises(AssertionError):
            case.check(out)
    case.paged.sequences[0] = right
    for options in ({"window": 130}, {"scale": 0.06}):
        with pytest.raises(AssertionError):
            case.check(out, replace(case.rule, **options))


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "fold", "options"),
    [(64, 64, {"window": 150, "softcap": 20.0, "sinks": True}), (80, 128, {}), (128, 64, {}), (256, 64, {})],
)
def test_folded_rows_are_those_of_decode(
    launchers: Launchers, options: dict[str, Any], fold: int, head_dim: int, kind: dtype
) -> None:
    if "sinks" in options:
        options = {**options, "sinks": torch.linspace(-2, 2, 6, device=launchers.device)}
    case = Case(launchers, kind, [(300, 3), (64, 2), (130, 7)], heads=6, head_dim=head_dim, rule=rule_of(**options))
    out = case.run(fold_tokens=fold)
    case.check(out)
    for i, (length, count) in enumerate(case.chunks):
        table, sequence = case.paged.tables[i : i + 1].expand(count, -1), case.paged.sequences[i]
        lens = torch.arange(length - count + 1, length + 1, dtype=torch.int32, device=launchers.device)
        rows = slice(int(case.start[i]), int(case.start[i + 1]))
        alone = Paged(case.paged.cache, table.contiguous(), lens, [sequence] * count)
        assert torch.equal(out[rows], decode(launchers, case.q[rows], alone, case.rule, split=fold))


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("fold_tokens", [0, 64])
def test_a_row_depends_neither_on_the_others_nor_on_the_grid(
    launchers: Launchers, fold_tokens: int, kind: dtype
) -> None:
    case = Case(launchers, kind, [(150, 15), (64, 2), (129, 1)], heads=6)
    together = case.run(fold_tokens=fold_tokens)
    assert torch.equal(together, case.run(num_ctas=40, fold_tokens=fold_tokens))
    whole, chunks, start, q = case.paged, case.chunks, case.start, case.q
    for i in range(len(chunks)):
        case.paged = Paged(whole.cache, whole.tables[i : i + 1], whole.seq_lens[i : i + 1], whole.sequences[i : i + 1])
        case.chunks, case.start = chunks[i : i + 1], np.array([0, chunks[i][1]])
        case.q = torch.cat([q[start[i] : start[i + 1]], q[-SLACK:]])
        assert torch.equal(together[start[i] : start[i + 1]], case.run(num_ctas=1, fold_tokens=fold_tokens))


@pytest.mark.parametrize("wrong", ["q", "out", "block_tables", "query_start", "seq_lens", "work", "fold_tokens"])
def test_a_tensor_that_does_not_fit_is_named(launchers: Launchers, wrong: str) -> None:
    case = Case(launchers, torch.bfloat16, [(20, 5), (6, 6)])
    tensors: dict[str, Any] = {
        "q": case.q[:11],
        "out": torch.zeros_like(case.q[:11]),
        "block_tables": case.paged.tables,
        "query_start": torch.tensor([0, 5, 11], dtype=torch.int32, device=launchers.device),
        "seq_lens": case.paged.seq_lens,
    }
    work, fold = case.work(), 0
    if wrong == "work":
        work = replace(work, work=work.work.long())
    elif wrong == "fold_tokens":
        fold = 80
    else:
        tensors[wrong] = {
            "q": lambda x: x[:, :3],
            "out": lambda x: x.half(),
            "block_tables": lambda x: x[:1],
            "query_start": lambda x: x[:2],
            "seq_lens": lambda x: x.long(),
        }[wrong](tensors[wrong])
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        launchers.prefill_attention(
            tensors["q"], tensors["out"], case.paged.cache, tensors["block_tables"], tensors["query_start"],
            tensors["seq_lens"], work, case.rule, num_ctas=1, fold_tokens=fold,
        )  # fmt: skip


def test_the_plan_has_every_row_once_and_long_ones_first() -> None:
    from llmserve.ops.cuda.prefill_attention import plan_query_tiles

    random = np.random.default_rng(fresh_seed())
    for _ in range(50):
        counts = random.integers(0, 300, random.integers(0, 6))
        lens, group = counts + random.integers(0, 500, len(counts)), int(random.integers(1, 20))
        start = np.cumsum([0, *counts])
        work = plan_query_tiles(start, lens, group=group, head_dim=64, max_work=10_000)
        want = {(i, tile) for i, count in enumerate(counts) for tile in range(-(-int(count) * group // 128))}
        assert len(work) == len(want)
        assert {tuple(row) for row in work.tolist()} == want
        seen = [lens[i] - counts[i] + min(((t + 1) * 128 - 1) // group + 1, counts[i]) for i, t in work]
        assert seen == sorted(seen, reverse=True)
    with pytest.raises(ValueError, match=r"^max_work: 2 tiles, room for 1"):
        plan_query_tiles(np.array([0, 65]), np.array([70]), group=1, head_dim=256, max_work=1)

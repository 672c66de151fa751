"""Decode attention by every kind of launchers against float64: lengths at every edge, poison around what is visible."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest

from tests.cuda.attention_cases import EDGES, TYPES, Paged, attention, paged, torch, visible
from tests.ops.seeds import fresh_seed

if TYPE_CHECKING:
    from numpy.random import Generator
    from torch import Tensor, device, dtype

    from llmserve.ops.cuda.decode_attention import AttentionRule, SplitWork, SplitWorkspace
    from llmserve.ops.cuda.launchers import Launchers

GUARD: Final = 64
SLACK: Final = 3


def rule_of(**options: Any) -> AttentionRule:
    from llmserve.ops.cuda.decode_attention import AttentionRule

    return AttentionRule(**{"scale": 0.3, **options})


def planned(seq_lens: Tensor, heads: int, head_dim: int, split: int, window: int) -> tuple[SplitWork, SplitWorkspace]:
    """On the device, with room to spare and poison in it."""
    from llmserve.ops.cuda.decode_attention import SplitWork, SplitWorkspace, plan_work

    on = seq_lens.device
    work, start = plan_work(seq_lens.cpu().numpy(), split_tokens=split, window=window, max_work=10_000)
    room = torch.full((len(work) + SLACK, 2), 2**30, dtype=torch.int32, device=on)
    room[: len(work)] = torch.from_numpy(work)
    extent = torch.tensor([len(work), split], dtype=torch.int32, device=on)
    state = torch.full((len(room), heads, 2), float("nan"), device=on)
    out = torch.full((len(room), heads, head_dim), float("nan"), device=on)
    return SplitWork(room, extent, torch.from_numpy(start).to(on)), SplitWorkspace(out, state)


def decode(
    launchers: Launchers, q: Tensor, case: Paged, rule: AttentionRule, *, split: int = 128, num_ctas: int = 5
) -> Tensor:
    sequences, heads, head_dim = q.shape
    work, workspace = planned(case.seq_lens, heads, head_dim, split, rule.window)
    memory = torch.full((sequences, heads * head_dim + GUARD), float("nan"), dtype=torch.bfloat16, device=q.device)
    out = memory[:, : heads * head_dim].view(sequences, heads, head_dim)
    launchers.decode_attention(q, out, case.cache, case.tables, case.seq_lens, work, workspace, rule, num_ctas=num_ctas)
    assert memory[:, heads * head_dim :].isnan().all(), "it wrote behind a row"
    assert workspace.out[-SLACK:].isnan().all(), "it wrote behind the workspace"
    return out


def queries(random: Generator, on: device, sequences: int, heads: int, head_dim: int) -> Tensor:
    memory = torch.full((sequences, heads * head_dim + 8), float("nan"), dtype=torch.bfloat16, device=on)
    q = memory[:, : heads * head_dim].view(sequences, heads, head_dim)
    q.copy_(torch.from_numpy(random.standard_normal(q.shape)))
    return q


def expected(q: Tensor, case: Paged, rule: AttentionRule) -> tuple[Tensor, Tensor]:
    values = [
        attention(q[i : i + 1], sequence, visible(len(sequence.k), 1, rule, q.device), rule, case.cache.k.dtype)
        if len(sequence.k)
        else (torch.zeros_like(q[:1]).double(), torch.zeros_like(q[:1]).double())
        for i, sequence in enumerate(case.sequences)
    ]
    return torch.cat([value for value, _ in values]), torch.cat([bound for _, bound in values])


def check(out: Tensor, q: Tensor, case: Paged, rule: AttentionRule) -> None:
    want, bound = expected(q, case, rule)
    assert ((out.double() - want).abs() <= bound).all()


def seen_first(seq_lens: list[int], window: int) -> list[int]:
    return [max(0, length - window) if window else 0 for length in seq_lens]


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128, 256])
def test_agrees_with_float64(launchers: Launchers, head_dim: int, kind: dtype) -> None:
    random = np.random.default_rng(fresh_seed())
    lens = [int(x) for x in random.permutation([*EDGES, 0])]
    case = paged(random, launchers.device, kind, lens, head_dim=head_dim, kv_heads=1)
    q = queries(random, launchers.device, len(lens), 4, head_dim)
    rule = rule_of(scale=2 / head_dim**0.5)
    out = decode(launchers, q, case, rule, split=int(random.choice([64, 128, 256])))
    check(out, q, case, rule)
    assert (out[lens.index(0)] == 0).all()


@pytest.mark.parametrize("head_dim", [8, 24, 72, 192])
def test_heads_of_odd_widths(launchers: Launchers, head_dim: int) -> None:
    random = np.random.default_rng(fresh_seed())
    case = paged(random, launchers.device, torch.bfloat16, [70, 9], head_dim=head_dim)
    q = queries(random, launchers.device, 2, 4, head_dim)
    check(decode(launchers, q, case, rule_of(), split=64), q, case, rule_of())


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 5, 7, 16, 17, 64])
def test_any_number_of_queries_for_a_key(launchers: Launchers, group: int, kind: dtype) -> None:
    random = np.random.default_rng(fresh_seed())
    case = paged(random, launchers.device, kind, [70, 33], kv_heads=2)
    q = queries(random, launchers.device, 2, 2 * group, 64)
    check(decode(launchers, q, case, rule_of(), split=64), q, case, rule_of())


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("window", [1, 16, 100, 130, 1000])
def test_what_is_before_the_window_is_not_read(launchers: Launchers, window: int, kind: dtype) -> None:
    random = np.random.default_rng(fresh_seed())
    lens = [1, 17, 64, 65, 200, 257, 300]
    case = paged(random, launchers.device, kind, lens, first_visible=seen_first(lens, window))
    q = queries(random, launchers.device, len(lens), 4, 64)
    rule = rule_of(window=window)
    check(decode(launchers, q, case, rule, split=64), q, case, rule)


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"sinks": True}, {"softcap": 30.0, "sinks": True, "window": 90}])
def test_options(launchers: Launchers, options: dict[str, Any], kind: dtype) -> None:
    random = np.random.default_rng(fresh_seed())
    lens = [1, 65, 0, 150]
    case = paged(random, launchers.device, kind, lens)
    q = queries(random, launchers.device, len(lens), 6, 64)
    if "sinks" in options:
        sinks = torch.from_numpy(random.uniform(-3, 3, 6)).float().to(launchers.device)
        options = {**options, "sinks": sinks}
    rule = rule_of(**options)
    check(decode(launchers, q, case, rule, split=64), q, case, rule)
    changes: tuple[tuple[str, Any], ...] = (("sinks", None), ("softcap", 0.0))
    for name, other in changes:
        if name in options:
            with pytest.raises(AssertionError):
                check(decode(launchers, q, case, rule, split=64), q, case, replace(rule, **{name: other}))


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_a_mistake_would_be_seen(launchers: Launchers, kind: dtype) -> None:
    random = np.random.default_rng(fresh_seed())
    case = paged(random, launchers.device, kind, [300, 40])
    q = queries(random, launchers.device, 2, 8, 64)
    rule = rule_of(scale=0.05)  # all tokens count
    out = decode(launchers, q, case, rule)
    check(out, q, case, rule)
    for token in (0, 131, 299):
        changed = replace(case.sequences[0], v=case.sequences[0].v.clone())
        changed.v[token] = 0.0
        with pytest.raises(AssertionError):
            check(out, q, replace(case, sequences=[changed, case.sequences[1]]), rule)
    for options in ({"window": 299}, {"scale": 0.06}):
        with pytest.raises(AssertionError):
            check(out, q, case, replace(rule, **options))


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_a_row_depends_neither_on_the_others_nor_on_the_grid(launchers: Launchers, kind: dtype) -> None:
    random = np.random.default_rng(fresh_seed())
    lens = [300, 64, 0, 129, 17]
    case = paged(random, launchers.device, kind, lens)
    q = queries(random, launchers.device, len(lens), 6, 64)
    rule = rule_of(window=200)
    together = decode(launchers, q, case, rule)
    assert torch.equal(together, decode(launchers, q, case, rule, num_ctas=64))
    for i in range(len(lens)):
        alone = Paged(case.cache, case.tables[i : i + 1], case.seq_lens[i : i + 1], case.sequences[i : i + 1])
        assert torch.equal(together[i : i + 1], decode(launchers, q[i : i + 1], alone, rule, num_ctas=1))


def test_no_sequences_are_no_work(launchers: Launchers) -> None:
    random = np.random.default_rng(fresh_seed())
    case = paged(random, launchers.device, torch.bfloat16, [5])
    q = queries(random, launchers.device, 1, 2, 64)
    empty = Paged(case.cache, case.tables[:0], case.seq_lens[:0], [])
    assert decode(launchers, q[:0], empty, rule_of()).shape == (0, 2, 64)


def test_nan_of_a_value_reaches_its_sequence_alone(launchers: Launchers) -> None:
    random = np.random.default_rng(fresh_seed())
    case = paged(random, launchers.device, torch.bfloat16, [70, 70], block_size=16, kv_heads=1)
    case.cache.k[int(case.tables[0, 4]), 0, 3, 5] = float("nan")
    out = decode(launchers, queries(random, launchers.device, 2, 2, 64), case, rule_of())
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


@pytest.mark.parametrize("wrong", ["q", "out", "block_tables", "seq_lens", "work", "workspace.out", "sinks", "extent"])
def test_a_tensor_that_does_not_fit_is_named(launchers: Launchers, wrong: str) -> None:
    random = np.random.default_rng(fresh_seed())
    case = paged(random, launchers.device, torch.bfloat16, [5, 6])
    q = queries(random, launchers.device, 2, 4, 64)
    out, tables, lens, rule = torch.zeros_like(q), case.tables, case.seq_lens, rule_of()
    work, workspace = planned(lens, 4, 64, 64, 0)
    if wrong == "q":
        q = q[:, :3]
    elif wrong == "out":
        out = out.float()
    elif wrong == "block_tables":
        tables = tables.long()
    elif wrong == "seq_lens":
        lens = lens[:1]
    elif wrong == "work":
        work = replace(work, work=work.work.T)
    elif wrong == "workspace.out":
        workspace = replace(workspace, out=workspace.out[:1])
    elif wrong == "sinks":
        rule = rule_of(sinks=torch.zeros(3, device=launchers.device))
    else:
        work = replace(work, extent=work.extent[:1])
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        launchers.decode_attention(q, out, case.cache, tables, lens, work, workspace, rule, num_ctas=1)


def test_the_plan_has_every_split_once() -> None:
    from llmserve.ops.cuda.decode_attention import plan_work

    random = np.random.default_rng(fresh_seed())
    for _ in range(50):
        lens, split = random.integers(0, 1000, random.integers(0, 9)), int(random.choice([64, 128, 256]))
        window = int(random.choice([0, 1, 100, 5000]))
        work, start = plan_work(lens, split_tokens=split, window=window, max_work=200)
        want: list[tuple[int, int]] = []
        for i, length in enumerate(lens):
            assert start[i] == len(want)
            first = max(0, length - window) if window else 0
            want += [(i, n) for n in range(20) if n * split < length and (n + 1) * split > first]
        assert [tuple(row) for row in work.tolist()] == want
    with pytest.raises(ValueError, match=r"^max_work: 3 splits, room for 2"):
        plan_work(np.array([129]), split_tokens=64, window=0, max_work=2)
    with pytest.raises(ValueError, match=r"^split_tokens: 80 "):
        plan_work(np.array([129]), split_tokens=80, window=0, max_work=2)


def test_splits_are_as_large_as_leaves_no_sm_idle() -> None:
    from llmserve.ops.cuda.decode_attention import choose_split

    assert choose_split(np.array([10]), 8, 132) == 64
    assert choose_split(np.zeros(0, np.int32), 8, 132) == 64
    assert choose_split(np.full(256, 4096), 8, 132) == 4096
    split = choose_split(np.array([131072]), 8, 132)
    assert 131072 // split * 8 >= 2 * 132 > 131072 // (2 * split) * 8

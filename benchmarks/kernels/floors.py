"""What finished kernels must reach, and what of a run does not.

Shares are of the nearer roof, memory or arithmetic, at the moment of the measurement. A model's layer is judged as a
whole: its four matrices, weighted by their time. The head is judged alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from benchmarks.kernels.records import LAYER_PARTS, Disturbed, Gemm, Versus

ONE_ROW: Final = 0.85
"""Of the DRAM rate, at one row."""
LARGE_SHAPES: Final = ("llama-3.2-1b", "llama-3-8b")
"""Models of a billion weights and up: `ONE_ROW` is asked of them only."""
FEW_ROWS: Final = (2, 4)
FEW_ROWS_RATIO: Final = 1.10
"""Their time against one row's."""
EIGHT_ROWS: Final = 0.60
MANY_ROWS: Final = {
    "q4_0": 0.68,
    "q4_1": 0.62,
    "q4_g64": 0.68,
    "q4_g64m": 0.62,
    "q4_g128": 0.75,
    "q4_g128m": 0.62,
    "q8_0": 0.68,
    "i8": 0.75,
    "bf16": 0.70,
}
"""From 16 rows on, by packed type."""
UNJUDGED: Final = frozenset({"q4_nl", "q5_0", "q5_1", "q2_k", "q3_k", "q6_k", "f32"})
"""Types that nothing was promised for: their figures are printed."""
UNJUDGED_ISA: Final = "amx"
"""The roof there is that of the matrix unit, which weights in groups cannot come near: scaling sums is vector work."""
LIBRARY_TYPE: Final = "i8"
"""Must be as fast as the library at LIBRARY_ROWS rows of the square matrix."""
LIBRARY_ROWS: Final = 2048


def misses(gemms: Sequence[Gemm], versus: Sequence[Versus], disturbed: Sequence[Disturbed] = ()) -> list[str]:
    """One line for each bound that is not met, for each type that has none, and for what could not be judged.

    A layer of which a matrix was disturbed is not judged at that number of rows.
    """
    found = [
        f"{name} has no floor: benchmarks/kernels/floors.py has no line for it"
        for name in sorted({one.type for one in gemms} - set(MANY_ROWS) - UNJUDGED)
    ]
    found += [f"{one.type} {one.shape} {one.part} M={one.m}: disturbed in every round" for one in disturbed]
    lost = {(one.type, one.shape, part_of(one), one.m) for one in disturbed}
    whole = [one for one in gemms if (one.type, one.shape, part_of(one), one.m) not in lost]
    for unit in units(whole):
        if unit[0].type in MANY_ROWS:
            found += _unit_misses(unit)
    for one in versus:
        ours = one.ours.get(LIBRARY_TYPE)
        if one.m == LIBRARY_ROWS and ours is not None and ours < one.library_ops_per_s:
            found.append(
                f"{LIBRARY_TYPE} {one.m}x{one.n}x{one.k}: {ours / 1e9:.0f} GOPS, "
                f"{one.library} {one.library_ops_per_s / 1e9:.0f}"
            )
    return found


def units(gemms: Iterable[Gemm]) -> list[list[Gemm]]:
    """What is judged together: the matrices of a layer, or one other matrix, of one type, all rows."""
    groups: dict[tuple[str, str, str], list[Gemm]] = {}
    for one in gemms:
        groups.setdefault((one.type, one.shape, part_of(one)), []).append(one)
    return list(groups.values())


def part_of(one: Gemm | Disturbed) -> str:
    """`layer` for its four matrices, else the matrix itself."""
    return "layer" if one.part in LAYER_PARTS else one.part


def seconds(unit: Iterable[Gemm], m: int) -> float:
    """Of all matrices together; 0 where there are none of so many rows."""
    return sum(one.gemm_s for one in unit if one.m == m)


def share(unit: Iterable[Gemm], m: int, *, dram: bool = False) -> float:
    """Of the nearer roof, or of the DRAM rate, all matrices together: time needed at least / time taken."""
    chosen = [one for one in unit if one.m == m]
    needed = sum((one.dram_share if dram else one.bound_share) * one.gemm_s for one in chosen)
    return needed / seconds(chosen, m) if chosen else 0.0


def name_of(unit: Sequence[Gemm]) -> str:
    """`q4_0 llama-3.2-1b layer`."""
    first = unit[0]
    return f"{first.type} {first.shape} {part_of(first)}"


def _unit_misses(unit: Sequence[Gemm]) -> Iterator[str]:
    rows = sorted({one.m for one in unit})
    name = name_of(unit)
    for m in rows:
        taken = share(unit, m)
        if m == 1 and unit[0].shape in LARGE_SHAPES and share(unit, 1, dram=True) < ONE_ROW:
            yield f"{name} M=1: {share(unit, 1, dram=True):.0%} of the DRAM rate, at least {ONE_ROW:.0%} expected"
        if m in FEW_ROWS and 1 in rows and seconds(unit, m) > FEW_ROWS_RATIO * seconds(unit, 1):
            ratio = seconds(unit, m) / seconds(unit, 1)
            yield f"{name} M={m}: {ratio:.2f} times one row's time, at most {FEW_ROWS_RATIO:.2f} expected"
        if m == 8 and taken < EIGHT_ROWS:
            yield f"{name} M=8: {taken:.0%} of the nearer roof, at least {EIGHT_ROWS:.0%} expected"
        if m >= 16 and taken < MANY_ROWS[unit[0].type]:
            floor = MANY_ROWS[unit[0].type]
            yield f"{name} M={m}: {taken:.0%} of the nearer roof, at least {floor:.0%} expected"

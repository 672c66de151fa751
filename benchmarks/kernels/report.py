"""A run as text, and as a plot: shares of the nearer roof against the number of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from benchmarks.kernels.floors import name_of, seconds, share, units
from benchmarks.kernels.records import LAYER_PARTS, Gemm, Kernels, Roof, Versus
from benchmarks.plot import Lines, draw

_UNITS: Final = {"dram": "GB/s", "int8": "GOPS"}


def text(result: Kernels) -> str:
    """Markdown."""
    lines = [*_roofs(result.roofs), "", *_summary(result.gemms), "", *_gemms(result.gemms)]
    if result.versus:
        lines += ["", *_versus(result.versus)]
    run, host = result.run, result.host
    lost = sum(one.disturbed for one in result.gemms) + run.rounds * len(result.disturbed)
    disturbed = lost / max(1, run.rounds * (len(result.gemms) + len(result.disturbed)))
    lines += ["", f"{run.cpu} (family/model {host.cpu_family_model}), {run.isa}, {run.threads} threads, medians of "
              f"{run.rounds} rounds; other processes kept {result.others_cores:.2f} cores busy and disturbed "
              f"{disturbed:.0%} of the measurements. {host.date[:10]}, commit `{host.commit}`."]  # fmt: skip
    return "\n".join(lines) + "\n"


def plot(result: Kernels) -> str:
    """As SVG: a panel for each shape whose layer was measured at three numbers of rows at least."""
    panels: dict[str, list[tuple[str, list[tuple[float, float]]]]] = {}
    for unit in units(result.gemms):
        rows = sorted({one.m for one in unit})
        if unit[0].part in LAYER_PARTS and len(rows) >= 3:
            points = [(float(m), share(unit, m)) for m in rows]
            panels.setdefault(unit[0].shape, []).append((unit[0].type, points))
    return draw(
        [
            Lines(
                title=f"{shape}: a layer's GEMMs, share of the nearer roof",
                x_title="rows (tokens) of the step",
                series=series,
                highest=1.1,
                percent=True,
            )
            for shape, series in panels.items()
        ]
    )


def _roofs(roofs: Sequence[Roof]) -> Iterator[str]:
    yield "| roof | threads | median | lowest–highest |"
    yield "|---|---:|---:|---:|"
    for one in roofs:
        unit = _UNITS.get(one.name, "GFLOPS")
        spread = f"{one.low / 1e9:.0f}–{one.high / 1e9:.0f}"
        yield f"| {one.name} | {one.threads} | {one.per_s / 1e9:.0f} {unit} | {spread} |"


def _summary(gemms: Sequence[Gemm]) -> Iterator[str]:
    """A line for each unit: its time and share at each number of rows."""
    rows = sorted({one.m for one in gemms})
    yield "| ms (share of the nearer roof) | " + " | ".join(f"M={m}" for m in rows) + " |"
    yield "|---|" + "---:|" * len(rows)
    for unit in units(gemms):
        cells = (f"{seconds(unit, m) * 1e3:.3g} ({share(unit, m):.0%})" if seconds(unit, m) else "" for m in rows)
        yield f"| {name_of(unit)} | " + " | ".join(cells) + " |"


def _gemms(gemms: Sequence[Gemm]) -> Iterator[str]:
    yield "| type | shape | part | N | K | M | µs | with norm | GB/s | GOPS | of DRAM | of arithmetic |"
    yield "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for one in gemms:
        yield (
            f"| {one.type} | {one.shape} | {one.part} | {one.n} | {one.k} | {one.m} | {one.gemm_s * 1e6:.1f} | "
            f"{one.call_s * 1e6:.1f} | {one.bytes_per_s / 1e9:.1f} | {one.ops_per_s / 1e9:.0f} | "
            f"{one.dram_share:.0%} | {one.roof_share:.0%} {one.roof} |"
        )


def _versus(versus: Sequence[Versus]) -> Iterator[str]:
    yield f"| M x N x K | {versus[0].library} | ours |"
    yield "|---|---:|---|"
    for one in versus:
        ours = ", ".join(
            f"{name} {value / 1e9:.0f} ({value / one.library_ops_per_s:.2f}×)" for name, value in one.ours.items()
        )
        yield f"| {one.kind} {one.m}x{one.n}x{one.k} | {one.library_ops_per_s / 1e9:.0f} GOPS | {ours} |"

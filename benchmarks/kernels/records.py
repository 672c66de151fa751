"""What `llmserve_kernel_bench` prints, one record a line, and the result file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from llmserve.tools.bench_host import Host

LAYER_PARTS: Final = ("qkv", "o", "gate_up", "down")
"""Matrices of one layer; the head stands apart."""


class Run(msgspec.Struct, frozen=True, kw_only=True, tag_field="record", tag="run"):
    """What all records of a run belong to."""

    cpu: str
    isa: str
    threads: int
    rounds: int
    commit: str
    compiler: str


class Roof(msgspec.Struct, frozen=True, kw_only=True, tag_field="record", tag="roof"):
    """What the machine can do at most: the median of the run's samples."""

    name: str
    """`dram`, or the arithmetic: `int8`, `bf16`, `f32`."""
    threads: int
    per_s: float
    """Bytes or operations."""
    low: float
    high: float


class Gemm(msgspec.Struct, frozen=True, kw_only=True, tag_field="record", tag="gemm"):
    """One GEMM: medians of the rounds."""

    type: str
    shape: str
    part: str
    n: int
    k: int
    m: int
    copies: int
    """Of the matrix, which took turns."""
    disturbed: int
    """Rounds that do not count, because a neighbour disturbed each attempt."""
    weight_bytes: int
    gemm_s: float
    """The node: dot products, epilogue, the wait for the slowest worker."""
    gemm_s_low: float
    gemm_s_high: float
    call_s: float
    """With the norm that quantizes its input, where the network has one."""
    bytes_per_s: float
    ops_per_s: float
    dram_share: float
    roof: str
    """The arithmetic that bounds it."""
    roof_share: float
    """As `dram_share`: of the roof just before and after each measurement."""

    @property
    def bound_share(self) -> float:
        """Of the nearer roof: the share of the time that is needed at least."""
        return max(self.dram_share, self.roof_share)


class Disturbed(msgspec.Struct, frozen=True, kw_only=True, tag_field="record", tag="disturbed"):
    """A GEMM of which no round counts."""

    type: str
    shape: str
    part: str
    m: int


class Versus(msgspec.Struct, frozen=True, kw_only=True):
    """The same product by a library and by ours, in turn; medians of the rounds."""

    kind: str
    """`int8` or `bf16`."""
    n: int
    k: int
    m: int
    library: str
    library_ops_per_s: float
    ours: dict[str, float]
    """Operations per second of each packed type that computes in this kind."""


class Kernels(msgspec.Struct, frozen=True, kw_only=True):
    """The result file."""

    host: Host
    run: Run
    others_cores: float
    """Cores that other processes kept busy meanwhile."""
    roofs: list[Roof]
    gemms: list[Gemm]
    disturbed: list[Disturbed]
    versus: list[Versus]


class Printed(msgspec.Struct, frozen=True, kw_only=True):
    """All lines of one run of the executable."""

    run: Run
    roofs: list[Roof]
    gemms: list[Gemm]
    disturbed: list[Disturbed]


def parse(lines: Iterable[str]) -> Printed:
    """Read the executable's lines. Raises `ValueError` (msgspec's is one) for lines of another kind or none."""
    decoder = msgspec.json.Decoder(Run | Roof | Gemm | Disturbed)
    records = [decoder.decode(line) for line in lines if line.strip()]
    runs = [one for one in records if isinstance(one, Run)]
    if len(runs) != 1:
        raise ValueError(f"{len(runs)} lines say what the run was, expected one")
    return Printed(
        run=runs[0],
        roofs=[one for one in records if isinstance(one, Roof)],
        gemms=[one for one in records if isinstance(one, Gemm)],
        disturbed=[one for one in records if isinstance(one, Disturbed)],
    )

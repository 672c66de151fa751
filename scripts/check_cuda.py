"""Compiles every CUDA source for sm_80 and sm_90a, without a GPU: warnings are errors, and no kernel may take more than
the committed table says.

The table, `csrc/cuda/resources.json`, has registers, bytes of spills and shared memory of each kernel; `--write` makes
it anew. Registers depend on the compiler: with another nvcc than the table's, spills alone are judged. Where there is
no nvcc nothing is checked, and that is said.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
SOURCES: Final = ROOT / "csrc" / "cuda"
TABLE: Final = SOURCES / "resources.json"
ARCHITECTURES: Final = ("sm_80", "sm_90a")
FLAGS: Final = ("-std=c++20", "-O3", "-lineinfo", "--Werror", "all-warnings", "-Xptxas", "-v", "-cubin")
_ENTRY: Final = re.compile(r"Compiling entry function '(\w+)'")
_UNNAMED: Final = re.compile(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}")
"""The unnamed namespace of a source, which nvcc names after where the source lies."""
_SPILLS: Final = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED: Final = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass(frozen=True, slots=True)
class Usage:
    """What one kernel takes."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def parse(text: str) -> dict[str, Usage]:
    """By mangled name without unnamed namespaces, from what `ptxas -v` says."""
    found: dict[str, Usage] = {}
    name, spilled = "", 0
    for line in text.splitlines():
        if entry := _ENTRY.search(line):
            name, spilled = _UNNAMED.sub("", entry[1]), 0
        elif spills := _SPILLS.search(line):
            spilled = int(spills[1]) + int(spills[2])
        elif (used := _USED.search(line)) and name:
            found[name] = Usage(int(used[1]), spilled, int(used[2] or 0))
            name = ""
    return found


def compile_one(nvcc: str, source: Path, architecture: str) -> dict[str, Usage]:
    """Raises `CalledProcessError` with the compiler's words."""
    out = ROOT / "build" / "cuda-check" / f"{source.stem}.{architecture}.cubin"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [nvcc, *FLAGS, f"-arch={architecture}", f"-I{ROOT / 'csrc'}", str(source), "-o", str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return parse(done.stdout)


def misses(table: dict[str, Any], found: dict[str, dict[str, Usage]], *, same_compiler: bool) -> list[str]:
    """Kernels that take more than the table allows, that it does not have, or that are no more."""
    lines = []
    for place, kernels in found.items():
        known = table.get(place, {})
        lines += [f"{place}: {name} is not in the table" for name in sorted(kernels.keys() - known.keys())]
        lines += [f"{place}: {name} is in the table and not in the source" for name in sorted(known.keys() - kernels)]
        for name in sorted(kernels.keys() & known.keys()):
            for what, is_now in asdict(kernels[name]).items():
                is_judged = same_compiler or what == "spill_bytes"
                if is_judged and is_now > known[name][what]:
                    lines.append(f"{place}: {name}: {what} {is_now}, the table has {known[name][what]}")
    return lines + [f"{place}: is in the table and not in the source" for place in sorted(table.keys() - found.keys())]


def main() -> int:
    """Compile all, judge or write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--write", action="store_true", help="make the table anew")
    write = parser.parse_args().write
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("skipped: CUDA sources are not compiled: no nvcc on this machine")
        return 0
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout.split()[-1]
    jobs = [(source, architecture) for source in sorted(SOURCES.glob("*.cu")) for architecture in ARCHITECTURES]
    try:
        with ThreadPoolExecutor() as pool:
            results = list(pool.map(lambda job: compile_one(nvcc, *job), jobs))
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(error.cmd)}\n{error.output}")
        return 1
    found = {f"{source.name} {architecture}": one for (source, architecture), one in zip(jobs, results, strict=True)}
    if write:
        kernels = {place: {name: asdict(usage) for name, usage in one.items()} for place, one in found.items()}
        TABLE.write_text(json.dumps({"nvcc": version, "kernels": kernels}, indent=1, sort_keys=True) + "\n")
    table = json.loads(TABLE.read_text())
    failures = misses(table["kernels"], found, same_compiler=table["nvcc"] == version)
    for failure in failures:
        print(f"error: {failure}")
    every = [usage for one in found.values() for usage in one.values()]
    print(
        f"CUDA: {len(jobs)} objects, {len(every)} kernels, at most {max(one.registers for one in every)} registers, "
        f"{sum(usage.spill_bytes > 0 for usage in every)} with spills, {len(failures)} errors"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

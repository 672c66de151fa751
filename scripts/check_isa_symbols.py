"""Fails when an ISA object file carries a weak symbol that another object could define too.

The linker keeps one copy of a weak symbol. If that copy was compiled for AVX-512, an older CPU dies of an illegal
instruction in a harmless `std::vector` or inline helper. So kernels are in a namespace named for their ISA level,
and any other weak definition in their objects is an error.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OBJECT_FOLDER = re.compile(r"llmserve_isa_(\w+)\.dir$")
HARMLESS = "DW.ref."  # a pointer to a personality routine, the same at every level


def weak_definitions(path: Path) -> list[str]:
    """Demangled names of the weak and unique symbols that an object file defines."""
    output = subprocess.run(
        ["nm", "--demangle", "--defined-only", str(path)], check=True, capture_output=True, text=True
    ).stdout
    symbols = (line.split(" ", 2) for line in output.splitlines())
    return [parts[2] for parts in symbols if len(parts) == 3 and parts[1] in "WVu"]


def is_foreign(symbol: str, level: str) -> bool:
    """Whether another object may hold the same symbol compiled with other flags."""
    own = re.search(rf"(?:^|[\s<(,&*])llmserve::{level}::", symbol) is not None and not symbol.startswith("std::")
    return not own and not symbol.startswith(HARMLESS)


def main() -> int:
    """Checks every object of the release build; 1 if any symbol is foreign or nothing was built."""
    folders = [
        path for path in sorted((ROOT / "build").glob("cpython-*/CMakeFiles/*")) if OBJECT_FOLDER.match(path.name)
    ]
    objects = [(folder, path) for folder in folders for path in sorted(folder.rglob("*.o"))]
    failures = list[str]()
    for folder, path in objects:
        level = OBJECT_FOLDER.sub(r"\1", folder.name)
        failures += [f"{path.name}: {name}" for name in weak_definitions(path) if is_foreign(name, level)]
    for failure in failures:
        print(f"error: weak symbol in ISA object {failure}")
    if not objects:
        print("error: no ISA objects under build/; run `make build` first")
    print(f"ISA symbols: {len(objects)} objects, {len(failures)} foreign weak symbols")
    return 1 if failures or not objects else 0


if __name__ == "__main__":
    sys.exit(main())

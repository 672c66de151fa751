"""The GPU benchmarks: `make gpu-bench`. Writes JSON into the folder named by OUT, or benchmarks/results/local."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.kernels import run as run_kernels
from benchmarks.gpu.model import run as run_model
from benchmarks.gpu.quality import run as run_quality
from benchmarks.gpu.timing import Ceilings, ceilings

PARTS: Final = ("kernels", "quality", "model")


def main() -> int:
    """Run the parts in turn; one that fails is recorded and does not stop the others."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated: %(default)s")
    parser.add_argument("--model", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf, for the part `quality`")
    arguments = parser.parse_args()
    folder = Path(os.environ.get("OUT") or "benchmarks/results/local")
    folder.mkdir(parents=True, exist_ok=True)
    limits = ceilings()
    results: dict[str, Any] = {"ceilings": asdict(limits)}
    print(json.dumps(results), flush=True)
    runs: dict[str, Callable[[Ceilings], Any]] = {
        "kernels": run_kernels,
        "quality": lambda _: run_quality(arguments.model) if arguments.model else "skipped: no --model",
        "model": run_model,
    }
    failed = False
    for part in arguments.parts.split(","):
        started = time.perf_counter()
        try:
            results[part] = runs[part](limits)
        except Exception as error:  # noqa: BLE001  # the other parts are worth their time
            results[part], failed = {"error": f"{type(error).__name__}: {error}"}, True
        results[f"{part}_s"] = time.perf_counter() - started
        print(json.dumps({part: results[part]}), flush=True)
        (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""The GPU benchmarks: `make gpu-bench`. Writes JSON into the folder named by OUT, or benchmarks/results/local.

Each part has a process of its own: what ends one leaves the results of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

PARTS: Final = ("kernels", "quality", "bf16", "i4_g128", "deterministic")


def run_part(part: str, model: Path | None) -> Any:
    """What a part finds, with the ceilings it was measured beside."""
    from benchmarks.gpu import timing

    limits = timing.ceilings()
    if part == "kernels":
        from benchmarks.gpu import kernels

        found: Any = kernels.run(limits)
    elif part == "quality":
        from benchmarks.gpu import quality

        found = quality.run(model) if model is not None else "skipped: no --model"
    else:
        from benchmarks.gpu import model as networks

        found = networks.run(part, limits)
    return {"ceilings": asdict(limits), "found": found}


def main() -> int:
    """Run the parts one after the other; one that fails is recorded and does not stop the others."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated: %(default)s")
    parser.add_argument("--model", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf, for the part `quality`")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here is not None:
        try:
            result = run_part(arguments.parts, arguments.model)
        except Exception:  # noqa: BLE001  # it is recorded
            result = {"error": traceback.format_exc()}
        arguments.here.write_text(json.dumps(result) + "\n")
        return 1 if "error" in result else 0
    return _run_all(arguments)


def _run_all(arguments: argparse.Namespace) -> int:
    folder = Path(os.environ.get("OUT") or "benchmarks/results/local")
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    deadline, failed = time.monotonic() + 60 * arguments.minutes, False
    for part in arguments.parts.split(","):
        started, report = time.monotonic(), folder / f"{part}.part.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--parts", part, "--here", str(report)]
        command += ["--model", str(arguments.model)] if arguments.model else []
        try:
            code: int | str = subprocess.run(command, check=False, timeout=max(5.0, deadline - started)).returncode
        except subprocess.TimeoutExpired:
            code = "timed out"
        results[part] = json.loads(report.read_text()) if report.exists() else {"error": f"ended with {code}"}
        report.unlink(missing_ok=True)
        results[part]["seconds"] = round(time.monotonic() - started, 1)
        failed |= "error" in results[part]
        (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({part: results[part]}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

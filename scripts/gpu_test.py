"""Runs the GPU tests, then those of the kernels under compute-sanitizer, and writes what came out as JSON.

Each file of tests has a process of its own: a kernel that reads where it must not ends everything in its process. The
report is written anew after each, so that nothing is lost when time runs out. Needs no network and nothing but the
packages of a GPU box: torch, pytest, numpy. The report is gpu_test.json in the folder that OUT names, by default
benchmarks/results/local.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
# Warnings are not errors there: the packages of such a machine are not those we lock.
PYTEST: Final = (
    sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-W", "default", "-o", "timeout=60",
    "-m", "gpu",
)  # fmt: skip
WHOLE: Final = ("test_networks", "test_models", "test_engine", "test_executor_offload", "test_smollm2")
"""Files about whole networks: they come last, and the sanitizer would take hours over them."""
SKIPPED: Final = ("test_triton_compiles", "test_emulator", "test_packing")
"""Files without a test for a GPU."""


def run(command: list[str], name: str, folder: Path, *, timeout_s: float, env: dict[str, str]) -> dict[str, Any]:
    """One run of pytest over one file: counts, the names of failures, and how it ended."""
    started, report = time.monotonic(), folder / f"{name}.xml"
    with (folder / "gpu_test.log").open("a") as log:
        log.write(f"\n===== {name}\n")
        log.flush()
        arguments = [*command, f"tests/cuda/{name.split('.')[0]}.py", f"--junitxml={report}"]
        try:
            code: int | str = subprocess.run(
                arguments, cwd=ROOT, timeout=max(5.0, timeout_s), check=False, stdout=log, stderr=log, env=env
            ).returncode
        except subprocess.TimeoutExpired:
            code = "timed out"
    result: dict[str, Any] = {"exit": code, "seconds": round(time.monotonic() - started, 1)}
    if report.exists():
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None, "pytest writes one suite"
        result |= {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
        result["failed"] = [_failure(case) for case in suite.iter("testcase") if _trouble(case) is not None]
        report.unlink()
    return result


def _trouble(case: ElementTree.Element) -> ElementTree.Element | None:
    failure = case.find("failure")
    return case.find("error") if failure is None else failure


def _failure(case: ElementTree.Element) -> dict[str, str]:
    trouble = _trouble(case)
    assert trouble is not None, "only failures come here"
    return {"test": str(case.get("name")), "message": str(trouble.get("message"))[:500]}


def device() -> str:
    """Name and driver of the GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    """All files, then those of kernels again under the sanitizer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--no-sanitizer", action="store_true", help="leave compute-sanitizer out")
    parser.add_argument("--minutes", type=float, default=7.0, help="for everything together")
    parser.add_argument("--files", default="", help="comma-separated names of test files; empty: all")
    arguments = parser.parse_args()
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "local")
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.stem for path in (ROOT / "tests" / "cuda").glob("test_*.py") if path.stem not in SKIPPED)
    names = arguments.files.split(",") if arguments.files else sorted(names, key=lambda name: name in WHOLE)
    jobs = [(name, list(PYTEST), dict(os.environ)) for name in names]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is not None and not arguments.no_sanitizer:
        # Without this torch hands out pieces of large allocations, and what is read beside a tensor is found nowhere.
        env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [sanitizer, "--error-exitcode", "99", *PYTEST]
        jobs += [(f"{name}.sanitized", command, env) for name in names if name not in WHOLE]
    results: dict[str, Any] = {"device": device(), "sanitizer": sanitizer is not None and not arguments.no_sanitizer}
    deadline = time.monotonic() + 60 * arguments.minutes
    for name, command, env in jobs:
        left = deadline - time.monotonic()
        results[name] = "no time left" if left < 5 else run(command, name, folder, timeout_s=left, env=env)
        (folder / "gpu_test.json").write_text(json.dumps(results, indent=1) + "\n")
        print(name, results[name], flush=True)
    return 0 if all(isinstance(part, str | bool) or part["exit"] in (0, 5) for part in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

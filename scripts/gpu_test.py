"""Runs the GPU tests, then those of the kernels under compute-sanitizer, and writes what came out as JSON.

Needs no network and nothing but the packages of a GPU box: torch, pytest, numpy. The report is gpu_test.json in the
folder that OUT names, by default benchmarks/results/local.
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
    sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-W", "default", "-m", "gpu",
)  # fmt: skip
SANITIZED: Final = "test_rms_norm or test_kv_append or attention or linear or test_act or test_sample"
"""Tests of single kernels: whole networks would take hours under the sanitizer."""


def run(arguments: list[str], report: Path, *, timeout_s: float) -> dict[str, Any]:
    """One run of pytest: counts, the names of failures, and how it ended."""
    started = time.monotonic()
    try:
        code: int | str = subprocess.run(
            [*arguments, f"--junitxml={report}"], cwd=ROOT, timeout=timeout_s, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        code = "timed out"
    result: dict[str, Any] = {"exit": code, "seconds": round(time.monotonic() - started, 1)}
    if report.exists():
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None, "pytest writes one suite"
        result |= {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
        result["failed"] = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
    return result


def device() -> str:
    """Name and driver of the GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    """Both runs, one report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--no-sanitizer", action="store_true", help="leave compute-sanitizer out")
    parser.add_argument("--sanitized", default=SANITIZED, help="pytest -k of what it runs")
    parser.add_argument("--minutes", type=float, default=8.0, help="for both runs together")
    arguments = parser.parse_args()
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "local")
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    results: dict[str, Any] = {"device": device()}
    results["tests"] = run([*PYTEST, "tests/cuda"], folder / "gpu_test.xml", timeout_s=60 * arguments.minutes)
    sanitizer = shutil.which("compute-sanitizer")
    if arguments.no_sanitizer or sanitizer is None:
        results["sanitizer"] = "left out" if arguments.no_sanitizer else "compute-sanitizer is not installed"
    else:
        command = [sanitizer, "--error-exitcode", "99", *PYTEST, "tests/cuda", "-k", arguments.sanitized]
        left = max(1.0, deadline - time.monotonic())
        results["sanitizer"] = run(command, folder / "gpu_sanitizer.xml", timeout_s=left)
    (folder / "gpu_test.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    runs = [part for part in (results["tests"], results["sanitizer"]) if isinstance(part, dict)]
    return 0 if all(part["exit"] == 0 for part in runs) else 1


if __name__ == "__main__":
    sys.exit(main())

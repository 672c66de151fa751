"""How long a model of 7 billion weights takes to load, and how much memory meanwhile.

python -m benchmarks.kernels.load

Writes a file of random Q4_0 weights, then loads it in fresh processes: packing into memory, packing into an image,
mapping the image with its pages in memory and with its pages on disk. Memory is the process's own (`VmHWM` of its
anonymous pages, `RssAnon`) and its peak resident set with shared file pages (`VmHWM`), sampled by the kernel and every
5 ms: pages of the checkpoint count while they are mapped, pages of the image too, the page cache of unmapped files
does not. Needs 9 GB of disk for the time it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.peers.results import RESULTS, save_json
from benchmarks.random_gguf import LLAMA_2_7B, write_random
from llmserve.config import EngineConfig
from llmserve.engine.loader import load_engine
from llmserve.tools.bench_host import Host, describe_host
from llmserve.tools.bench_meter import OthersMeter, wait_until_quiet
from llmserve.types import Request, SamplingParams

PACKING_BOUND_S: Final = 15.0
MAPPING_BOUND_S: Final = 2.0
MEMORY_BOUND: Final = 1.15
_SAMPLE_S: Final = 0.005


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One start of the engine, in a process of its own."""

    what: str
    origin: str
    seconds: float
    """From the call until a request could be taken; imports come before."""
    weights_s: float
    """Of them, until the last report of progress on the weights."""
    first_token_s: float
    """Of a prompt of one token, after that."""
    decode_s: float
    """Median of the 16 tokens after it."""
    packed_bytes: int
    peak_rss: int
    """Peak resident set during the load, all kinds of pages."""
    peak_anon: int
    """Peak of anonymous pages alone."""
    before_rss: int
    """Resident before the load: interpreter and libraries."""
    huge_bytes: int
    """Of the weights, how many lie in 2 MiB pages after the first tokens."""
    others_cores: float
    """Cores that other processes kept busy during the load."""

    @property
    def peak_ratio(self) -> float:
        """What loading added at its peak, over the packed size."""
        return (self.peak_rss - self.before_rss) / self.packed_bytes


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result file."""

    host: Host
    file_bytes: int
    layers: int
    disk: str
    """File system of the image."""
    loads: list[Load]


class Memory:
    """Peaks of this process while it is entered."""

    def __init__(self) -> None:
        self.peak_rss = self.peak_anon = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's own peak begins anew
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_rss = max(self.peak_rss, status("VmHWM"))

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self.peak_rss = max(self.peak_rss, status("VmRSS"))
            self.peak_anon = max(self.peak_anon, status("RssAnon"))


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def huge_bytes() -> int:
    """Bytes of this process in 2 MiB pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("AnonHugePages", "FilePmdMapped")))


def load_once(model: Path, what: str, *, keep: bool) -> Load:
    """Load in this process."""
    wait_until_quiet(max_cores=0.1, timeout_s=20.0, sample_s=0.5)
    before, meter, weights_at = status("VmRSS"), OthersMeter(), [0.0]

    def on_progress(phase: str, done: int, total: int) -> None:
        weights_at[0] = time.perf_counter()

    # Random weights repeat themselves: drafts would be accepted, and a step would be many tokens.
    config = EngineConfig(
        model_path=model, max_model_len=512, packed_cache_bytes=None if keep else 0, speculation="off"
    )
    with Memory() as memory:
        started = time.perf_counter()
        engine = load_engine(config, progress=on_progress)
        seconds = time.perf_counter() - started
    others = meter.cores()
    sampling = SamplingParams(max_tokens=17, temperature=0.0)
    engine.submit(Request(request_id="1", prompt_token_ids=[1], sampling=sampling))
    steps = []
    while engine.has_work:
        started_step = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - started_step)
    return Load(
        what=what,
        origin=engine.info.weights_origin,
        seconds=round(seconds, 3),
        weights_s=round(weights_at[0] - started, 3),
        first_token_s=round(steps[0], 3),
        decode_s=round(sorted(steps[1:17])[8], 4),
        packed_bytes=engine.info.weight_bytes,
        peak_rss=memory.peak_rss,
        peak_anon=memory.peak_anon,
        before_rss=before,
        huge_bytes=huge_bytes(),
        others_cores=round(others, 2),
    )


def in_new_process(model: Path, home: Path, what: str, *, keep: bool = True) -> Load:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.kernels.load", "--once", what, "--model", str(model)]
    command += [] if keep else ["--no-keep"]
    done = subprocess.run(
        command, env={**os.environ, "LLMSERVE_HOME": str(home)}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Load)


def forget_pages(*folders: Path) -> None:
    """Have the system drop the pages of these files; only of files, so that nobody else is disturbed."""
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(scratch: Path) -> Iterator[Load]:
    """All arms, in order."""
    model, home = scratch / "model" / "random-7b-q4_0.gguf", scratch / "home"
    with model.open("rb") as file:
        while file.read(16 << 20):
            pass
    yield in_new_process(model, home, "into memory, file in memory", keep=False)
    forget_pages(model.parent)
    yield in_new_process(model, home, "into memory, file on disk", keep=False)
    yield in_new_process(model, home, "first start, file in memory")
    yield in_new_process(model, home, "next start, image in memory")
    forget_pages(model.parent, home)
    yield in_new_process(model, home, "next start, image on disk")
    for path in (home / "packed").glob("*.image"):
        path.unlink()
    forget_pages(model.parent)
    yield in_new_process(model, home, "first start, file on disk")


def misses(load: Load) -> Iterator[str]:
    """Bounds that a start missed."""
    bound = MAPPING_BOUND_S if load.origin == "mapped" else PACKING_BOUND_S
    if load.seconds > bound:
        yield f"{load.what}: {load.seconds:.1f} s, more than {bound:.0f}"
    if load.peak_ratio > MEMORY_BOUND:
        yield f"{load.what}: {load.peak_ratio:.2f} times the packed size in memory, more than {MEMORY_BOUND}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=LLAMA_2_7B.layers, help="fewer make a smaller model (default: 32)"
    )
    parser.add_argument("--scratch", type=Path, help="folder for model and image (default: the temporary folder)")
    parser.add_argument("--model", type=Path, help="a file that an earlier run wrote with --write")
    parser.add_argument("--write", type=Path, help="only write the file of weights, to this path")
    parser.add_argument("--output", type=Path, default=RESULTS / "load_7b.json", help="result file")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    parser.add_argument("--no-keep", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        load = load_once(arguments.model, arguments.once, keep=not arguments.no_keep)
        print(msgspec.json.encode(load).decode())
        return 0
    shape = replace(LLAMA_2_7B, layers=arguments.layers)
    if arguments.write is not None:
        write_random(arguments.write, shape)
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        folder = Path(name) / "model"
        folder.mkdir()
        model = folder / "random-7b-q4_0.gguf"
        if arguments.model is None:
            write_random(model, shape)
        else:
            model.hardlink_to(arguments.model)
        forget_pages(folder)  # on disk before anything is timed
        host, file_bytes, disk = describe_host(), model.stat().st_size, _file_system(folder)
        print(
            "| start | ready s | weights s | first token s | decode ms | peak / packed | own / packed | 2 MiB pages |"
        )
        print("|---|---:|---:|---:|---:|---:|---:|---:|")
        loads = []
        for load in measure(Path(name)):
            loads.append(load)
            print(_row(load), flush=True)
    save_json(LoadResult(host=host, file_bytes=file_bytes, layers=arguments.layers, disk=disk, loads=loads),
              arguments.output)  # fmt: skip
    missed = [miss for load in loads for miss in misses(load)]
    for miss in missed:
        print(f"MISSED: {miss}")
    return 1 if missed else 0


def _row(load: Load) -> str:
    return (
        f"| {load.what} ({load.origin}) | {load.seconds:.2f} | {load.weights_s:.2f} | {load.first_token_s:.2f} "
        f"| {load.decode_s * 1000:.0f} | {load.peak_ratio:.2f} | {load.peak_anon / load.packed_bytes:.2f} "
        f"| {load.huge_bytes / load.packed_bytes:.0%} |"
    )


def _file_system(folder: Path) -> str:
    """Type of the file system that holds a folder."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(mount, kind) for mount, kind in mounts if folder.is_relative_to(mount)]
    return max(inside, key=lambda pair: len(pair[0]))[1] if inside else ""


if __name__ == "__main__":
    sys.exit(main())

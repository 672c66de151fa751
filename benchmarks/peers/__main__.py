"""llmserve and its peers on the same file, side by side: they alternate, and only one of them runs at a time."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from benchmarks.arguments import positive
from benchmarks.peers.llama_cpp import IK, TOOLS, LlamaCpp, find_binaries, find_ik_binaries
from benchmarks.peers.openvino import OpenVino
from benchmarks.peers.ours import Llmserve
from benchmarks.peers.peer import LEVELS, Peer, Setting
from benchmarks.peers.quiet import Quiet
from benchmarks.peers.report import plot, speed_table
from benchmarks.peers.results import RESULTS, Comparison, Engine, ModelFile, save_json
from benchmarks.peers.rounds import PARTS, run_rounds
from benchmarks.peers.vllm_cpu import VllmCpu
from llmserve.checkpoints import pull
from llmserve.errors import LLMServeError
from llmserve.tools.bench_host import describe_host
from llmserve.tools.bench_load import Load

PEERS: Final = ("llama.cpp", "ik_llama.cpp", "openvino", "vllm")
_EPILOG: Final = """examples:
  python -m benchmarks.peers --peers llama.cpp,openvino --binaries llama.cpp/build/bin
  python -m benchmarks.peers --peers llama.cpp,ik_llama.cpp --binaries DIR --ik-binaries DIR --rounds 5
  python -m benchmarks.peers --peers llama.cpp,openvino --model q4_1.gguf --files q4_0.gguf,q4_k.gguf

Over HTTP all servers get the same requests: a closed loop, 128 tokens in, 64 out, greedy, caches off. Without HTTP: a
prompt of 512 tokens, and decode at batch sizes. A peer that is not installed is, into an environment of its own:
llama.cpp is built (about 10 minutes), openvino takes 300 MB, vllm 3.4 GB; ik_llama.cpp is measured by path only."""


def choose(peers: list[str], setting: Setting, args: argparse.Namespace) -> list[Peer]:
    """The peers by name, installed, and llmserve last."""
    engines: list[Peer] = []
    for name in peers:
        if name == "llama.cpp":
            engines.append(LlamaCpp(setting=setting, binaries=find_binaries(args.binaries)))
        elif name == "ik_llama.cpp":
            engines.append(LlamaCpp(setting=setting, binaries=find_ik_binaries(args.ik_binaries), name=IK))
        elif name == "openvino":
            engines.append(OpenVino.installed(setting))
        else:
            engines.append(VllmCpu.installed(setting, args.vllm_weights))
    return [*engines, Llmserve(setting)]


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of names with commas: `llama.cpp,openvino`."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)!r}: choose among {', '.join(known)}")
        return names

    return parse


def describe(engine: Peer, model: Path) -> Engine:
    """For the result file."""
    server = engine.server(model, 0)
    command = " ".join(Path(part).name if part.startswith("/") else part for part in server.command) if server else ""
    return Engine(name=engine.name, version=engine.version(), command=command, given=engine.given)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--peers",
        type=names_of(PEERS),
        default="llama.cpp,openvino",
        help=f"of {', '.join(PEERS)} (llama.cpp,openvino)",
    )
    add("--binaries", type=Path, help="folder of llama.cpp with " + ", ".join(TOOLS))
    add("--ik-binaries", type=Path, help="the same of ik_llama.cpp")
    add("--vllm-weights", type=Path, help="folder that vLLM loads (default: the file's weights in BF16)")
    add("--model", default="smollm2", help="path or name of a GGUF file (smollm2)")
    add("--files", default="", help="more files of the same network, with commas: each peer's best type is told too")
    add("--parts", type=names_of(PARTS), default=PARTS, help="http, alone (both): over HTTP, the engine without it")
    add("--levels", type=positive(int), default=LEVELS, metavar="N,N,…", help="streams and batch sizes (1,8,32)")
    add("--prompt-tokens", type=int, default=128, help="of a request, and before decodes without HTTP (128)")
    add("--output-tokens", type=int, default=64, help="length of the answers (64)")
    add("--prefill-tokens", type=int, default=512, help="of a prompt without HTTP (512)")
    add("--rounds", type=int, default=3, help="alternations (3)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="compute threads of each (all cores)")
    add("--max-others", type=float, default=0.1, help="cores that others may use meanwhile (0.1)")
    add("--wait-quiet", type=float, default=60.0, help="seconds to wait for quiet (60)")
    add("--out", type=Path, default=RESULTS / "local" / "peers.json", help="result file; a plot goes beside it")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the rounds; write the result file and the plot, print the table."""
    args = parse_arguments(arguments)
    quiet = Quiet(max_cores=args.max_others, timeout_s=args.wait_quiet)
    load = Load(prompt_tokens=args.prompt_tokens, output_tokens=args.output_tokens)
    setting = Setting(
        num_threads=args.threads, load=load, quiet=quiet, levels=args.levels, prefill_tokens=args.prefill_tokens
    )
    files = [pull.resolve(name) for name in (args.model, *filter(None, args.files.split(",")))]
    engines = choose(args.peers, setting, args)
    host = describe_host()
    try:
        served, alone = run_rounds(setting, engines, files, args.rounds, args.parts)
    except LLMServeError as error:
        print(f"nothing is written: {error}", file=sys.stderr)
        return 1
    result = Comparison(
        host=host,
        model=ModelFile.of(files[0]),
        other_files=[ModelFile.of(file) for file in files[1:]],
        num_threads=setting.num_threads,
        prompt_tokens=setting.load.prompt_tokens,
        output_tokens=setting.load.output_tokens,
        max_others_cores=quiet.max_cores,
        engines=[describe(engine, files[0]) for engine in engines],
        served=served,
        alone=alone,
    )
    save_json(result, args.out)
    args.out.with_suffix(".svg").write_text(plot(result), encoding="utf-8")
    print(f"\n{speed_table(result, full=True)}\nwritten: {args.out}, {args.out.with_suffix('.svg')}")
    measured = {one.engine for one in served} | {one.engine for one in alone}
    unmeasured = [one.name for one in engines if one.name not in measured]
    for name in unmeasured:
        print(f"{name} was never measured: see above why", file=sys.stderr)
    return 1 if unmeasured else 0


if __name__ == "__main__":
    sys.exit(main())

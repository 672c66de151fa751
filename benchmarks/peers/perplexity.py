"""Perplexity and log-probabilities of every weight type: llmserve and llama.cpp against float32 on the same weights.

    python -m benchmarks.peers.perplexity [--binaries DIR] [--types Q4_0,Q4_K_S]

The text is `benchmarks/data/prose.txt`, prose of this project. As llama-perplexity does it: windows of 512 tokens that
follow each other, no start token, the second half of each window is scored. Each file is made of the default model by
the peer's quantizer (`perplexity_models`). The reference runs the same file in float32 (`make reference-env`).

What is compared: in a perplexity errors of both signs cancel, so that a worse engine can be closer by chance. Therefore
the bound against the peer is on the mean absolute difference of the scored tokens' log-probabilities from float32; the
two engines' are compared token by token, and two standard errors of the mean of that pass for noise. llama-perplexity
keeps no log-probability more than 16 below that of the most likely token; such tokens are left out for everybody.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.llama_cpp import PEER, find_binaries
from benchmarks.peers.perplexity_models import BLOCK, TYPES, count_types, quantize, write_float32
from benchmarks.peers.results import OURS, RESULTS, ModelFile, save_json
from llmserve import LLM, checkpoints, text
from llmserve.checkpoints import pull
from llmserve.errors import EngineFault
from llmserve.tools.bench_host import Host, describe_host
from llmserve.types import SamplingParams

ROOT: Final = Path(__file__).resolve().parent.parent.parent
TEXT: Final = ROOT / "benchmarks" / "data" / "prose.txt"
WINDOW: Final = 512
FIRST: Final = WINDOW // 2 + 1
"""The first scored token of a window."""
EXACT: Final = f"{OURS} --exact"
MAX_RELATIVE: Final = {OURS: 0.01, EXACT: 0.001}
"""Bounds of |perplexity / that of float32 - 1|."""

Logprobs = NDArray[np.float64]


class Distance(msgspec.Struct, frozen=True, kw_only=True):
    """One engine on one file."""

    engine: str
    perplexity: float
    relative: float
    """To the perplexity of float32, minus 1."""
    mean: float
    """|Δ| of the scored tokens' log-probabilities."""
    p99: float


class TypeAccuracy(msgspec.Struct, frozen=True, kw_only=True):
    """One weight type."""

    type: str
    model: ModelFile
    tensor_types: dict[str, int]
    """Tensors of each type in the file."""
    widened: bool
    num_scored: int
    """Of the scored tokens those that all engines told."""
    perplexity: float
    """Of float32 on the dequantized weights."""
    engines: list[Distance]
    excess: float
    """llmserve's |Δ| minus the peer's, mean over the scored tokens."""
    excess_error: float
    """Its standard error."""


class Perplexities(msgspec.Struct, frozen=True, kw_only=True):
    """The result file."""

    host: Host
    source: ModelFile
    text_sha256: str
    num_windows: int
    num_scored: int
    types: list[TypeAccuracy]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What stays the same for all types."""

    binaries: Path
    reference: Path
    """A Python with torch and transformers."""
    work: Path
    source: Path
    windows: list[list[int]]
    num_threads: int


def read_windows(model: Path) -> list[list[int]]:
    """The text as whole windows of tokens."""
    tokenizer = text.load_tokenizer(checkpoints.open_text(model))
    token_ids = tokenizer.encode(TEXT.read_text(), add_special=False)
    return [token_ids[start : start + WINDOW] for start in range(0, len(token_ids) - WINDOW + 1, WINDOW)]


def kept(setting: Setting, who: str, digest: str, ask: Callable[[], Logprobs]) -> Logprobs:
    """What another engine told about a file (by its digest) over these windows; asked once, kept in the work folder."""
    key = hashlib.sha256((digest + json.dumps(setting.windows)).encode()).hexdigest()[:16]
    path = setting.work / f"{who}-{key}.npy"
    if not path.exists():
        np.save(path, ask())
    told: Logprobs = np.load(path)
    return told


def ask_reference(setting: Setting, model: Path) -> Logprobs:
    """Float32, [scored tokens]."""
    windows, out = model.with_suffix(".windows.json"), model.with_suffix(".float32.json")
    windows.write_text(json.dumps(setting.windows))
    worker = Path(__file__).with_name("perplexity_reference.py")
    command = [setting.reference, worker, model, windows, WINDOW - FIRST, out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineFault(f"the reference failed: {done.stderr[-1000:]}")
    told = _scored(json.loads(out.read_text()))
    windows.unlink()
    out.unlink()
    return told


def ask_ours(setting: Setting, model: Path, *, exact: bool) -> Logprobs:
    """Prompt log-probabilities of the windows."""
    with LLM(model, exact=exact, max_model_len=2 * WINDOW) as llm:
        answers = llm.generate(setting.windows, SamplingParams(max_tokens=0, num_prompt_logprobs=1))
    rows = []
    for answer in answers:
        assert answer.prompt_logprobs is not None
        rows.append([score.logprob for score in answer.prompt_logprobs])
    return _scored(rows)


def _scored(rows: list[list[float]]) -> Logprobs:
    """[windows][tokens, the last included] → the scored half of each."""
    return np.array([row[-(WINDOW - FIRST) :] for row in rows]).reshape(-1)


def ask_peer(setting: Setting, model: Path) -> Logprobs:
    """llama-perplexity, from the file in which it keeps its log-probabilities."""
    told = model.with_suffix(".peer")
    command = [
        str(setting.binaries / "llama-perplexity"), "-m", str(model), "-f", str(TEXT), "-c", str(WINDOW),
        "-t", str(setting.num_threads), "--save-all-logits", str(told),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineFault(f"{PEER}: {done.stderr[-1000:]}")
    logprobs = read_peer_file(told, setting.windows)
    told.unlink()
    return logprobs


def read_peer_file(path: Path, windows: list[list[int]]) -> Logprobs:
    """Log-probabilities of the scored tokens; raises `EngineFault` where the peer had other windows.

    The file: `_logits_`, int32 window, vocabulary, number of windows, the tokens; then for each scored token a float32
    step and a float32 lowest log-probability, and for each entry of the vocabulary a uint16 in steps above the lowest.
    A step is 16 / 65535 or less. Code 0 stands for all that is not above the lowest: not told, NaN here.
    """
    content = np.memmap(path, np.uint8, "r")
    window, vocab, count = content[8:20].view("<i4").tolist()
    body = 20 + 4 * window * count
    token_ids = content[20:body].view("<i4").reshape(count, window)
    if token_ids.tolist() != windows:
        raise EngineFault(f"{PEER} cuts the text into other tokens or windows")
    rows = content[body:].view("<u2").reshape(count, WINDOW - FIRST, -1)
    if rows.shape[2] < vocab + 4:
        raise EngineFault(f"{PEER} keeps its log-probabilities in another form")
    step, lowest = np.moveaxis(np.ascontiguousarray(rows[:, :, :4]).view("<f4"), 2, 0).astype(np.float64)
    codes = np.take_along_axis(rows, token_ids[:, FIRST:, None] + 4, axis=2)[:, :, 0]
    logprobs: Logprobs = np.where(codes == 0, np.nan, lowest + step * codes).reshape(-1)
    return logprobs


def measure(setting: Setting, kind: str) -> TypeAccuracy:
    """Make the file, ask everybody, remove the file."""
    widened = TYPES[kind] == BLOCK
    base = setting.work / ("wide.F32.gguf" if widened else "F32.gguf")
    if not base.exists():
        write_float32(setting.source, base, widen=widened)
    model = setting.work / f"{setting.source.name.split('.')[0]}{'-wide' if widened else ''}.{kind}.gguf"
    quantize(setting.binaries, base, model, kind)
    file, types = ModelFile.of(model), count_types(model)
    reference = kept(setting, "float32", file.sha256, partial(ask_reference, setting, model))
    told = {
        PEER: kept(setting, "peer", file.sha256, partial(ask_peer, setting, model)),
        OURS: ask_ours(setting, model, exact=False),
        EXACT: ask_ours(setting, model, exact=True),
    }
    model.unlink()
    return judge(kind, file, types, widened, reference, told)


def judge(
    kind: str, file: ModelFile, types: dict[str, int], widened: bool, reference: Logprobs, told: dict[str, Logprobs]
) -> TypeAccuracy:
    """Distances of all engines from float32, over the tokens that the peer tells."""
    known = ~np.isnan(told[PEER])
    reference, told = reference[known], {name: logprobs[known] for name, logprobs in told.items()}
    errors = {name: np.abs(logprobs - reference) for name, logprobs in told.items()}
    excess = errors[OURS] - errors[PEER]
    return TypeAccuracy(
        type=kind,
        model=file,
        tensor_types=types,
        widened=widened,
        num_scored=reference.size,
        perplexity=round(math.exp(-reference.mean()), 4),
        engines=[
            Distance(
                engine=name,
                perplexity=round(math.exp(-logprobs.mean()), 4),
                relative=round(math.expm1(reference.mean() - logprobs.mean()), 6),
                mean=round(float(errors[name].mean()), 5),
                p99=round(float(np.quantile(errors[name], 0.99)), 5),
            )
            for name, logprobs in told.items()
        ],
        excess=round(float(excess.mean()), 5),
        excess_error=round(float(excess.std(ddof=1) / math.sqrt(excess.size)), 5),
    )


def misses(one: TypeAccuracy) -> list[str]:
    """Bounds that a type does not meet."""
    found = [
        f"{one.type}: {engine.engine}: perplexity {engine.relative:+.2%} from float32, the bound is {bound:.1%}"
        for engine in one.engines
        if (bound := MAX_RELATIVE.get(engine.engine)) is not None and not abs(engine.relative) <= bound
    ]
    if not one.excess <= 2 * one.excess_error:
        found.append(
            f"{one.type}: mean |Δ| exceeds that of {PEER} by {one.excess:.4f}, twice its error is "
            f"{2 * one.excess_error:.4f}"
        )
    return found


def row(one: TypeAccuracy) -> str:
    """One line of the table."""
    cells = [f"{engine.perplexity:.3f} {engine.relative:+.2%} {engine.mean:.4f}" for engine in one.engines]
    held = ", ".join(f"{count} {name}" for name, count in one.tensor_types.items())
    return f"{one.type:7} {one.perplexity:8.3f} | " + " | ".join(f"{cell:24}" for cell in cells) + f" | {held}"


def merged(out: Path, result: Perplexities) -> Perplexities:
    """The types of an earlier result over the same text that were not measured now stay."""
    if not out.exists():
        return result
    earlier = msgspec.json.decode(out.read_bytes(), type=Perplexities)
    if (earlier.text_sha256, earlier.source) != (result.text_sha256, result.source):
        return result
    types = {one.type: one for one in [*earlier.types, *result.types]}
    return msgspec.structs.replace(result, types=[types[kind] for kind in TYPES if kind in types])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--binaries", type=Path, help="folder with llama-quantize and llama-perplexity")
    parser.add_argument("--types", default=",".join(TYPES), help="of " + ",".join(TYPES))
    parser.add_argument("--reference", type=Path, default=ROOT / ".venv-reference/bin/python", help="its Python")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "perplexity", help="folder for models")
    parser.add_argument("--threads", type=int, default=1, help="of the peer; its figures do not depend on it")
    parser.add_argument("--out", type=Path, default=RESULTS / "local" / "perplexity.json", help="result file")
    return parser.parse_args()


def main() -> int:
    """Measure, print and write; 1 when a bound is missed."""
    args = _arguments()
    kinds = args.types.split(",")
    if unknown := [kind for kind in kinds if kind not in TYPES]:
        sys.exit(f"unknown types: {', '.join(unknown)}")
    if not args.reference.exists():
        sys.exit(f"{args.reference} is missing: make reference-env, or name another with --reference")
    args.work.mkdir(parents=True, exist_ok=True)
    source = pull.resolve("smollm2")
    setting = Setting(
        binaries=find_binaries(args.binaries), reference=args.reference, work=args.work, source=source,
        windows=read_windows(source), num_threads=args.threads,
    )  # fmt: skip
    num_windows = len(setting.windows)
    print(f"type     float32 | {PEER}: perplexity, relative, mean |Δ| | {OURS} | {EXACT} | tensors")
    measured = []
    for kind in kinds:
        measured.append(measure(setting, kind))
        print(row(measured[-1]), flush=True)
    result = Perplexities(
        host=describe_host(), source=ModelFile.of(source), text_sha256=hashlib.sha256(TEXT.read_bytes()).hexdigest(),
        num_windows=num_windows, num_scored=num_windows * (WINDOW - FIRST), types=measured,
    )  # fmt: skip
    save_json(merged(args.out, result), args.out)
    missed = [line for one in measured for line in misses(one)]
    for line in missed:
        print(f"MISSED {line}")
    print(f"written: {args.out}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""What the measured kernels promise for a model, and what the engine makes of it.

    make kernel-bench && python -m benchmarks.kernels.promise

The promise is the time of a step's GEMMs alone (with the norms that quantize their inputs), summed over the layers of
the model's file from benchmarks/results/kernels.json; attention, sampling and the engine come on top. Beside it stands
`llmserve bench --offline` of this machine: run both on the same one.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.engine.probe import Conditions, arguments_of, conclude, conditions, resolve
from benchmarks.kernels.records import Gemm, Kernels
from benchmarks.peers.quiet import Quiet
from benchmarks.peers.results import RESULTS
from llmserve.checkpoints.gguf import TensorInfo, read_header
from llmserve.checkpoints.mapping import MappedFile
from llmserve.tools.bench_offline import OfflineLoad, run_offline

MIN_SHARE: Final = 0.6
"""Of what the kernels promise."""
_PREFILL_TOKENS: Final = 512
_BATCH_SIZES: Final = (1, 8, 32)
_PARTS: Final = {"attn_q": "qkv", "attn_output": "o", "ffn_gate": "gate_up", "ffn_down": "down", "output": "head"}
"""A tensor that tells the type of a part; K, V and up are packed with Q and gate."""
_PACKED: Final = {"q4_k": "q4_1", "q5_k": "q5_1", "iq4_nl": "q4_nl", "iq4_xs": "q4_nl"}


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of step; tokens/s."""

    name: str
    promised: float
    measured: float
    share: float


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    """The result file."""

    conditions: Conditions
    kernels_commit: str
    steps: list[Step]


def count_matrices(tensors: dict[str, TensorInfo]) -> Counter[tuple[str, str]]:
    """How many matrices of each (part, packed type) a network has."""
    found: Counter[tuple[str, str]] = Counter()
    for name, tensor in tensors.items():
        part = _PARTS.get(name.removesuffix(".weight").rpartition(".")[2])
        if part is not None:
            found[part, _PACKED.get(tensor.dtype, tensor.dtype)] += 1
    if "output.weight" not in tensors:
        dtype = tensors["token_embd.weight"].dtype
        found["head", _PACKED.get(dtype, dtype)] += 1
    return found


def step_seconds(
    gemms: list[Gemm], shape: str, matrices: Counter[tuple[str, str]], num_tokens: int, rows: int
) -> float:
    """Of all GEMMs of a step of so many tokens, `rows` of which need logits. Raises `SystemExit` if one lacks."""
    times = {(one.part, one.type, one.m): one.call_s for one in gemms if one.shape == shape}
    total = 0.0
    for (part, packed_type), count in matrices.items():
        key = (part, packed_type, rows if part == "head" else num_tokens)
        if key not in times:
            raise SystemExit(f"kernels.json has no {part} of {packed_type} with {key[2]} rows for {shape}")
        total += count * times[key]
    return total


def main() -> int:
    parser = arguments_of(__doc__, "promise.json")
    parser.add_argument("--kernels", type=Path, default=RESULTS / "kernels.json", help="what make kernel-bench wrote")
    parser.add_argument("--shape", default="smollm2-135m", help="the model's shape there")
    arguments = parser.parse_args()
    kernels = msgspec.json.decode(arguments.kernels.read_bytes(), type=Kernels)
    model = resolve(arguments.model)
    matrices = count_matrices(read_header(MappedFile(model), vocabulary=False).tensors)
    load = OfflineLoad(prefill_tokens=(_PREFILL_TOKENS,), batch_sizes=_BATCH_SIZES, repetitions=5)
    report, others = Quiet(timeout_s=20.0).measure(lambda: run_offline(model, load, num_threads=kernels.run.threads))
    cases = [(f"prefill {_PREFILL_TOKENS}", _PREFILL_TOKENS, 1, report.prefill[0].tokens_per_s)]
    cases += [(f"decode B={one.num_sequences}", *2 * (one.num_sequences,), one.tokens_per_s) for one in report.decode]
    steps = []
    for name, num_tokens, rows, measured in cases:
        promised = num_tokens / step_seconds(kernels.gemms, arguments.shape, matrices, num_tokens, rows)
        steps.append(Step(name=name, promised=round(promised, 1), measured=round(measured, 1),
                          share=round(measured / promised, 3)))  # fmt: skip
        print(f"{name:14} promised {promised:6.0f}, measured {measured:6.0f} tokens/s: {measured / promised:.0%}")
    result = Promise(conditions=conditions(model, others), kernels_commit=kernels.run.commit, steps=steps)
    misses = [f"{one.name}: {one.share:.0%} of what the kernels promise, not ≥ {MIN_SHARE:.0%}" for one in steps
              if one.share < MIN_SHARE]  # fmt: skip
    return conclude(result, arguments.output, misses)


if __name__ == "__main__":
    sys.exit(main())

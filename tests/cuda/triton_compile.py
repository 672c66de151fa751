"""Compiles the Triton kernels for GPUs without one: what the launches of a step ask for, through Triton's own ptxas.

Run as a process of its own, since Triton decides when it is imported whether it compiles or interprets:
`python -m tests.cuda.triton_compile 80 90` prints a line of JSON for each kernel compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from llmserve.ops.cuda.fallback_attention import paged_attention
from llmserve.ops.cuda.moe import Experts, Router, moe
from llmserve.ops.cuda.stacked_weights import StackedWeights
from llmserve.ops.protocol import RouterSpec
from llmserve.types import CheckpointTensor

TYPES: Final = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.float16: "*fp16",
}
OPTIONS: Final = ("num_warps", "num_stages")
NOWHERE: Final = CheckpointTensor(name="router", dtype="f32", shape=(0, 0), data=memoryview(b""))


class Recorder:
    """Stands in for the launch of a kernel: notes what it would be compiled for. Nothing is computed."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, JITFunction[Any], ASTSource, dict[str, Any]]] = []
        self.case = ""

    def run(self, function: JITFunction[Any], *args: object, **kwargs: Any) -> None:
        options: dict[str, Any] = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        del kwargs["grid"], kwargs["warmup"]
        values = dict(zip(function.arg_names, args, strict=False)) | kwargs
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(function.params):
            value = values[parameter.name]
            one = type(value) is int and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or one:
                signature[parameter.name], constants[(index,)] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[parameter.name], divisible = TYPES[value.dtype], value.data_ptr() % 16 == 0
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                divisible = isinstance(value, int) and value % 16 == 0
            if divisible and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(function, signature, constants, attributes)
        self.launches.append((self.case, function, source, options))


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of local memory, which holds what registers could not."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", printed)
    assert found, printed
    return {"registers": int(found[1]), "stack": int(found[2]), "local": int(found[4])}


def weights(experts: int, columns: int, depth: int, bits: int) -> StackedWeights:
    if bits == 16:
        return StackedWeights(torch.empty((experts, columns, depth), dtype=torch.bfloat16))
    values = torch.empty((experts, columns, depth * bits // 8), dtype=torch.uint8 if bits == 4 else torch.int8)
    scales = torch.empty((experts, columns, depth // 32), dtype=torch.float16)
    return StackedWeights(values, bits, scales, scales if bits == 4 else None)


def run_moe(tokens: int, bits: int) -> None:
    """Qwen3-30B-A3B's sizes with fewer experts; groups, a bias and a shared expert with a gate besides."""
    experts, hidden, columns = 8, 2048, 768
    spec = RouterSpec(
        NOWHERE, experts, 2, scoring="sigmoid", choice_bias=NOWHERE, num_groups=2, top_k_groups=1, scaling=2.5
    )
    wide, narrow = weights(experts, columns, hidden, bits), weights(1, 64, hidden, 16)
    shared = Experts(narrow, narrow, weights(1, hidden, 64, 16), "gelu")
    every = Experts(wide, wide, weights(experts, hidden, columns, bits), "silu", shared, torch.empty(hidden))
    x = torch.zeros((tokens, hidden), dtype=torch.bfloat16)
    moe(x, Router(spec, torch.zeros((experts, hidden)), torch.zeros(experts)), every, residual=x)


def run_attention(tokens: int, kv_heads: int, head_dim: int, v_dim: int) -> None:
    q, out = (torch.empty((tokens, 16, dim), dtype=torch.bfloat16) for dim in (head_dim, v_dim))
    k_cache, v_cache = (torch.empty((4, kv_heads, 16, dim), dtype=torch.bfloat16) for dim in (head_dim, v_dim))
    table = torch.zeros((4, 4), dtype=torch.int32)
    paged_attention(
        q, k_cache, v_cache, out, block_tables=table, seq_lens=table[0].clone(), query_start=torch.arange(5).int(),
        scale=0.1, softcap=30.0, window=100, sinks=torch.zeros(16),
    )  # fmt: skip


CASES: Final[dict[str, Callable[[], None]]] = {
    "moe 1": lambda: run_moe(1, 16),
    "moe 64": lambda: run_moe(64, 16),
    "moe 4096": lambda: run_moe(4096, 16),
    "moe 8 bits 64": lambda: run_moe(64, 8),
    "moe 4 bits 1": lambda: run_moe(1, 4),
    "moe 4 bits 96": lambda: run_moe(96, 4),
    "moe 4 bits 4096": lambda: run_moe(4096, 4),
    "attention 576/512 decode": lambda: run_attention(4, 1, 576, 512),
    "attention 576/512 prefill": lambda: run_attention(1024, 1, 576, 512),
    "attention 300 prefill": lambda: run_attention(1024, 4, 300, 300),
    "attention 100 prefill": lambda: run_attention(1024, 4, 100, 100),
}


def main(architectures: list[int]) -> None:
    recorder = Recorder()

    def run(function: JITFunction[Any], *args: object, **kwargs: object) -> None:
        recorder.run(function, *args, **kwargs)

    with patch.object(JITFunction, "run", run):
        for name, launch in CASES.items():
            recorder.case = name
            launch()
    done: set[tuple[str, str, int]] = set()
    for case, function, source, options in recorder.launches:
        for architecture in architectures:
            key = (source.hash(), str(options), architecture)
            if key in done:
                continue
            done.add(key)
            kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            found = {"case": case, "kernel": function.__name__, "sm": architecture, "shared": kernel.metadata.shared}
            sys.stdout.write(json.dumps(found | resources(kernel.asm["cubin"])) + "\n")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])

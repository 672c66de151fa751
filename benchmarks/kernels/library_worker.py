"""Matrix products by oneDNN through torch, measured on request. Runs in the reference environment.

One JSON object a line on stdin, {"kind", "m", "n", "k", "threads", "seconds"}; the answer is {"library", "ops_per_s"},
or {"error"}. Weights are prepacked, and as many copies take turns as llmserve's benchmark would use.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

_COLD_BYTES = 256 * 2**20
_MAX_OPERATIONS = 12e9
_Product = Callable[[Any], Any]


def make_int8(m: int, n: int, k: int) -> tuple[Any, Callable[[], Any], _Product]:
    """(activations, a new packed weight, their product): u8 activations, s8 weights per channel, float32 out."""
    x = torch.randint(0, 255, (m, k), dtype=torch.uint8)
    scales, zeros = torch.rand(n), torch.zeros(n, dtype=torch.int64)

    def pack() -> Any:
        return torch.ops.onednn.qlinear_prepack(torch.randint(-127, 128, (n, k), dtype=torch.int8), None)

    def multiply(weight: Any) -> Any:
        return torch.ops.onednn.qlinear_pointwise(
            x, 0.1, 128, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    return x, pack, multiply


def make_bf16(m: int, n: int, k: int) -> tuple[Any, Callable[[], Any], _Product]:
    """The same in bfloat16."""
    x = torch.randn(m, k).bfloat16()

    def pack() -> Any:
        return torch.ops.mkldnn._reorder_linear_weight(torch.randn(n, k).bfloat16(), m)

    def multiply(weight: Any) -> Any:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    return x, pack, multiply


def measure(kind: str, m: int, n: int, k: int, threads: int, seconds: float) -> dict[str, Any]:
    """Operations per second: the median over the calls of about so many seconds."""
    torch.set_num_threads(threads)
    size = 1 if kind == "int8" else 2
    operations = 2.0 * m * n * k
    copies = max(1, int(min(math.ceil(_COLD_BYTES / (n * k * size)), _MAX_OPERATIONS / operations)))
    _, pack, multiply = (make_int8 if kind == "int8" else make_bf16)(m, n, k)
    weights = [pack() for _ in range(copies)]
    for weight in weights:
        multiply(weight)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not times:
        for weight in weights:
            start = time.perf_counter()
            multiply(weight)
            times.append(time.perf_counter() - start)
    return {"library": f"oneDNN by torch {torch.__version__}", "ops_per_s": operations / statistics.median(times)}


def main() -> None:
    for line in sys.stdin:
        try:
            answer = measure(**json.loads(line))
        except (RuntimeError, AttributeError) as error:  # what a torch without the operator raises
            answer = {"error": str(error).split("\n", 1)[0]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

"""What int8 keys and values cost: perplexity over a cache in int8 and in BF16, on the same text.

python -m benchmarks.engine.kv_perplexity
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final, get_args

import msgspec
import numpy as np

from benchmarks.engine.probe import Conditions, arguments_of, conclude, conditions, resolve
from benchmarks.peers.perplexity import WINDOW, read_windows
from llmserve import LLM
from llmserve.config import KVCacheDtype
from llmserve.types import SamplingParams

MAX_RELATIVE: Final = 0.005
"""Of the perplexity over a BF16 cache."""


class KVPerplexity(msgspec.Struct, frozen=True, kw_only=True):
    """The result file."""

    conditions: Conditions
    num_tokens: int
    perplexity: dict[str, float]
    """By the cache's type."""
    relative: float
    """int8 over BF16, minus 1."""
    mean_difference: float
    """Mean |Δ log-probability| of a token."""


def logprobs(
    model: Path, windows: list[list[int]], dtype: KVCacheDtype
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Of every token of the windows but the first, [windows * (WINDOW - 1)]."""
    with LLM(model, kv_cache_dtype=dtype, max_model_len=2 * WINDOW) as llm:
        answers = llm.generate(windows, SamplingParams(max_tokens=0, num_prompt_logprobs=1))
    rows = [[score.logprob for score in answer.prompt_logprobs or []][-(WINDOW - 1) :] for answer in answers]
    return np.array(rows, np.float64).reshape(-1)


def main() -> int:
    arguments = arguments_of(__doc__, "kv_perplexity.json").parse_args()
    model = resolve(arguments.model)
    windows = read_windows(model)
    told = {dtype: logprobs(model, windows, dtype) for dtype in get_args(KVCacheDtype)}
    perplexity = {dtype: float(np.exp(-own.mean())) for dtype, own in told.items()}
    result = KVPerplexity(
        conditions=conditions(model, 0.0),
        num_tokens=len(told["bf16"]),
        perplexity={dtype: round(value, 4) for dtype, value in perplexity.items()},
        relative=round(perplexity["int8"] / perplexity["bf16"] - 1, 5),
        mean_difference=round(float(np.abs(told["int8"] - told["bf16"]).mean()), 5),
    )
    print(f"{result.num_tokens} tokens: {result.perplexity}, {result.relative:+.2%}, mean |Δ| {result.mean_difference}")
    misses = []
    if not abs(result.relative) <= MAX_RELATIVE:
        misses.append(f"perplexity {result.relative:+.2%}, at most {MAX_RELATIVE:.1%} expected")
    return conclude(result, arguments.output, misses)


if __name__ == "__main__":
    sys.exit(main())

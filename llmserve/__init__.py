"""llmserve: an LLM inference server for CPUs and GPUs.

Importing the package is cheap: `LLM` and `SamplingParams` are loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmserve.client.offline import LLM as LLM
    from llmserve.types import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from llmserve.client.offline import LLM

        return LLM
    if name == "SamplingParams":
        from llmserve.types import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

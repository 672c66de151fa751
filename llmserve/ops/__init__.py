"""Executors: the modules that run a model file. Each is imported by name, so nothing is loaded that was not asked for.

An executor module `llmserve.ops.<name>` has one public function, `build`, as `ExecutorModule` says.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Final, Protocol, cast

from llmserve.config import ExecutorConfig, ModelConfig
from llmserve.errors import ExtensionNotBuilt, InvalidRequest
from llmserve.ops.protocol import Executor, Ops, Value

EXECUTORS: Final = ("cpu", "cuda", "reference")

Forward = Callable[[Ops], Value]
"""A model file bound to its tensors: says one forward pass against the ops it is given."""

Progress = Callable[[str, int, int], None]
"""Called while weights are prepared: (what, done, total)."""


class ExecutorModule(Protocol):
    """What an executor module offers."""

    def build(
        self, config: ModelConfig, forward: Forward, executor_config: ExecutorConfig, *, progress: Progress
    ) -> Executor:
        """Prepare the weights and return the loaded network. The KV cache is allocated later, by `allocate_kv`."""


def load(name: str) -> ExecutorModule:
    """Import the executor called `name`.

    Raises `InvalidRequest` for an unknown name, `ExtensionNotBuilt` when the extension it needs is missing.
    """
    if name not in EXECUTORS:
        raise InvalidRequest(f"no executor is called {name!r}; there are: {', '.join(EXECUTORS)}", param="device")
    try:
        module = import_module(f"llmserve.ops.{name}")
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise ExtensionNotBuilt(
                "device cuda needs PyTorch with CUDA in this environment: pip install torch"
            ) from error
        if error.name != "llmserve._C":
            raise
        raise ExtensionNotBuilt("the compiled extension llmserve._C is missing; build it with: make build") from error
    return cast(ExecutorModule, module)

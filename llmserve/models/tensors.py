"""`TensorReader`: how a model file takes its tensors out of a checkpoint.

Invariant: after `finish` every tensor of the checkpoint was taken by the model, so none is silently ignored.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmserve.errors import CheckpointError
from llmserve.types import CheckpointTensor


class TensorReader:
    """Looks tensors up by canonical name and checks their shapes."""

    def __init__(self, tensors: Mapping[str, CheckpointTensor]) -> None:
        self._tensors = tensors
        self._taken: set[str] = set()

    def take(self, name: str, *shape: int) -> CheckpointTensor:
        """The tensor called `name`. Raises `CheckpointError` if it is missing or has another shape."""
        tensor = self.maybe(name, *shape)
        if tensor is None:
            raise CheckpointError(f"tensor {name} is missing; expected shape {list(shape)}")
        return tensor

    def maybe(self, name: str, *shape: int) -> CheckpointTensor | None:
        """The same, or None if the checkpoint has no such tensor."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"tensor {name} has shape {list(tensor.shape)}; expected {list(shape)}")
        self._taken.add(name)
        return tensor

    def finish(self, *, ignore: frozenset[str] = frozenset()) -> None:
        """Raises `CheckpointError` if the checkpoint holds tensors that the model did not take."""
        left = sorted(self._tensors.keys() - self._taken - ignore)
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise CheckpointError(f"the model has no use for tensor {', '.join(left[:3])}{more}")

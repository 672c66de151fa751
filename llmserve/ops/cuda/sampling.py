"""Sampling and log-probabilities of a step on the device, and the one copy of what came out to the host.

Invariants: `start` enqueues and does not wait; steps are finished in the order they were started; at most two are under
way, so that a step may be started before the one before it is finished.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Final

import torch
from numpy.typing import NDArray
from torch import Tensor

from llmserve.config import ExecutorConfig
from llmserve.ops.cuda.edits import DeviceEdits, build_edits, to_device, typical_ps
from llmserve.ops.cuda.launchers import Launchers
from llmserve.ops.cuda.sample import SampleRows, workspace_bytes
from llmserve.ops.cuda.upload import Upload, upload_bytes
from llmserve.ops.protocol import StepInput, StepOutput

_FIELDS: Final = ("targets", "temperature", "top_k", "top_p", "min_p", "seed", "sample_position", "num_logprobs")


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """A step's sampling parameters on the device."""

    rows: SampleRows
    num_logprobs: Tensor
    edits: DeviceEdits | None


@dataclass(slots=True)
class _Results:
    """Memory for what is copied to the host, and the event behind the copy."""

    host: Tensor
    copied: torch.cuda.Event | None


@dataclass(slots=True)
class _Started:
    step: StepInput
    results: _Results
    num_rows: int
    width: int


class Sampling:
    """Of one executor."""

    def __init__(self, launchers: Launchers, config: ExecutorConfig, vocab_size: int) -> None:
        self._launchers = launchers
        self._vocab_size = vocab_size
        self._is_gpu = launchers.device.type == "cuda"
        rows = config.max_logit_rows
        self._upload = Upload(launchers.device, upload_bytes([(rows, 4)] * 7 + [(rows, 8)] * 2))
        self._results = [self._make_results(3 * rows) for _ in range(2)]
        self._started: deque[_Started] = deque()
        self._token_ids: Tensor | None = None

    @property
    def last_token_ids(self) -> Tensor:
        """Of the step started last, on the device: int32 [R]."""
        assert self._token_ids is not None, "no step was started yet"
        return self._token_ids

    def send(self, step: StepInput) -> SamplingInputs:
        """Bring a step's parameters over. They are valid until the next call.

        Before the step's own work is enqueued: edits, which few steps have, are copied as the host waits.
        Raises `ValueError` when a state does not know all tokens before the position to sample.
        """
        edits, typical = build_edits(step, self._vocab_size), typical_ps(step)
        arrays: list[NDArray[Any]] = [getattr(step, name) for name in _FIELDS]
        sent = self._upload.send(arrays if typical is None else [*arrays, typical])
        fields = dict(zip(_FIELDS, sent, strict=False))
        num_logprobs = fields.pop("num_logprobs")
        rows = SampleRows(**fields, typical_p=None if typical is None else sent[-1])
        return SamplingInputs(rows, num_logprobs, None if edits is None else to_device(edits, self._launchers.device))

    def start(self, logits: Tensor, step: StepInput, inputs: SamplingInputs) -> None:
        """Enqueue the sampling of logits, float32 [R, vocab]."""
        assert len(self._started) < 2, "collect comes first"
        num_rows = len(logits)
        width = max(0, int(step.num_logprobs.max(initial=0)))
        packed = torch.empty(num_rows * (3 + 2 * width), dtype=torch.int32, device=logits.device)
        token_ids, ranks, logprobs, top_ids, top_logprobs = _split(packed, num_rows, width)
        if num_rows:
            self._sample(logits, token_ids, inputs)
            if (step.num_logprobs >= 0).any():
                self._launchers.token_logprobs(
                    logits, token_ids, inputs.num_logprobs, logprobs, ranks, top_ids, top_logprobs
                )
            else:
                ranks.zero_()
                logprobs.fill_(float("nan"))
        self._token_ids = token_ids
        self._started.append(_Started(step, self._copy_back(packed), num_rows, width))

    def finish(self) -> StepOutput:
        """Wait for the oldest step started and not finished. States record what was sampled."""
        started = self._started.popleft()
        if started.results.copied is not None:
            started.results.copied.synchronize()
        size = started.num_rows * (3 + 2 * started.width)
        parts = _split(started.results.host[:size].clone(), started.num_rows, started.width)
        token_ids, ranks, logprobs, top_ids, top_logprobs = (part.numpy() for part in parts)
        for row, state in enumerate(started.step.states):
            if state is not None and started.step.targets[row] < 0 and token_ids[row] >= 0:
                state.record(int(token_ids[row]))
        return StepOutput(token_ids, logprobs, ranks, top_ids, top_logprobs)

    def _sample(self, logits: Tensor, token_ids: Tensor, inputs: SamplingInputs) -> None:
        size = workspace_bytes(*logits.shape)
        workspace = torch.empty(size, dtype=torch.uint8, device=logits.device)
        edits = inputs.edits
        if edits is None:
            return self._launchers.sample(logits, inputs.rows, token_ids, workspace)
        edited = torch.empty((len(edits.rows), logits.shape[1]), device=logits.device)
        self._launchers.edit_logits(logits, edits, edited)
        return self._launchers.sample(
            logits, inputs.rows, token_ids, workspace, edited=edited, edited_rows=edits.edited_rows
        )

    def _copy_back(self, packed: Tensor) -> _Results:
        self._results.reverse()
        if len(self._results[0].host) < len(packed):
            self._results[0] = self._make_results(len(packed))
        results = self._results[0]
        results.host[: len(packed)].copy_(packed, non_blocking=True)
        if results.copied is not None:
            results.copied.record()
        return results

    def _make_results(self, count: int) -> _Results:
        host = torch.empty(count, dtype=torch.int32, pin_memory=self._is_gpu)
        return _Results(host, torch.cuda.Event() if self._is_gpu else None)


def _split(packed: Tensor, num_rows: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """token_ids, ranks, logprobs [R], top_ids, top_logprobs [R, K] of one run of memory."""
    top = num_rows * width
    token_ids, ranks, logprobs, top_ids, top_logprobs = packed.split([num_rows] * 3 + [top] * 2)
    shape = num_rows, width
    return (
        token_ids,
        ranks,
        logprobs.view(torch.float32),
        top_ids.view(shape),
        top_logprobs.view(torch.float32).view(shape),
    )

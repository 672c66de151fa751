"""OpenVINO GenAI's continuous batching, stepped and timed on request. Runs in an environment of its own.

One JSON object a line on stdin. The first is {"model", "threads"}; its answer {"version", "vocab_size"}. Then each
{"prompts", "warm_up", "num_steps"}, token ids in both, is answered with {"seconds"}: for 0 steps the time of each
prompt alone, from its submission to its first token; else the time of so many steps in which all prompts decode
together. {"error"} says what went wrong.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai

CACHE_GB = 2
MAX_BATCHED_TOKENS = 2048
_Prompts = list[list[int]]


class Stepped:
    """A pipeline whose every step is ours to time. Greedy; end tokens are ignored; no prefix is kept."""

    def __init__(self, model: str, num_threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": num_threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self._num_requests = 0

    @property
    def vocab_size(self) -> int:
        return len(self._pipeline.get_tokenizer().get_vocab())

    def prefill(self, prompts: _Prompts) -> list[float]:
        """Seconds of each prompt alone."""
        times = []
        for prompt in prompts:
            start = time.perf_counter()
            handle = self._submit(prompt, 1)  # kept: a request ends with its handle
            self._drain()
            times.append(time.perf_counter() - start)
            if _tokens(handle) != 1:
                raise RuntimeError("a prompt gave no token")
        return times

    def decode(self, prompts: _Prompts, num_steps: int) -> float:
        """Seconds of `num_steps` steps of all prompts; each has its first token before."""
        handles = [self._submit(prompt, len(prompt) + 4 * num_steps) for prompt in prompts]
        waiting = list(handles)
        while waiting:
            self._pipeline.step()
            waiting = [handle for handle in waiting if not _tokens(handle)]
        for handle in handles:
            _tokens(handle)
        start = time.perf_counter()
        for _ in range(num_steps):
            self._pipeline.step()
        took = time.perf_counter() - start
        counts = {_tokens(handle) for handle in handles}
        for handle in handles:
            handle.cancel()
        self._drain()
        if counts != {num_steps}:
            raise RuntimeError(f"{num_steps} steps gave {sorted(counts)} tokens")
        return took

    def _submit(self, prompt: list[int], num_tokens: int) -> Any:
        self._num_requests += 1
        config = openvino_genai.GenerationConfig(max_new_tokens=num_tokens, ignore_eos=True, do_sample=False)
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        return self._pipeline.add_request(self._num_requests, ids, config)

    def _drain(self) -> None:
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()


def _tokens(handle: Any) -> int:
    """Tokens that came since the last look."""
    count = 0
    while handle.can_read():
        count += sum(len(output.generated_ids) for output in handle.read().values())
    return count


def answer(pipeline: Stepped, prompts: _Prompts, warm_up: _Prompts, num_steps: int) -> dict[str, Any]:
    """Prompts of the same shape go first: the library makes kernels for shapes that it meets."""
    if not num_steps:
        pipeline.prefill(warm_up)
        return {"seconds": pipeline.prefill(prompts)}
    pipeline.decode(warm_up, 2)
    return {"seconds": [pipeline.decode(prompts, num_steps)]}


def main() -> None:
    pipeline = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if pipeline is None:
                pipeline = Stepped(request["model"], request["threads"])
                reply = {"version": openvino_genai.__version__, "vocab_size": pipeline.vocab_size}
            else:
                reply = answer(pipeline, **request)
        except (RuntimeError, ValueError) as error:  # what the library raises for a file that it cannot load
            reply = {"error": " ".join(str(error).split())[:500]}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()

"""OpenVINO GenAI: it loads the GGUF file itself; its continuous batching is stepped in a process of its own.

Its defaults hold: weights as in the file, activations quantized to 8 bits at run time, an 8-bit KV cache.
"""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.line_worker import LineWorker
from benchmarks.peers.environment import environment, pip_install, said
from benchmarks.peers.peer import PREFILL_REPETITIONS, Bench, ServerCommand, Setting
from llmserve.errors import EngineFault
from llmserve.tools.bench_prompts import random_token_ids

PEER: Final = "OpenVINO GenAI"
ENVIRONMENT: Final = ".venv-peers-openvino"
PACKAGE: Final = "openvino-genai==2026.4.1"
_PROBE: Final = "import openvino_genai; print(openvino_genai.__version__)"
_WORKER: Final = Path(__file__).with_name("openvino_worker.py")


class _Answer(msgspec.Struct, frozen=True):
    version: str = ""
    vocab_size: int = 0
    seconds: list[float] = []
    error: str = ""


@dataclass(frozen=True, slots=True)
class OpenVino:
    """The package in its environment."""

    setting: Setting
    python: Path
    name: str = PEER
    given: str = ""

    @classmethod
    def installed(cls, setting: Setting) -> OpenVino:
        """Install it where it is not. Raises `subprocess.CalledProcessError`."""
        note = f"{PACKAGE}, about 400 MB"
        return cls(setting, environment(ENVIRONMENT, _PROBE, note, lambda python: pip_install(python, PACKAGE)))

    def version(self) -> str:
        return said([self.python, "-c", _PROBE]).strip().splitlines()[-1]

    def server(self, model: Path, port: int) -> ServerCommand | None:
        return None

    def alone(self, model: Path) -> AbstractContextManager[Bench]:
        return self._alone(model)

    @contextlib.contextmanager
    def _alone(self, model: Path) -> Iterator[Bench]:
        with LineWorker(self.python, _WORKER) as worker:
            request = {"model": str(model), "threads": self.setting.num_threads}
            yield _Loaded(worker, self.setting, _ask(worker, request).vocab_size)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A worker with the model. The prompts are those that `run_offline` sends, in the same order."""

    worker: LineWorker
    setting: Setting
    vocab_size: int

    def prefill(self) -> float:
        seconds = self._measure(PREFILL_REPETITIONS, self.setting.prefill_tokens, num_steps=0)
        return self.setting.prefill_tokens / statistics.median(seconds)

    def decode(self, batch: int) -> float:
        load = self.setting.load
        (took_s,) = self._measure(batch, load.prompt_tokens, num_steps=load.output_tokens)
        return batch * load.output_tokens / took_s

    def _measure(self, count: int, num_tokens: int, *, num_steps: int) -> list[float]:
        load = self.setting.load
        rng = random.Random(load.seed)
        random_token_ids(rng, load.prompt_tokens, self.vocab_size)  # our own warm-up takes these first
        prompts = [random_token_ids(rng, num_tokens, self.vocab_size) for _ in range(count)]
        warm_up = [random_token_ids(rng, num_tokens, self.vocab_size) for _ in range(count)]
        return _ask(self.worker, {"prompts": prompts, "warm_up": warm_up, "num_steps": num_steps}).seconds


def _ask(worker: LineWorker, request: object) -> _Answer:
    line = worker.ask(request)
    answer = (
        msgspec.json.decode(line, type=_Answer) if line else _Answer(error=f"its process ended: {worker.last_words()}")
    )
    if answer.error:
        raise EngineFault(f"{PEER}: {answer.error}")
    return answer

"""llmserve as one of the compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.peer import PREFILL_REPETITIONS, Bench, ServerCommand, Setting
from benchmarks.peers.results import OURS
from llmserve import __version__
from llmserve.tools.bench_offline import OfflineLoad, OfflineReport, run_offline
from llmserve.tools.bench_server import llmserve_command


@dataclass(frozen=True, slots=True)
class Llmserve:
    """This installation. Prefix cache and speculation are off, as they are in the peers."""

    setting: Setting
    name: str = OURS
    given: str = ""

    def version(self) -> str:
        return __version__

    def server(self, model: Path, port: int) -> ServerCommand:
        options = ["--threads", str(self.setting.num_threads), "--no-prefix-cache", "--speculation", "off"]
        return ServerCommand(command=llmserve_command(str(model), port=port, options=options))

    def alone(self, model: Path) -> AbstractContextManager[Bench]:
        return self._alone(model)

    @contextlib.contextmanager
    def _alone(self, model: Path) -> Iterator[Bench]:
        yield _Engine(model, self.setting)


@dataclass(frozen=True, slots=True)
class _Engine:
    """Loaded anew, in this process, for each measurement."""

    model: Path
    setting: Setting

    def prefill(self) -> float:
        report = self._run(prefill_tokens=(self.setting.prefill_tokens,), repetitions=PREFILL_REPETITIONS)
        return report.prefill[0].tokens_per_s

    def decode(self, batch: int) -> float:
        return self._run(batch_sizes=(batch,)).decode[0].tokens_per_s

    def _run(
        self, *, prefill_tokens: tuple[int, ...] = (), batch_sizes: tuple[int, ...] = (), repetitions: int = 1
    ) -> OfflineReport:
        load = OfflineLoad(
            prefill_tokens=prefill_tokens,
            batch_sizes=batch_sizes,
            prompt_tokens=self.setting.load.prompt_tokens,
            output_tokens=self.setting.load.output_tokens,
            repetitions=repetitions,
            seed=self.setting.load.seed,
        )
        return run_offline(self.model, load, num_threads=self.setting.num_threads)

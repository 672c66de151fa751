"""What `llmserve doctor` looks at: this machine, this installation, and whether a model would run.

Each check returns findings and raises nothing that it can explain instead. A finding with a `remedy` is something that
is wrong.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llmserve import __version__
from llmserve.cli.byte_size import format_bytes
from llmserve.errors import LLMServeError

if TYPE_CHECKING:
    from llmserve.config import EngineConfig
    from llmserve.engine.engine import Engine
    from llmserve.types import EngineInfo

_ISA_VARIABLE: Final = "LLMSERVE_CPU_ISA"
_FEATURES: Final = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8")
_PACKAGES: Final = ("numpy", "msgspec", "pyzmq", "tokenizers", "starlette", "uvicorn", "uvloop", "httptools", "jinja2")
_SERVING_MODULES: Final = (
    "llmserve.cli.serve",
    "llmserve.cli.engine_process",
    "llmserve.server.http.app",
    "llmserve.server.http.run",
    "llmserve.server.http.openapi",
    "llmserve.service.model",
    "llmserve.cli.engine_main",
    "llmserve.engine.loader",
    "llmserve.ops.cpu",
)
_UNWANTED: Final = ("torch", "transformers")
_LEAST_SPACE_BYTES: Final = 1 << 30
_LEAST_MEMORY_BYTES: Final = 512 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `remedy` is empty when all is well."""

    topic: str
    text: str
    remedy: str = ""


def check_installation() -> Iterator[Finding]:
    """The machine and what is installed on it."""
    yield Finding("llmserve", f"{__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}")
    yield _processor()
    yield _cores()
    yield from _memory()
    extension = _extension()
    yield extension
    if not extension.remedy:
        yield _isa()
        yield _torch()
    yield _packages()
    yield _store()
    yield _images()


def check_model(config: EngineConfig) -> Iterator[Finding]:
    """Load the model here, as the engine's process would, and compute one token with it."""
    from llmserve.engine.loader import load_engine
    from llmserve.engine.memory import available_bytes

    available = available_bytes()
    num_bytes = sum(f.stat().st_size for f in _files(config.model_path))
    yield Finding("model", f"{config.model_path} ({format_bytes(num_bytes)})")
    if num_bytes > available:
        remedy = "free memory, raise the control group's limit, or take a smaller model"
        yield Finding("loading", f"needs more than the {format_bytes(available)} that are available", remedy)
        return
    try:
        engine = load_engine(config, progress=lambda phase, done, total: None)
        yield from _describe_engine(engine, config)
    except LLMServeError as error:
        yield Finding("loading", str(error), "take another model, or other options")


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.iterdir() if file.suffix in (".safetensors", ".gguf")]


def _describe_engine(engine: Engine, config: EngineConfig) -> Iterator[Finding]:
    from llmserve import checkpoints

    info = engine.info
    yield Finding(
        "loading",
        f"{info.architecture}, {format_bytes(info.weight_bytes)} of weights for {info.isa} in {info.load_s:.1f} s",
    )
    yield _weights(info, config)
    yield Finding(
        "speculation",
        f"up to {config.max_draft_tokens} tokens ahead, where text repeats itself and it pays"
        if config.speculation == "auto"
        else "off",
    )
    num_slots = info.num_blocks * info.block_size
    yield Finding(
        "KV cache",
        f"{num_slots} tokens, {format_bytes(info.kv_cache_bytes)} in {info.num_blocks} blocks, taken when touched",
    )
    max_position = checkpoints.open_checkpoint(config.model_path).config.max_position
    yield from _explain_cache(config, info, max_position)
    wanted_len = config.max_model_len or max_position
    shortened = f" (shortened from {wanted_len}: the cache holds no more)" if info.max_model_len < wanted_len else ""
    num_long, even_len = num_slots // info.max_model_len, min(info.max_model_len, num_slots // info.max_num_seqs)
    yield Finding(
        "what fits",
        f"{info.max_model_len} tokens a sequence{shortened}; {num_long} sequences of that length, or "
        f"{info.max_num_seqs} of {even_len} tokens, at the same time",
    )
    yield _first_token(engine)


def _weights(info: EngineInfo, config: EngineConfig) -> Finding:
    """Where the packed weights are, and whether they were there already."""
    from llmserve.engine.images import max_image_bytes

    if info.weights_origin == "mapped":
        return Finding("packed weights", f"mapped from {info.image_path}, which was there")
    if info.weights_origin == "written":
        return Finding("packed weights", f"packed now and kept in {info.image_path} for the next start")
    if max_image_bytes(config) == 0:
        return Finding("packed weights", "in memory; keeping them is switched off")
    least = config.packed_cache_min_bytes
    if info.weight_bytes < least:
        return Finding("packed weights", f"in memory; less than {format_bytes(least)} are packed anew at each start")
    return Finding("packed weights", "in memory; no image could be kept, the log says why")


def _explain_cache(config: EngineConfig, info: EngineInfo, max_position: int) -> Iterator[Finding]:
    """The memory choice: what limited it and what would change it."""
    from llmserve.cli.memory_report import describe_change, describe_limits
    from llmserve.engine.memory import kv_cache_limits, memory_rooms

    available = info.available_bytes
    limits = kv_cache_limits(
        config,
        max_position=max_position,
        bytes_per_block=info.kv_cache_bytes // info.num_blocks,
        available=available,
    )
    text = describe_limits(config, limits, available=available, max_position=max_position)
    yield Finding("limited by", text)
    group = min(memory_rooms(), key=lambda room: room.num_bytes).group
    yield Finding("to change it", describe_change(info.kv_cache_limit, available=available, group=group))


def _first_token(engine: Engine) -> Finding:
    from llmserve.types import Request, SamplingParams

    engine.submit(Request(request_id="doctor", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=1)))
    outputs = [output for _ in range(4) if engine.has_work for output in engine.step()]
    if not outputs or outputs[-1].finish_reason not in ("stop", "length"):
        reason = outputs[-1].error if outputs else "no output"
        return Finding("first step", f"failed: {reason}", "report this with the output of this command")
    return Finding("first step", "a token was computed")


def _processor() -> Finding:
    fields = dict[str, str]()
    for line in _read("/proc/cpuinfo").split("\n\n", 1)[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    flags = set(fields.get("flags", "").split())
    found = ", ".join(feature for feature in _FEATURES if feature in flags) or "none of those that are used"
    return Finding("processor", f"{fields.get('model name', platform.machine())}; features: {found}")


def _isa() -> Finding:
    from llmserve import _C

    best, limit = _C.best_isa(""), os.environ.get(_ISA_VARIABLE, "")
    if not limit:
        return Finding("instructions", f"{best}: the best that processor and operating system both support")
    try:
        return Finding("instructions", f"{_C.best_isa(limit)}: {_ISA_VARIABLE}={limit} limits it; the best is {best}")
    except ValueError as error:
        return Finding("instructions", str(error), f"set {_ISA_VARIABLE} to scalar, avx2, avx512 or amx, or unset it")


def _cores() -> Finding:
    allowed, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = _quota_cores()
    text = f"{allowed} of {present} cores may be used"
    if quota is not None and quota < allowed:
        remedy = "" if quota >= 1 else "give the control group at least one core (cpu.max)"
        return Finding("cores", f"{text}; the control group grants the time of {quota:.1f} (see --threads)", remedy)
    return Finding("cores", text)


def _quota_cores() -> float | None:
    """The cgroup v2 CPU quota in cores, None without one."""
    path = next((line.split(":", 2)[2] for line in _read("/proc/self/cgroup").splitlines() if line[:3] == "0::"), "/")
    for folder in (Path("/sys/fs/cgroup") / path.lstrip("/"), Path("/sys/fs/cgroup")):
        quota, _, period = _read(str(folder / "cpu.max")).strip().partition(" ")
        if quota.isdecimal() and period.isdecimal():
            return int(quota) / int(period)
    return None


def _memory() -> Iterator[Finding]:
    from llmserve.cli.memory_report import describe_available
    from llmserve.engine.memory import available_bytes, memory_rooms

    total = next((line.split()[1] for line in _read("/proc/meminfo").splitlines() if line.startswith("MemTotal")), "0")
    remedy = "free memory or raise the control group's limit" if available_bytes() < _LEAST_MEMORY_BYTES else ""
    yield Finding("memory", describe_available(memory_rooms(), int(total) * 1024), remedy)


def _extension() -> Finding:
    try:
        module = import_module("llmserve._C")
    except ImportError as error:
        return Finding("extension", f"llmserve._C cannot be loaded: {error}", "build it: make build, or pip install .")
    return Finding("extension", str(module.__file__))


def _packages() -> Finding:
    versions, missing = [], []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding("packages", f"missing: {', '.join(missing)}", "install them: make build, or pip install .")
    return Finding("packages", ", ".join(versions))


def _torch() -> Finding:
    """Import what both processes import, then look. This process imports nothing else that is heavy."""
    for name in _SERVING_MODULES:
        import_module(name)
    loaded = [name for name in _UNWANTED if name in sys.modules]
    if loaded:
        return Finding("torch", f"serving loads {', '.join(loaded)}", "report this: it costs seconds and gigabytes")
    return Finding("torch", "neither process loads torch or transformers")


def _store() -> Finding:
    from llmserve.checkpoints.store import Store

    home = Store().home
    where = next(folder for folder in (home, *home.absolute().parents) if folder.exists())
    free = shutil.disk_usage(where).free
    text = f"{home} (LLMSERVE_HOME): {format_bytes(free)} free"
    if not os.access(where, os.W_OK):
        return Finding("store", f"{text}, not writable", "set LLMSERVE_HOME to a folder of your own")
    return Finding("store", text, "free space or set LLMSERVE_HOME" if free < _LEAST_SPACE_BYTES else "")


def _images() -> Finding:
    from llmserve.config import EngineConfig
    from llmserve.engine.images import image_folder, max_image_bytes
    from llmserve.ops.image_folder import ImageFolder

    try:
        bound = max_image_bytes(EngineConfig(model_path=Path()))
    except LLMServeError as error:
        return Finding("packed weights", str(error), "set it to a number, or unset it")
    images = ImageFolder(image_folder(), bound).images()
    taken = format_bytes(sum(stat.st_size for stat in images.values()))
    count = f"{len(images)} image{'s' if len(images) != 1 else ''}"
    return Finding("packed weights", f"{image_folder()}: {count}, {taken} of at most {format_bytes(bound)}")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""

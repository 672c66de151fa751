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
        yield from _describe_engine(engine, config, available)
    except LLMServeError as error:
        yield Finding("loading", str(error), "take another model, or other options")


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.iterdir() if file.suffix in (".safetensors", ".gguf")]


def _describe_engine(engine: Engine, config: EngineConfig, available: int) -> Iterator[Finding]:
    info = engine.info
    yield Finding(
        "loading",
        f"{info.architecture}, {format_bytes(info.weight_bytes)} of weights, packed for {info.isa} in "
        f"{info.load_s:.1f} s",
    )
    num_slots = info.num_blocks * info.block_size
    yield Finding(
        "KV cache",
        f"{num_slots} tokens, {format_bytes(info.kv_cache_bytes)} in {info.num_blocks} blocks: "
        + _why_so_large(config, info.kv_cache_bytes, available),
    )
    yield Finding(
        "what fits",
        f"{info.max_model_len} tokens a sequence; {num_slots // info.max_model_len} sequences of that length, or "
        f"{info.max_num_seqs} of {min(info.max_model_len, num_slots // info.max_num_seqs)} tokens, at the same time",
    )
    yield _first_token(engine)


def _why_so_large(config: EngineConfig, chosen: int, available: int) -> str:
    from llmserve.engine.memory import DEFAULT_CAP_BYTES, KEPT_FRACTION

    if config.kv_cache_bytes:
        return "as --kv-cache-memory says"
    share = f"{1 - KEPT_FRACTION:.0%} of the {format_bytes(available)} available"
    # Sizes are whole blocks, and memory moved while the model was loaded.
    if chosen >= 0.99 * DEFAULT_CAP_BYTES:
        return f"the default limit, less than {share}; --kv-cache-memory sets another"
    if chosen < 0.9 * (1 - KEPT_FRACTION) * available:
        return "all that the most sequences of the greatest length could use"
    return f"{share}; --kv-cache-memory sets another"


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
        return Finding("instructions", str(error), f"set {_ISA_VARIABLE} to scalar, avx2 or avx512, or unset it")


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
    from llmserve.engine.memory import available_bytes

    total = next((line.split()[1] for line in _read("/proc/meminfo").splitlines() if line.startswith("MemTotal")), "0")
    available = available_bytes()
    remedy = "free memory or raise the control group's limit" if available < _LEAST_MEMORY_BYTES else ""
    yield Finding(
        "memory",
        f"{format_bytes(available)} of {format_bytes(int(total) * 1024)} available (control groups' limits count)",
        remedy,
    )


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


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""

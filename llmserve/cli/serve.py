"""`llmserve serve`: the frontend's composition root.

Order is what matters here: the engine's process is spawned first, then, while it loads, everything is imported that
only the frontend needs, and the text side is read. HTTP listens as soon as it can: `/livez` is 200, `/readyz` and
requests are 503 until the model is there. The address is announced only then.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from llmserve.cli import options
from llmserve.cli.byte_size import format_bytes
from llmserve.cli.progress import ProgressDisplay
from llmserve.config import DEFAULT_ITL_TARGET_MS, DEFAULT_MAX_DRAFT_TOKENS, EngineConfig, ServerConfig
from llmserve.errors import InvalidRequest

if TYPE_CHECKING:
    from llmserve.types import EngineInfo

HELP: Final = """Serve MODEL over OpenAI-compatible HTTP until SIGTERM or Ctrl-C.

The first signal lets running requests finish (`--drain-timeout`), a second one ends them now.

Examples:

    llmserve serve smollm2

    llmserve serve Qwen/Qwen3-0.6B

    llmserve serve ./model.gguf --host 0.0.0.0 --port 8080 --kv-cache-memory 2GiB

    llmserve serve smollm2 --max-model-len 2048 --max-num-seqs 32 --served-model-name tiny
"""
_SERVER: Final = "Server"
_ADDRESS_ERRORS: Final = {errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES}
_MAX_TEMPLATE_BYTES: Final = 1 << 20


class GenerationConfig(StrEnum):
    """Where sampling defaults come from."""

    MODEL = "model"
    NONE = "none"


Host = Annotated[str, typer.Option(rich_help_panel=_SERVER, help="Address to listen on.")]
Port = Annotated[
    int, typer.Option(min=0, max=65535, rich_help_panel=_SERVER, help="Port to listen on; 0 picks a free one.")
]
ServedModelName = Annotated[
    str, typer.Option(rich_help_panel=_SERVER, help="What clients call the model; empty: taken from MODEL.")
]
ChatTemplateFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", show_default=False, rich_help_panel=_SERVER, help="Use this Jinja chat template."),
]
Defaults = Annotated[
    GenerationConfig,
    typer.Option(rich_help_panel=_SERVER, help="Take sampling defaults from the model's files, or from none."),
]
DrainTimeout = Annotated[
    float,
    typer.Option(min=0, metavar="SECONDS", rich_help_panel=_SERVER, help="Time for running requests at the end."),
]
LogLevel = Annotated[options.LogLevel, typer.Option(rich_help_panel=_SERVER, help="How much is logged, on stderr.")]


def command(
    model: options.Model,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    served_model_name: ServedModelName = "",
    chat_template: ChatTemplateFile = None,
    generation_config: Defaults = GenerationConfig.MODEL,
    drain_timeout: DrainTimeout = 30.0,
    log_level: LogLevel = options.LogLevel.INFO,
    max_model_len: options.MaxModelLen = 0,
    max_num_seqs: options.MaxNumSeqs = 0,
    max_num_batched_tokens: options.MaxNumBatchedTokens = 0,
    max_num_waiting: options.MaxNumWaiting = 512,
    itl_target_ms: options.ItlTarget = DEFAULT_ITL_TARGET_MS,
    prefix_cache: options.PrefixCache = True,
    kv_cache_memory: options.KVCacheMemory = "",
    host_kv_cache: options.HostKVCache = "",
    device: options.DeviceOption = "cpu",
    threads: options.Threads = 0,
    exact: options.Exact = False,
    packed_cache: options.PackedCache = True,
    step_lease: options.StepLease = True,
    kv_cache_dtype: options.KVCacheDtypeOption = "bf16",
    deterministic: options.Deterministic = False,
    speculation: options.SpeculationOption = "auto",
    max_draft_tokens: options.MaxDraftTokens = DEFAULT_MAX_DRAFT_TOKENS,
    trace: options.Trace = None,
) -> int:
    """Run the command; see `HELP`."""
    started_s = time.monotonic()
    options.configure_logging(log_level)
    template = _read_template(chat_template)
    with ProgressDisplay() as display:
        path = _resolve(model, display)
        engine = options.engine_config(
            path,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_waiting=max_num_waiting,
            itl_target_ms=itl_target_ms,
            prefix_cache=prefix_cache,
            kv_cache_memory=kv_cache_memory,
            host_kv_cache=host_kv_cache,
            device=device,
            threads=threads,
            exact=exact,
            packed_cache=packed_cache,
            step_lease=step_lease,
            kv_cache_dtype=kv_cache_dtype,
            deterministic=deterministic,
            speculation=speculation,
            max_draft_tokens=max_draft_tokens,
            trace=trace,
        )
        name = served_model_name or options.model_name(model, path)
        server = _server_config(host, port, name, drain_timeout, generation_config, template)
        return _run(engine, server, display, started_s=started_s)


def _server_config(
    host: str, port: int, name: str, drain_timeout_s: float, defaults: GenerationConfig, template: str
) -> ServerConfig:
    return ServerConfig(
        host=host,
        port=port,
        served_model_name=name,
        drain_timeout_s=drain_timeout_s,
        generation_defaults=defaults is GenerationConfig.MODEL,
        chat_template=template,
    )


def _clear(trace: Path | None) -> None:
    """Begin a trace anew. An engine that is started again continues it: what came before tells why."""
    if trace is None:
        return
    try:
        trace.write_bytes(b"")
    except OSError as error:
        raise InvalidRequest(f"--trace {trace}: {(error.strerror or str(error)).lower()}") from error


def _read_template(path: Path | None) -> str:
    """The chat template of the file that was given; empty without one."""
    if path is None:
        return ""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"--chat-template {path}: {(error.strerror or str(error)).lower()}") from error
    if len(raw) > _MAX_TEMPLATE_BYTES:
        raise InvalidRequest(f"--chat-template {path}: {format_bytes(len(raw))} is too long for a template")
    try:
        source = raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"--chat-template {path}: not UTF-8 text") from error
    if not source.strip():
        raise InvalidRequest(f"--chat-template {path}: the file is empty")
    return source


def _resolve(model: str, display: ProgressDisplay) -> Path:
    from llmserve.checkpoints import pull

    return pull.resolve(model, progress=display)


def _run(engine: EngineConfig, server: ServerConfig, display: ProgressDisplay, *, started_s: float) -> int:
    import uvloop

    _clear(engine.trace_path)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(_serve(engine, server, display, started_s=started_s))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno in _ADDRESS_ERRORS:
                raise InvalidRequest(_address_error(server, error)) from error
            raise
    return 0


async def _serve(engine: EngineConfig, server: ServerConfig, display: ProgressDisplay, *, started_s: float) -> None:
    from llmserve.cli.engine_process import engine_process

    async with engine_process(engine, display) as client:
        # From here on the child loads in parallel with these imports, which take longer than all before.
        from llmserve.server.http.app import create_app
        from llmserve.server.http.run import serve
        from llmserve.service.model import ServedModel, load_model_text

        model = ServedModel(
            name=server.served_model_name,
            client=client,
            load_text=lambda: load_model_text(
                engine.model_path,
                chat_template=server.chat_template,
                generation_defaults=server.generation_defaults,
            ),
            progress_timeout_s=server.progress_timeout_s,
        )
        urls: list[str] = []

        def on_ready() -> None:
            display.close()
            gc.collect()
            gc.freeze()  # what has been loaded stays: to walk through it took every stream several ms, now and then
            _announce(urls[0], model.name, model.info, time.monotonic() - started_s)

        app = create_app(model, server)
        await asyncio.sleep(0)  # a Ctrl-C that came during the imports ends it here, not inside the server's start
        await serve(app, server, on_listening=urls.append, on_ready=on_ready)


def _announce(url: str, name: str, info: EngineInfo, took_s: float) -> None:
    """Tell where the server is and what it chose. On stdout: it is what was asked for."""
    num_slots = info.num_blocks * info.block_size
    threads = f"{info.num_threads} thread{'s' if info.num_threads != 1 else ''}"
    body = f'{{"messages": [{{"role": "user", "content": "Hello"}}], "model": "{name}"}}'
    print(
        f"{name} is ready at {url} after {took_s:.1f} s\n"
        f"  model     {info.architecture}, {format_bytes(info.weight_bytes)} of weights, "
        f"{info.device} {info.isa}, {threads}\n"
        f"  KV cache  {num_slots} tokens, {format_bytes(info.kv_cache_bytes)} at most (taken when touched); "
        f"{info.max_model_len} tokens a sequence, {info.max_num_seqs} sequences a step\n"
        f"  try       curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        flush=True,
    )


def _address_error(server: ServerConfig, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {server.port} of {server.host} is in use; choose another one with --port"
    if error.errno == errno.EACCES:
        return f"port {server.port} of {server.host} may not be used without more rights; choose one from 1024 on"
    return f"cannot listen on {server.host}: {(error.strerror or str(error)).lower()}"

"""From a configuration to a running engine: checkpoint → model → executor → KV cache → `Engine`."""

from __future__ import annotations

import time
from typing import cast

from llmserve import checkpoints, ops
from llmserve.checkpoints import Checkpoint
from llmserve.config import MAX_DRAFT_TOKENS, EngineConfig, ExecutorConfig
from llmserve.engine.engine import Engine
from llmserve.engine.images import image_config
from llmserve.engine.kv_cache import PagedExecutor
from llmserve.engine.memory import available_bytes, fit_kv_cache
from llmserve.engine.scheduler import SchedulerConfig
from llmserve.engine.trace import StepTrace
from llmserve.errors import InvalidRequest, OutOfMemory
from llmserve.models import catalog
from llmserve.ops import Progress
from llmserve.ops.protocol import DeviceExecutor
from llmserve.types import EngineInfo

MIN_LOGIT_ROWS = 64
"""Rows for scoring prompts even when few sequences may run."""


def load_engine(config: EngineConfig, *, progress: Progress) -> Engine:
    """Load a model. `progress(phase, done, total)` is called as it goes.

    Raises `CheckpointError`, `ModelNotFound`, `OutOfMemory`, `ExtensionNotBuilt`, `InvalidRequest` (a bad option).
    """
    started = time.monotonic()
    _check_host_kv_cache(config)
    scheduler_config = _scheduler_config(config)
    trace = StepTrace(config.trace_path, name=config.model_path.name) if config.trace_path is not None else None
    checkpoint = checkpoints.open_checkpoint(config.model_path)
    model = checkpoint.config
    executor = ops.load(config.device).build(
        model,
        catalog.load_model(checkpoint),
        ExecutorConfig(
            max_num_tokens=scheduler_config.max_num_tokens,
            max_num_seqs=scheduler_config.max_num_seqs,
            max_logit_rows=scheduler_config.max_logit_rows,
            max_model_len=config.max_model_len or model.max_position,
            block_size=config.block_size,
            num_threads=config.num_threads,
            exact=config.exact,
            kv_cache_dtype=config.kv_cache_dtype,
            deterministic=config.deterministic,
            host_kv_cache_bytes=config.host_kv_cache_bytes,
            images=image_config(config, checkpoint),
        ),
        progress=_releasing(checkpoint, progress),
    )
    checkpoint.release_pages()
    available = cast(DeviceExecutor, executor).free_bytes() if config.device == "cuda" else available_bytes()
    kv_plan = fit_kv_cache(
        config,
        max_position=model.max_position,
        bytes_per_block=executor.kv_bytes_per_block(),
        available=available,
    )
    executor.allocate_kv(kv_plan.num_blocks)
    info = EngineInfo(
        model_path=str(config.model_path),
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        max_model_len=kv_plan.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_waiting=config.max_num_waiting,
        num_blocks=kv_plan.num_blocks,
        block_size=config.block_size,
        kv_cache_bytes=kv_plan.num_bytes,
        weight_bytes=executor.weight_bytes,
        device=config.device,
        isa=executor.isa,
        num_threads=executor.num_threads,
        load_s=time.monotonic() - started,
        available_bytes=available,
        kv_cache_limit=kv_plan.limit,
        weights_origin=executor.weights_origin,
        image_path=executor.image_path,
    )
    return Engine(cast(PagedExecutor, executor), scheduler_config, info, trace=trace)


def _releasing(checkpoint: Checkpoint, progress: Progress) -> Progress:
    """Weights are packed one after another: the pages of each are given back, so that a model is not there twice."""

    def report(phase: str, done: int, total: int) -> None:
        checkpoint.release_pages()
        progress(phase, done, total)

    return report


def _check_host_kv_cache(config: EngineConfig) -> None:
    """Raises `InvalidRequest` where it would never be used, `OutOfMemory` where it does not fit."""
    if not config.host_kv_cache_bytes:
        return
    if config.device != "cuda":
        reason = f"on the device {config.device} the KV cache is in host memory already"
    elif not config.enable_prefix_cache:
        reason = "it keeps cached prefixes, and the prefix cache is off"
    else:
        available = available_bytes()
        if config.host_kv_cache_bytes > available:
            raise OutOfMemory(
                f"a host KV cache of {config.host_kv_cache_bytes} bytes does not fit: {available} bytes of memory are "
                "available"
            )
        return
    raise InvalidRequest(f"host_kv_cache_bytes: {reason}", param="host_kv_cache_bytes")


def _scheduler_config(config: EngineConfig) -> SchedulerConfig:
    if not 1 <= config.max_num_seqs <= config.max_num_batched_tokens:
        raise InvalidRequest(
            f"max_num_seqs is {config.max_num_seqs}; it must lie between 1 and max_num_batched_tokens "
            f"({config.max_num_batched_tokens})",
            param="max_num_seqs",
        )
    if not 1 <= config.max_draft_tokens <= MAX_DRAFT_TOKENS:
        raise InvalidRequest(
            f"max_draft_tokens is {config.max_draft_tokens}; it must lie between 1 and {MAX_DRAFT_TOKENS}. "
            "To draft nothing, set speculation to off",
            param="max_draft_tokens",
        )
    return SchedulerConfig(
        max_num_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_logit_rows=max(config.max_num_seqs, MIN_LOGIT_ROWS),
        max_num_waiting=config.max_num_waiting,
        itl_target_ms=config.itl_target_ms,
        ageing_s=config.priority_ageing_s,
        enable_prefix_cache=config.enable_prefix_cache,
        max_draft_tokens=config.max_draft_tokens if config.speculation == "auto" else 0,
    )

"""The engine's process, started before anything that its loading need not wait for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from llmserve.client.process import ProcessClient
from llmserve.config import EngineConfig


@contextlib.asynccontextmanager
async def engine_process(
    config: EngineConfig, on_progress: Callable[[str, int, int], None]
) -> AsyncIterator[ProcessClient]:
    """A client whose child has been spawned when the body begins and has ended when it is left.

    The body must `await client.start()` sooner or later: that raises what loading raised.
    """
    client = ProcessClient(config, on_progress=on_progress)
    starting = asyncio.create_task(client.start())
    await asyncio.sleep(0)  # lets the task spawn the child
    try:
        yield client
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await client.stop()

"""A model of this machine behind the service, without a server: an engine process, a tokenizer, a template."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from llmserve.cli.engine_process import engine_process
from llmserve.cli.partner import ChatMessage, ChatOptions
from llmserve.config import EngineConfig

if TYPE_CHECKING:
    from llmserve.service.choice import Delta
    from llmserve.service.generate import Generation
    from llmserve.service.model import ServedModel
    from llmserve.service.options import RequestOptions

_POLL_S = 0.02


class LocalModel:
    """Made by `open_local_model`. Close it to end the engine's process."""

    def __init__(self, served: ServedModel, resources: contextlib.AsyncExitStack) -> None:
        self.name = served.name
        self.num_tokens: int | None = None
        """Tokens of the last answer."""
        self.served = served
        self._resources = resources

    async def answer(self, messages: list[ChatMessage], options: ChatOptions) -> AsyncGenerator[str, None]:
        """Pieces of text as they come. Raises `InvalidRequest`, e.g. for a conversation longer than the context."""
        from llmserve.service.options import RequestOptions
        from llmserve.service.prompts import chat_prompt

        await self._wait_until_ready()
        prompt = await chat_prompt(
            self.served.text,
            cast("list[dict[str, Any]]", messages),
            add_generation_prompt=True,
            template_kwargs={},
        )
        generation = self._generation([prompt], RequestOptions(**asdict(options)), default_max_tokens=None)
        async with contextlib.aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                self.num_tokens = generation.usage.completion_tokens
                yield delta.text

    async def complete(
        self, prompt: str, options: RequestOptions, *, default_max_tokens: int
    ) -> tuple[Generation, AsyncGenerator[Delta, None]]:
        """Continue a raw prompt: the generation, whose `usage` grows, and its deltas. Raises `InvalidRequest`."""
        from llmserve.service.prompts import completion_prompts

        prompts = await completion_prompts(self.served.text, [prompt], echo=False, skip_special=True)
        generation = self._generation(prompts, options, default_max_tokens=default_max_tokens)
        return generation, generation.deltas()

    async def aclose(self) -> None:
        """End the engine's process."""
        await self._resources.aclose()

    def _generation(self, prompts: list[Any], options: RequestOptions, *, default_max_tokens: int | None) -> Generation:
        from llmserve.service.generate import Generation

        return Generation(self.served, prompts, options, default_max_tokens=default_max_tokens)

    async def _wait_until_ready(self) -> None:
        """An engine that died is started again by its client; a person can wait for that."""
        await asyncio.sleep(0)  # lets the client notice what happened while the loop did not run
        while self.served.client.state == "restarting":  # noqa: ASYNC110 - the client has no event for it
            await asyncio.sleep(_POLL_S)


async def open_local_model(
    config: EngineConfig, *, name: str, on_progress: Callable[[str, int, int], None]
) -> LocalModel:
    """Load a model. Raises what loading raises."""
    resources = contextlib.AsyncExitStack()
    try:
        client = await resources.enter_async_context(engine_process(config, on_progress))
        from llmserve.service.model import ServedModel, load_model_text  # while the child loads

        served = ServedModel(name=name, client=client, load_text=lambda: load_model_text(config.model_path))
        await served.start()
    except BaseException:
        await resources.aclose()
        raise
    return LocalModel(served, resources)

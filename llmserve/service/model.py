"""`ServedModel`: one model as the frontends see it: its name, its text side and the client of its engine.

Invariants: the text side and the engine load at the same time, in `start`; whatever needs one of them before it is
there raises NotReady, which is how a server answers while it loads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llmserve.client.protocol import EngineClient
from llmserve.errors import ModelNotFound, NotReady
from llmserve.metrics import Metrics
from llmserve.service.health import Health
from llmserve.service.in_flight import InFlight
from llmserve.service.sampling import GenerationDefaults
from llmserve.text import ChatTemplate, Tokenizer, load_chat_template, load_tokenizer
from llmserve.types import EngineInfo, EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelText:
    """The text side of a model."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None = None
    """None: the model has none, so chat requests are refused."""
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)


def load_model_text(path: Path, *, chat_template: str = "", generation_defaults: bool = True) -> ModelText:
    """Read the text side of the checkpoint at `path`. Raises CheckpointError.

    `chat_template` replaces the checkpoint's own when not empty.
    """
    from llmserve import checkpoints

    assets = checkpoints.open_text(path)
    tokenizer = load_tokenizer(assets)
    return ModelText(
        tokenizer=tokenizer,
        chat_template=load_chat_template(assets, tokenizer, source=chat_template),
        defaults=GenerationDefaults.from_config(assets.generation_config if generation_defaults else {}),
    )


class ServedModel:
    """One model behind any number of frontends."""

    def __init__(
        self,
        *,
        name: str,
        client: EngineClient,
        load_text: Callable[[], ModelText],
        progress_timeout_s: float = 5.0,
    ) -> None:
        self.name = name
        self.client = client
        self.created_s = int(time.time())
        """When this server took up the model, Unix seconds."""
        self.in_flight = InFlight()
        self.health = Health(client, self.in_flight, progress_timeout_s=progress_timeout_s)
        self.metrics = Metrics(model_name=name, engine=self._engine_state)
        client.watch_steps(self.metrics.note_step)
        self._load_text = load_text
        self._text: ModelText | None = None

    async def start(self) -> None:
        """Load the text side on a thread while the engine starts. Raises what either of them raises."""
        text, _ = await asyncio.gather(asyncio.to_thread(self._load_text), self.client.start())
        self._text = text

    async def stop(self) -> None:
        """Stop the engine."""
        await self.client.stop()

    @property
    def text(self) -> ModelText:
        """Raises NotReady until loaded."""
        if self._text is None:
            raise NotReady("the model is loading")
        return self._text

    @property
    def info(self) -> EngineInfo:
        """What the engine says of itself. Raises NotReady until it first was ready."""
        info = self.client.info
        if info is None:
            raise NotReady("the model is loading")
        return info

    def check_name(self, name: str | None) -> None:
        """Raise ModelNotFound unless `name` is this model's; None means the only one."""
        if name is not None and name != self.name:
            raise ModelNotFound(f"the model {name!r} does not exist; this server has {self.name!r}")

    def check_accepting(self) -> None:
        """Raise NotReady when a request would have nobody to serve it, Overloaded when it would find the queue full."""
        if self._text is None or self.client.state != "ready":
            readiness = self.health.check()
            raise NotReady(readiness.reason or "the model is loading")
        self.client.check_capacity()

    def _engine_state(self) -> tuple[EngineInfo, EngineStats] | None:
        info = self.client.info
        return None if info is None else (info, self.client.stats)

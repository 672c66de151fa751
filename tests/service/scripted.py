"""A scripted engine: speaks the `EngineClient` protocol, samples nothing. The application around it has no socket."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar

import httpx
import msgspec

from llmserve.client.protocol import ClientState
from llmserve.config import ServerConfig
from llmserve.errors import Overloaded
from llmserve.server.http.app import create_app
from llmserve.service.model import ModelText, ServedModel
from llmserve.text import Tokenizer, load_chat_template, load_tokenizer
from llmserve.types import EngineInfo, EngineStats, Output, Request, TokenLogprob
from tests.unit.text_vocab import made_assets

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{{ suffix }}"
)
MODEL = "made-model"
MAX_MODEL_LEN = 512


class Wait:
    """A script's item: nothing more comes until the request is aborted."""


class Pause:
    """A script's item: nothing comes for a while."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


Script = Callable[[Request], Iterable[Output | Exception | Wait | Pause]]
_T = TypeVar("_T")


def made_text() -> ModelText:
    """Tokenizer and template of the made vocabulary."""
    assets = made_assets(chat_template=TEMPLATE)
    tokenizer = load_tokenizer(assets)
    return ModelText(tokenizer=tokenizer, chat_template=load_chat_template(assets, tokenizer))


TEXT = made_text()
TOKENIZER: Tokenizer = TEXT.tokenizer
INFO = EngineInfo(
    model_path="made.gguf",
    architecture="llama",
    vocab_size=TOKENIZER.vocab_size,
    max_model_len=MAX_MODEL_LEN,
    max_num_seqs=8,
    num_blocks=64,
    block_size=16,
    kv_cache_bytes=0,
    weight_bytes=0,
    device="scripted",
    isa="none",
    num_threads=1,
    load_s=0.0,
)


def ids_of(text: str) -> list[int]:
    """Token ids of a text, no special ones."""
    return TOKENIZER.encode(text, add_special=False)


def says(text: str, *, end: bool = True) -> Script:
    """An engine that says `text`, one token a step, then ends by the end token; `max_tokens` cuts it short."""

    def script(request: Request) -> Iterator[Output]:
        eos_id = TOKENIZER.eos_id
        assert eos_id is not None
        return speak(request, [*ids_of(text), *([eos_id] if end else [])])

    return script


def speak(request: Request, ids: list[int]) -> Iterator[Output]:
    """One output for each id, as an engine would report it."""
    sampling = request.sampling
    prompt_logprobs = None
    if sampling.num_prompt_logprobs is not None:
        prompt_logprobs = tuple(logprob(i, sampling.num_prompt_logprobs) for i in request.prompt_token_ids[1:])
    if sampling.max_tokens == 0:
        yield Output(request_id=request.request_id, prompt_logprobs=prompt_logprobs, finish_reason="length")
        return
    for position, token_id in enumerate(ids, start=1):
        stopped = token_id in sampling.stop_token_ids
        length = position == min(sampling.max_tokens, len(ids))
        yield Output(
            request_id=request.request_id,
            token_ids=(token_id,),
            logprobs=None if sampling.num_logprobs is None else (logprob(token_id, sampling.num_logprobs),),
            prompt_logprobs=prompt_logprobs if position == 1 else None,
            finish_reason="stop" if stopped else "length" if length else None,
            stop_token_id=token_id if stopped else None,
        )
        if stopped or length:
            return


def logprob(token_id: int, num_top: int) -> TokenLogprob:
    """A made entry: the token is the likeliest at -0.5, its successors follow."""
    return TokenLogprob(
        token_id,
        -0.5,
        1,
        tuple((token_id + i) % TOKENIZER.vocab_size for i in range(num_top)),
        tuple(-0.5 - i for i in range(num_top)),
    )


class ScriptedStream:
    """One request's outputs."""

    def __init__(self, client: ScriptedClient, request: Request) -> None:
        self._client = client
        self._request = request
        self._items = iter(client.script(request))
        self._ended = False

    def __aiter__(self) -> ScriptedStream:
        return self

    async def __anext__(self) -> Output:
        await asyncio.sleep(0)
        item = next(self._items, None)
        if item is None:
            self._ended = True
            raise StopAsyncIteration
        if isinstance(item, Pause):
            await asyncio.sleep(item.seconds)
            return await self.__anext__()
        if isinstance(item, Wait):
            await asyncio.Event().wait()
        if isinstance(item, Exception):
            self._ended = True
            raise item
        assert isinstance(item, Output), item
        self._ended = item.finish_reason is not None
        return item

    async def forward(self, take: Callable[[Output], bool]) -> None:
        async with contextlib.aclosing(self):
            async for output in self:
                if not take(output):
                    return

    async def aclose(self) -> None:
        if not self._ended:
            self._ended = True
            self._client.aborted.append(self._request.request_id)
        self._client.num_open -= 1


class ScriptedClient:
    """The protocol's other side. `requests` and `aborted` record what came in."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.num_open = 0
        self.state: ClientState = "starting"
        self.info: EngineInfo | None = None
        self.stats = EngineStats(num_blocks=64, num_blocks_used=16, num_generation_tokens=3)
        self.is_busy = False
        self.last_progress_s = time.monotonic()
        self.start_error: Exception | None = None
        self.full: Overloaded | None = None
        self.frozen = False

    async def start(self) -> EngineInfo:
        if self.start_error is not None:
            raise self.start_error
        self.state = "ready"
        self.info = INFO
        return INFO

    def submit(self, request: Request) -> ScriptedStream:
        # Everything that crosses the seam must survive the wire.
        request = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=Request)
        self.requests.append(request)
        self.num_open += 1
        return ScriptedStream(self, request)

    def watch_steps(self, on_step: Callable[[EngineStats], None]) -> None:
        self.on_step = on_step

    def check_capacity(self) -> None:
        if self.full is not None:
            raise self.full

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    async def control(self, command: str, **args: Any) -> dict[str, Any]:
        if self.frozen:
            await asyncio.Event().wait()
        return {}

    async def stop(self) -> None:
        self.state = "stopped"


class Server:
    """The whole stack without a socket."""

    def __init__(self, script: Script, **config: Any) -> None:
        self.client = ScriptedClient(script)
        self.model = ServedModel(name=MODEL, client=self.client, load_text=lambda: TEXT)
        self.app = create_app(self.model, ServerConfig(**config))

    @contextlib.asynccontextmanager
    async def http(self, *, start: bool = True) -> AsyncIterator[httpx.AsyncClient]:
        """A client of the started application."""
        if start:
            await self.model.start()
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://made") as http:
            yield http

    def run(self, act: Callable[[httpx.AsyncClient], Awaitable[_T]], *, start: bool = True) -> _T:
        """Run one test's requests on a loop of their own."""

        async def main() -> _T:
            async with self.http(start=start) as http:
                return await act(http)

        return asyncio.run(main())

    def post(self, path: str, body: object) -> httpx.Response:
        """One request; bytes are sent as they are."""
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)

        async def act(http: httpx.AsyncClient) -> httpx.Response:
            return await http.post(path, content=raw)

        return self.run(act)

    def get(self, path: str, *, start: bool = True) -> httpx.Response:
        """One GET."""

        async def act(http: httpx.AsyncClient) -> httpx.Response:
            return await http.get(path)

        return self.run(act, start=start)

    def chat(self, **body: object) -> httpx.Response:
        """A chat completion of a short conversation, or of `messages`."""
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]} | body)

    def complete(self, **body: object) -> httpx.Response:
        """A completion of a short prompt, or of `prompt`."""
        return self.post("/v1/completions", {"prompt": "hi", "max_tokens": 64} | body)


def events(response: httpx.Response) -> list[Any]:
    """The data of all events of a stream; `[DONE]` as it is."""
    blocks = response.text.split("\n\n")
    assert blocks.pop() == "", "a stream ends with an empty line"
    lines = [block for block in blocks if not block.startswith(":")]
    assert all(line.startswith("data: ") for line in lines), lines
    data = [line.removeprefix("data: ") for line in lines]
    return [item if item == "[DONE]" else msgspec.json.decode(item) for item in data]

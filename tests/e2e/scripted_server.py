"""A real server process around the scripted engine. The prompt says what the engine does.

`forever`: one token each 10 ms, without end. `stuck`: nothing ever comes. `slow`: the first token comes late.
`break`: fails after two tokens. `many N`: N tokens as fast as they are taken. Anything else is answered by `hello
wörld`.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterable

from llmserve.config import ServerConfig
from llmserve.errors import EngineFault
from llmserve.server.http.app import create_app
from llmserve.server.http.run import run_server
from llmserve.service.model import ServedModel
from llmserve.types import Output, Request
from tests.service.scripted import MODEL, TEXT, TOKENIZER, Pause, ScriptedClient, Wait, ids_of, says, speak

SLOW_S = 0.5


def script(request: Request) -> Iterable[Output | Exception | Wait | Pause]:
    """What the prompt asks for."""
    prompt = TOKENIZER.decode(request.prompt_token_ids, skip_special=False)
    token = Output(request_id=request.request_id, token_ids=tuple(ids_of("a")))
    if "forever" in prompt:
        return (item for _ in itertools.count() for item in (token, Pause(0.01)))
    if "stuck" in prompt:
        return [Wait()]
    if "slow" in prompt:
        return [Pause(SLOW_S), *says("late")(request)]
    if "break" in prompt:
        return [token, token, EngineFault("it broke")]
    if "many" in prompt:
        return speak(request, ids_of("a") * int(prompt.split("many ")[1].split("<")[0]))
    return says("hello wörld")(request)


def main() -> None:
    """Serve until a signal; the URL goes to the standard output when the model is ready."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    config = ServerConfig(port=0, drain_timeout_s=float(sys.argv[1]), keep_alive_comment_s=0.1)
    model = ServedModel(name=MODEL, client=ScriptedClient(script), load_text=lambda: TEXT)
    urls: list[str] = []

    def on_ready() -> None:
        sys.stdout.write(urls[0] + "\n")
        sys.stdout.flush()

    run_server(create_app(model, config), config, on_listening=urls.append, on_ready=on_ready)


if __name__ == "__main__":
    main()

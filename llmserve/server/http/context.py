"""What is known of one HTTP exchange while it runs: its id, its route, and what goes into its log line."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field

from starlette.types import Scope

_CLIENT_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(slots=True, kw_only=True)
class Exchange:
    """Made by the boundary for every request, found in the ASGI scope as `llmserve.exchange`."""

    request_id: str
    start_s: float = field(default_factory=time.monotonic)
    """Monotonic."""
    route: str = ""
    """The route's path template; empty when none matched."""
    status: int = 0
    """0 until the answer has begun."""
    error: str = ""
    """Code of the error that ended the exchange, also where the status had been sent before."""
    stream: bool = False
    generation: bool = False
    """Whether this is a request to a model: only those are logged at INFO."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float | None = None
    finish_reasons: tuple[str, ...] = ()


def new_exchange(scope: Scope) -> Exchange:
    """Take the client's `x-request-id` where it is fit for headers and logs, else make one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            if _CLIENT_ID.fullmatch(text):
                return Exchange(request_id=text)
    return Exchange(request_id=secrets.token_hex(12))


def exchange_of(scope: Scope) -> Exchange:
    """The exchange that the boundary put into the scope."""
    exchange: Exchange = scope["llmserve.exchange"]
    return exchange

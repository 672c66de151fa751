"""HTTP connections on which a running answer can be written to without a task.

uvicorn's protocol with one addition: each request's scope offers `WRITE_NOW`, an extension in ASGI's sense. An
application that finds none sends messages as usual. Invariant: what is written so is framed as `send` would frame it
and comes in the order of the calls; nothing is written that `send` would have to wait with, or to refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

WRITE_NOW: Final = "llmserve.write_now"
"""Key in the scope's `extensions`."""

WriteNow = Callable[[bytes], bool]
"""Writes a piece of the body that more follows; False, and nothing is done, where only `send` can tell what to do."""


class Connection(HttpToolsProtocol):
    """One connection."""

    def on_headers_complete(self) -> None:
        """Offer the extension to the request that begins; its application runs in a later turn of the loop."""
        super().on_headers_complete()
        if self.scope is self.cycle.scope:
            self.scope["extensions"] = {WRITE_NOW: partial(_write_now, self.cycle)}  # type: ignore[dict-item]


def _write_now(cycle: RequestResponseCycle, body: bytes) -> bool:
    if (
        cycle.flow.write_paused
        or cycle.disconnected
        or not cycle.response_started
        or cycle.response_complete
        or not cycle.chunked_encoding
    ):
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
    return True

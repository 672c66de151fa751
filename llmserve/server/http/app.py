"""`create_app`: the HTTP application of one served model.

Invariant: the application starts at once and answers truthfully while the model loads; the model is started and
stopped by its lifespan.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import NoReturn

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.routing import Route

from llmserve.config import ServerConfig
from llmserve.server.http.boundary import Boundary
from llmserve.server.http.chat import read_chat
from llmserve.server.http.completions import read_completion
from llmserve.server.http.endpoint import GenerationEndpoint
from llmserve.server.http.errors import MethodNotAllowed, RouteNotFound
from llmserve.server.http.operations import operation_routes
from llmserve.server.http.schemas import ChatBody, CompletionBody
from llmserve.service.model import ServedModel

logger = logging.getLogger("llmserve.http")


def create_app(model: ServedModel, config: ServerConfig) -> Starlette:
    """The ASGI application. `app.state.model` is `model`; `app.state.loading` is the task that starts it."""
    chat = GenerationEndpoint(model, config, body_type=ChatBody, dialect=read_chat)
    completions = GenerationEndpoint(model, config, body_type=CompletionBody, dialect=read_completion)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            *operation_routes(model),
        ],
        middleware=[Middleware(Boundary, responses=model.metrics.responses)],
        exception_handlers={HTTPException: _raise_ours},
        lifespan=_lifespan,
    )
    app.router.redirect_slashes = False
    app.state.model = model
    app.state.loading = None
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    model: ServedModel = app.state.model
    # The listener opens at once: probes get a truthful answer while the model loads.
    loading = app.state.loading = asyncio.create_task(_load(model))
    try:
        yield
    finally:
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        await model.stop()


async def _load(model: ServedModel) -> None:
    await model.start()
    info = model.info
    logger.info(
        "event=model_ready model=%s architecture=%s max_model_len=%d kv_blocks=%d load_s=%.2f",
        model.name,
        info.architecture,
        info.max_model_len,
        info.num_blocks,
        info.load_s,
    )


def _raise_ours(request: Request, error: Exception) -> NoReturn:
    """Turn the router's errors into ours, which the boundary answers in OpenAI's shape."""
    assert isinstance(error, HTTPException), "registered for HTTPException alone"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        raise MethodNotAllowed(f"{request.url.path} does not take {request.method}", allowed=allowed)
    raise RouteNotFound(f"there is nothing at {request.url.path}")

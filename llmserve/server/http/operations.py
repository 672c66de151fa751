"""The routes beside generation: models, health, metrics, version and documentation."""

from __future__ import annotations

import functools
from importlib import metadata, resources

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from llmserve.server.http.responses import ModelCard, ModelList
from llmserve.service.model import ServedModel

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def operation_routes(model: ServedModel) -> list[Route]:
    """All routes that do not generate."""

    async def list_models(_: Request) -> Response:
        return _json(ModelList([_card(model)]))

    async def get_model(request: Request) -> Response:
        model.check_name(request.path_params["id"])
        return _json(_card(model))

    async def livez(_: Request) -> Response:
        return _json({"status": "alive"})

    async def readyz(_: Request) -> Response:
        readiness = await model.health.probe()
        if readiness.ready:
            return _json({"status": "ready"})
        return _json({"status": "not ready", "reason": readiness.reason}, status=503)

    async def metrics(_: Request) -> Response:
        return Response(model.metrics.render(), headers={"content-type": _METRICS_TYPE})

    async def version(_: Request) -> Response:
        return _json({"version": server_version()})

    return [
        Route("/v1/models", list_models),
        Route("/v1/models/{id:path}", get_model),
        Route("/livez", livez),
        Route("/readyz", readyz),
        Route("/health", readyz),
        Route("/metrics", metrics),
        Route("/version", version),
        Route("/openapi.json", _openapi),
        Route("/docs", _docs),
        Route("/", _index),
    ]


@functools.cache
def server_version() -> str:
    """The installed version, `0+unknown` when run from a bare source tree."""
    try:
        return metadata.version("llmserve")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def _card(model: ServedModel) -> ModelCard:
    info = model.client.info
    return ModelCard(model.name, model.created_s, info.max_model_len if info is not None else None)


def _json(value: object, *, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


@functools.cache
def _openapi_bytes() -> bytes:
    from llmserve.server.http.openapi import openapi_document  # 10 ms that no start needs

    return msgspec.json.encode(openapi_document(server_version()))


async def _openapi(_: Request) -> Response:
    return Response(_openapi_bytes(), media_type="application/json")


@functools.cache
def _page(name: str) -> str:
    return resources.files("llmserve.server.http").joinpath(name).read_text("utf-8")


async def _docs(_: Request) -> Response:
    return HTMLResponse(_page("docs.html"))


async def _index(_: Request) -> Response:
    return HTMLResponse(_page("index.html"))

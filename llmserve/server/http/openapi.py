"""`/openapi.json`, generated from the structs that parse and answer."""

from __future__ import annotations

from typing import Any

import msgspec

from llmserve.server.http import responses
from llmserve.server.http.errors import ErrorBody
from llmserve.server.http.schemas import ChatBody, CompletionBody

_REF = "#/components/schemas/{name}"
_ERRORS = {
    "400": "A parameter is wrong or not supported; `param` names it.",
    "404": "There is no such model.",
    "408": "The deadline passed before the first byte.",
    "413": "The body is too large.",
    "503": "Loading, draining or overloaded; `Retry-After` says when to try again.",
}
_PLAIN = (
    ("/livez", "The process answers."),
    ("/readyz", "A model is loaded and its engine makes progress; 503 otherwise."),
    ("/health", "The same as /readyz."),
    ("/metrics", "Prometheus metrics."),
    ("/version", "Version of the server."),
    ("/openapi.json", "This description."),
    ("/docs", "This description as a page."),
)


def openapi_document(version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 description of all routes."""
    types = (
        ChatBody,
        CompletionBody,
        responses.ChatAnswer,
        responses.ChatChunk,
        responses.CompletionAnswer,
        responses.ModelCard,
        responses.ModelList,
        ErrorBody,
    )
    _, schemas = msgspec.json.schema_components(types, ref_template=_REF)
    paths: dict[str, Any] = {
        "/v1/chat/completions": _generation("Answer a conversation", ChatBody, responses.ChatAnswer, "ChatChunk"),
        "/v1/completions": _generation(
            "Continue prompts", CompletionBody, responses.CompletionAnswer, "CompletionAnswer"
        ),
        "/v1/models": {"get": _get("All served models.", _ref(responses.ModelList))},
        "/v1/models/{id}": {"get": _get("One served model.", _ref(responses.ModelCard)) | {"parameters": [_MODEL_ID]}},
    }
    paths |= {path: {"get": {"summary": text, "responses": {"200": {"description": text}}}} for path, text in _PLAIN}
    return {
        "openapi": "3.1.0",
        "info": {"title": "llmserve", "version": version, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": schemas},
    }


_MODEL_ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}


def _ref(struct: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REF.format(name=struct.__name__)}


def _json(schema: dict[str, str]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _get(text: str, schema: dict[str, str]) -> dict[str, Any]:
    return {"summary": text, "responses": {"200": {"description": text, "content": _json(schema)}}}


def _generation(
    summary: str, body: type[msgspec.Struct], answer: type[msgspec.Struct], chunk_name: str
) -> dict[str, Any]:
    chunk = {"$ref": _REF.format(name=chunk_name)}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": _json(_ref(body))},
            "responses": {
                "200": {
                    "description": "The answer; with `stream`, events of which each `data:` line is a chunk.",
                    "content": _json(_ref(answer)) | {"text/event-stream": {"schema": chunk}},
                },
                **{
                    status: {"description": text, "content": _json(_ref(ErrorBody))} for status, text in _ERRORS.items()
                },
            },
        }
    }

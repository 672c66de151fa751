"""Errors as HTTP answers, in OpenAI's shape.

Invariant: `ERROR_TABLE` names every class of `llmserve.errors` (a test asserts it). An answer never carries a
traceback.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from llmserve import errors
from llmserve.errors import LLMServeError


class BodyTooLarge(LLMServeError):
    """The request's body is longer than the server takes."""


class RouteNotFound(LLMServeError):
    """No route has this path."""


class MethodNotAllowed(LLMServeError):
    """The route exists, but not with this method; `allowed` lists those it has."""

    def __init__(self, message: str, *, allowed: str = "") -> None:
        super().__init__(message)
        self.allowed = allowed


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How a class of errors looks on the wire."""

    status: int
    type: str
    code: str | None


ERROR_TABLE: dict[type[LLMServeError], ErrorKind] = {
    LLMServeError: ErrorKind(500, "server_error", "internal_error"),
    errors.InvalidRequest: ErrorKind(400, "invalid_request_error", None),
    errors.ModelNotFound: ErrorKind(404, "invalid_request_error", "model_not_found"),
    errors.CheckpointError: ErrorKind(500, "server_error", "checkpoint_error"),
    errors.Overloaded: ErrorKind(429, "overloaded_error", "overloaded"),
    errors.NotReady: ErrorKind(503, "service_unavailable_error", "not_ready"),
    errors.DeadlineExceeded: ErrorKind(408, "timeout_error", "deadline_exceeded"),
    errors.EngineDied: ErrorKind(503, "service_unavailable_error", "engine_died"),
    errors.EngineFault: ErrorKind(500, "server_error", "engine_fault"),
    errors.ExtensionNotBuilt: ErrorKind(500, "server_error", "extension_not_built"),
    errors.OutOfMemory: ErrorKind(400, "invalid_request_error", "out_of_memory"),
    errors.ClientDisconnected: ErrorKind(499, "client_disconnected", "client_disconnected"),
    BodyTooLarge: ErrorKind(413, "invalid_request_error", "body_too_large"),
    RouteNotFound: ErrorKind(404, "invalid_request_error", "route_not_found"),
    MethodNotAllowed: ErrorKind(405, "invalid_request_error", "method_not_allowed"),
}


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every answer that is not a success."""

    error: ErrorDetail


def error_kind(error: BaseException) -> ErrorKind:
    """The row of the nearest class that the table has; whatever is not ours is an internal error."""
    for cls in type(error).__mro__:
        kind = ERROR_TABLE.get(cls)
        if kind is not None:
            return kind
    return ERROR_TABLE[LLMServeError]


def error_body(error: BaseException, *, request_id: str) -> bytes:
    """The JSON body of an error. Errors that are not ours tell nothing but the id under which they were logged."""
    kind = error_kind(error)
    if not isinstance(error, LLMServeError):
        detail = ErrorDetail(f"internal error; request {request_id}", kind.type, code=kind.code)
    elif isinstance(error, errors.InvalidRequest):
        detail = ErrorDetail(str(error), kind.type, param=error.param, code=error.code or kind.code)
    else:
        detail = ErrorDetail(str(error), kind.type, code=kind.code)
    return msgspec.json.encode(ErrorBody(detail))


def error_headers(error: BaseException) -> list[tuple[bytes, bytes]]:
    """The headers that go with an error besides the content's."""
    if isinstance(error, errors.Overloaded):
        return [(b"retry-after", str(max(1, round(error.retry_after_s))).encode())]
    if isinstance(error, MethodNotAllowed):
        return [(b"allow", error.allowed.encode())]
    if error_kind(error).status == 503:
        return [(b"retry-after", b"1")]
    return []

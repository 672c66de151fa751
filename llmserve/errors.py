"""The one tree of errors. It knows nothing of HTTP or gRPC: each frontend maps it by a table of its own.

Invariant: every leaf class is named in each frontend's table (a test asserts it).
"""

from __future__ import annotations


class LLMServeError(Exception):
    """Base of all errors that llmserve raises on purpose. `str()` is one line for a person."""


class InvalidRequest(LLMServeError):
    """The request cannot be served as sent. `param` names the offending parameter where there is one."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ModelNotFound(LLMServeError):
    """No loaded model, file or package has this name."""


class CheckpointError(LLMServeError):
    """A checkpoint is unreadable, inconsistent or of a kind that is not supported."""


class Overloaded(LLMServeError):
    """The server cannot take the request now; `retry_after_s` says when to try again."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(LLMServeError):
    """The engine is loading, restarting or draining."""


class DeadlineExceeded(LLMServeError):
    """The request's deadline passed."""


class EngineDied(LLMServeError):
    """The engine process ended while it held the request."""


class EngineFault(LLMServeError):
    """The engine failed on this request alone."""


class ExtensionNotBuilt(LLMServeError):
    """The compiled extension is missing. The message names the build command."""


class OutOfMemory(LLMServeError):
    """What was asked for can never fit into the memory at hand."""


class ClientDisconnected(LLMServeError):
    """The client went away; nobody reads the answer."""

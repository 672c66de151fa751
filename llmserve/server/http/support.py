"""How each parameter is treated, read from the schema: the check of parameters that are not supported yet, and the
table for the documentation."""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from llmserve.errors import InvalidRequest
from llmserve.server.http.schemas import ChatBody, CompletionBody, Message, StreamOptions


def check_supported(body: msgspec.Struct, path: str = "") -> None:
    """Raise InvalidRequest naming the first parameter that is set and not supported yet."""
    for name, neutral_values in _neutral_fields(type(body)):
        value = getattr(body, name)
        if value is None or any(_equal(value, neutral) for neutral in neutral_values):
            continue
        accepted = ", ".join(msgspec.json.encode(neutral).decode() for neutral in (None, *neutral_values))
        raise InvalidRequest(
            f"{path}{name} is not supported yet; it may be absent or one of: {accepted}",
            param=path + name,
            code="unsupported_parameter",
        )


def _equal(value: object, neutral: object) -> bool:
    # True == 1 in Python, not on the wire.
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


@functools.cache
def _neutral_fields(struct: type[msgspec.Struct]) -> tuple[tuple[str, tuple[object, ...]], ...]:
    return tuple(
        (name, meta.extra["neutral"])
        for name, meta in _marks(struct)
        if meta is not None and meta.extra is not None and meta.extra["support"] == "neutral"
    )


def _marks(struct: type[msgspec.Struct]) -> Iterator[tuple[str, Meta | None]]:
    """Each field with the Meta that stands outermost on it."""
    hints = typing.get_type_hints(struct, include_extras=True)
    for name in struct.__struct_fields__:
        metas = [meta for meta in getattr(hints[name], "__metadata__", ()) if isinstance(meta, Meta)]
        yield name, metas[0] if metas else None


def _description(hint: Any) -> str:
    """The first description on a type or, for a union, on one of its members."""
    if typing.get_origin(hint) is Annotated:
        for meta in hint.__metadata__:
            if isinstance(meta, Meta) and meta.description:
                return meta.description
    for member in typing.get_args(hint):
        found = _description(member)
        if found:
            return found
    return ""


_HONOURED = "honoured"
_LABELS = {"neutral": "refused unless neutral", "ignored": "ignored"}


def _rows(struct: type[msgspec.Struct], prefix: str) -> Iterator[tuple[str, str, str]]:
    hints = typing.get_type_hints(struct, include_extras=True)
    for name, meta in _marks(struct):
        extra = meta.extra if meta is not None and meta.extra is not None else {}
        support = _LABELS.get(str(extra.get("support")), _HONOURED)
        yield f"`{prefix}{name}`", support, _description(hints[name])


def support_table() -> str:
    """The Markdown table of all parameters of the generation endpoints."""
    endpoints = {"chat": dict[str, tuple[str, str]](), "completions": dict[str, tuple[str, str]]()}
    for endpoint, struct in (("chat", ChatBody), ("completions", CompletionBody)):
        for part, prefix in ((struct, ""), (StreamOptions, "stream_options.")):
            endpoints[endpoint].update({name: (kind, text) for name, kind, text in _rows(part, prefix)})
    for name, kind, text in _rows(Message, "messages[]."):
        endpoints["chat"][name] = (kind, text)
    lines = ["| parameter | chat | completions | |", "|---|---|---|---|"]
    names = dict.fromkeys((*endpoints["chat"], *endpoints["completions"]))
    for name in sorted(names, key=lambda name: name.strip("`")):
        cells = [endpoints[endpoint].get(name, ("–", ""))[0] for endpoint in ("chat", "completions")]
        texts = dict.fromkeys(endpoints[e][name][1] for e in endpoints if name in endpoints[e])
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {' / '.join(text for text in texts if text)} |")
    return "\n".join(lines) + "\n"

"""The description of the API is made from what parses: it cannot lag behind."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from llmserve.server.http.schemas import ChatBody, CompletionBody
from scripts.write_api_table import PAGE, with_table
from tests.service.scripted import Server, says


@pytest.fixture(scope="module")
def document() -> Any:
    return Server(says("a")).get("/openapi.json").json()


def test_documented_table_is_of_today() -> None:
    page = PAGE.read_text("utf-8")
    assert with_table(page) == page, "run scripts/write_api_table.py"


def test_every_route_is_described(document: Any) -> None:
    routes = {getattr(route, "path", "") for route in Server(says("a")).app.routes} - {"/"}
    assert {path.replace(":path", "") for path in routes} == set(document["paths"])


@pytest.mark.parametrize("struct", [ChatBody, CompletionBody])
def test_every_parameter_is_described(document: Any, struct: type[msgspec.Struct]) -> None:
    properties = document["components"]["schemas"][struct.__name__]["properties"]
    assert set(properties) == set(struct.__struct_fields__)
    assert document["components"]["schemas"][struct.__name__]["additionalProperties"] is False


def test_bounds_are_described(document: Any) -> None:
    temperature = document["components"]["schemas"]["ChatBody"]["properties"]["temperature"]
    number = next(s for s in temperature["anyOf"] if s["type"] == "number")
    assert (number["minimum"], number["maximum"]) == (0, 2)


def test_references_resolve(document: Any) -> None:
    names = re.findall(r"#/components/schemas/(\w+)", msgspec.json.encode(document).decode())
    assert set(names) <= set(document["components"]["schemas"])


def test_pages_load_nothing_from_elsewhere() -> None:
    for path in ("/", "/docs"):
        response = Server(says("a")).get(path)
        assert response.status_code == 200
        assert not re.search(r"(src|href)=\"(https?:)?//", response.text)

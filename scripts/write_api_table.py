"""Writes the table of parameters into docs/api.md, from the schema that parses them. `--check` only compares."""

from __future__ import annotations

import sys
from pathlib import Path

from llmserve.server.http.support import support_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
BEGIN = "<!-- begin parameters: written by scripts/write_api_table.py -->\n"
END = "<!-- end parameters -->\n"


def with_table(page: str) -> str:
    """The page with the table of today between its marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + support_table() + END + after


def main() -> int:
    """Write, or with `--check` return 1 when the page is out of date."""
    page = PAGE.read_text("utf-8")
    if "--check" in sys.argv[1:]:
        return int(with_table(page) != page)
    PAGE.write_text(with_table(page), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Parsers of command-line values that several benchmarks take. Each raises `argparse.ArgumentTypeError`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

_Number = TypeVar("_Number", int, float)


def positive(kind: Callable[[str], _Number]) -> Callable[[str], list[_Number]]:
    """A parser of numbers above 0 with commas between; an empty text is an empty list."""

    def parse(text: str) -> list[_Number]:
        try:
            values = [kind(part) for part in text.split(",") if text]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: write numbers with commas, e.g. 1,8,32") from error
        if not all(0 < value < float("inf") for value in values):
            raise argparse.ArgumentTypeError(f"{text!r}: numbers above 0")
        return values

    return parse


def one_positive(text: str) -> float:
    """A number above 0."""
    (value, *more) = positive(float)(text) or [0.0]
    if more or not value:
        raise argparse.ArgumentTypeError(f"{text!r}: one number above 0")
    return value

"""Philox4x32-10 against the known answers that its authors publish with Random123, and our use of it."""

from __future__ import annotations

import pytest

from llmserve.ops.philox import Words, philox4x32, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: Words, key: tuple[int, int], expected: Words) -> None:
    assert philox4x32(counter, key) == expected


def test_uniform_is_the_first_word_of_the_counter_and_key_that_the_definition_says() -> None:
    seed, position = 0x299F31D0A4093822, 0x85A308D3243F6A88
    word = philox4x32((0x243F6A88, 0x85A308D3, 0, 0), (0xA4093822, 0x299F31D0))[0]
    assert uniform(seed, position) == ((word >> 8) + 0.5) / 2**24


def test_uniform_is_inside_the_unit_interval_and_even() -> None:
    draws = [uniform(seed, position) for seed in range(40) for position in range(100)]
    assert 0 < min(draws) < 0.002
    assert 0.998 < max(draws) < 1
    assert abs(sum(draws) / len(draws) - 0.5) < 0.015
    assert len(set(draws)) > 3990

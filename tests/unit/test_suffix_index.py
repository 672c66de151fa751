"""The index against a search of the whole text; the drafter's chances."""

from __future__ import annotations

import time
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.engine import suffix_index
from llmserve.engine.drafter import SuffixDrafter
from llmserve.engine.suffix_index import MAX_MATCH, MAX_TOKENS_PER_CALL, MIN_MATCH, SuffixIndex


def longest_match(tokens: list[int]) -> int:
    """Length of the longest earlier occurrence of the end, overlaps allowed; 0 when it is shorter than MIN_MATCH."""
    for length in range(len(tokens) - 1, MIN_MATCH - 1, -1):
        end = tokens[-length:]
        if any(tokens[start : start + length] == end for start in range(len(tokens) - length)):
            return length
    return 0


def indexed(tokens: list[int], num_loaded: int) -> SuffixIndex:
    text = array("i", tokens[:num_loaded])
    index = SuffixIndex(text)
    assert index.load()
    for position in range(num_loaded, len(tokens)):
        text.append(tokens[position])
        index.follow(position)
    return index


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 40))
def test_finds_the_longest_match(tokens: list[int], num_loaded: int) -> None:
    index = indexed(tokens, min(num_loaded, len(tokens)))
    expected = longest_match(tokens)
    if expected < MAX_MATCH and len(tokens) <= suffix_index.MAX_CANDIDATES:
        assert index.match_length == expected
    else:
        assert (index.match_length > 0) == (expected > 0)
        assert index.match_length <= expected
    if index.match_length:
        start = index._next
        length = index.match_length
        assert tokens[start - length : start] == tokens[-length:]


def test_the_most_recent_of_equal_matches_counts() -> None:
    assert indexed([1, 2, 3, 10, 9, 1, 2, 3, 20, 8, 1, 2, 3], 13).predicted == 20


def test_a_longer_match_counts_more_than_a_recent_one() -> None:
    tokens = [5, 1, 2, 3, 10, 6, 1, 2, 3, 20, 5, 1, 2, 3]
    assert indexed(tokens, 14).predicted == 10
    assert indexed(tokens, 11).predicted == 10, "also when the tokens came one by one"


def test_what_repeats_goes_on_beyond_the_end() -> None:
    assert indexed([7, 1, 2, 3, 1, 2, 3], 7).draft(8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_nothing_is_predicted_of_too_little() -> None:
    index = indexed([1, 2, 9, 1, 2], 5)
    assert (index.match_length, index.predicted, index.draft(4)) == (0, -1, [])


def test_long_texts_are_taken_in_by_parts() -> None:
    text = array("i", range(MAX_TOKENS_PER_CALL + 10))
    index = SuffixIndex(text)
    assert not index.load()
    assert index.num_indexed == MAX_TOKENS_PER_CALL
    assert index.load()
    assert index.num_indexed == len(text)


def test_a_token_costs_the_same_in_a_long_text() -> None:
    """A text of one token only: every place is a candidate."""

    def seconds_for(num_tokens: int) -> float:
        text = array("i", [4] * num_tokens)
        index = SuffixIndex(text)
        while not index.load():
            pass
        best = 1.0
        for number in range(5):
            started = time.perf_counter()
            for _ in range(20):
                text.append(5 + number)
                index.follow(len(text) - 1)
                for _ in range(3):
                    text.append(4)
                    index.follow(len(text) - 1)
            best = min(best, time.perf_counter() - started)
        return best

    assert seconds_for(200_000) < 10 * seconds_for(2_000) + 0.001


def drafter_after(tokens: list[int], more: list[int]) -> SuffixDrafter:
    text = array("i", tokens)
    drafter = SuffixDrafter(text)
    drafter.catch_up()
    for token in more:
        text.append(token)
        drafter.catch_up()
    return drafter


def test_chances_fall_along_a_draft_and_rise_with_the_match() -> None:
    passage = list(range(100, 160))
    short = drafter_after([*passage, 1, 2, *passage[:3]], []).chances(8)
    long = drafter_after([*passage, 1, 2, *passage[:40]], []).chances(8)
    assert short == sorted(short, reverse=True)
    assert all(0 < chance < 1 for chance in short + long)
    assert long[0] > short[0]
    assert drafter_after(passage, []).chances(8) == []


def test_chances_are_learned_without_a_row() -> None:
    cycle = [1, 2, 3, 4, 5, 6]
    right = drafter_after(cycle * 2, cycle * 10).chances(1)
    wrong = SuffixDrafter(array("i"))
    text = wrong._tokens
    wrong.catch_up()
    for number in range(40):  # the same three tokens, always followed by another one
        text.extend([1, 2, 3, 100 + number])
        wrong.catch_up()
    text.extend([1, 2, 3])
    wrong.catch_up()
    assert right[0] > 0.9
    assert wrong.chances(1)[0] < 0.1


def test_a_draft_has_the_tokens_that_came_then() -> None:
    passage = list(range(100, 130))
    drafter = drafter_after([*passage, 1, 2, *passage[:4]], passage[4:9])
    assert drafter.draft(5) == passage[9:14]


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3])
def test_short_texts(num_tokens: int) -> None:
    assert drafter_after(list(range(num_tokens)), [1]).draft(3) == []

"""The incremental detokenizer: whatever the grouping, its deltas joined are the whole decode, cut at the stop."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmserve.text import Detokenizer, load_tokenizer
from tests.unit.text_vocab import made_assets

TOKENIZER = load_tokenizer(made_assets())
BYTE_IDS = {TOKENIZER.token_bytes(i): i for i in range(5, 261)}
# Few different bytes, so that stop strings and broken characters are met often.
TOKEN_IDS = st.one_of(
    st.sampled_from([BYTE_IDS[bytes([b])] for b in b"ab\xe2\x82\xac\xc3\xa9\xf0\x9f\x98\x80"]),
    st.integers(0, TOKENIZER.vocab_size + 2),
)
STOPS = st.lists(st.text(st.sampled_from("ab\u20ac\u00e9\ufffd"), min_size=1, max_size=4), max_size=3)


def ids_of(text: str) -> list[int]:
    """One token a byte."""
    return [BYTE_IDS[bytes([byte])] for byte in text.encode()]


def cut(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """The definition, one character after the other: the first end of any stop string, there the longest one."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


@given(st.lists(st.lists(TOKEN_IDS, max_size=5), max_size=20), STOPS, st.booleans(), st.booleans())
@example([[BYTE_IDS[b"\xf0"], BYTE_IDS[b"\x9f"]], [BYTE_IDS[b"a"]]], [], False, False)
def test_deltas_join_to_the_cut_whole(
    groups: list[list[int]], stops: list[str], include_stop: bool, skip_special: bool
) -> None:
    stream = Detokenizer(TOKENIZER, stop=stops, include_stop=include_stop, skip_special=skip_special)
    whole = TOKENIZER.decode([i for group in groups for i in group], skip_special=skip_special)
    expected, stop = cut(whole, stops, include_stop)
    sent = ""
    for group in groups:
        sent += stream.push(group)
        assert expected.startswith(sent)
    assert sent + stream.finish() == expected
    assert stream.stopped == stop
    assert stream.finish() == ""


@given(st.lists(TOKEN_IDS, max_size=40), STOPS)
@example([BYTE_IDS[b"\xed"], BYTE_IDS[b"\xac"], BYTE_IDS[b"\xe2"]], ["\ufffda"])
def test_pending_tokens_are_those_not_sent_in_full(ids: list[int], stops: list[str]) -> None:
    stream = Detokenizer(TOKENIZER, stop=stops, skip_special=False)
    sent, text_of = "", TOKENIZER.decode(ids, skip_special=False)
    for count, token_id in enumerate(ids, 1):
        sent += stream.push([token_id])
        if stream.stopped is not None:
            break
        done = count - stream.pending_tokens
        assert 0 <= done <= count
        released = TOKENIZER.decode(ids[:done], skip_special=False)
        assert len(released) <= len(sent)
        assert len(sent) < len(TOKENIZER.decode(ids[:count], skip_special=False)) or stream.pending_tokens == 0
        assert text_of.startswith(sent)
    stream.finish()
    assert stream.stopped is not None or stream.pending_tokens == 0


def test_an_unfinished_character_is_held_back() -> None:
    stream = Detokenizer(TOKENIZER)
    deltas = [stream.push([i]) for i in ids_of("\u20ac")]
    assert deltas == ["", "", "\u20ac"]
    assert stream.push(ids_of("\U0001f600")[:3]) == ""
    assert stream.pending_tokens == 3
    assert stream.finish() == "\ufffd"
    assert stream.pending_tokens == 0


def test_a_stop_string_never_leaks_in_part() -> None:
    stream = Detokenizer(TOKENIZER, stop=["\n\nUser:"])
    assert stream.push(ids_of("hi\n\nUse")) == "hi"
    assert stream.pending_tokens == 5
    assert stream.push(ids_of("ful")) == "\n\nUseful"
    assert stream.push(ids_of("\n")) == ""
    assert stream.push(ids_of("\nUser: x")) == ""
    assert stream.stopped == "\n\nUser:"
    assert stream.push(ids_of("more")) == ""
    assert stream.finish() == ""


def test_held_text_is_sent_at_the_end() -> None:
    stream = Detokenizer(TOKENIZER, stop=["ab"])
    assert stream.push(ids_of("xa")) == "x"
    assert stream.finish() == "a"
    assert stream.stopped is None


def test_the_stop_string_is_kept_on_request() -> None:
    stream = Detokenizer(TOKENIZER, stop=["ab"], include_stop=True)
    assert stream.push(ids_of("xabz")) == "xab"


@pytest.mark.parametrize("grouped", [True, False])
def test_the_stop_that_ends_first_wins(grouped: bool) -> None:
    stream = Detokenizer(TOKENIZER, stop=["abcd", "bc"])
    ids = ids_of("abcd")
    assert "".join([stream.push(group) for group in ([ids] if grouped else [[i] for i in ids])]) == "a"
    assert stream.stopped == "bc"


def test_tokens_after_the_stop_count_as_pending() -> None:
    stream = Detokenizer(TOKENIZER, stop=["lo"])
    hello = TOKENIZER.encode("hello", add_special=False)
    assert stream.push([*hello, *ids_of("xyz")]) == "hel"
    assert stream.pending_tokens == 3  # `hello` was sent in part, x, y and z not at all
    stream.push(ids_of("z"))
    assert stream.pending_tokens == 4


def test_control_tokens_are_dropped_or_shown() -> None:
    assert Detokenizer(TOKENIZER).push([0, *ids_of("a"), 1]) == "a"
    assert Detokenizer(TOKENIZER, skip_special=False).push([0, *ids_of("a")]) == "<|im_start|>a"


def test_empty_stop_strings_mean_nothing() -> None:
    stream = Detokenizer(TOKENIZER, stop=[""])
    assert stream.push(ids_of("a")) == "a"
    assert stream.stopped is None

"""Stop strings: the same text is shown however it is cut into pieces.

Run: python -m pytest tests/generation/test_stop.py
"""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.generation.stop import StopStrings


def occurrences(text, stops):
    """All (end, start) of stop strings in a text, written without the code's find."""
    return [
        (start + len(stop), start)
        for stop in stops
        for start in range(len(text))
        if text[start : start + len(stop)] == stop
    ]


def before_the_stop(text, stops):
    """The text before the stop string that is complete first (the longest such)."""
    found = occurrences(text, stops)
    return text[: min(found)[1]] if found else text


def feed(pieces, stops):
    """What is shown after each piece, and at the end."""
    stream = StopStrings(stops)
    shown = [stream.add(piece) for piece in pieces]
    return stream, shown, stream.finish()


def cut(text, places):
    """The text in pieces; a place named twice gives an empty piece."""
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


TEXTS = st.text("abc", max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)
PLACES = st.lists(st.integers(0, 12), max_size=8)


@example("abcc", ["abcc", "bc"], [1, 2, 3])  # the later one is complete first
@example("aab", ["ab"], [1, 2])  # what was held was not it, its end may be
@example("cabc", ["bc", "abc"], [2])  # both end there: the longest
@given(TEXTS, STOPS, PLACES)
def test_shown_text_does_not_depend_on_the_pieces(text, stops, places):
    stream, shown, rest = feed(cut(text, places), stops)
    assert "".join(shown) + rest == before_the_stop(text, stops)
    assert stream.is_stopped == bool(occurrences(text, stops))


@given(TEXTS, STOPS, PLACES)
def test_no_part_of_a_stop_string_is_shown_and_no_more_is_held(text, stops, places):
    stream, read, shown = StopStrings(stops), "", ""
    for piece in cut(text, places):
        read += piece
        shown += stream.add(piece)
        if stream.is_stopped:
            assert shown == before_the_stop(read, stops)
            assert stream.finish() == ""
        else:
            held = read.removeprefix(shown)
            assert shown + held == read
            beginnings = [
                n for s in stops for n in range(1, len(s)) if read[-n:] == s[:n]
            ]
            assert len(held) == max(beginnings, default=0)


@example("ab", ["abc", "b"], [1], 2)  # held, as it may be the beginning of another
@given(TEXTS, STOPS, PLACES, st.integers(0, 12))
def test_no_stop_string_ends_in_free_text(text, stops, places, num_free):
    """Those that begin there count, as vLLM's do."""
    pieces = cut(text[:num_free], places)
    rest = cut(text[num_free:], places)
    stream = StopStrings(stops)
    shown = "".join(stream.add(piece, is_free=True) for piece in pieces)
    shown += "".join(stream.add(piece) for piece in rest) + stream.finish()
    found = [f for f in occurrences(text, stops) if f[0] > len(text[:num_free])]
    assert shown == (text[: min(found)[1]] if found else text)
    assert stream.is_stopped == bool(found)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "rest"),
    [
        (["a", "b"], [], ["a", "b"], ""),
        (["one STOP two"], ["STOP"], ["one "], ""),
        (["one ST", "OP two"], ["STOP"], ["one ", ""], ""),
        (["one ST", "ART"], ["STOP"], ["one ", "START"], ""),
        (["one ST"], ["STOP"], ["one "], "ST"),
        (["x\n", "\n", "y"], ["\n\n"], ["x", "", ""], ""),
        (["a", "", "b"], ["ab"], ["", "", ""], ""),
        (["ab", "more", "ab"], ["ab"], ["", "", ""], ""),  # nothing after the stop
        (["€", "uro"], ["€u"], ["", ""], ""),
    ],
)
def test_examples(pieces, stops, shown, rest):
    _, *result = feed(pieces, stops)
    assert result == [shown, rest]


def test_one_string_is_not_a_list_of_characters():
    _, shown, rest = feed(["a cab ab"], "ab")
    assert (shown, rest) == (["a c"], "")


def test_what_was_held_is_given_back_once():
    stream = StopStrings(["end"])
    assert stream.add("en") == ""
    assert (stream.finish(), stream.finish()) == ("en", "")
    assert not stream.is_stopped


@pytest.mark.parametrize("stops", ["", [""], ["a", ""], [5], [None], [b"a"]])
def test_a_stop_string_has_characters(stops):
    with pytest.raises(RequestError, match="at least one character: got"):
        StopStrings(stops)


def test_none_is_no_stop_string():
    stops = StopStrings(None)
    assert stops.add("text") == "text"
    assert not stops.is_stopped

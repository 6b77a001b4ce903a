from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from router.life.stop_strings import StopStrings

LETTERS = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def naive(text: str, stops: list[str], armed_from: int = 0) -> tuple[str, str | None]:
    """Character by character: the first stop string to be complete, the longest of those complete at once."""
    for end in range(armed_from + 1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


@given(LETTERS, STOPS, st.lists(st.integers(0, 30), max_size=10), st.integers(0, 4))
def test_any_cut_gives_what_the_naive_search_gives(
    text: str, stops: list[str], places: list[int], unarmed: int
) -> None:
    pieces, matcher, emitted = cut(text, places), StopStrings(stops), ""
    unarmed = min(unarmed, len(pieces))
    for index, piece in enumerate(pieces):
        emitted += matcher.push(piece, armed=index >= unarmed)
        if matcher.matched:
            break
    else:
        emitted += matcher.flush()
    assert (emitted, matcher.matched) == naive(text, stops, len("".join(pieces[:unarmed])))


@given(LETTERS, STOPS)
def test_nothing_is_held_back_that_cannot_become_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    emitted = ""
    for end in range(1, len(text) + 1):
        emitted += matcher.push(text[end - 1], armed=False)
        held = text[len(emitted) : end]
        assert not held or any(stop.startswith(held) for stop in stops)
    assert emitted + matcher.flush() == text


def test_without_stop_strings_text_passes_at_once() -> None:
    assert StopStrings(()).push("hello") == "hello"


def test_a_string_split_across_pieces_stops_before_it() -> None:
    matcher = StopStrings(("<end>",))
    assert [matcher.push(piece) for piece in ("a <", "en", "d> b")] == ["a ", "", ""]
    assert matcher.matched == "<end>"


def test_a_false_start_is_let_through() -> None:
    matcher = StopStrings(("<end>",))
    assert [matcher.push(piece) for piece in ("<e", "<e", "x")] == ["", "<e", "<ex"]

"""Stop strings are found however a text is divided into pieces."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_mlx.generation.stopping import StopStrings


def stopped(pieces: Sequence[str], stop: Sequence[str]) -> tuple[str, str | None]:
    """Return the text before a stop string in ``pieces``, and the stop string that ended it."""
    search = StopStrings(stop)
    text = "".join([search.add(piece) for piece in pieces])
    return (text if search.found else text + search.finish()), search.found


def plainly(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """Compute the result of ``stopped`` character by character."""
    for end in range(1, len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4), st.data())
def test_equals_the_plain_search_however_the_text_is_cut(text: str, stop: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert stopped(pieces, stop) == plainly(text, stop)


@given(st.lists(st.text("abc", max_size=6), max_size=10), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1))
def test_text_is_held_back_only_while_it_may_begin_a_stop_string(pieces: list[str], stop: list[str]) -> None:
    search, given_out = StopStrings(stop), ""
    for number in range(len(pieces)):
        given_out += search.add(pieces[number])
        if search.found is not None:
            break
        rest = "".join(pieces[: number + 1])[len(given_out) :]
        assert rest == "" or any(string.startswith(rest) for string in stop)


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (["\n\n"], "one\n\ntwo", ("one", "\n\n")),
        (["END", "ND"], "the END", ("the ", "END")),
        (["ab", "b"], "xab", ("x", "ab")),
        ([], "anything", ("anything", None)),
        (["aab"], "aaab", ("a", "aab")),
        (["é"], "café!", ("caf", "é")),
    ],
)
def test_stop_strings_by_hand(stop: list[str], text: str, expected: tuple[str, str | None]) -> None:
    assert stopped(list(text), stop) == expected
    assert stopped([text], stop) == expected


def test_nothing_comes_after_the_end() -> None:
    search = StopStrings(["."])
    assert search.add("a.b") == "a"
    assert search.add("c") == ""
    assert search.finish() == ""

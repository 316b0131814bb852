"""Text as users see it: pieces add up, stop strings are never shown, not even their beginnings."""

from hypothesis import given
from hypothesis import strategies as st

from fullpipe.text import Reply


class Letters:
    """A detokenizer whose tokens are code points; the newest letter is held back, as with split UTF-8."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, token: int) -> str:
        certain, self.held = self.held, chr(token)
        return certain

    def finish(self) -> str:
        certain, self.held = self.held, ""
        return certain


def read(text: str, stop: tuple[str, ...], least: int = 0) -> tuple[str, list[str], bool]:
    reply, pieces, stopped = Reply(Letters(), stop, least), [], False
    for letter in text:
        stopped = reply.push(ord(letter))
        pieces.append(reply.fresh())
        if stopped:
            break
    reply.finish()
    pieces.append(reply.fresh())
    return reply.text, pieces, stopped


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    said, pieces, _ = read(text, tuple(stop))
    ends = [text.find(one) for one in stop if one in text]
    # A stop string counts when it is complete, so with several the one that ends first wins.
    complete = min((text.find(one) + len(one) for one in stop if one in text), default=None)
    assert "".join(pieces) == said
    if complete is None:
        assert said == text
    else:
        assert said in {text[:end] for end in ends} and not any(one in said for one in stop)


def test_a_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    _, pieces, stopped = read("a\nUserx", ("\nUser:",))
    assert pieces[:6] == ["", "a", "", "", "", ""] and "".join(pieces) == "a\nUserx" and not stopped
    said, pieces, stopped = read("a\nUser: hi", ("\nUser:",))
    assert (said, stopped) == ("a", True)


class Plain:
    """A detokenizer whose tokens are code points, certain at once."""

    def push(self, token: int) -> str:
        return chr(token)

    def finish(self) -> str:
        return ""


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.integers(0, 12))
def test_stop_strings_that_are_complete_too_early_do_not_count(text: str, stop: list[str], least: int) -> None:
    """The obvious way: after each letter beyond the least number, whether a stop string ends there."""
    expected, ended = text, False
    for end in range(least + 1, len(text) + 1):
        found = [one for one in stop if text[:end].endswith(one)]
        if found:
            expected, ended = text[: end - max(map(len, found))], True
            break
    reply, stopped = Reply(Plain(), stop, least), False
    for letter in text:
        if stopped := reply.push(ord(letter)):
            break
    reply.finish()
    assert (reply.text, stopped) == (expected, ended)

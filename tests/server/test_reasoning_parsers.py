"""Thoughts are told apart from answers, however the text is cut, and their tokens are counted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_server import byte_tokenizer

from fullpipe.server.reasoning import Thinking, Thoughtful, ThoughtTokens
from fullpipe.server.tools.events import Said, Thought, Words


def heard(pieces: Sequence[str], begins: bool, told: bool = True) -> tuple[str, str]:
    """Thoughts and words."""
    reader = Thoughtful(begins, Words(), told)
    events = [event for piece in pieces for event in reader.push(piece)] + reader.finish()
    assert all(isinstance(event, (Said, Thought)) and event.text for event in events)
    return ("".join(event.text for event in events if isinstance(event, Thought)),
            "".join(event.text for event in events if isinstance(event, Said)))


@pytest.mark.parametrize(("text", "begins", "thoughts", "words"), [
    ("<think>\nHm.\n</think>\n\nNoon.", True, "\nHm.\n", "\n\nNoon."), ("Hm.</think>Noon.", True, "Hm.", "Noon."),
    ("<think>Hm.</think>Noon.", False, "Hm.", "Noon."), ("\n <think>Hm.</think>Noon.", False, "Hm.", "Noon."),
    ("Hm.", True, "Hm.", ""), ("<think>Hm.", False, "Hm.", ""), ("<think>Hm.</thi", False, "Hm.</thi", ""),
    ("Noon.", False, "", "Noon."), ("Hm.</think>Noon.", False, "", "Hm.</think>Noon."), ("", True, "", ""),
    ("", False, "", ""), ("\n", False, "", "\n"), ("<thi", True, "<thi", ""), ("<thi", False, "", "<thi"),
    ("</think>Noon.", True, "", "Noon."), ("<think></think>", False, "", ""),
    ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"), ("\nNoon.", False, "", "\nNoon."),
    ("\nHm.</think>", True, "\nHm.", ""),
])
def test_thoughts_end_with_their_mark(text: str, begins: bool, thoughts: str, words: str) -> None:
    assert heard([text], begins) == heard(list(text), begins) == (thoughts, words)
    assert heard([text], begins, told=False) == ("", words)


PARTS = ["<think>", "</think>", "<", "think>", "</", "a", "\n", "🙂"]


@given(text=st.lists(st.sampled_from(PARTS), max_size=8).map("".join),
       begins=st.booleans(), places=st.lists(st.integers(0, 60), max_size=6))
def test_however_a_text_is_cut_its_thoughts_are_the_same(text: str, begins: bool, places: list[int]) -> None:
    ends = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    assert heard([text[a:b] for a, b in pairwise(ends)], begins) == heard([text], begins)


@pytest.mark.parametrize(("prompt", "opened"), [
    ("<|Assistant|><think>\n", True), ("assistant\n<think>\n\n</think>\n\n", False), ("assistant\n", None),
    ("What does <think> mean?<assistant>", None), ("", None),
])
def test_a_prompt_may_have_opened_the_thoughts_or_closed_them(prompt: str, opened: bool | None) -> None:
    tokenizer = byte_tokenizer()
    assert Thinking(tokenizer, always=True).opened(tokenizer.encode(prompt)) is opened


NAMES = {7: " ", 8: "<think>", 9: "</think>", 10: "", 11: "</th", 12: "ink>", 13: "a</think>b", 14: "<th"}


@pytest.mark.parametrize(("tokens", "begins", "number"), [
    ([1, 2, 3, 9, 4], True, 3), ([8, 1, 2, 9, 4, 8, 5, 9], False, 2), ([1, 2], False, 0),
    ([8, 1], True, 1), ([9], True, 0), ([1, 8, 2, 9], False, 0), ([], True, 0),
    ([1, 2, 3], True, 3), ([7, 8, 1, 9, 2], False, 1), ([7, 7, 8, 1, 2], True, 2), ([7, 1], True, 2),
    ([1, 11, 12, 2], True, 1), ([1, 11, 2, 9], True, 3), ([1, 11], True, 2), ([14, 12, 1, 9], False, 1),
    ([14], True, 1), ([14], False, 0), ([1, 13, 2], True, 2), ([1, 10, 2], True, 3),
])
def test_tokens_of_thoughts_are_those_that_are_read_as_thoughts(tokens: list[int], begins: bool, number: int) -> None:
    def counter() -> ThoughtTokens:
        return ThoughtTokens(lambda token: NAMES.get(token, "x"), begins)

    assert counter().count(tokens, ended=True) == number
    single = counter()
    assert sum(single.count([token]) for token in tokens) + single.count([], ended=True) == number

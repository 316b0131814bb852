"""Parsers of tool calls say what an answer is, to the letter, and however its text is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.server.tools.events import (
    Argued,
    Called,
    Event,
    Notes,
    Reader,
    Said,
    Words,
    call_id,
    joined,
    short_call_id,
)
from fullpipe.server.tools.hermes import HermesParser
from fullpipe.server.tools.llama3 import Llama3Parser
from fullpipe.server.tools.made import NamedCall, RequiredCalls
from fullpipe.server.tools.marks import Marks, Without
from fullpipe.server.tools.mistral import MistralParser
from fullpipe.server.tools.names import STYLES, style_of
from tool_templates import LLAMA_TOOLS, MISTRAL_TOOLS, QWEN_TOOLS

OFFERED = ("f", "get_weather")
PARSERS: dict[str, Callable[[Notes], Reader]] = {
    "hermes": lambda notes: HermesParser(notes, OFFERED), "llama3": lambda notes: Llama3Parser(notes, OFFERED),
    "mistral": lambda notes: MistralParser(notes, OFFERED), "required": RequiredCalls,
    "named": lambda notes: NamedCall(notes, "f"),
}


@dataclass
class Heard:
    """What the events of an answer join to."""

    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def add(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case Said(text):
                    self.content += text
                case Called(index, id, name):
                    assert index == len(self.calls)
                    self.calls.append((name, ""))
                    self.ids.append(id)
                case Argued(index, text):
                    assert index == len(self.calls) - 1, "a piece of a call that is over"
                    self.calls[index] = (self.calls[index][0], self.calls[index][1] + text)


def numbered(most: int | None = None) -> Notes:
    ids = count()
    return Notes(lambda: f"id{next(ids)}", most)


def heard(reader: Reader, pieces: Sequence[str]) -> Heard:
    found = Heard()
    for piece in pieces:
        found.add(reader.push(piece))
    found.add(reader.finish())
    return found


def said(parser: str, text: str) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls, the same whole and character by character."""
    whole, single = (heard(PARSERS[parser](numbered()), pieces) for pieces in ([text], list(text)))
    assert whole == single
    assert whole.ids == [f"id{index}" for index in range(len(whole.calls))]
    return whole.content, whole.calls


F = '{"name": "f", "arguments": {"a": 1}}'
G = '{"name": "get_weather", "arguments": {"city": "Zürich", "days": [1, {"x": "}"}]}}'
F_CALL, G_CALL = ("f", '{"a": 1}'), ("get_weather", '{"city": "Zürich", "days": [1, {"x": "}"}]}')


def marked(call: str) -> str:
    return f"<tool_call>\n{call}\n</tool_call>"


# ---- Hermes and Qwen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "content", "calls"), [
    (marked(F), "", [F_CALL]), (f"Let me see.\n{marked(F)}", "Let me see.", [F_CALL]),
    (f"\n\n{marked(F)}\n{marked(G)}\n", "", [F_CALL, G_CALL]),
    (f"{marked(F)}\nThat is all.", "\nThat is all.", [F_CALL]),
    ("<tool_call>" + F, "", [F_CALL]), (f"<tool_call>{F}<tool_call>{G}", "", [F_CALL, G_CALL]),
    # the other order, other members, no arguments, and those that are no object
    (marked('{"arguments": {"a": 1}, "name": "f"}'), "", [F_CALL]),
    (marked('{"id": 7, "name": "f", "why": [{"name": "g"}], "arguments": {"a": 1}}'), "", [F_CALL]),
    (marked('{"name": "f"}'), "", [("f", "{}")]), (marked('{"name": "f", "arguments": null}'), "", [("f", "{}")]),
    (marked('{"name": "f", "arguments": "{\\"a\\": 1}"}'), "", [F_CALL]),
    (marked('{"name": "f", "parameters": {"a": 1}}'), "", [F_CALL]),
    (marked('{"name": "anything", "arguments": {}}'), "", [("anything", "{}")]),
    # strings may hold everything
    (marked('{"name": "f", "arguments": {"a": "</tool_call> \\" {["}}'), "",
     [("f", '{"a": "</tool_call> \\" {["}')]),
    # a brace too many, one too few
    (f"<tool_call>{F}}}</tool_call>", "", [F_CALL]), (f"<tool_call>{F[:-1]}</tool_call>", "", [F_CALL]),
    ('<tool_call>{"name": "f", "arguments": {"a": {"b": 1}</tool_call>', "", [("f", '{"a": {"b": 1}')]),
    # cut off
    ('<tool_call>{"name": "f", "arguments": {"a', "", [("f", '{"a')]),
])
def test_hermes(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert said("hermes", text) == (content, calls)


@pytest.mark.parametrize("text", [
    "", " ", "Hello.\n", "a < b </tool", "<tool_call>", "<tool_call>\n{\"name\": \"f\", \"argu", "</tool_call>",
    marked("no JSON"), marked("{'name': 'f', 'arguments': {}}"), marked('{"name": "", "arguments": {}}'),
    marked('{"name": 5, "arguments": {}}'), marked('{"name": "f", "arguments": [1]}'), marked("[]"), marked("{}"),
    marked('{"arguments": {"a": 1}}'), marked('{"name": "f" "arguments": {}}'), "<tool_call>" * 3, "{", "```json\n",
    "  \n", "I use <tool_call> marks.", "<tool_callx>" + F,
])
def test_what_hermes_would_not_read_is_said_as_it_stands(text: str) -> None:
    assert said("hermes", text) == (text, [])


@pytest.mark.parametrize("text", [
    F, f" {F}\n", f"```json\n{F}\n```", f"```\n{F}\n```\n", f"```json\n{F}", f"```json  \n\n{F}\n``",
    '{"name": "f", "arguments": {"a": 1}, "type": "function"}', '{"arguments": {"a": 1}, "name": "f"}',
])
def test_an_answer_that_is_nothing_but_a_call_is_one_without_marks(text: str) -> None:
    assert said("hermes", text) == ("", [F_CALL])


@pytest.mark.parametrize("text", [
    F + " is what I would call.", f"```json\n{F}\n```\nSo.", "See: " + F, F.replace('"f"', '"unknown"'),
    '{"name": "f", "arguments": {}, "age": 3}', '{"city": "Zürich"}', "```python\nprint(1)\n```", F[:-1], "[]",
    f"[{F}]", "```json\n{}\n```", F + F, "```xml\n" + F, "``" + F,
])
def test_what_only_looks_like_a_call_is_said_as_it_stands(text: str) -> None:
    assert said("hermes", text) == (text, [])


def test_an_answer_in_json_is_not_held_back_for_long() -> None:
    reader = PARSERS["hermes"](numbered())
    assert reader.push('{"name": "Zoë", ') == [Said('{"name": "Zoë",')]
    assert reader.push('"arguments": 5}') == [Said(' "arguments": 5}')]


# ---- Llama 3 ---------------------------------------------------------------------------------------------------------


LLAMA = F.replace("arguments", "parameters")


@pytest.mark.parametrize(("text", "content", "calls"), [
    (LLAMA, "", [F_CALL]), (F, "", [F_CALL]), (f"\n {LLAMA}\n", "", [F_CALL]),
    (f"{LLAMA}; {G}", "", [F_CALL, G_CALL]), (f"{LLAMA}\n{G};", "", [F_CALL, G_CALL]),
    (f"<|python_tag|>{LLAMA}", "", [F_CALL]), (f"Wait. <|python_tag|> {LLAMA}", "Wait.", [F_CALL]),
    ('<|python_tag|>{"name": "other", "parameters": {}}', "", [("other", "{}")]),
    ('{"type": "function", "name": "f", "parameters": {"a": 1}}', "", [F_CALL]),
    (f"{LLAMA} So.", " So.", [F_CALL]), ('{"name": "f", "parameters": {"a', "", [("f", '{"a')]),
    ('<|python_tag|>f.call(a="1")', 'f.call(a="1")', []), ("<|python_tag|>", "", []),
    ("Hello.", "Hello.", []), ("", "", []), (" ", " ", []), (f"So: {LLAMA}", f"So: {LLAMA}", []),
    ('{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
    ('{"name": "f", "age": 3}', '{"name": "f", "age": 3}', []), ('{"na', '{"na', []),
])
def test_llama3(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert said("llama3", text) == (content, calls)


# ---- Mistral ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "content", "calls"), [
    (f"[TOOL_CALLS] [{F}]", "", [F_CALL]), (f"[TOOL_CALLS][{F}, {G}]", "", [F_CALL, G_CALL]),
    (f"Yes.[TOOL_CALLS] [{F}]\n", "Yes.", [F_CALL]), (f"[TOOL_CALLS]{F}", "", [F_CALL]),
    ('[TOOL_CALLS]f{"a": 1}', "", [F_CALL]), ('[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g{}', "", [F_CALL, ("g", "{}")]),
    ('[TOOL_CALLS]f[ARGS]{"a": 1}', "", [F_CALL]), ('[TOOL_CALLS] f[CALL_ID]abc123456[ARGS] {"a": 1}', "", [F_CALL]),
    ('[TOOL_CALLS]f{"a": 1} So.', " So.", [F_CALL]), ('[TOOL_CALLS]f{"a": "}', "", [("f", '{"a": "}')]),
    ('[TOOL_CALLS] [{"name": "f", "arguments": {"a', "", [("f", '{"a')]),
    (f"[TOOL_CALLS] [{F}, 5]", "5]", [F_CALL]), (f'[TOOL_CALLS] [{F}, {{"na', '{"na', [F_CALL]),
    ("[TOOL_CALLS] []", " []", []), ("[TOOL_CALLS]", "", []), ("[TOOL_CALLS]hi there, you {", "hi there, you {", []),
    ("[TOOL_CALLS]f (x)", "f (x)", []), ("[TOOL_CALLS]f", "f", []), ("[TOOL", "[TOOL", []), ("Hello.", "Hello.", []),
    ("[TOOL_CALLS]a b{}", "a b{}", []),
])
def test_mistral(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert said("mistral", text) == (content, calls)


# ---- demanded calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "content", "calls"), [
    (f"[{LLAMA}]", "", [F_CALL]), (f" [ {F} , {G} ] ", "", [F_CALL, G_CALL]),
    ('[{"name": "f", "parameters": {"a', "", [("f", '{"a')]), ("[", "[", []), ("", "", []), ('[{"na', '[{"na', []),
    ("no list", "no list", []),
])
def test_required(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert said("required", text) == (content, calls)


@pytest.mark.parametrize("text", ['{"a": 1}', "", '{"a', "\n\n {} "])
def test_named(text: str) -> None:
    assert said("named", text) == ("", [("f", text.lstrip())])


# ---- every form ------------------------------------------------------------------------------------------------------

FRAGMENTS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[ARGS]", "[CALL_ID]", F, G, LLAMA, "f",
             "{", "}", "[", "]", ",", ";", ":", '"', "\\", '"name"', '"f"', '"arguments"', '"parameters"', "null", "1",
             "\n", " ", "```json\n", "```", "ü🙂", "<", "</", "tool_call>", '"arguments": {', "So"]
answers = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


def cut(text: str, places: Sequence[int]) -> list[str]:
    ends = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[begin:end] for begin, end in pairwise(ends)]


@pytest.mark.parametrize("parser", PARSERS)
@given(text=answers, places=st.lists(st.integers(0, 500), max_size=8))
def test_however_an_answer_is_cut_it_says_the_same(parser: str, text: str, places: list[int]) -> None:
    whole = heard(PARSERS[parser](numbered()), [text])
    assert heard(PARSERS[parser](numbered()), cut(text, places)) == whole
    assert heard(PARSERS[parser](numbered()), list(text)) == whole


@pytest.mark.parametrize("parser", [name for name in PARSERS if name != "named"])
@given(text=answers)
def test_an_answer_without_calls_is_said_to_the_letter(parser: str, text: str) -> None:
    found = heard(PARSERS[parser](numbered()), [text])
    if not found.calls:
        assert found.content.replace("[TOOL_CALLS]", "").replace("<|python_tag|>", "").split() \
            == text.replace("[TOOL_CALLS]", "").replace("<|python_tag|>", "").split()


@pytest.mark.parametrize("parser", ["hermes", "required"])
@given(text=answers)
def test_where_no_mark_is_a_special_token_no_character_is_lost(parser: str, text: str) -> None:
    found = heard(PARSERS[parser](numbered()), [text])
    assert found.calls or found.content == text


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
arguments = st.dictionaries(st.text(max_size=6), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8),
    max_size=4)


@given(name=names, told=arguments, ascii_=st.booleans(), indent=st.sampled_from([None, 2]),
       places=st.lists(st.integers(0, 500), max_size=8))
def test_any_call_comes_through(name: str, told: dict[str, object], ascii_: bool, indent: int | None,
                                places: list[int]) -> None:
    call = json.dumps({"name": name, "arguments": told}, ensure_ascii=ascii_, indent=indent)
    for parser, text in (("hermes", marked(call)), ("mistral", f"[TOOL_CALLS] [{call}]"),
                         ("llama3", f"<|python_tag|>{call}"), ("required", f"[{call}, {call}]")):
        found = heard(PARSERS[parser](numbered()), cut(text, places))
        assert found.content == "" and {one for one, _ in found.calls} == {name}
        assert all(json.loads(raw) == told for _, raw in found.calls)


def test_arguments_come_as_soon_as_they_are_certain() -> None:
    reader = PARSERS["hermes"](numbered())
    reader.push('Well.\n<tool_call>\n{"name": "f", "arguments": ')
    assert reader.push('{"a": "on') == [Called(0, "id0", "f"), Argued(0, '{"a": "on')]
    assert reader.push("e") == [Argued(0, "e")]
    assert reader.push('"}') == [Argued(0, '"}')]
    assert reader.push("}\n</tool_call>") == [] == reader.finish()


def test_what_may_begin_a_mark_is_held_back_until_it_is_certain() -> None:
    reader = PARSERS["hermes"](numbered())
    assert reader.push("a <tool") == [Said("a")]
    assert reader.push("_box> b") == [Said(" <tool_box> b")]
    assert reader.push("<tool_call") == []
    assert reader.finish() == [Said("<tool_call")]


@pytest.mark.parametrize("parser", ["hermes", "mistral", "llama3", "required"])
def test_where_one_call_is_allowed_the_first_counts(parser: str) -> None:
    text = {"hermes": marked(F) + marked(G), "mistral": f"[TOOL_CALLS] [{F}, {G}]", "llama3": f"{LLAMA}; {G}",
            "required": f"[{F}, {G}]"}[parser]
    assert heard(PARSERS[parser](numbered(1)), [text]) == Heard("", [F_CALL], ["id0"])


def test_words_are_said_as_they_come() -> None:
    reader = Words()
    assert reader.push("<tool_call> ") == [Said("<tool_call> ")]
    assert reader.push("") == [] == reader.finish()


# ---- marks, ids, names -----------------------------------------------------------------------------------------------


@given(text=st.lists(st.sampled_from(["<a>", "<b", ">", "<", "a", "b", "x", "<b>c"]), max_size=10).map("".join),
       places=st.lists(st.integers(0, 50), max_size=6))
def test_marks_are_left_out_however_a_text_is_cut(text: str, places: list[int]) -> None:
    left = heard(Without(["<a>", "<b>", "<b>c", "a>b"], Words()), cut(text, places)).content
    assert left == heard(Without(["<a>", "<b>", "a>b"], Words()), list(text)).content
    assert len(left) <= len(text) and ("<" in text or left == text or "a>b" in text)


def test_no_marks_are_nowhere() -> None:
    marks = Marks()
    assert (marks.split("any"), marks.rest()) == (("any", "", ""), "")


def test_ids_are_such_as_clients_and_templates_take() -> None:
    assert {len(call_id()), call_id().index("_")} == {29, 4}
    assert short_call_id().isalnum() and len(short_call_id()) == 9
    assert len({call_id() for _ in range(9)}) == len({short_call_id() for _ in range(9)}) == 9


@pytest.mark.parametrize(("parser", "template", "style"), [
    ("auto", QWEN_TOOLS, "hermes"), ("auto", LLAMA_TOOLS, "llama3_json"), ("auto", MISTRAL_TOOLS, "mistral"),
    ("auto", "{{ '<|python_tag|>' }}", "llama3_json"), ("auto", "", None), ("auto", "{{ tools }}", None),
    ("auto", "<tool_call>\n<function=f>", None), ("none", QWEN_TOOLS, None), ("mistral", QWEN_TOOLS, "mistral"),
    ("hermes", "", "hermes"),
])
def test_the_template_tells_how_a_model_calls(parser: str, template: str, style: str | None) -> None:
    assert style_of(parser, template) is (STYLES[style] if style else None)


def test_pieces_that_become_known_together_are_one() -> None:
    reader = HermesParser(numbered(), OFFERED)
    events = [event for char in F for event in reader.push(char)]
    assert not events and joined(reader.finish()) == [Called(0, "id0", "f"), Argued(0, '{"a": 1}')]
    apart = [Argued(0, "a"), Called(1, "i", "f"), Argued(1, "b"), Said("c"), Argued(1, "d")]
    assert joined(apart) == apart and joined([]) == []

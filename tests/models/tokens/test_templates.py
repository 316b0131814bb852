"""Chat templates say what transformers makes of them, take messages as clients send them, and own their faults."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage
from template_styles import (
    CHATML,
    GEMMA,
    LLAMA,
    MISTRAL,
    OSS,
    PARTS_IN_A_MACRO,
    PARTS_OF_A_VARIABLE,
    PARTS_ONLY,
    PHI,
    QWEN3,
    QWEN25,
    R1,
    SEEING,
    STYLES,
)

from fullpipe.errors import MessageError, UnsupportedModel, UsageError
from fullpipe.models.tokens.loading import load_tokenizer, with_template
from fullpipe.models.tokens.messages import conversation
from fullpipe.models.tokens.template import RESERVED, ChatTemplate, template_source
from fullpipe.models.tokens.tokenizer import Tokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "own_token": "<own>"}
SYSTEM = {"role": "system", "content": " Be 'brief' & <kind>. "}
USER = {"role": "user", "content": "Wie spät ist es?\n"}
ANSWER = {"role": "assistant", "content": "Zwölf."}
THOUGHT = {"role": "assistant", "content": "Noon.", "reasoning_content": "The sun is high."}
THOUGHT_ALOUD = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nNoon."}
ARGUMENTS = {"city": "Zürich", "days": [1, 2], "deep": {"a": None, "b": True}}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "call12345", "type": "function", "function": {"name": "clock", "arguments": ARGUMENTS}}]}
RESULT = {"role": "tool", "tool_call_id": "call12345", "content": '{"hour": 12}'}
TALKS = {
    "user": [USER], "system": [SYSTEM, USER], "answered": [USER, ANSWER, USER], "long": [SYSTEM, USER, ANSWER, USER],
    "two users": [USER, USER], "late system": [USER, SYSTEM, USER], "thought": [USER, THOUGHT, USER, THOUGHT],
    "thought aloud": [USER, THOUGHT_ALOUD, USER], "called": [USER, CALL, RESULT], "two results": [USER, CALL, RESULT,
                                                                                                RESULT, ANSWER, USER],
    "empty": [{"role": "user", "content": ""}], "a role of its own": [{"role": "critic", "content": "Hm."}],
}


@pytest.fixture(scope="module")
def backend() -> Any:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    backend.add_special_tokens(["<s>", "</s>", "<own>"])
    return backend


def theirs(backend: Any, source: str, messages: list[Any], **more: Any) -> str | None:
    """What transformers renders, None where it refuses."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=source, **TOKENS)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **more))
    except Exception:  # whatever the template raises
        return None


def ours(source: str, messages: list[Any], prompt: bool | None = None, **more: Any) -> str | None:
    try:
        return ChatTemplate(source, TOKENS).render(messages, prompt, **more)
    except UsageError:
        return None


# ---- as transformers renders them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("style", STYLES)
def test_a_template_says_what_transformers_says(style: str, talk: str, prompt: bool, backend: Any) -> None:
    source, messages = STYLES[style], copy.deepcopy(TALKS[talk])
    wanted = theirs(backend, source, wrapped(messages) if source in (PARTS_ONLY, PARTS_OF_A_VARIABLE) else messages,
                    add_generation_prompt=prompt)
    said = ours(source, messages, prompt)
    assert messages == TALKS[talk], "what a caller gives stays as it is"
    if style == "AWKWARD" and talk == "thought":
        assert said is not None and said.count("reasoning") > str(wanted).count("reasoning")  # it has vLLM's name too
    elif any("tool_calls" in message for message in messages) and ("tool_calls" not in source or source == R1):
        assert (said is None) == (source != R1)  # theirs leaves calls out; what it does with R1's is tested below
    else:
        assert said == wanted


def wrapped(messages: list[Any]) -> list[Any]:
    """With contents as lists of parts, which transformers leaves to its caller."""
    return [message | {"content": [{"type": "text", "text": message["content"]}] if message["content"] else []}
            for message in messages]


@pytest.mark.parametrize("content", ["The hour is", "The hour is  \n", "  two\nlines ", "<think>\nOnce", "x"])
@pytest.mark.parametrize("style", [name for name in STYLES if name != "AWKWARD"])  # there theirs leaves a mark
def test_the_final_message_is_continued_where_transformers_cuts(style: str, content: str, backend: Any) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    source = STYLES[style]
    wanted = theirs(backend, source, wrapped(messages) if source in (PARTS_ONLY, PARTS_OF_A_VARIABLE) else messages,
                    continue_final_message=True)
    assert ours(source, messages, continue_final=True) == wanted
    assert wanted is None or wanted.rstrip().endswith(content.strip())


@given(st.text(alphabet="ab \n<>|", min_size=1, max_size=12))
def test_a_continued_message_ends_as_it_was_given(content: str) -> None:
    said = ChatTemplate(CHATML).render([USER, {"role": "assistant", "content": content}], continue_final=True)
    assert said.endswith("<|im_start|>assistant\n" + content)


def test_a_template_that_writes_a_message_twice_is_continued_after_the_second() -> None:
    said = ours("{% for m in messages %}{{ m.content }},{{ m.content | trim }};{% endfor %}", [ANSWER],
                continue_final=True)
    assert said == "Zwölf.,Zwölf."


def test_parts_are_continued_after_the_last() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    message = {"role": "assistant", "content": parts}
    assert ours(SEEING, [message], continue_final=True) == "<assistant>[one][two"
    assert ours(CHATML, [message], continue_final=True) == "<|im_start|>assistant\none\ntwo"


@pytest.mark.parametrize(("source", "messages", "why"), [
    (CHATML, [USER, {"role": "assistant", "content": ""}], "no text to continue"),
    (QWEN25, [USER, {**CALL, "content": None}], "no text to continue"),
    ("{% for m in messages %}{{ m.role }}{% endfor %}", [USER], "does not write the final message"),
    ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", [USER], "does not write the final message"),
])
def test_what_cannot_be_continued(source: str, messages: list[Any], why: str) -> None:
    with pytest.raises(MessageError, match=why) as caught:
        ChatTemplate(source).render(messages, continue_final=True)
    assert caught.value.where == "continue_final_message"


def test_to_continue_and_to_begin_exclude_each_other() -> None:
    with pytest.raises(MessageError, match="excludes add_generation_prompt"):
        ChatTemplate(CHATML).render([ANSWER], True, continue_final=True)


def test_variables_have_an_effect_where_they_are_read(backend: Any) -> None:
    for value in (False, True, None):
        wanted = theirs(backend, QWEN3, [USER], add_generation_prompt=True, enable_thinking=value)
        assert ours(QWEN3, [USER], variables={"enable_thinking": value}) == wanted
    assert ours(QWEN3, [USER], variables={"enable_thinking": False}) != ours(QWEN3, [USER])
    template = ChatTemplate(QWEN3)
    assert template.reads("enable_thinking") and not template.reads("temperature")
    always = ChatTemplate(QWEN3, variables={"enable_thinking": False})
    assert always.render([USER]).endswith("</think>\n\n")
    assert always.render([USER], variables={"enable_thinking": True}).endswith("assistant\n")


def test_a_variable_may_have_any_name() -> None:
    names = {name: name.upper() for name in ("self", "context", "args", "loop", "messages_")}
    assert ChatTemplate("{{ context }}{{ messages_ }}").render([USER], variables=names) == "CONTEXTMESSAGES_"


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_variables_cannot_say_otherwise_than_the_request(name: str) -> None:
    with pytest.raises(MessageError, match=f"chat_template_kwargs: cannot set '{name}'"):
        ChatTemplate(CHATML).render([USER], variables={name: None})
    with pytest.raises(MessageError, match=name):
        ChatTemplate(CHATML, variables={name: None})


# ---- messages --------------------------------------------------------------------------------------------------------


def text(*parts: str, kind: str = "text") -> list[dict[str, Any]]:
    return [{"type": kind, "text": part, "cache_control": {"type": "ephemeral"}} for part in parts]


@pytest.mark.parametrize(("source", "content", "said"), [
    (CHATML, text("a", "b"), "a\nb"), (CHATML, text("a", kind="input_text"), "a"),
    (CHATML, [{"type": "refusal", "refusal": "No."}], "No."), (QWEN3, text("a", "b"), "a\nb"),
    (SEEING, text("a", "b"), "[a][b]"), (SEEING, "a", "a"), (PARTS_IN_A_MACRO, text("a", "b"), "(a)(b)"),
    (PARTS_IN_A_MACRO, "a", "a"), (PARTS_ONLY, "abc", "abc<end>"), (PARTS_ONLY, text("a", "b"), "ab<end>"),
    (PARTS_OF_A_VARIABLE, "abc", "abc<end>"), (PARTS_OF_A_VARIABLE, text("a", "b"), "ab<end>"),
])
def test_contents_come_as_the_template_reads_them(source: str, content: Any, said: str) -> None:
    """Joined as vLLM joins them, or as parts where it goes through parts."""
    assert said in ChatTemplate(source).render([USER, {"role": "assistant", "content": content}], False)


@pytest.mark.parametrize("nothing", [None, [], ""])
def test_an_answer_may_have_no_content(nothing: Any) -> None:
    for message in (CALL, RESULT, ANSWER):
        assert conversation([message | {"content": nothing}])[0]["content"] == ""
    assert ours(QWEN25, [USER, CALL | {"content": nothing}]) == ours(QWEN25, [USER, CALL])
    bare = {key: value for key, value in CALL.items() if key != "content"}
    assert ours(QWEN25, [USER, bare]) == ours(QWEN25, [USER, CALL])


def test_an_answer_of_the_openai_package_is_a_message() -> None:
    """With all its nulls, and its arguments in a string."""
    function = {"name": "clock", "arguments": json.dumps(ARGUMENTS)}
    call = ChatCompletionMessage.model_validate({"role": "assistant", "content": None, "tool_calls": [
        {"id": "call12345", "type": "function", "function": function}]})
    for source in (LLAMA, QWEN25, QWEN3):
        assert ours(source, [USER, call, RESULT]) == ours(source, [USER, CALL, RESULT])
    refused = ChatCompletionMessage(role="assistant", content=None, refusal="I will not.")
    assert ours(CHATML, [USER, refused]) == ours(CHATML, [USER, {"role": "assistant", "content": "I will not."}])


@pytest.mark.parametrize(("given_", "arguments"), [
    ('{"a": 1}', '{"a": 1}'), ({"a": 1}, '{"a": 1}'), ("", "{}"), (None, "{}"), ("  ", "{}"), ("[1]", "[1]"),
])
def test_arguments_of_calls(given_: Any, arguments: str) -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": given_}}]}
    for source in (QWEN25, R1, "{% for m in messages %}{{ m.tool_calls[0].function.arguments }}{% endfor %}"):
        assert arguments in str(ours(source, [call]))


@pytest.mark.parametrize(("source", "said"), [
    (QWEN25, '{"name": "f", "arguments": {"city": "Be}'), (R1, '{"city": "Be'),
    ("{% for m in messages %}{{ m.tool_calls[0].function.arguments }}{% endfor %}", '{"city": "Be'),
    ("{% for m in messages %}<{% for k, v in m.tool_calls[0].function.arguments.items() %}{{ k }}{% endfor %}>"
     "{% endfor %}", "<>"),
])
def test_a_call_that_was_cut_off_can_be_read_again(source: str, said: str) -> None:
    whole = {"role": "assistant", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": '{"city": "Be'}}]}
    assert said in str(ours(source, [whole]))


def test_templates_that_take_arguments_for_text_get_text() -> None:
    said = str(ours(R1, [USER, CALL, RESULT]))
    assert f"clock\n{json.dumps(ARGUMENTS, ensure_ascii=False)}<|output|>" in said


def test_a_function_call_is_a_tool_call() -> None:
    old = [USER, {"role": "assistant", "content": None, "function_call": {"name": "clock", "arguments": "{}"}},
           {"role": "function", "name": "clock", "content": "12"}]
    new = [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]},
           {"role": "tool", "name": "clock", "content": "12"}]
    assert ours(QWEN25, old) == ours(QWEN25, new) is not None


def test_calls_are_not_lost_in_a_template_without_words_for_them() -> None:
    with pytest.raises(MessageError, match="no words for them") as caught:
        ChatTemplate(CHATML).render([USER, CALL, RESULT])
    assert caught.value.where == "messages[1].tool_calls"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_goes_by_any_of_its_names(name: str) -> None:
    turn = {"role": "assistant", "content": "Noon.", name: "The sun is high."}
    assert ours(QWEN3, [USER, turn]) == ours(QWEN3, [USER, THOUGHT])
    assert "<analysis>The sun is high." in str(ours(OSS, [USER, turn]))


def test_a_developer_is_the_system_where_the_template_knows_none() -> None:
    messages = [{"role": "developer", "content": "d"}, USER]
    assert str(ours(CHATML, messages)).startswith("<|im_start|>system\nd")
    assert ours("{% for m in messages %}{{ m.role }}{% endfor %}{# developer #}", messages) == "developeruser"


@pytest.mark.parametrize(("messages", "where"), [
    (["hi"], "messages[0]"), ([None], "messages[0]"), ([{}], "messages[0].role"),
    ([{"role": "", "content": "x"}], "messages[0].role"), ([{"role": 1, "content": "x"}], "messages[0].role"),
    ([USER, {"role": "user"}], "messages[1].content"), ([{"role": "user", "content": None}], "messages[0].content"),
    ([{"role": "system", "content": []}], "messages[0].content"), ([{"role": "user", "content": 5}],
                                                                   "messages[0].content"),
    ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [*text("a"), {"type": "image_url", "image_url": {}}]}],
     "messages[0].content[1].type"),
    ([{"role": "user", "content": [{"text": "a"}]}], "messages[0].content[0].type"),
    ([{"role": "assistant", "tool_calls": 5}], "messages[0].tool_calls"),
    ([{"role": "assistant", "tool_calls": "f()"}], "messages[0].tool_calls"),
    ([{"role": "assistant", "tool_calls": {"name": "f"}}], "messages[0].tool_calls"),
    ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
    ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "messages[0].tool_calls[0].function.name"),
], ids=lambda value: str(value)[:50])
def test_what_is_no_message_is_named(messages: list[Any], where: str) -> None:
    with pytest.raises(MessageError) as caught:
        ChatTemplate(QWEN25).render(messages)
    assert caught.value.where == where
    assert caught.value.message.startswith(where)


# ---- faults of templates ---------------------------------------------------------------------------------------------

FAULTS = {
    "{{ raise_exception('no system message please') }}": "refuses these messages: no system message please",
    "{{ messages[0].content + 1 }}": "TypeError: can only concatenate str",
    "{{ 'a' + messages[0].nothing }}": "'dict object' has no attribute 'nothing'",
    "{{ nothing.at_all }}": "'nothing' is undefined", "{{ no_such_function() }}": "'no_such_function' is undefined",
    "{{ messages[9].content }}": "list object has no element 9", "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
    "{{ messages | tojson(indent='x' * 3, cls=1) }}": "TypeError: ", "{{ strftime_now(3) }}": "TypeError: ",
    "{{ ''.__class__.__mro__ }}": "unsafe", "{{ messages.append(1) }}": "unsafe",
    "{{ 'x'.encode('ascii').decode('utf-16') }}": "UnicodeDecodeError: ", "{{ [1] | sum(start='a') }}": "TypeError: ",
    "{% include 'other' %}": "no loader", "{{ 'abc' | no_such_filter if false else messages[3].x }}": "",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError: ", "{{ {}.pop('x') }}": "",
    "{{ 'abc'.index('x') }}": "ValueError: substring not found", "{{ dict([1]) }}": "TypeError: ",
}


@pytest.mark.parametrize("source", FAULTS)
def test_whatever_a_template_raises_is_an_error_of_the_request(source: str) -> None:
    with pytest.raises((UsageError, UnsupportedModel)) as caught:
        ChatTemplate(source).render([USER])
    assert FAULTS[source] in caught.value.message
    assert "`chat_template=FILE`" in str(caught.value.hint)
    assert "alternat" not in str(caught.value), "it has not been asked why"


@pytest.mark.parametrize(("source", "messages", "why"), [
    (GEMMA, [SYSTEM, USER], "System role not supported"), (MISTRAL, [USER, USER], "roles must alternate"),
    (LLAMA, [USER, CALL | {"tool_calls": CALL["tool_calls"] * 2}], "one tool call at a time"),  # type: ignore[operator]
])
def test_a_template_refuses_in_its_own_words(source: str, messages: list[Any], why: str) -> None:
    with pytest.raises(UsageError, match=f"refuses these messages: {why}"):
        ChatTemplate(source).render(messages)


@pytest.mark.parametrize("source", ["{% for %}", "{{ a", "{% generation %}", "{{ 'x' | }}", "{% break %}",
                                    "{{ " + "(" * 5000 + ")" * 5000 + " }}"])
def test_a_template_that_is_none_is_refused(source: str) -> None:
    for ask in (ChatTemplate(source).check, lambda: ChatTemplate(source).render([USER]),
                lambda: ChatTemplate(source).reads("x")):
        with pytest.raises(UnsupportedModel, match="cannot be read"):
            ask()


# ---- where they come from --------------------------------------------------------------------------------------------


def write(folder: Path, backend: Any, **files: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("settings", [
    {"chat_template": CHATML},
    {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]},
])
def test_templates_of_a_directory(settings: dict[str, Any], backend: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, backend, tokenizer_config=settings))
    assert tokenizer.template is not None and tokenizer.template.source == CHATML
    (tmp_path / "chat_template.jinja").write_text("a file of its own")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.template is not None and tokenizer.template.source == "a file of its own"


def test_named_tokens_of_a_directory_are_those_of_transformers(backend: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ bos_token }}{{ own_token }}",
                "bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "</s>", "pad_token": None,
                "add_bos_token": True, "extra_special_tokens": {"own_token": "<own>", "image": "</s>"}}
    folder = write(tmp_path, backend, tokenizer_config=settings, special_tokens_map={"unk_token": "<unk>"})
    found = load_tokenizer(folder)
    assert found.named == AutoTokenizer.from_pretrained(folder).special_tokens_map
    assert found.template is not None and found.template.render([]) == "<s><own>"


def test_named_tokens_of_a_gguf_file(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    for key, value in {"model": "gpt2", "pre": "qwen2"}.items():
        writer.add_string(f"tokenizer.ggml.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", ["a", "<s>", "</s>", "<pad>", "b", "ab"])
    writer.add_array("tokenizer.ggml.token_type", [1, 3, 3, 3, 1, 1])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    for key, id_ in {"bos": 1, "eos": 2, "padding": 3, "unknown": 9}.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", id_)
    writer.add_chat_template("{{ bos_token }}{{ pad_token }}{{ unk_token is defined }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = load_tokenizer(tmp_path / "m.gguf")
    assert found.named == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert found.template is not None and found.template.render([]) == "<s><pad>False"


@pytest.mark.parametrize("given_", [CHATML, CHATML.replace("\n", "\\n"), "file.jinja", "ü {{ messages[0].content }}"])
def test_a_template_is_given_as_file_or_in_a_line(given_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.jinja").write_text(CHATML)
    source = template_source(given_)
    assert source == (given_ if "ü" in given_ else CHATML)


@pytest.mark.parametrize(("given_", "why"), [
    ("missing.jinja", "No such file"), (".", "directory"), ("binary", "utf-8"), ("", "directory"),
    ("{{ messages }}\\", "cannot be read"), ("broken", "the given chat template cannot be read"),
])
def test_a_template_that_cannot_be_had_is_refused_at_once(given_: str, why: str, backend: Any, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(b"\xff\xfe")
    Path("broken").write_text("{% for %}")
    with pytest.raises(UsageError, match=why) as caught:
        with_template(Tokenizer(backend), given_, None, print)
    assert caught.value.hint


def test_another_template_keeps_the_models_tokens(backend: Any) -> None:
    tokenizer = Tokenizer(backend, template=ChatTemplate("own"), named={"bos_token": "<s>"})
    other = with_template(tokenizer, "{{ bos_token }}{{ mood }}{{ messages }}", {"mood": "calm"}, print)
    assert other.template is not None and other.template.render([]) == "<s>calm[]"
    same = with_template(tokenizer, None, None, print)
    assert same.template is not None and same.template.source == "own"


def test_a_broken_template_of_the_model_is_told_and_plain_text_goes_on(backend: Any) -> None:
    told: list[str] = []
    tokenizer = with_template(Tokenizer(backend, template=ChatTemplate("{% for %}")), None, None, told.append)
    assert len(told) == 1 and "chats will be refused" in told[0]
    assert tokenizer.encode("<s>") == [1]
    with pytest.raises(UnsupportedModel):
        tokenizer.chat("hi")


def test_a_default_variable_that_the_template_does_not_read_is_told(backend: Any) -> None:
    told: list[str] = []
    tokenizer = Tokenizer(backend, template=ChatTemplate(QWEN3))
    with_template(tokenizer, None, {"enable_thinking": False, "enable_thinkng": False, "mood": 1}, told.append)
    assert len(told) == 1 and "does not read enable_thinkng, mood" in told[0]


def test_variables_need_a_template(backend: Any) -> None:
    with pytest.raises(UsageError, match="default_chat_template_kwargs are for a chat template"):
        with_template(Tokenizer(backend), None, {"a": 1}, print)


@pytest.mark.parametrize("source", [LLAMA, PHI, GEMMA])
def test_a_system_message_beside_is_the_first(source: str, backend: Any) -> None:
    if ours(source, [SYSTEM, USER]) is None:
        with pytest.raises(UsageError, match="System role not supported"):
            Tokenizer(backend, template=ChatTemplate(source)).chat("x", system="s")
    else:
        asked = Tokenizer(backend, template=ChatTemplate(source))
        assert asked.chat("x", system="s") == asked.chat([{"role": "system", "content": "s"},
                                                          {"role": "user", "content": "x"}])

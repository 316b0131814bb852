"""`fullpipe generate`: what it prints, where, and when. Failures are in test_failures.py."""

from __future__ import annotations

import json
import math
import re
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from command import METHODS, PIPELINES, PROMPT, Models, asking, run, running

import fullpipe
from fullpipe.cli import generate as verb
from fullpipe.errors import PromptError, UsageError
from fullpipe.events import Emitted, Finished, Launched
from fullpipe.llm import LLM
from fullpipe.messages import Landed
from fullpipe.request import SamplingParams
from fullpipe.trace.recorder import read_events
from simulated import simulated

SHAPE = {
    "text": str, "token_ids": list, "finish_reason": str,
    "usage": {"prompt_tokens": int, "completion_tokens": int},
    "speculation": {"method": str, "stages": int, "width": int, "steps": float, "steps_per_token": float, "hits": int,
                    "misses": int, "hit_rate": float, "mean_acceptance_length": float, "altered_tokens": int,
                    "launched_rows": int, "wasted_rows": int, "fill": float, "draft_calls": int, "draft_rows": int,
                    "accept": str},
    "timing": {"clock": str, "ttft_s": float, "tbt_s": float, "tokens_per_s": float, "wall_s": float},
}


def shape_of(value: Any) -> Any:
    return {key: shape_of(item) for key, item in value.items()} if isinstance(value, dict) else type(value)


def answer(*arguments: str | Path, stdin: str | None = None) -> dict[str, Any]:
    result = run(*arguments, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


# ---- the object ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", PIPELINES)
def test_json_is_one_object_with_all_that_is_promised(models: Models, stages: int | None) -> None:
    told = answer(*asking(models.target, "--max-tokens", "24", "--method", "fullpipe", "--width", "4", stages=stages))
    assert shape_of(told) == SHAPE
    assert len(told["token_ids"]) == len(told["text"]) == told["usage"]["completion_tokens"] == 24
    assert told["finish_reason"] == "length"
    assert told["timing"]["clock"] == "wall"
    assert all(math.isfinite(value) and value > 0 for value in list(told["timing"].values())[1:])
    figures = told["speculation"]
    assert (figures["method"], figures["stages"], figures["width"]) == ("fullpipe", stages or 1, 4)
    assert figures["hits"] + figures["misses"] == 24 - 1  # nothing was to follow the last
    assert figures["wasted_rows"] == figures["launched_rows"] - 24 and figures["draft_calls"] > 0
    assert 0 < figures["fill"] <= 1 and 0 <= figures["hit_rate"] <= 1 <= figures["mean_acceptance_length"]


@pytest.mark.parametrize(("method", "more", "width"), [
    ("fullpipe", (), None), ("fullpipe", ("--width", "8"), 8), ("spd", (), 1), ("ppsd", (), 1),
    ("spd", ("--width", "3", "--refresh"), 3)])
def test_the_width_is_the_methods_own_unless_given(models: Models, method: str, more: tuple[str, ...],
                                                   width: int | None) -> None:
    told = answer(*asking(models.target, "--max-tokens", "4", "--method", method, *more))
    assert told["speculation"]["width"] == width


def test_plain_pp_asks_no_draft(models: Models) -> None:
    told = answer(*asking(models.target, "--method", "pp", "--max-tokens", "16"))
    assert told["speculation"]["draft_calls"] == 0 == told["speculation"]["hits"]


def test_plain_pp_in_unit_time_takes_as_many_steps_as_there_are_stages(models: Models) -> None:
    with simulated(models.target, method="pp", stages=4, dtype="float32") as llm:
        (one,) = llm.generate(PROMPT, SamplingParams(max_tokens=16))
    assert one.speculation["steps_per_token"] == one.timing["tbt_s"] == 4
    assert one.timing["clock"] == "virtual"


# ---- without options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("draft", "method"), [("none", "pp"), ("ngram", "chain")])
def test_in_one_process_guesses_are_verified_at_once(models: Models, draft: str, method: str) -> None:
    told = answer(*asking(models.target, "--max-tokens", "20", draft=draft))
    assert (told["speculation"]["method"], told["speculation"]["stages"]) == (method, 1)
    assert told["token_ids"] == answer(*asking(models.target, "--max-tokens", "20", "--method", "pp"))["token_ids"]


def test_what_pays_is_measured_and_said(models: Models) -> None:
    """A model of no partner: n-gram, which costs nothing, or nothing. Who asks for a draft by name gets it."""
    free = run(*asking(models.target, "--max-tokens", "8", draft="auto")).stderr.splitlines()
    assert free[:2] == ["loading target in this process in float32", "measuring what rows cost"]
    assert free[2].startswith(("guessing ", "no draft pays in one process here (")) and " ms a token exp" in free[2]
    named = run(*asking(models.target, "--max-tokens", "8", "--depth", "3", draft=models.draft)).stderr
    assert "guessing " in named and " chain on 1 stage: " in named


# ---- one text, whatever the method -----------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [(), ("--temperature", "1", "--seed", "7")], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft", ["model", "ngram"])
def test_all_methods_say_the_same(models: Models, draft: str, sampling: tuple[str, ...]) -> None:
    guesser = models.draft if draft == "model" else "ngram"
    asked = asking(models.target, "--max-tokens", "40", *sampling, draft=guesser)
    said = {method: answer(*asked, "--method", method) for method in METHODS}
    assert {tuple(told["token_ids"]) for told in said.values()} == {tuple(said["pp"]["token_ids"])}
    assert {told["text"] for told in said.values()} == {said["pp"]["text"]}
    if draft == "model":  # the others want stages that work at the same time
        assert all(said[method]["speculation"]["hits"] > 0 for method in ("chain", "static-tree"))


def test_all_methods_say_the_same_in_unit_time_and_hit(models: Models) -> None:
    with simulated(models.target, draft=str(models.draft), stages=3, dtype="float32") as llm:
        said = {}
        for method in METHODS:
            llm.use(method)
            (said[method],) = llm.generate(PROMPT, SamplingParams(max_tokens=40))
    assert {tuple(one.token_ids) for one in said.values()} == {tuple(said["pp"].token_ids)}
    assert all(said[method].speculation["hits"] > 0 for method in METHODS[1:])


@pytest.mark.processes
@pytest.mark.parametrize(("methods", "sampling"), [
    (METHODS, ()), (("pipedec", "fullpipe"), ("--temperature", "1", "--seed", "7")),
], ids=["greedy", "sampled"])
def test_methods_say_the_same_on_processes(models: Models, methods: tuple[str, ...],
                                           sampling: tuple[str, ...]) -> None:
    asked = asking(models.target, "--max-tokens", "40", *sampling)
    truth = answer(*asked, "--method", "pp")["token_ids"]
    for method in methods:
        assert answer(*asked, "--method", method, "--stages", "2")["token_ids"] == truth, method


def test_the_seed_decides_the_sample(models: Models) -> None:
    asked = asking(models.target, "--max-tokens", "20", "--temperature", "1")
    first, again, other = (answer(*asked, "--seed", seed)["token_ids"] for seed in ("7", "7", "8"))
    assert first == again != other


# ---- lossy, and only when asked for ----------------------------------------------------------------------


@pytest.mark.parametrize("stages", PIPELINES)
def test_a_lossy_answer_says_how_many_tokens_it_altered(models: Models, stages: int | None) -> None:
    """Random weights know little, so a draft's best guess mostly passes; and where it is wrong nothing else flies."""
    method = "chain" if stages is None else "spd"
    asked = asking(models.target, "--max-tokens", "40", "--method", method, draft=models.draft, stages=stages)
    exact, lossy = answer(*asked), answer(*asked, "--accept-typical", "0.001")
    assert (exact["speculation"]["accept"], exact["speculation"]["altered_tokens"]) == ("exact", 0)
    assert lossy["speculation"]["accept"] == "typical:0.001"
    assert 0 < lossy["speculation"]["altered_tokens"] < 40
    assert lossy["token_ids"] != exact["token_ids"]


def test_without_drafts_nothing_is_altered(models: Models) -> None:
    asked = asking(models.target, "--max-tokens", "20", "--method", "pp")
    lossy = answer(*asked, "--accept-typical", "0.001")
    assert lossy["speculation"]["altered_tokens"] == 0 and lossy["token_ids"] == answer(*asked)["token_ids"]


def test_the_last_line_tells_of_it(models: Models) -> None:
    asked = asking(models.target, "--max-tokens", "20", "--method", "chain", draft=models.draft)
    assert "altered" not in run(*asked).stderr
    lossy = run(*asked, "--accept-typical", "0.001").stderr.splitlines()[-1]
    assert lossy.startswith("[20 tokens (") and " altered, typical:0.001), length; chain on 1 stage: " in lossy


# ---- streams ---------------------------------------------------------------------------------------------


def test_the_text_goes_to_stdout_and_the_rest_to_stderr(models: Models) -> None:
    asked = asking(models.target, "--max-tokens", "20", "--method", "pp", draft="none")
    result = run(*asked)
    assert result.stdout == answer(*asked)["text"] + "\n"
    loading, summary = result.stderr.splitlines()
    assert loading == "loading target in this process in float32"
    assert summary.startswith("[20 tokens, length; pp on 1 stage: ")


@pytest.mark.parametrize("stages", PIPELINES)
def test_text_streams_as_it_is_committed(models: Models, tmp_path: Path, stages: int | None) -> None:
    asked = asking(models.target, "--max-tokens", "200", stages=stages)
    with running(asked, tmp_path) as command:
        first = command.first_bytes().decode()
        code, rest, _ = command.end()
    assert code == 0 and len(first) < 200
    assert first + rest == run(*asked).stdout and len(first + rest) == 201


def test_a_dash_reads_the_prompt_from_stdin(models: Models) -> None:
    asked = asking(models.target, "--max-tokens", "12", prompt="-")
    given = answer(*asking(models.target, "--max-tokens", "12", prompt="some words"))
    assert answer(*asked, stdin="some words")["token_ids"] == given["token_ids"]


def test_the_prompt_goes_through_the_chat_template_unless_told_not_to(models: Models) -> None:
    def length(*more: str) -> int:
        said = answer(*asking(models.target, "--max-tokens", "1", *more, prompt="abc"))
        told: int = said["usage"]["prompt_tokens"]
        return told

    assert length("--no-chat-template") == len("abc")
    assert length() == len("user:abc;assistant:")
    assert length("--system", "xy") == len("system:xy;user:abc;assistant:")
    own = "<{{ messages[0].content }}>{{ mood }}"
    assert length("--chat-template", own) == len("<abc>")
    assert length("--chat-template", own, "--default-chat-template-kwargs", '{"mood": "calm"}') == len("<abc>calm")


@pytest.mark.parametrize(("options", "says"), [
    (["--chat-template", "missing.jinja"], "missing.jinja"), (["--chat-template", "{% for %}"], "cannot be read"),
    (["--chat-template", "{{ raise_exception('not today') }}"], "not today"),
    (["--default-chat-template-kwargs", "{"], "is not JSON"), (["--default-chat-template-kwargs", "[]"], "JSON object"),
    (["--default-chat-template-kwargs", '{"messages": []}'], "cannot set 'messages'"),
    (["--no-chat-template", "--chat-template", "{{ x }}"], "--chat-template has no effect"),
    (["--no-chat-template", "--system", "s"], "--system has no effect"),
    (["--no-chat-template", "--default-chat-template-kwargs", "{}"], "has no effect"),
])
def test_a_template_that_cannot_be_used_is_refused(models: Models, options: list[str], says: str) -> None:
    result = run(*asking(models.target, *options))
    assert result.exit_code == 2 and says in result.output.replace("\n", " ")
    assert "bug" not in result.output


def test_a_stop_string_ends_the_text_before_it(models: Models) -> None:
    asked = asking(models.target, "--max-tokens", "30")
    full = answer(*asked)["text"]
    stop = full[10:13]
    for more in (("--stop", stop), ("--stop", "no such words", "--stop", stop)):
        told = answer(*asked, *more)
        assert told["finish_reason"] == "stop" and told["text"] == full[: full.index(stop)]
    streamed = run(*asked, "--stop", stop)
    assert streamed.stdout == full[: full.index(stop)] + "\n"  # nothing of it was shown and taken back


def test_events_are_recorded_for_read_events(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    told = answer(*asking(models.target, "--max-tokens", "20", "--events", path))
    events = list(read_events(path))
    assert [event.token for event in events if isinstance(event, Emitted)] == told["token_ids"]
    launched = sum(len(event.nodes) for event in events if isinstance(event, Launched))
    assert launched == told["speculation"]["launched_rows"]
    assert any(isinstance(event, Landed) for event in events)
    assert [event.reason for event in events if isinstance(event, Finished)] == ["length"]


# ---- Ctrl-C ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", PIPELINES)
def test_ctrl_c_keeps_what_was_said(models: Models, tmp_path: Path, stages: int | None) -> None:
    asked = asking(models.target, "--max-tokens", "15000", stages=stages)
    with running(asked, tmp_path) as command:
        said = command.first_bytes().decode()
        command.interrupt()
        code, rest, err = command.end()
    said += rest
    assert code == 130 and said.endswith("\n")
    assert "Traceback" not in err and "interrupted" in err
    assert f"[{len(said) - 1} tokens, abort;" in err
    whole = run(*asking(models.target, "--max-tokens", len(said) - 1)).stdout
    assert said == whole


@pytest.mark.parametrize("stages", PIPELINES)
def test_ctrl_c_with_json_prints_what_there_is(models: Models, tmp_path: Path, stages: int | None) -> None:
    trace = tmp_path / "trace"
    home = tmp_path / "tmp"
    home.mkdir()
    asked = asking(models.target, "--max-tokens", "15000", "--json", "--events", trace, stages=stages)
    with running(asked, home) as command:
        command.until_it_speaks(trace)
        command.interrupt()
        code, out, err = command.end()
    told = json.loads(out)
    assert code == 130 and "Traceback" not in err
    told["speculation"]["width"] = told["speculation"]["width"] or 0  # null: as many rows as pay
    assert shape_of(told) == SHAPE and told["finish_reason"] == "abort"
    assert 0 < len(told["token_ids"]) == len(told["text"]) < 15000
    assert list(read_events(trace))


@pytest.mark.parametrize("written", [False, True])
def test_ctrl_c_while_printing_ends_the_stream_too(models: Models, capsys: pytest.CaptureFixture[str], written: bool,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two chunks the stream does not see the interrupt. Nothing is lost, and nothing said twice."""
    numbers, real = count(), verb._Page._add

    def interrupted(page: verb._Page, text: str) -> None:
        last = next(numbers) == 3
        if written or not last:
            real(page, text)
        if last:
            raise KeyboardInterrupt

    monkeypatch.setattr(verb._Page, "_add", interrupted)
    with LLM(str(models.target), dtype="float32", threads=1) as llm:
        with pytest.raises(KeyboardInterrupt):
            verb._answer(llm, "hello", SamplingParams(max_tokens=50), as_json=False)
        said = capsys.readouterr()
        number = int(re.search(r"(\d+) tokens, abort", said.err)[1])  # type: ignore[index]
        assert 4 <= number < 50
        assert said.out == llm.generate("hello", SamplingParams(max_tokens=number))[0].text + "\n"


# ---- the front door in Python ----------------------------------------------------------------------------


PARAMS = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def llm(models: Models) -> Any:
    with fullpipe.LLM(str(models.target), draft=str(models.draft), dtype="float32", threads=1) as llm:
        yield llm


def test_generate_takes_every_kind_of_prompt(llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello")
    messages = [{"role": "user", "content": "hello"}]
    (plain,), (by_id,), (talk,) = (llm.generate(prompt, PARAMS) for prompt in ("hello", ids, messages))
    assert plain.token_ids == by_id.token_ids != talk.token_ids
    assert llm.chat(messages, PARAMS).token_ids == talk.token_ids
    several = llm.generate(["hello", ids, messages], PARAMS)
    assert [one.token_ids for one in several] == [plain.token_ids, by_id.token_ids, talk.token_ids]
    assert llm.generate([], PARAMS) == []


def test_a_chat_is_asked_for_as_of_vllm(llm: LLM) -> None:
    def read(messages: Any, **options: Any) -> int:
        return llm.chat(messages, SamplingParams(max_tokens=1), **options).usage["prompt_tokens"]

    hello, begun = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "He"}
    assert read([hello]) == len("user:hello;assistant:")
    assert read([hello], add_generation_prompt=False) == len("user:hello;assistant:")  # which this template ignores
    assert read([hello, begun], continue_final_message=True) == len("user:hello;assistant:He")
    assert read([{"role": "user", "content": [{"type": "text", "text": "ab"}]}]) == len("user:ab;assistant:")
    assert read([hello], chat_template_kwargs={"unread": 1}) == read([hello])
    for options in ({"continue_final_message": True, "add_generation_prompt": True},
                    {"chat_template_kwargs": {"tools": []}}):
        with pytest.raises(UsageError):
            read([hello, begun], **options)


@pytest.mark.parametrize("messages", [[], [{"role": "user", "content": " "}], [{"role": "user"}]])
def test_a_chat_in_which_nothing_is_said_is_empty(llm: LLM, messages: Any) -> None:
    for ask in (llm.chat, llm.encode):
        with pytest.raises(PromptError, match="the prompt is empty"):
            ask(messages)


def test_several_at_a_time_say_what_they_say_alone(llm: LLM, models: Models) -> None:
    prompts = ["one", "another prompt, longer", "x", "hello hello hello", "the fifth"]
    alone = [one.text for one in llm.generate(prompts, PARAMS)]
    assert len(set(alone)) == len(prompts)
    with LLM(str(models.target), draft=str(models.draft), dtype="float32", threads=1, max_num_seqs=3) as shared:
        assert [one.text for one in shared.generate(prompts, PARAMS)] == alone


def test_a_stream_is_the_text_in_pieces(llm: LLM) -> None:
    chunks = list(llm.stream("hello", PARAMS))
    (whole,) = llm.generate("hello", PARAMS)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    *others, last = chunks
    assert last.completion is not None and last.completion.text == whole.text
    assert others and all(chunk.completion is None for chunk in others)


def test_a_stream_closed_early_makes_room_for_the_next(llm: LLM) -> None:
    stream = llm.stream("hello", SamplingParams(max_tokens=200))
    begun = next(stream)
    stream.close()
    (whole,) = llm.generate("hello", PARAMS)
    assert whole.token_ids[: len(begun.token_ids)] == begun.token_ids
    assert len(whole.token_ids) == PARAMS.max_tokens and not llm._service.engine.busy
    llm._service.engine.check()


# ---- real weights ----------------------------------------------------------------------------------------


@pytest.mark.weights
def test_smollm_answers_in_words_and_ends_by_itself() -> None:
    asked = asking("smollm2-135m", "--max-tokens", "60", prompt="What is the capital of France?")
    told = answer(*asked)
    assert "Paris" in told["text"] and told["finish_reason"] == "stop"
    assert "<|im_end|>" not in told["text"]
    assert told["token_ids"] == answer(*asked, "--method", "pp")["token_ids"]

"""What a model's generation_config.json asks for is in force in Python, on the command line and in `show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from command import run

from chain import write_chain
from fullpipe import LLM, SamplingParams

SAYS = [3, 1, 4, 2]


def model(folder: Path, **wants: Any) -> Path:
    """After "c" it says "a d b b b ..."."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "a", "b", "c", "d", "e"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return write_chain(folder, backend, SAYS, generation_config=wants)


def test_python_takes_it_where_nothing_is_said(tmp_path: Path) -> None:
    told: list[str] = []
    with LLM(model(tmp_path, max_new_tokens=2, top_k=5), draft="none", progress=told.append) as llm:
        assert told[-1].startswith("sampling where a request says nothing, from generation_config.json: top_k 5, max_t")
        assert llm.get_default_sampling_params() == SamplingParams(max_tokens=2, top_k=5)
        assert llm.get_default_sampling_params(top_k=1, seed=4) == SamplingParams(max_tokens=2, top_k=1, seed=4)
        assert llm.generate("c")[0].token_ids == [1, 4]
        assert [chunk.completion.token_ids for chunk in llm.stream("c") if chunk.completion] == [[1, 4]]
        assert len(llm.generate("c", SamplingParams(max_tokens=3))[0].token_ids) == 3
        assert len(llm.generate("c", SamplingParams())[0].token_ids) == 128, "taken as they are"
    with LLM(tmp_path, draft="none", generation_config="none") as plain:
        assert plain.get_default_sampling_params() == SamplingParams()


@pytest.mark.parametrize(("flags", "tokens", "notes"), [
    ((), 2, ["sampling where"]), (("--max-tokens", "3"), 3, ["sampling where"]),
    (("--generation-config", "none", "--max-tokens", "4"), 4, []),
    (("--temperature", "0", "--top-p", "0.5"), 2, ["sampling where", "warning: at temperature 0 the likeliest token is "
                                                 "taken, and --top-p changes nothing"]),
    (("--max-tokens", "600"), 511, ["sampling where", "the context of 512 tokens is full: there was no room for 600"])])
def test_the_command_takes_it_where_no_flag_is_given(tmp_path: Path, flags: tuple[str, ...], tokens: int,
                                                     notes: list[str]) -> None:
    folder = model(tmp_path, max_new_tokens=2, temperature=0, top_k=5)
    result = run("generate", "c", "--model", folder, "--draft", "none", "--no-chat-template", *flags)
    assert result.exit_code == 0 and len(result.stdout.split()) == tokens
    for line in ("sampling where", "warning: ", "the context of"):
        assert (line in result.stderr) == any(note.startswith(line) for note in notes)
    assert all(note in result.stderr.replace("\n", " ") for note in notes)


def test_its_help_says_so() -> None:
    text = " ".join(run("generate", "--help").stdout.replace("│", " ").split())
    assert "the model's, or 0.0" in text and "the model's, or 128" in text


def test_show_has_it(tmp_path: Path) -> None:
    folder = model(tmp_path, temperature=0.6, top_p=0.9)
    assert json.loads(run("show", folder, "--json").stdout)["sampling"] == {"temperature": 0.6, "top_p": 0.9}
    assert "sampling    temperature 0.6, top_p 0.9" in run("show", folder).stdout


def test_a_bad_value_names_the_file_and_the_way_out(tmp_path: Path) -> None:
    result = run("generate", "c", "--model", model(tmp_path, top_p=7), "--draft", "none")
    assert result.exit_code == 3
    assert "top_p must be in (0, 1] (got 7)" in result.stderr and "--generation-config none" in result.stderr


def test_a_system_message_in_plain_text_is_refused(tmp_path: Path) -> None:
    result = run("generate", "c", "--model", model(tmp_path), "--no-chat-template", "--system", "Be brief.")
    assert result.exit_code == 2 and "--system has no effect without a chat template" in result.stderr


def test_verify_is_greedy_whatever_the_model_wants(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("c\n")
    folder = model(tmp_path / "model", temperature=2.0, max_new_tokens=2)
    result = run("verify", "--prompts", prompts, "--model", folder, "--draft", "ngram", "--no-chat-template",
                 "--max-tokens", "5", "--method", "chain", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tokens"] == 5 and "sampling where" not in result.stderr

"""`fullpipe verify`: it says "identical" when it is so, and where and how narrowly when it is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import METHODS, PIPELINES, Models, run
from typer.testing import Result

from fullpipe.cli.verify import Difference, first_difference
from fullpipe.llm import LLM, Completion


def verify(models: Models, prompts: Path, *more: str | Path) -> Result:
    return run("verify", "--prompts", prompts, "--model", models.target, "--draft", models.draft, "--dtype",
               "float32", "--threads", "1", "--max-tokens", "20", *more)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"question_id": 81, "turns": ["hello hello", "and then"]}\n\n'
                    '{"prompt": "some words"}\nplain text\n')
    return file


# ---- the verb --------------------------------------------------------------------------------------------


def test_methods_are_identical(models: Models, prompts: Path) -> None:
    result = verify(models, prompts)
    assert result.exit_code == 0, result.output
    assert result.stdout == ("identical: 3 prompts, 60 tokens, float32, methods chain, static-tree, pipedec, spd, "
                             "ppsd, fullpipe\n")
    assert "fullpipe: prompt 3 of 3" in result.stderr


@pytest.mark.parametrize("stages", PIPELINES)
def test_the_report_as_json(models: Models, prompts: Path, stages: int | None) -> None:
    cut = [] if stages is None else ["--stages", str(stages)]
    result = verify(models, prompts, "--json", "--limit", "2", *cut, "--temperature", "1", "--seed", "7")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "prompts": 2, "methods": list(METHODS[1:]), "tokens": 40, "identical": True, "near_ties": 0, "differences": [],
        "model": str(models.target), "draft": str(models.draft), "stages": stages or 1, "dtype": "float32",
        "near_tie_tolerance": 0.001,
    }


def test_lossy_texts_are_not_verified(models: Models, prompts: Path) -> None:
    result = verify(models, prompts, "--accept-typical", "0.3")
    assert (result.exit_code, result.stdout) == (2, "") and "--accept-typical" in result.stderr


@pytest.mark.parametrize(("tolerance", "code", "words"), [
    ("1e-3", 1, ["DIFFERENT: prompt 81, fullpipe, token 4: ", "1 different, 0 near-ties (margin up to 0.001): "]),
    ("1e9", 0, ["near-tie: prompt 81, fullpipe, token 4: ", "0 different, 1 near-ties (margin up to 1000000000.0): "]),
], ids=["real", "near-tie"])
def test_a_difference_is_told(models: Models, prompts: Path, monkeypatch: pytest.MonkeyPatch, tolerance: str,
                              code: int, words: list[str]) -> None:
    """One token of one method's real answer is altered on its way."""
    real = LLM.generate

    def altered(self: LLM, *arguments: Any) -> list[Completion]:
        (one,) = real(self, *arguments)
        if one.speculation["method"] == "fullpipe":
            tokens = list(one.token_ids)
            tokens[4] ^= 1
            one = replace(one, token_ids=tokens)
        return [one]

    monkeypatch.setattr(LLM, "generate", altered)
    result = verify(models, prompts, "--limit", "1", "--tolerance", tolerance)
    assert result.exit_code == code, result.output
    assert [line.startswith(word) for line, word in zip(result.stdout.splitlines(), words, strict=True)] == [True] * 2


@pytest.mark.parametrize(("content", "message"), [
    (None, "cannot read prompts from "), ("", " holds no prompts"), ("\n \n", " holds no prompts"),
    ('fine\n{"turns": []}\n', "line 2: not a prompt"), ('{"prompt"', "line 1: not a prompt"),
    (b"\xff\xfe\x00", "cannot read prompts from "),
], ids=["missing", "empty", "blank", "no turns", "broken", "no text"])
def test_a_file_that_holds_no_prompts(models: Models, tmp_path: Path, content: str | bytes | None,
                                      message: str) -> None:
    file = tmp_path / "prompts"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    result = verify(models, file)
    assert (result.exit_code, result.stdout) == (2, "")
    told, hint = result.stderr.splitlines()
    assert told.startswith("error: ") and str(file) in told and message in told and hint
    assert "Traceback" not in result.stderr


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_a_pick_without_a_rival_is_strict_json_too(models: Models, prompts: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """One method's real answer is altered on its way: another token, and no rival to it; and for another method
    its end."""
    real = LLM.generate

    def altered(self: LLM, *arguments: Any) -> list[Completion]:
        (one,) = real(self, *arguments)
        match one.speculation["method"]:
            case "fullpipe":
                tokens, margins = list(one.token_ids), list(one.margins)
                tokens[4], margins[4] = tokens[4] ^ 1, None
                one = replace(one, token_ids=tokens, margins=margins)
            case "chain":
                one = replace(one, token_ids=one.token_ids[:9])
        return [one]

    monkeypatch.setattr(LLM, "generate", altered)
    asked = ("--limit", "1", "--method", "chain", "--method", "fullpipe")
    result = verify(models, prompts, *asked, "--json")
    assert result.exit_code == 1, result.output
    short, other = json.loads(result.stdout, parse_constant=refuse)["differences"]
    assert (short["token"], short["margin"], short["reference_margin"], short["near_tie"]) == (-1, None, None, False)
    assert (other["index"], other["margin"], other["near_tie"]) == (4, None, False) and other["reference_margin"] > 0
    lines = verify(models, prompts, *asked).stdout.splitlines()
    assert lines[0] == "DIFFERENT: prompt 81, chain, token 9: one text ends there"
    assert " (no rival) against " in lines[1] and lines[1].endswith(")") and "(margin " in lines[1]


@pytest.mark.parametrize("tolerance", ["inf", "nan", "-0.1"])
def test_a_tolerance_that_is_none(models: Models, prompts: Path, tolerance: str) -> None:
    result = verify(models, prompts, "--tolerance", tolerance)
    assert result.exit_code == 2 and "error: the tolerance must be 0 or more, and finite" in result.stderr


def test_a_depth_counts_for_the_methods_that_have_one(models: Models, prompts: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[str, int | None] = {}
    real = LLM.use

    def noted(self: LLM, method: str, **options: Any) -> None:
        real(self, method, **options)
        used[method] = getattr(self._service.engine.method, "depth", None)

    monkeypatch.setattr(LLM, "use", noted)
    result = verify(models, prompts, "--limit", "1", "--depth", "3")
    assert result.exit_code == 0, result.output
    assert used == {"pp": None, "chain": 3, "static-tree": 3, "pipedec": None, "spd": None, "ppsd": None,
                    "fullpipe": None}


def test_a_depth_that_no_method_has_is_refused(models: Models, prompts: Path) -> None:
    result = verify(models, prompts, "--method", "pipedec", "--method", "fullpipe", "--depth", "3")
    assert result.exit_code == 2 and "error: the method pipedec has no depth (got 3)" in result.stderr
    assert "chain, static-tree" in result.stderr


def test_pp_alone_is_nothing_to_compare(models: Models, prompts: Path) -> None:
    result = verify(models, prompts, "--method", "pp")
    assert result.exit_code == 2 and "error: nothing to compare with pp" in result.stderr


def test_methods_can_be_chosen(models: Models, prompts: Path) -> None:
    result = verify(models, prompts, "--limit", "1", "--method", "pipedec", "--method", "chain")
    assert result.exit_code == 0 and result.stdout.endswith("methods pipedec, chain\n")


# ---- where two answers part ------------------------------------------------------------------------------


def said(tokens: list[int], margins: list[float | None]) -> Completion:
    return Completion("", tokens, "length", {}, {}, {}, margins)


REFERENCE = said([1, 2, 3], [5.0, 0.01, 5.0])


def difference(one: Completion, near: float = 0.1) -> Difference | None:
    return first_difference("81", "chain", one, REFERENCE, near)


def test_the_same_tokens_are_no_difference() -> None:
    assert difference(said([1, 2, 3], [4.9, 0.02, 5.1])) is None


def test_both_picks_close_to_their_rivals_is_a_near_tie() -> None:
    assert difference(said([1, 9, 7], [5.0, 0.02, 8.0])) == Difference("81", "chain", 1, 9, 2, 0.02, 0.01, True)


@pytest.mark.parametrize("near", [0.0, 0.005, 0.015])
def test_the_tolerance_decides(near: float) -> None:
    found = difference(said([1, 9, 7], [5.0, 0.02, 8.0]), near)
    assert found is not None and not found.near_tie


def test_a_pick_without_a_rival_is_no_near_tie() -> None:
    found = difference(said([1, 9, 3], [5.0, None, 5.0]))
    assert found is not None and (found.margin, found.reference_margin, found.near_tie) == (None, 0.01, False)


def test_one_pick_far_above_its_rival_is_no_near_tie() -> None:
    found = difference(said([1, 9, 3], [5.0, 3.0, 5.0]))
    assert found is not None and (found.index, found.margin, found.near_tie) == (1, 3.0, False)


@pytest.mark.parametrize("tokens", [[1, 2], [1, 2, 3, 4]])
def test_another_length_is_a_difference_that_no_tie_explains(tokens: list[int]) -> None:
    found = difference(said(tokens, [5.0, 0.01, 5.0, 5.0][: len(tokens)]))
    assert found is not None and not found.near_tie
    assert (found.index, found.margin, found.reference_margin) == (min(len(tokens), 3), None, None)

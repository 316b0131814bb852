"""What an answer must be, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import run

import structured
from fullpipe.cli.structured import StructureOptions
from fullpipe.errors import UsageError
from fullpipe.request import Structured


def test_at_most_one_structure_is_asked_for(tmp_path: Path) -> None:
    (file := tmp_path / "schema.json").write_text('{"type": "object"}\n')
    assert StructureOptions().structured() is None
    for options, expected in (
        (StructureOptions(json_schema=str(file)), Structured("json", '{"type": "object"}\n')),
        (StructureOptions(json_schema='{"type": "array"}'), Structured("json", '{"type": "array"}')),
        (StructureOptions(json_schema='{"enum": ["' + "x" * 5000 + '"]}'),
         Structured("json", '{"enum": ["' + "x" * 5000 + '"]}')),
        (StructureOptions(regex="a+"), Structured("regex", "a+")),
        (StructureOptions(choice=("yes", "no")), Structured("choice", '["yes", "no"]')),
        (StructureOptions(grammar='start: "a"\n'), Structured("grammar", 'start: "a"\n')),
    ):
        assert options.structured() == expected
    with pytest.raises(UsageError, match="one structure"):
        StructureOptions(regex="a", choice=("b",)).structured()


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (file := tmp_path / "schema").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot read"):
        StructureOptions(json_schema=str(file)).structured()


@pytest.mark.parametrize(("options", "said"), [
    ({"json_schema": "/nope.json"}, "/nope.json is not there, and is no JSON either"),
    ({"json_schema": '{"type": '}, "is not JSON"), ({"grammar": "/nope.lark"}, "is no grammar either"),
])
def test_what_is_neither_a_file_nor_a_text(options: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        StructureOptions(**options).structured()


def test_a_broken_schema_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    (file := tmp_path / "schema.json").write_text("{")
    for schema in (str(file), "/nope.json"):
        refused = run("generate", "hi", "-m", "/no/such/model", "--json-schema", schema)
        assert refused.exit_code == 2 and "--json-schema" in refused.stderr and "model" not in refused.stderr


def test_the_answer_is_what_was_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="the extra 'structured' is not installed")
    folder = structured.save(tmp_path / "model")
    asked = ["generate", "say", "-m", folder, "--draft", "ngram", "--no-chat-template", "--dtype", "float32",
             "--threads", "1", "--method", "chain"]
    (file := tmp_path / "schema.json").write_text(structured.JSON.text)
    assert set(json.loads(run(*asked, "--json-schema", file).stdout)) == {"kind", "n", "on"}
    assert run(*asked, "--choice", "abc", "--choice", "true").stdout in ("abc\n", "true\n")
    refused = run(*asked, "--regex", "(")
    assert refused.exit_code == 2 and "regular expression cannot be followed" in refused.stderr

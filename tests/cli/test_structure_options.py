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

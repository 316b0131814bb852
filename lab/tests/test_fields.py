"""The document's table of fields is what the server does."""

from __future__ import annotations

from pathlib import Path

import pytest

from fullpipe.errors import UsageError
from fullpipe.server.protocol.tables import REFUSED
from fullpipe_lab import fields
from fullpipe_lab.fields import BEGIN, DOCUMENT, END, VLLM, endpoints, main, table, with_table


def rows() -> dict[str, list[str]]:
    """Cells by field."""
    split = [line[2:-2].split(" | ") for line in table().splitlines()[2:]]
    return {cells[0].strip("`"): cells[1:] for cells in split}


def test_the_document_says_what_the_server_does() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_table(text) == text, "run: python -m fullpipe_lab.fields --write"


def test_every_field_of_vllm_and_of_this_server_has_a_row_that_says_its_fate() -> None:
    found, kinds = rows(), endpoints()
    for number, (name, endpoint) in enumerate(kinds.items()):
        assert len(set(VLLM[name])) == len(VLLM[name]), "a field stands there twice"
        if endpoint.model is not None:
            assert {found[field][number] for field in endpoint.fields} <= {"yes", "ignored", "refused"}
    assert found["messages"][0] == "yes" and found["prompt"][1] == "yes" and found["prompt"][0] == ""


def test_what_is_not_taken_says_why() -> None:
    for field, cells in rows().items():
        assert len(cells) == 4 and (cells[3] or not {"ignored", "refused"} & set(cells[:3])), field
        if "refused" in cells[:2]:
            assert REFUSED.get(field, "this server does not know it") in cells[3], field


def test_it_is_put_between_its_marks_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "serving.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.setattr(fields, "DOCUMENT", path)
    assert main(["--write"]) == 0
    assert path.read_text() == f"before\n{BEGIN}\n\n{table()}\n\n{END}\nafter\n"
    assert main([]) == 0 and capsys.readouterr().out.strip() == table()
    with pytest.raises(UsageError, match="no place"):
        with_table("nothing")

"""The study that keeps what `fullpipe verify` said of a pair."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fullpipe.errors import StationFailed
from fullpipe_lab.studies import verify_pair
from fullpipe_lab.studies.verify_pair import main, row_of, verify

REPORT = {"model": "m", "draft": "d", "stages": 2, "dtype": "stored", "prompts": 2, "tokens": 32,
          "methods": ["chain", "fullpipe"], "identical": False, "near_ties": 1, "near_tie_tolerance": 1e-3,
          "differences": [{"method": "chain", "near_tie": True}, {"method": "fullpipe", "near_tie": False}]}


def test_near_ties_are_told_apart_from_differences() -> None:
    row = row_of(REPORT | {"temperature": 0.0})
    assert (row["identical"], row["near_ties"], row["different"]) == (False, 1, {"fullpipe": 1})


def test_a_run_without_a_report_is_an_error() -> None:
    with pytest.raises(StationFailed, match="ended with code 2"):
        verify([sys.executable, "-c", "raise SystemExit(2)"])


def test_a_report_of_differences_is_a_report() -> None:
    assert verify([sys.executable, "-c", "print('{\"prompts\": 1}'); raise SystemExit(1)"])["prompts"] == 1


def test_what_is_done_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    heats: list[str] = []

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked = dict(zip(words[5::2], words[6::2]))
        heats.append(asked["--temperature"])
        assert len(Path(asked["--prompts"]).read_text().splitlines()) == 6 and asked["--stages"] == "2"
        return subprocess.CompletedProcess(words, 0, json.dumps(REPORT | {"identical": True, "differences": []}))

    monkeypatch.setattr(verify_pair.subprocess, "run", run)
    monkeypatch.setattr(verify_pair, "commit_of", lambda _: ("c", False))
    for heat in ("0", "0,1"):
        monkeypatch.setattr("sys.argv", ["verify_pair", "--quick", "--out", str(tmp_path), "--temperatures", heat])
        main()
    assert heats == ["0", "1"] and capsys.readouterr().out.count("yes") == 3

"""What was claimed, what was believed, and what came true."""

from __future__ import annotations

import pytest

from fullpipe.methods import make_method
from fullpipe.request import SamplingParams
from fullpipe.stations.drafts.mix import Mix
from fullpipe.stations.drafts.ngram import NgramDraft
from fullpipe_lab.calibration_table import WatchedCalibration, name_of, show
from fullpipe_lab.clusters import unit_cluster
from fullpipe_lab.recording import Answer
from fullpipe_lab.replay import replay


def test_every_guess_of_a_replay_is_in_the_table_once() -> None:
    text = [5, 6, 7, 8] * 20
    answer = Answer("one", "repeats", text[:8], text[8:], "length")
    watched = WatchedCalibration()
    replay(answer, SamplingParams(max_tokens=len(answer.tokens)), Mix([NgramDraft()]), make_method("fullpipe", width=2),
           unit_cluster(3), calibration=watched)
    lines = watched.table()
    assert sum(line.number for line in lines) == watched.noted > len(answer.tokens)
    sure = max(lines, key=lambda line: (line.decile, -line.kind))
    assert sure.seen == sure.number and sure.claimed < sure.believed <= sure.number, "a loop is surer than n-gram says"
    claimed, believed = watched.surprise()
    assert believed < claimed
    assert "| draft 0 alone | 0.9 to 1.0 |" in show(lines)


@pytest.mark.parametrize(("kind", "name"), [(0, "one draft"), (1, "one draft, asked again"), (3, "draft 0 alone"),
                                            (8, "draft 1 alone, behind a guess"), (9, "drafts 0 and 1")])
def test_kinds_have_names(kind: int, name: str) -> None:
    assert name_of(kind) == name

"""Links and paces as users ask for them: what they do, and where they are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from command import Models, asking, run

from fullpipe.errors import UsageError
from fullpipe.llm import LLM
from fullpipe.messages import Event, Landed
from fullpipe.request import SamplingParams


@pytest.mark.parametrize(("more", "message"), [
    (("--clock", "wall", "--link-ms", "5"), "in one process on the wall clock there are none"),
    (("--clock", "wall", "--link-mbit", "5"), "in one process on the wall clock there are none"),
    (("--link-mbit", "0"), "bandwidth must be above 0 (got 0.0 Mbit/s)"),
    (("--link-ms", "inf"), "latency must be 0 s or more (got inf s)"),
    (("--pipeline", "distributed", "--link-ms", "-1"), "latency must be 0 or more (got -1.0 ms)"),
    (("--pipeline", "distributed", "--link-ms", "2000", "--timeout", "2"), "2 s without progress count as failure"),
])
def test_links_that_cannot_be_given(models: Models, more: tuple[str, ...], message: str) -> None:
    result = run(*asking(models.target, *more))
    assert result.exit_code == 2
    assert message in result.stderr


def test_paces_are_for_processes(models: Models) -> None:
    with pytest.raises(UsageError, match="only where they are processes"):
        LLM(str(models.target), stages=2, pace={"stage 0": {1: 0.1}})


@pytest.mark.processes
def test_emulated_links_and_paces_change_the_time_and_not_the_text(models: Models) -> None:
    options: dict[str, Any] = {"draft": "ngram", "stages": 2, "dtype": "float32", "threads": 1}
    params, events = SamplingParams(max_tokens=6), list[Event]()
    with LLM(str(models.target), **options) as llm:
        (plain,) = llm.generate("hello there", params)
    with LLM(str(models.target), pipeline="distributed", link_ms=30, link_mbit=100, pace={"stage 1": {1: 0.02}},
             listeners=[events.append], **options) as llm:
        (emulated,) = llm.generate("hello there", params)
    assert emulated.token_ids == plain.token_ids
    assert emulated.timing["clock"] == "wall"
    landed = [event for event in events if isinstance(event, Landed)]
    assert landed
    for event in landed:
        first, second = event.legs
        assert second.start - first.end >= 0.03
        assert event.time - second.end >= 0.03
        assert second.end - second.start >= (0.02 if second.nodes else 0.0)


@pytest.mark.processes
def test_link_options_reach_the_processes(models: Models) -> None:
    """pp waits for both ways, from stage 0 to stage 1 and back, at every token."""
    result = run(*asking(models.target, "--pipeline", "distributed", "--method", "pp", "--draft", "none",
                         "--link-ms", "30", "--max-new-tokens", "4", "--json"))
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["timing"]["tbt_s"] >= 0.06

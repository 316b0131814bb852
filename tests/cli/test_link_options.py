"""Links as users ask for them: what they do, and where they are refused."""

from __future__ import annotations

import json

import pytest
from command import Models, asking, run

from fullpipe.llm import LLM
from fullpipe.messages import Event, Landed
from fullpipe.request import SamplingParams


@pytest.mark.parametrize(("more", "message"), [
    (("--link-mbit", "0"), "bandwidth must be above 0 (got 0.0 Mbit/s)"),
    (("--link-ms", "inf"), "latency must be 0 or more (got inf ms)"),
    (("--link-ms", "-1"), "latency must be 0 or more (got -1.0 ms)"),
    (("--link-ms", "2000", "--timeout", "2"), "2 s without progress count as failure"),
])
def test_links_that_cannot_be_given(models: Models, more: tuple[str, ...], message: str) -> None:
    result = run(*asking(models.target, *more, stages=2))
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.processes
def test_emulated_links_change_the_time_and_not_the_text(models: Models) -> None:
    params, events = SamplingParams(max_tokens=6), list[Event]()
    with LLM(str(models.target), draft="ngram", dtype="float32", threads=1) as llm:
        (plain,) = llm.generate("hello there", params)
    with LLM(str(models.target), draft="ngram", dtype="float32", threads=1, stages=2, link_ms=30, link_mbit=100,
             listeners=[events.append]) as llm:
        (emulated,) = llm.generate("hello there", params)
    assert emulated.token_ids == plain.token_ids
    assert emulated.timing["clock"] == "wall"
    landed = [event for event in events if isinstance(event, Landed)]
    assert landed
    for event in landed:
        first, second = event.legs
        assert second.start - first.end >= 0.03
        assert event.time - second.end >= 0.03


@pytest.mark.processes
def test_link_options_reach_the_processes(models: Models) -> None:
    """pp waits for both ways, from stage 0 to stage 1 and back, at every token."""
    result = run(*asking(models.target, "--method", "pp", "--draft", "none", "--link-ms", "30", "--max-tokens", "4",
                         "--json", stages=2))
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["timing"]["tbt_s"] >= 0.06

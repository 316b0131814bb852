"""The recorded truths of the scripted stations."""

from __future__ import annotations

from typing import Any

import pytest

from fullpipe.errors import UsageError
from fullpipe.messages import Flight, Opening, Part
from fullpipe.request import SamplingParams
from fullpipe.stations.scripted import ScriptedStage


def _said(truth: dict[str, Any], request: int, positions: list[int]) -> list[int]:
    """What a single stage answers at these positions of a request whose prompt has 2 tokens."""
    slots = list(range(len(positions)))
    part = Part(request + 7, [], slots, slots, positions, slots, [[slot] for slot in slots], [True] * len(slots))
    opening = Opening(request + 7, 2, SamplingParams(), request=request)
    landed = ScriptedStage(0, 1, truth).run(Flight(0, [part], [opening]), None)
    tokens: list[int] = landed.tokens  # type: ignore[union-attr]
    return tokens


def test_text_is_held_at_its_ends() -> None:
    assert _said({"kind": "text", "tokens": [5, 6, 7]}, 0, [0, 1, 2, 3, 4, 9]) == [5, 5, 6, 7, 7, 7]


@pytest.mark.parametrize(("request_id", "tokens"), [(0, [5, 6]), (1, [8, 9]), (2, [5, 6]), (5, [8, 9])])
def test_each_request_is_told_its_own_text(request_id: int, tokens: list[int]) -> None:
    assert _said({"kind": "texts", "texts": [[5, 6], [8, 9]]}, request_id, [1, 2]) == tokens


@pytest.mark.parametrize("truth", [{"kind": "text", "tokens": []}, {"kind": "texts", "texts": []},
                                   {"kind": "texts", "texts": [[1], []]}, {"kind": "texts"}])
def test_truth_without_tokens_is_refused(truth: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="no such truth") as caught:
        ScriptedStage(0, 1, truth)
    assert caught.value.hint

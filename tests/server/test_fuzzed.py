"""The study that fuzzes a real server (studies.serving.fuzz): what it asks, how it judges; and some of it here."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import httpx
import pytest
from one_word import OneWord, application

from fullpipe_lab.studies.serving import shots as module
from fullpipe_lab.studies.serving.fuzz import Fuzzing, fault_of
from fullpipe_lab.studies.serving.shots import Shot, by_schemathesis, kinds_of, own

FAMILIES = {"sensible", "twisted", "broken", "strange"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return dict(application(OneWord()).openapi())


@pytest.fixture(autouse=True)
def the_model_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MODEL_NAME", "m")


def test_what_is_asked_is_drawn_from_the_seed_and_the_document(document: dict[str, Any]) -> None:
    assert {"/v1/chat/completions", "/v1/completions"} <= kinds_of(document).keys()
    shots = list(own(document, 400, 1))
    assert len(shots) == 400 and shots == list(own(document, 400, 1)) != list(own(document, 400, 2))
    assert {shot.family for shot in shots} == FAMILIES


def test_schemathesis_gives_as_many_as_are_asked_for_right_and_wrong_ones(document: dict[str, Any]) -> None:
    shots = by_schemathesis(document, 40, 1)
    assert 15 <= len(shots) <= 40, "bodies that are no JSON are left out"
    assert {shot.family for shot in shots} == {"schemathesis, positive", "schemathesis, negative"}


def test_hundreds_are_answered_without_a_fault(document: dict[str, Any]) -> None:
    service = OneWord()
    app = application(service)

    async def ask() -> Fuzzing:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            fuzzing = Fuzzing(client)
            await fuzzing.caller([*own(document, 300, 3), *by_schemathesis(document, 60, 3)])
            return fuzzing

    done = asyncio.run(ask())
    assert done.faults == []
    statuses = Counter[int]()
    for (_, _, status), times in done.counts.items():
        statuses[status] += times
    assert statuses[200] > 10 and statuses[400] > 100 and service.asked and done.streams > 1


SHOT = Shot("sensible", "POST", "/v1/completions", b"{}")


def answer(status: int, content: bytes = b"{}", kind: str = "application/json") -> httpx.Response:
    return httpx.Response(status, content=content, headers={"content-type": kind})


@pytest.mark.parametrize(("response", "what"), [
    (answer(200), ""), (answer(200, b"data: {}\n\ndata: [DONE]\n\n", "text/event-stream"), ""),
    (answer(400, b'{"error": {"message": "no", "type": "x", "param": null, "code": null}}'), ""),
    (answer(500, b"oh"), "oh"), (answer(503, b"later"), "later"), (answer(200, b"{"), "not JSON"),
    (answer(200, b"data: {}\n\n", "text/event-stream"), "breaks a rule"),
    (answer(200, b'data: {"error": {"message": "no"}}\n\ndata: [DONE]\n\n', "text/event-stream"), "ends with an error"),
    (answer(400, b"no"), "without an error"), (answer(400, b"{}"), "without an error"),
    (answer(422, b'{"detail": []}'), "without an error"),
    (answer(400, b'{"error": {"message": ""}}'), "without a reason"),
    (answer(400, b'{"error": "no"}'), "without a reason"),
])
def test_what_counts_as_a_fault(response: httpx.Response, what: str) -> None:
    found = fault_of(SHOT, response)
    assert (what in found) if what else not found

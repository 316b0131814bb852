"""The page's data: every step is what the events say of that moment. The page itself is in test_page_browser.py."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from fullpipe.errors import UsageError
from fullpipe.events import Died, Emitted, Launched
from fullpipe.messages import Event, Landed
from fullpipe.trace.page import page_data, write_page
from recorded import recorded, uneven

EMBEDDED = re.compile(r'<script id="data" type="application/json">(.*?)</script>', re.DOTALL)


def embedded(path: Path) -> dict[str, Any]:
    [text] = EMBEDDED.findall(path.read_text(encoding="utf-8"))
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.fixture(scope="module", params=["fullpipe", "chain"])
def events(request: pytest.FixtureRequest) -> list[Event]:
    return recorded(request.param, accuracy=0.5, costs=uneven, requests=2)


def test_states_change_at_the_steps_of_their_events(events: list[Event]) -> None:
    data = page_data(events, {})
    times, nodes = data["times"], data["nodes"]
    place = {id: index for index, id in enumerate(nodes["id"]) if id >= 0}
    seen = {"launched": 0, "landed": 0, "died": 0}
    for event in events:
        changed = {Launched: "launched", Landed: "landed", Died: "died"}.get(type(event))
        for id in event.nodes if changed else ():  # type: ignore[attr-defined]
            if id in place:
                assert times[nodes[changed][place[id]]] == event.time
                seen[changed] += 1
    assert all(count > 30 for count in seen.values())
    for column, first in (("landed", "launched"), ("died", "launched"), ("launched", "proposed")):
        assert all(later >= earlier for later, earlier in zip(nodes[column], nodes[first]) if later >= 0)


def test_the_committed_nodes_are_the_text(events: list[Event]) -> None:
    data = page_data(events, {})
    nodes, emissions = data["nodes"], data["emissions"]
    emitted = [event for event in events if isinstance(event, Emitted)]
    assert [nodes["token"][node] for node in emissions["node"]] == [event.token for event in emitted]
    assert [data["times"][step] for step in emissions["step"]] == [event.time for event in emitted]
    assert [nodes["position"][node] for node in emissions["node"]] == [event.position for event in emitted]
    assert emissions["kind"] == [["miss", "hit", "last"].index(event.fate) for event in emitted]
    for id in (0, 1):  # each token's parent is the one before it
        path = [node for node, request in zip(emissions["node"], emissions["request"]) if request == id]
        assert [nodes["parent"][node] for node in path[1:]] == path[:-1]


def test_all_columns_are_parallel_and_point_into_them(events: list[Event]) -> None:
    data = page_data(events, {})
    size = len(data["nodes"]["id"])
    assert {len(column) for column in data["nodes"].values()} == {size}
    assert all(-1 <= parent < size for parent in data["nodes"]["parent"])
    for stays in data["stays"]:
        assert len({len(column) for column in stays.values()}) == 1
        assert all(-1 <= row < size for rows in stays["rows"] for row in rows)
        assert all(stays["prompt"][k] + len(stays["rows"][k]) for k in range(len(stays["rows"])))


def test_texts_cannot_leave_their_place(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- & \u2028 \"'"
    events = recorded(tokens=5)
    token = next(event.token for event in events if isinstance(event, Emitted))
    write_page(events, tmp_path / "p.html", tokenizer_texts={token: evil}, title=evil, clock="virtual time")
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 2 == page.count("<script") and "alert(1)<" not in page
    data = embedded(tmp_path / "p.html")
    assert data["texts"] == {str(token): evil} and (data["title"], data["clock"]) == (evil, "virtual time")


def test_it_needs_nothing_but_itself(tmp_path: Path) -> None:
    write_page(recorded(tokens=5), tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:,")', page) and "@import" not in page and "fetch(" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["p.html"]


def test_five_thousand_events_stay_small_and_quick(tmp_path: Path) -> None:
    events = recorded("fullpipe", 8, tokens=600, accuracy=0.8)
    assert len(events) > 5000
    start = time.perf_counter()
    write_page(events, tmp_path / "p.html")
    assert time.perf_counter() - start < 5  # 0.2 s, and room for a busy machine
    assert (tmp_path / "p.html").stat().st_size < 2e6


def test_what_cannot_be_shown_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "p.html"
    path.write_text("old")
    with pytest.raises(UsageError, match="shows no work"):
        write_page([], path)
    assert path.read_text() == "old"

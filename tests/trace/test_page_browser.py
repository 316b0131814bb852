"""The page in a real headless Chromium: what it shows at a step is what the events say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fullpipe.events import Died, Emitted, Finished, Launched
from fullpipe.messages import Drafted, Event, Landed, Leg
from fullpipe.trace.page import write_page
from recorded import recorded, uneven

TEXTS = {token: f" w{token}" for token in range(50)} | {7: "</b>\n<i>"}
SHOWN = {token: text.replace(" ", "·").replace("\n", "⏎") for token, text in TEXTS.items()}


class Moment:
    """What the events say of all that happened up to a time."""

    def __init__(self, events: list[Event], now: float) -> None:
        self.now = now
        self.emitted = [event for event in events if isinstance(event, Emitted) and event.time <= now]
        self.launched = {id: token for event in events if isinstance(event, Launched) and event.time <= now
                         for id, token in zip(event.nodes, event.tokens)}
        self.landed = {id for event in events if isinstance(event, Landed) and event.time <= now for id in event.nodes}
        dead = {id: event.time for event in events if isinstance(event, Died) for id in event.nodes}
        self.dead = {id for id, time in dead.items() if time <= now}
        self.dead_now = {id for id, time in dead.items() if time == now}
        self.committed = {event.node for event in self.emitted}
        self.legs = [leg for leg in _legs(events) if leg.nodes and leg.start <= now < leg.end]

    @property
    def live(self) -> set[int]:
        return set(self.launched) - self.dead - self.committed


def _legs(events: list[Event]) -> Iterator[Leg]:
    for event in events:
        if isinstance(event, Landed):
            yield from event.legs
        elif isinstance(event, Drafted):
            yield event.leg


def times_of(events: list[Event]) -> list[float]:
    kinds = (Launched, Landed, Drafted, Emitted, Died, Finished)
    return sorted({event.time for event in events if isinstance(event, kinds)})


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return recorded("fullpipe", accuracy=0.5, tokens=25, costs=uneven)


@pytest.fixture
def page(browser: Any, events: list[Event], tmp_path: Path) -> Iterator[Any]:
    write_page(events, tmp_path / "page.html", tokenizer_texts=TEXTS, title="a <b>run</b>", clock="virtual time")
    browser.get((tmp_path / "page.html").as_uri())
    yield browser
    assert browser.get_log("browser") == []


def scrub(page: Any, step: int) -> None:
    page.execute_script("const s = document.getElementById('scrubber'); s.value = arguments[0];"
                        "s.dispatchEvent(new Event('input'))", step)


def counter(page: Any, label: str) -> str:
    return str(page.execute_script("return document.querySelector(`[data-counter='${arguments[0]}']`).textContent",
                                   label))


def tree(page: Any) -> dict[int, tuple[str, str]]:
    """Node ids in the tree, with their classes and what they read."""
    rows = page.execute_script("return [...document.querySelectorAll('#tree .node')].map(n => [n.dataset.node, "
                               "n.getAttribute('class'), n.querySelector('text').textContent])")
    return {int(id): (classes, text) for id, classes, text in rows}


def station(page: Any, name: str) -> list[tuple[str, str]]:
    rows = page.execute_script("return [...document.querySelectorAll(`[data-station='${arguments[0]}'] .cell`)]"
                               ".map(c => [c.className, c.textContent])", name)
    return [(classes, text) for classes, text in rows]


@pytest.mark.parametrize("share", [0.0, 0.21, 0.5, 0.83, 1.0])
def test_a_step_shows_what_the_events_say(page: Any, events: list[Event], share: float) -> None:
    times = times_of(events)
    step = round(share * (len(times) - 1))
    scrub(page, step)
    now = Moment(events, times[step])
    assert counter(page, "step") == f"{step + 1} of {len(times)}"
    assert counter(page, "tokens") == str(len(now.emitted))
    counted = now.emitted if step < len(times) - 1 else now.emitted[:-1]
    hits = sum(event.hit for event in counted)
    assert (counter(page, "hits"), counter(page, "misses")) == (str(hits), str(len(counted) - hits))
    text = page.execute_script("return [...document.querySelectorAll('#text span:not(.hidden)')]"
                               ".map(s => s.textContent).join('')")
    assert text == "".join(TEXTS[event.token] for event in now.emitted)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.47, 0.6, 0.9])
def test_the_tree_holds_the_live_nodes_and_those_that_just_died(page: Any, events: list[Event], share: float) -> None:
    times = times_of(events)
    step = round(share * (len(times) - 1))
    scrub(page, step)
    now, shown = Moment(events, times[step]), tree(page)
    launched_now = {id for id, (classes, _) in shown.items()
                    if "proposed" not in classes and "committed" not in classes}
    root = {id for id, (classes, _) in shown.items() if "root" in classes}
    assert launched_now == (now.live | (now.dead_now & set(now.launched))) - root
    assert len(root) == 1
    for id in launched_now:
        wanted = "dead-now" if id in now.dead else "landed" if id in now.landed else "in-flight"
        assert wanted in shown[id][0], id
        assert shown[id][1] == SHOWN[now.launched[id]]
    if now.emitted:
        [(classes, text)] = [shown[id] for id in root]
        assert text == SHOWN[now.emitted[-1].token] and "committed" in classes


def test_stations_show_their_rows_alive_and_dead(page: Any, events: list[Event]) -> None:
    times, dead, busy = times_of(events), 0, 0
    for step in range(0, len(times), 5):
        scrub(page, step)
        now = Moment(events, times[step])
        for name in (f"stage {k}" for k in range(4)):
            rows = [id for leg in now.legs if leg.station == name for id in leg.nodes if id >= 0]
            cells = [cell for cell in station(page, name) if "prompt" not in cell[0]]
            assert [text for _, text in cells] == [SHOWN[now.launched[id]] for id in rows]
            assert ["dead" in classes for classes, _ in cells] == [id in now.dead for id in rows]
            busy += bool(rows)
            dead += sum(id in now.dead for id in rows)
    assert busy > 20 and dead > 0


def test_no_overlap_in_the_tree(page: Any, events: list[Event]) -> None:
    largest = 0
    for step in range(0, len(times_of(events)), 10):
        scrub(page, step)
        boxes = page.execute_script("return [...document.querySelectorAll('#tree rect')].map(r => "
                                    "['x', 'y', 'width', 'height'].map(a => Number(r.getAttribute(a))))")
        for i, (x, y, width, height) in enumerate(boxes):
            for left, top, _, _ in boxes[:i]:
                assert abs(x - left) >= width or abs(y - top) >= height
        largest = max(largest, len(boxes))
    assert largest > 12


def test_keys_buttons_and_play_move_it(page: Any, events: list[Event]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    last = len(times_of(events)) - 1
    body = page.find_element(By.TAG_NAME, "body")

    def at() -> int:
        return int(counter(page, "step").split()[0]) - 1

    for move, wanted in ((Keys.ARROW_RIGHT, 1), (Keys.ARROW_RIGHT, 2), (Keys.ARROW_LEFT, 1), (Keys.PAGE_DOWN, 11),
                         (Keys.END, last), (Keys.ARROW_RIGHT, last), (Keys.HOME, 0), (Keys.ARROW_LEFT, 0)):
        body.send_keys(move)
        assert at() == wanted
    for button, wanted in (("forward", 1), ("back", 0), ("end", last), ("first", 0)):
        page.find_element(By.ID, button).click()
        assert at() == wanted
    first_miss = next(event.time for event in events if isinstance(event, Emitted) and not event.hit)
    body.send_keys("m")
    assert at() == times_of(events).index(first_miss)
    page.find_element(By.ID, "first").click()
    page.find_element(By.ID, "play").click()
    WebDriverWait(page, 20, poll_frequency=0.05).until(lambda _: at() >= 2)
    page.find_element(By.ID, "play").click()
    assert page.find_element(By.ID, "play").text == "play"


def test_token_text_and_title_are_text(page: Any) -> None:
    from selenium.webdriver.common.by import By

    assert page.find_element(By.ID, "title").text == "a <b>run</b>" == page.title
    assert not page.execute_script("return document.querySelectorAll('#text b, #text i, #tree b, .cell i').length")


def test_several_requests_are_chosen_from(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    both = recorded(requests=2, tokens=8)
    write_page(both, tmp_path / "page.html", tokenizer_texts=TEXTS)
    browser.get((tmp_path / "page.html").as_uri())
    browser.find_element(By.ID, "end").click()
    for request in (1, 0):
        Select(browser.find_element(By.ID, "request")).select_by_value(str(request))
        said = browser.find_element(By.ID, "text").get_attribute("textContent")
        assert said == "".join(TEXTS[event.token] for event in both
                               if isinstance(event, Emitted) and event.request == request)
    assert browser.get_log("browser") == []


def test_a_step_of_a_long_run_is_drawn_at_once(browser: Any, tmp_path: Path) -> None:
    long = recorded("fullpipe", 8, tokens=600, accuracy=0.8)
    assert len(long) > 5000
    write_page(long, tmp_path / "page.html", tokenizer_texts=TEXTS)
    browser.get((tmp_path / "page.html").as_uri())
    taken = browser.execute_script(
        "const s = document.getElementById('scrubber'), begun = performance.now();"
        "for (let k = 0; k < 20; k++) { s.value = k * s.max / 20; s.dispatchEvent(new Event('input')); }"
        "return (performance.now() - begun) / 20")
    assert taken < 100  # milliseconds; 7, and room for a busy machine
    assert browser.get_log("browser") == []

"""Draft jobs in which the draft goes on by itself: the text is what it always is, slots that are lent come back, and
the draft knows of every node exactly what stands before it, whatever has happened while its answer was on the way."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from driving import TellingEngine
from fullpipe.costs import CostCurve, Machine
from fullpipe.engine.jobs import _behind, _take_chain
from fullpipe.events import Emitted, Preempted
from fullpipe.messages import Drafted, Event, Expansion, Flight, steps
from fullpipe.methods import make_method
from fullpipe.models.decoder import DecoderSlice
from fullpipe.models.weights import open_model
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.links import INSTANT, Link, Links
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.request import Request, SamplingParams
from fullpipe.sequences.sequence import Sequence
from fullpipe.sequences.tree import Node, State
from fullpipe.stations.drafts.mix import Mix
from fullpipe.stations.drafts.model import DraftModel
from fullpipe.stations.drafts.ngram import NgramDraft
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage, hash_token
from fullpipe.stations.spec import StationSpec
from fullpipe.stations.target import ModelStage

TRUTH = {"kind": "hash", "vocab": 50, "seed": 3}
STAGE = CostCurve({1: 0.020, 2: 0.023, 4: 0.029, 8: 0.044, 16: 0.084, 32: 0.165})
DRAFT = CostCurve({1: 0.012, 2: 0.013, 4: 0.016, 8: 0.024, 16: 0.044, 32: 0.082})


def plain(prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(hash_token(tokens, 50, 3))
    return tokens[len(prompt):]


def costs(station: str, rows: int, measured: float, context: int) -> float:
    return (DRAFT if station == "draft" else STAGE)(rows)


def far(num_stages: int, draft_s: float) -> Links:
    return Links([INSTANT] * (num_stages - 1), draft=Link(draft_s / 2))


class Careful(ScriptedDraft):
    """Also checks of every row that it is asked about, or computes on its own, that it knows its path.

    expected: by node, the tokens up to it, as the engine sees them when it asks.
    """

    def __init__(self, accuracy: float, seed: int = 0) -> None:
        super().__init__(TRUTH, accuracy=accuracy, coverage=min(1.0, accuracy + 0.1), seed=seed)
        self.expected: dict[int, list[int]] = {}
        self.seen: Counter[str] = Counter()

    def run(self, job: Flight) -> list[Expansion]:
        said = super().run(job)
        for part in job.parts if not job.closes else ():
            table = self._tables[part.arena]
            for row, (node, wants) in enumerate(zip(part.nodes, part.wants)):
                if wants:
                    assert table.path(part, row) == self.expected[node], f"node {node} of job {job.id}"
                    self.seen["rows"] += 1
        self.seen["alone"] += steps(said)
        return said


def path_of(sequence: Sequence, node: Node) -> list[int]:
    below: list[int] = []
    while node.parent is not None:
        below.append(node.token)
        node = node.parent
    return sequence.tokens[: node.position + 1] + below[::-1]


class Watching(InProcessPipeline):
    """Tells a careful draft what the engine asks about."""

    engine: TellingEngine
    careful: Careful

    def draft(self, job: Flight) -> None:
        for node, (sequence, asked) in self.engine._jobs.asked.items():
            self.careful.expected[node] = path_of(sequence, asked)
        # A root that is sent and not asked about has brought text up to a chain that the draft knows already.
        self.careful.seen["overtaken"] += sum(
            node >= 0 and not wants and not path
            for part in job.parts for node, wants, path in zip(part.nodes, part.wants, part.paths))
        super().draft(job)


def engine_over(careful: Careful, *, stages: int = 2, draft_s: float = 0.1, mix: bool = False,
                **options: object) -> TellingEngine:
    pipeline = Watching([ScriptedStage(k, stages, TRUTH) for k in range(stages)],
                        Mix([careful, NgramDraft()]) if mix else careful, costs=costs, links=far(stages, draft_s))
    machine = Machine(stages, STAGE, DRAFT, draft_link_s=draft_s)
    pipeline.careful = careful
    pipeline.engine = engine = TellingEngine(pipeline, make_method("fullpipe", machine=machine), **options)
    return engine


def drive(engine: TellingEngine) -> None:
    while engine.busy:
        engine.step()
        engine.check()


def test_a_draft_far_away_goes_on_by_itself_and_what_it_has_computed_is_not_computed_again() -> None:
    """Also where text has overtaken the chain: what is left of it hangs behind the root, in the slots that it has."""
    careful, found = Careful(0.97), Counter[str]()
    engine = engine_over(careful)
    sequence = engine.submit(Request(0, (4, 8, 15), SamplingParams(max_tokens=200)))
    sent: set[int] = set()
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Emitted):
                found["hits"] += event.fate == "hit"
        engine.check()
        if not sequence.finished:
            sent |= engine._jobs.asked.keys()
            found["kept"] += sum(node.in_draft and node.id not in sent for node in sequence.tree.nodes())
    assert sequence.output == plain((4, 8, 15), 200)
    assert careful.seen["alone"] > 100 and careful.seen["rows"] < careful.seen["alone"]
    assert found["hits"] > 50 and careful.seen["overtaken"] > 3 and found["kept"] > 100, found
    assert engine.figures[0].num_emitted == 200


@given(draft_s=st.sampled_from([0.03, 0.1, 0.5, 2.0]), stages=st.integers(1, 4), accuracy=st.floats(0, 1),
       seed=st.integers(0, 9), slots=st.sampled_from([None, 240, 400]), spare=st.sampled_from([2, 3, 12, 100]),
       mix=st.booleans(), tokens=st.lists(st.integers(1, 60), min_size=1, max_size=4),
       chunk=st.sampled_from([2, 64]), luck=st.integers(0, 99))
def test_whatever_happens_meanwhile_text_slots_and_paths_are_right(
        draft_s: float, stages: int, accuracy: float, seed: int, slots: int | None, spare: int, mix: bool,
        tokens: list[int], chunk: int, luck: int) -> None:
    """Requests come, end and are sent back to wait while slots are lent."""
    rng = random.Random(luck)
    engine = engine_over(Careful(accuracy, seed), stages=stages, draft_s=draft_s, mix=mix, prefill_chunk=chunk,
                         kv_cache_tokens=slots, spare_slots=spare, block_size=40)
    waiting = [Request(id, (4, 8, id), SamplingParams(max_tokens=count)) for id, count in enumerate(tokens)]
    sequences = [engine.submit(waiting.pop(0))]
    while engine.busy or waiting:
        if waiting and (rng.random() < 0.02 or not engine.busy):
            sequences.append(engine.submit(waiting.pop(0)))
        engine.step()
        engine.check()
        if rng.random() < 0.005:
            engine.end(rng.choice(sequences).request.id)
    for one in sequences:
        assert one.output == plain(one.request.prompt, len(one.output))
        assert one.finished == "abort" or len(one.output) == one.request.params.max_tokens
    engine.drain()
    assert engine.memory.used == 0


def test_who_is_sent_back_while_slots_are_lent_loses_nothing() -> None:
    """The second comes while the first has lent slots; memory runs out, and the first is the younger one."""
    sent_back: list[Event] = []
    engine = engine_over(Careful(0.9), draft_s=30.0, spare_slots=40, kv_cache_tokens=700, block_size=50)
    engine.listen(lambda event: sent_back.append(event) if isinstance(event, Preempted) else None)
    first = engine.submit(Request(0, (4, 8, 15), SamplingParams(max_tokens=400)), arrived=1.0)
    while not (first.lent and len(first.output) > 5):
        engine.step()
    older = engine.submit(Request(1, (4, 8, 16), SamplingParams(max_tokens=600)), arrived=0.0)
    lent = 0
    while engine.busy:
        engine.step()
        engine.check()
        lent += bool(first.lent) and first.request.id not in engine._scheduler.running
    assert sent_back and lent, "the case that is meant"
    assert [one.output for one in (first, older)] == [plain((4, 8, 15), 400), plain((4, 8, 16), 600)]


class Silent(ScriptedDraft):
    """Leaves every second question unanswered."""

    def run(self, job: Flight) -> list[Expansion]:
        said = super().run(job)
        return said if job.id % 2 else []


def test_slots_come_back_where_no_answer_does() -> None:
    pipeline = InProcessPipeline([ScriptedStage(k, 2, TRUTH) for k in range(2)], Silent(TRUTH), costs=costs,
                                 links=far(2, 0.1))
    engine = TellingEngine(pipeline, make_method("fullpipe", machine=Machine(2, STAGE, DRAFT, draft_link_s=0.1)))
    sequence = engine.submit(Request(0, (4, 8, 15), SamplingParams(max_tokens=80)))
    drive(engine)
    assert sequence.output == plain((4, 8, 15), 80)


# ---- the splice --------------------------------------------------------------------------------------------


@st.composite
def chains(draw: st.DrawFn) -> tuple[Expansion, list[int]]:
    """An answer as a draft that goes on gives it, and some text that may have followed."""
    said, best = Expansion(7, [], [], []), -1
    for level in range(draw(st.integers(1, 6))):
        tokens = draw(st.lists(st.integers(0, 3), min_size=0 if level else 1, max_size=3, unique=True))
        if level:
            said.computed.append(best)
        said.parents += [best] * len(tokens)
        best = len(said.tokens)
        said.tokens += tokens
        said.logprobs += sorted((draw(st.floats(-5, 0)) for _ in tokens), reverse=True)
        if not tokens:
            break
    chain = [said.tokens[index] for index in said.computed]
    text = chain[: draw(st.integers(1, max(len(chain), 1)))] if draw(st.booleans()) and chain else []
    return said, text + draw(st.lists(st.integers(0, 3), min_size=0 if text else 1, max_size=2))


def paths(said: Expansion) -> dict[tuple[int, ...], tuple[float, bool]]:
    """Every guess by the tokens that lead to it, its own last: how likely it is, and whether it was computed."""
    leading: list[tuple[int, ...]] = []
    for token, parent in zip(said.tokens, said.parents):
        leading.append((*(leading[parent] if parent >= 0 else ()), token))
    return {path: (said.logprobs[at], at in said.computed) for at, path in enumerate(leading)}


@given(chains())
def test_what_is_left_of_an_answer_is_what_it_says_behind_the_text(drawn: tuple[Expansion, list[int]]) -> None:
    said, text = drawn
    rest, count = _behind(said, text), len(text)
    expected = {path[count:]: what for path, what in paths(said).items()
                if len(path) > count and path[:count] == tuple(text)}
    assert (paths(rest) if rest else {}) == expected
    if rest:
        assert [rest.parents[index] for index in rest.computed] == [-1, *rest.computed[:-1]][: len(rest.computed)]


def commit(sequence: Sequence, token: int) -> None:
    """The root enters, lands, and says what follows."""
    root = sequence.tree.root
    if root.slot is None:
        root.slot = sequence.slots.take()
        sequence.path_slots.append(root.slot or 0)
    if root.state is State.PROPOSED:
        sequence.tree.launch(root)
    sequence.tree.land(root, token)
    sequence.advance()


@given(chains())
def test_what_is_left_stands_in_the_slots_that_it_was_computed_in(drawn: tuple[Expansion, list[int]]) -> None:
    said, text = drawn
    engine = engine_over(Careful(0.5), draft_s=0.0)
    sequence = engine.submit(Request(0, (4, 8, 15), SamplingParams(max_tokens=80)))
    engine.step()
    node, lent = sequence.tree.root, [sequence.slots.take() or 0 for _ in said.computed]
    sequence.lent = list(lent)
    before = sequence.slots.num_free + len(lent)
    for token in text:
        before -= sequence.tree.root.slot is None
        commit(sequence, token)
    _take_chain(sequence, node, said, -math.inf)
    sequence.check()
    standing, root, under = list[int](), sequence.tree.root, paths(said)
    stands = {tuple(path_of(sequence, one)[node.position + 1 :]): one.slot for one in sequence.tree.nodes()
              if one is not root and one.slot is not None}
    for slot, index in zip(lent, said.computed):
        path = tuple(said.tokens[one] for one in said.computed[: said.computed.index(index) + 1])
        if path in stands:
            assert stands[path] == slot and under[path][1]
            standing.append(slot)
    assert len(stands) == len(standing) and sequence.slots.num_free == before - len(standing)
    if stands:  # what the draft knows is not all that is committed before it
        known = sequence.draft.rows
        commit(sequence, next(child.token for child in root.children.values() if child.in_draft))
        assert sequence.draft.rows == known and not sequence.tree.root.in_draft


# ---- in processes ------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_draft_in_a_process_goes_on_at_its_pace() -> None:
    stages = [StationSpec("fullpipe.stations.scripted:ScriptedStage", {"index": k, "num_stages": 2, "truth": TRUTH})
              for k in range(2)]
    draft = StationSpec("fullpipe.stations.drafts.scripted:ScriptedDraft", {"truth": TRUTH, "accuracy": 0.9})
    pace, heard = {"stage 0": {1: 0.002}, "draft": {1: 0.002}}, list[Drafted]()
    machine = Machine(2, CostCurve({1: 0.002}), CostCurve({1: 0.002}), draft_link_s=0.02)
    with WorkersPipeline(stages, draft, links=far(2, 0.02), pace=pace) as pipeline:
        engine = TellingEngine(pipeline, make_method("fullpipe", machine=machine), listeners=[
            lambda event: heard.append(event) if isinstance(event, Drafted) else None])
        sequence = engine.submit(Request(0, (4, 8, 15), SamplingParams(max_tokens=60)))
        drive(engine)
    assert sequence.output == plain((4, 8, 15), 60)
    assert sum(steps(one.expansions) for one in heard) > 5  # dozens, where nothing else wants the processor
    assert all(one.leg.end - one.leg.start >= 0.002 * (1 + steps(one.expansions)) - 1e-6
               for one in heard if one.leg.nodes)


# ---- with models -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target, and a draft that is mostly right: the target, disturbed."""
    root, target = tmp_path_factory.mktemp("models"), tiny.tiny_model("qwen2", seed=1)
    target.model.norm.weight.data *= 8  # so that both are sure of what they say
    found, generator = {"target": tiny.save(target, root / "target")}, torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(0.002 * torch.randn(parameter.shape, generator=generator))
    return found | {"draft": tiny.save(target, root / "draft")}


def whole(folder: Path, first: int = 0, last: int = tiny.LAYERS) -> DecoderSlice:
    return DecoderSlice(open_model(folder), first, last, has_embedding=not first, has_head=last == tiny.LAYERS,
                        dtype=torch.float32)


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=40), SamplingParams(max_tokens=40, temperature=1.0,
                                                                                  seed=7, repetition_penalty=1.2)],
                         ids=["greedy", "sampled"])
@pytest.mark.parametrize("mix", [False, True], ids=["alone", "mix"])
def test_a_model_and_its_draft_say_what_the_model_says(folders: dict[str, Path], params: SamplingParams,
                                                       mix: bool) -> None:
    texts, alone = [], 0

    class Counting(DraftModel):
        def run(self, job: Flight) -> list[Expansion]:
            nonlocal alone
            said = super().run(job)
            alone += steps(said)
            return said

    for name in ("pp", "fullpipe"):
        draft = Counting(whole(folders["draft"]))
        pipeline = InProcessPipeline([ModelStage(whole(folders["target"], 0, 3), is_last=False),
                                      ModelStage(whole(folders["target"], 3), is_last=True)],
                                     Mix([draft, NgramDraft()]) if mix else draft, costs=costs, links=far(2, 0.04))
        machine = Machine(2, STAGE, DRAFT, draft_link_s=0.04) if name == "fullpipe" else None
        engine = TellingEngine(pipeline, make_method(name, machine=machine))
        sequences = [engine.submit(Request(id, (1, 17, 9, 33, id + 3), params)) for id in range(2)]
        drive(engine)
        texts.append([one.output for one in sequences])
        if name == "fullpipe":
            alone_request = engine.submit(Request(2, (1, 17, 9, 33, 3), params))
            drive(engine)
            assert alone_request.output == texts[0][0]
            assert engine.figures[2].hit_rate > 0.3
    assert texts[0] == texts[1] and alone > 30

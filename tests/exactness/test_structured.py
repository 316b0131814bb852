"""Masks are part of the target's logits: a text that is held to something is the same by every method, and is what the
slow and obvious way says: the whole path anew for every token, and a new matcher."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import structured
import tiny
from driving import TellingEngine
from fullpipe.cluster.partition import cut
from fullpipe.errors import StructureError, UsageError
from fullpipe.events import Emitted
from fullpipe.llm import LLM
from fullpipe.messages import ArenaId, Expansion, Flight, Opening, Part
from fullpipe.methods import METHODS, make_method, options_of
from fullpipe.models.decoder import DecoderSlice
from fullpipe.models.tokens import matching
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.tokens.matching import Guide
from fullpipe.models.weights import open_model
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.request import Request, SamplingParams, Structured
from fullpipe.sequences.sequence import Sequence as Running
from fullpipe.stations.base import DraftLike
from fullpipe.stations.bits import bools_of
from fullpipe.stations.drafts.mix import Mix
from fullpipe.stations.drafts.model import DraftModel
from fullpipe.stations.drafts.ngram import NgramDraft
from fullpipe.stations.sampling import RowContext, pick
from fullpipe.stations.structure import Place, Structures, Walk
from fullpipe.stations.target import ModelStage

pytest.importorskip("llguidance", reason="the extra 'structured' is not installed")

BACKEND = structured.byte_level()
END, SIZE = BACKEND.token_to_id("<|end|>"), BACKEND.get_vocab_size(with_added_tokens=True)
PROMPT = tuple(BACKEND.encode('say {"kind":"abcd","n":12,"on":true} abab').ids)
PAIRS = Structured("grammar", 'start: pair{30}\npair: /[a-m]/ ("," | ";")')
WARM: dict[str, Any] = {"temperature": 1.0, "seed": 7}
PARAMS = {
    "json": SamplingParams(max_tokens=60, structured=structured.JSON),
    "json, sampled": SamplingParams(max_tokens=60, structured=structured.JSON, top_k=20, top_p=0.95, **WARM),
    "regex, with penalties": SamplingParams(max_tokens=40, structured=structured.STRUCTURES["regex"], temperature=0.9,
                                            seed=2, repetition_penalty=1.3, frequency_penalty=0.2),
    "grammar, cut short": SamplingParams(max_tokens=12, structured=PAIRS, **WARM),
    "bad words": SamplingParams(max_tokens=24, bad_word_ids=((97,), (65, 66), (66, 65), (98, 99, 100)), **WARM),
    "allowed": SamplingParams(max_tokens=24, allowed_token_ids=(*range(64, 90), END), min_tokens=10, **WARM),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target, and a draft that is mostly right."""
    root = tmp_path_factory.mktemp("models")
    return {"target": structured.save(root / "target"), "draft": structured.save(root / "draft", noise=0.02)}


def slice_of(folder: Path, first: int, last: int, *, begins: bool, ends: bool) -> DecoderSlice:
    return DecoderSlice(open_model(folder), first, last, has_embedding=begins, has_head=ends, dtype=torch.float32)


@pytest.fixture(scope="module")
def stages(folders: dict[str, Path]) -> Callable[[int], list[ModelStage]]:
    def make(count: int) -> list[ModelStage]:
        ranges, known = cut([1.0] * tiny.LAYERS, 1.0, 0.0, count), Structures(folders["target"], SIZE)
        return [ModelStage(slice_of(folders["target"], part.start, part.stop, begins=k == 0, ends=k == count - 1),
                           is_last=k == count - 1, vocab=SIZE, structures=known) for k, part in enumerate(ranges)]

    return make


@pytest.fixture(scope="module")
def drafts(folders: dict[str, Path]) -> dict[str, Callable[[], DraftLike]]:
    known = Structures(folders["draft"], SIZE, strict=False)

    def model() -> DraftModel:
        whole = slice_of(folders["draft"], 0, tiny.LAYERS, begins=True, ends=True)
        return DraftModel(whole, vocab=SIZE, structures=known)

    return {"model": model, "ngram": lambda: NgramDraft(structures=known),
            "mix": lambda: Mix([model(), NgramDraft(min_n=2, structures=known)]),
            "unguided": lambda: Mix([NgramDraft(), NgramDraft(max_n=2)])}


@pytest.fixture(scope="module")
def guide(folders: dict[str, Path]) -> Guide:
    return Guide(load_tokenizer(folders["target"]), SIZE, [END])


@pytest.fixture(scope="module")
def truth(folders: dict[str, Path], guide: Guide) -> dict[str, list[int]]:
    """What transformers' model says with our sampler and a new matcher for every token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders["target"]).eval()
    said = {}
    for name, params in PARAMS.items():
        output: list[int] = []
        while len(output) < params.max_tokens and END not in output:
            path = torch.tensor([[*PROMPT, *output]])
            with torch.inference_mode():
                logits = model(path).logits[0, -1:]
            told = path[0].numpy()
            where = Place(len(output), 0, lambda count, output=output: output[-count:])
            walk = Walk(guide, params.structured) if params.structured else None
            row = RowContext(params, len(told), lambda told=told: (told[: len(PROMPT)], told[len(PROMPT):]), where,
                             (END,), walk)
            output = output + pick(logits, [row], limit=SIZE)[0]
        said[name] = output
    return said


def run(engine: TellingEngine, params: SamplingParams) -> tuple[list[int], float]:
    engine.submit(Request(0, PROMPT, params, frozenset({END})))
    tokens = []
    while engine.busy:
        tokens += [event.token for event in engine.step() if isinstance(event, Emitted)]
        engine.check()
    return tokens, engine.figures[0].hit_rate


def test_the_texts_are_what_was_asked_for(truth: dict[str, list[int]], folders: dict[str, Path]) -> None:
    texts = {name: load_tokenizer(folders["target"]).decode(said) for name, said in truth.items()}
    for name in ("json", "json, sampled"):
        assert set(json.loads(texts[name])) == {"kind", "n", "on"} and truth[name][-1] == END
    assert re.fullmatch(structured.STRUCTURES["regex"].text, texts["regex, with penalties"])
    assert re.fullmatch("([a-m][,;])+", texts["grammar, cut short"]) and len(truth["grammar, cut short"]) == 12
    assert 97 not in truth["bad words"]
    assert set(truth["allowed"]) <= {*range(64, 90), END} and len(truth["allowed"]) >= 10


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_text_does_not_depend_on_the_method(stages: Callable[[int], list[ModelStage]], kind: str, method: str,
                                                drafts: dict[str, Callable[[], DraftLike]],
                                                truth: dict[str, list[int]]) -> None:
    pipeline = InProcessPipeline(stages(3), drafts["model"]())
    made = make_method(method, **options_of(method, width=4))
    tokens, hit_rate = run(TellingEngine(pipeline, made, prefill_chunk=8), PARAMS[kind])
    assert tokens == truth[kind]
    assert method == "pp" or hit_rate > 0.2


@pytest.mark.parametrize("who", ["ngram", "mix", "unguided"])
def test_nor_on_who_guesses(stages: Callable[[int], list[ModelStage]], who: str, truth: dict[str, list[int]],
                            drafts: dict[str, Callable[[], DraftLike]]) -> None:
    for kind, expected in truth.items():
        engine = TellingEngine(InProcessPipeline(stages(2), drafts[who]()), make_method("fullpipe", width=6))
        assert run(engine, PARAMS[kind])[0] == expected


def said_by(engine: TellingEngine, asked: Sequence[SamplingParams]) -> dict[int, list[int]]:
    """The texts of requests that are submitted together."""
    for id, params in enumerate(asked):
        engine.submit(Request(id, PROMPT, params, frozenset({END})))
    said: dict[int, list[int]] = {}
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Emitted):
                said.setdefault(event.request, []).append(event.token)
        engine.check()
    return said


def test_nor_on_company(stages: Callable[[int], list[ModelStage]], truth: dict[str, list[int]],
                        drafts: dict[str, Callable[[], DraftLike]]) -> None:
    engine = TellingEngine(InProcessPipeline(stages(2), drafts["mix"]()), make_method("fullpipe", width=4),
                           prefill_chunk=16)
    assert said_by(engine, list(PARAMS.values())) == {id: truth[kind] for id, kind in enumerate(PARAMS)}


@pytest.mark.parametrize("kind", ["json", "regex, with penalties", "allowed"])
def test_nor_on_being_sent_back_to_wait(stages: Callable[[int], list[ModelStage]], truth: dict[str, list[int]],
                                        drafts: dict[str, Callable[[], DraftLike]], kind: str,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """What memory has no room for is computed again, and its matcher begins anew."""
    engine = TellingEngine(InProcessPipeline(stages(2), drafts["mix"]()), make_method("fullpipe", width=3))
    grow, full_at = engine.memory.grow, [3, 4, 8]

    def there_is_no_room(sequence: Running, least: int) -> bool:
        if full_at and len(sequence.output) >= full_at[0]:
            full_at.pop(0)
            return False
        return grow(sequence, least)

    monkeypatch.setattr(engine.memory, "grow", there_is_no_room)
    assert run(engine, PARAMS[kind])[0] == truth[kind]
    assert engine.stats.totals.preemptions == 3


def test_nor_on_a_new_pipeline_in_the_middle(stages: Callable[[int], list[ModelStage]], truth: dict[str, list[int]],
                                             drafts: dict[str, Callable[[], DraftLike]]) -> None:
    """What was said before is computed again there, and what stands in its place goes on from it."""
    for kind in ("json", "regex, with penalties", "allowed"):
        engine = TellingEngine(InProcessPipeline(stages(3), drafts["mix"]()), make_method("fullpipe", width=4))
        engine.submit(Request(0, PROMPT, PARAMS[kind], frozenset({END})))
        tokens, when = list[int](), [4, 5, 9]
        while engine.busy:
            tokens += [event.token for event in engine.step() if isinstance(event, Emitted)]
            if when and len(tokens) >= when[0]:
                when.pop(0)
                engine.attach(InProcessPipeline(stages(2), drafts["mix"]()))
        assert tokens == truth[kind] and not when


# ---- drafts ----------------------------------------------------------------------------------------------------------


def job(params: SamplingParams, output: list[int]) -> Flight:
    """Asks what follows an answer of which the last two tokens are not committed."""
    path, first = [*PROMPT, *output], len(PROMPT) + len(output) - 2
    count = len(path)
    slots = list(range(count))
    opening = Opening(ArenaId(0), len(PROMPT), params, ends=[END])
    rows = Part(ArenaId(0), slots[:first], [-1] * first + [1, 2], path, slots, slots,
                [[]] * first + [slots[first : at + 1] for at in range(first, count)], [False] * (count - 1) + [True])
    return Flight(0, [rows], [opening], fanout=8)


def paths(expansion: Expansion) -> list[list[int]]:
    """Every guess with those before it."""
    found: list[list[int]] = []
    for token, parent in zip(expansion.tokens, expansion.parents):
        found.append([*(found[parent] if parent >= 0 else ()), token])
    return found


@pytest.mark.parametrize("who", ["model", "ngram", "mix"])
@pytest.mark.parametrize("kind", PARAMS)
def test_drafts_guess_nothing_that_is_forbidden(drafts: dict[str, Callable[[], DraftLike]], guide: Guide, who: str,
                                                kind: str, truth: dict[str, list[int]]) -> None:
    params, said, named = PARAMS[kind], truth[kind], 0
    for count in range(2, min(len(said), 14)):
        output = said[:count]
        for expansion in drafts[who]().run(job(params, output)):
            for path in paths(expansion):
                before = [*output, *path[:-1]]
                where = Place(len(before), 0, lambda n, before=before: before[-n:])
                if params.structured:
                    bits = Walk(guide, params.structured).may_follow(where)
                    assert bits is not None and bools_of(bits)[path[-1]], (output, path)
                assert not any(len(word) <= len(before) + 1 and (*before, path[-1])[-len(word):] == word
                               for word in params.bad_word_ids)
                assert params.allowed_token_ids is None or path[-1] in params.allowed_token_ids
                assert path[-1] != END or len(before) >= params.min_tokens
                named += 1
    assert named or who == "ngram"


# ---- the front door in Python ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [None, pytest.param(2, marks=pytest.mark.processes)])
def test_a_user_gets_the_structure_that_he_asks_for(folders: dict[str, Path], stages: int | None) -> None:
    asked = SamplingParams(max_tokens=80, structured=structured.JSON)
    plain = SamplingParams(max_tokens=80, structured=Structured("choice", '["abc", "truest"]'), temperature=1.0)
    options: dict[str, Any] = {"draft": f"{folders['draft']},ngram", "dtype": "float32", "threads": 1, "stages": stages}
    with LLM(folders["target"], method="fullpipe", **options) as llm:
        said, chosen = llm.generate(["say", "choose"], [asked, plain])
        assert llm.generate("say", asked)[0].token_ids == said.token_ids, "a second request finds what was made"
    assert set(json.loads(said.text)) == {"kind", "n", "on"} and said.finish_reason == "stop"
    assert chosen.text in ("abc", "truest") and chosen.finish_reason == "stop"
    with LLM(folders["target"], method="pp", draft="none", dtype="float32", threads=1) as llm:
        assert llm.generate("say", asked)[0].token_ids == said.token_ids


@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_a_text_that_cannot_be_followed_to_its_end_is_an_error_and_no_other_one_is(
        folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, draft: str) -> None:
    monkeypatch.setitem(matching._LIMITS, "max_lexer_states", 25)
    costly = SamplingParams(max_tokens=200, temperature=1.0, structured=Structured("regex", "[a-m].{25}[n-z]"))
    with LLM(folders["target"], draft=draft, dtype="float32", threads=1) as llm:
        expected = llm.generate("say", SamplingParams(max_tokens=40))[0]
        other = llm.stream("say", SamplingParams(max_tokens=40))
        said = [*next(other).token_ids]
        for _ in range(2):
            with pytest.raises(StructureError, match="any further: it became too complex"):
                llm.generate("say", costly)
        assert [*said, *(token for chunk in other for token in chunk.token_ids)] == expected.token_ids


def test_bad_words_and_the_least_number_of_tokens(folders: dict[str, Path]) -> None:
    ends = SamplingParams(max_tokens=30, logit_bias={END: 100.0})
    with LLM(folders["target"], method="chain", draft="ngram", dtype="float32", threads=1) as llm:
        plain = llm.generate("say", SamplingParams(max_tokens=12))[0]
        word = llm.tokenizer.decode(plain.token_ids[:1])
        other = llm.generate("say", SamplingParams(max_tokens=12, bad_words=(word,)))[0]
        at_once, later = llm.generate(["say", "say"], [ends, replace(ends, min_tokens=7)])
    assert plain.token_ids[0] not in other.token_ids
    assert (len(at_once.token_ids), at_once.finish_reason) == (1, "stop")
    assert (len(later.token_ids), later.finish_reason) == (8, "stop")


def test_what_cannot_be_is_refused_before_it_runs(folders: dict[str, Path]) -> None:
    with LLM(folders["target"], method="pp", draft="none", dtype="float32", threads=1) as llm:
        for params, said in ((SamplingParams(structured=Structured("regex", "(")), "regular expression cannot"),
                             (SamplingParams(allowed_token_ids=(SIZE + 5,)), "is not in the vocabulary"),
                             (SamplingParams(allowed_token_ids=(5,), logit_bias={5: -math.inf}), "nothing to pick")):
            with pytest.raises(UsageError, match=said):
                llm.generate("say", params)

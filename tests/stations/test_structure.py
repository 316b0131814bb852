"""What may follow a path, by a matcher that walks from path to path: what a new matcher says of it."""

from __future__ import annotations

import contextlib
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

import structured
from fullpipe.errors import MissingExtra, UsageError
from fullpipe.messages import ArenaId, Opening, Part
from fullpipe.models.tokens import matching
from fullpipe.models.tokens.checking import MOST_TEXT, check_structure
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.tokens.matching import Guide
from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.request import SamplingParams, Structured
from fullpipe.stations.bits import bools_of
from fullpipe.stations.structure import CannotFollow, Place, Structures, Walk
from fullpipe.stations.table import Slots, SlotTable

pytest.importorskip("llguidance", reason="the extra 'structured' is not installed")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    structured.byte_level().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [END, STOP]}))
    return load_tokenizer(folder)


END, STOP = (structured.byte_level().token_to_id(token) for token in ("<|end|>", "<|stop|>"))
SIZE = structured.byte_level().get_vocab_size(with_added_tokens=True)


@pytest.fixture(scope="module")
def guide(tokenizer: Tokenizer) -> Guide:
    return Guide(tokenizer, SIZE, tokenizer.eos_ids)


def place(path: Sequence[int], sure: int = 0) -> Place:
    return Place(len(path), sure, lambda count: list(path[-count:]))


def fresh(guide: Guide, asked: Structured, path: Sequence[int]) -> NDArray[np.bool_] | None:
    """What may follow by a matcher that knows nothing else: a mask, or None after an impossible path."""
    return forbidden(Walk(guide, asked), place(path))


def forbidden(walk: Walk, where: Place) -> NDArray[np.bool_] | None:
    bits = walk.may_follow(where)
    return None if bits is None else ~bools_of(bits)[:SIZE]


def some_path(guide: Guide, asked: Structured, dice: random.Random, most: int) -> list[int]:
    path: list[int] = []
    for _ in range(dice.randrange(most)):
        mask = fresh(guide, asked, path)
        assert mask is not None
        free = [token for token in np.flatnonzero(~mask).tolist() if token not in (END, STOP)]
        if not free:
            break
        path.append(dice.choice(free))
    return path


@pytest.mark.parametrize("kind", structured.STRUCTURES)
def test_a_walk_says_what_a_new_matcher_says(guide: Guide, kind: str) -> None:
    """From path to path of a tree, back and forth, of which some begin with the same committed tokens."""
    asked, dice = structured.STRUCTURES[kind], random.Random(kind)
    for _ in range(4):
        trunk = some_path(guide, asked, dice, 12)
        walk = Walk(guide, asked)
        for _ in range(25):
            sure = dice.randrange(len(trunk) + 1)
            path = trunk[: dice.randrange(sure, len(trunk) + 1)]
            sure = min(sure, len(path))
            path = path + [dice.randrange(SIZE) for _ in range(dice.choice([0, 0, 1, 2]))]
            ours, theirs = forbidden(walk, place(path, sure)), fresh(guide, asked, path)
            assert (ours is None) == (theirs is None), path
            assert ours is None or theirs is None or np.array_equal(ours, theirs), path


@pytest.mark.parametrize("kind", structured.STRUCTURES)
def test_a_text_that_keeps_to_the_masks_is_what_was_asked_for(guide: Guide, tokenizer: Tokenizer, kind: str) -> None:
    asked, dice, said = structured.STRUCTURES[kind], random.Random(3), set()
    for _ in range(12):
        walk, path = Walk(guide, asked), list[int]()
        while len(path) < 400:
            mask = forbidden(walk, place(path, len(path)))
            assert mask is not None and not mask.all()
            token = dice.choice(np.flatnonzero(~mask).tolist())
            if token in (END, STOP):
                break
            path.append(token)
        else:
            assert kind == "grammar", "the others have an end"
            continue
        said.add(tokenizer.decode(path))
    check: dict[str, Callable[[str], object]] = {
        "json": lambda text: set(json.loads(text)) == {"kind", "n", "on"},
        "regex": lambda text: re.fullmatch(asked.text, text), "choice": lambda text: text in json.loads(asked.text),
        "grammar": lambda text: text.count("(") == text.count(")")}
    assert said and all(map(check[kind], said)), said


def test_all_end_tokens_may_follow_together(guide: Guide, tokenizer: Tokenizer) -> None:
    walk, text = Walk(guide, Structured("choice", '["abc", "abcd"]')), tokenizer.encode("abc")
    for path, ends in ((text[:0], False), (text, True), (tokenizer.encode("abcd"), True)):
        mask = forbidden(walk, place(path))
        assert mask is not None and [bool(mask[END]), bool(mask[STOP])] == [not ends] * 2
    assert mask is not None and (~mask).sum() == 2, "nothing else may follow what is complete"


def test_nothing_follows_an_impossible_path(guide: Guide, tokenizer: Tokenizer) -> None:
    walk = Walk(guide, Structured("choice", '["abc", "abcd"]'))
    for path in (tokenizer.encode("xy"), [*tokenizer.encode("abc"), END], [*tokenizer.encode("abcd"), END, END],
                 tokenizer.encode("abcd") + tokenizer.encode("abcd")):
        assert forbidden(walk, place(path)) is None and walk.allowed(place(path), [97]) == 0
    assert forbidden(walk, place(tokenizer.encode("abc"))) is not None, "and it goes on elsewhere"


def test_a_chain_is_allowed_up_to_what_is_forbidden(guide: Guide, tokenizer: Tokenizer) -> None:
    walk, encode = Walk(guide, Structured("regex", "[a-d]{3,8}")), tokenizer.encode
    assert walk.allowed(place(encode("abc")), encode("cdx")) == len(encode("cd"))
    assert walk.allowed(place([]), encode("abcd")) == len(encode("abcd"))
    assert walk.allowed(place(encode("ab")), [END]) == 0
    assert walk.allowed(place(encode("abcdabcd")), encode("a")) == 0
    mask, again = forbidden(walk, place(encode("ab"))), fresh(guide, Structured("regex", "[a-d]{3,8}"), encode("ab"))
    assert mask is not None and again is not None and np.array_equal(mask, again), "asking changes nothing"


def test_a_structure_that_is_none_cannot_be_followed(guide: Guide, caplog: pytest.LogCaptureFixture) -> None:
    walk = Walk(guide, Structured("grammar", "start: no_such_rule"))
    for _ in range(2):
        with pytest.raises(CannotFollow):
            walk.may_follow(place([]))
    assert len(caplog.records) == 1


COSTLY = Structured("json", json.dumps({"type": "object", "required": ["a"], "additionalProperties": False,
                                        "properties": {"a": {"type": "string", "pattern": "[a-m].{25}[n-z]"}}}))
"""Its texts need many states, and other paths many more."""


def followed(guide: Guide, asked: Structured, dice: random.Random, *, branches: int = 0) -> tuple[list[int], bool]:
    """A text as a target makes it, with looks at other paths in between; and whether it could not go on."""
    walk, path = Walk(guide, asked), list[int]()
    aside = random.Random(1)
    while len(path) < 200:
        try:
            mask = forbidden(walk, place(path, len(path)))
        except CannotFollow:
            return path, True
        assert mask is not None, "of a committed path something is always said"
        free = [token for token in np.flatnonzero(~mask).tolist() if token not in (END, STOP)]
        for _ in range(branches):
            other = [*path, *aside.choices(free or [END], k=1)]
            with contextlib.suppress(CannotFollow):
                walk.may_follow(place(other, len(path)))
        if not free:
            break
        path.append(dice.choice(free))
    return path, False


def test_where_limits_are_reached_a_text_has_no_end_and_no_other_one_suffers(
        guide: Guide, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matching._LIMITS, "max_lexer_states", 120)
    alone = [followed(guide, COSTLY, random.Random(seed)) for seed in range(4)]
    assert {stuck for _, stuck in alone} == {True}
    again = [followed(Guide(tokenizer, SIZE, tokenizer.eos_ids), COSTLY, random.Random(seed)) for seed in range(4)]
    assert again == alone, "what was asked before changes nothing"
    begun = list[int]()
    monkeypatch.setattr(Walk, "_begin", lambda walk, begin=Walk._begin: (begun.append(1), begin(walk)))
    branched = [followed(guide, COSTLY, random.Random(seed), branches=4) for seed in range(4)]
    assert branched == alone and len(begun) > 5 * 4, "nor do other paths, for which new matchers begin"


def test_a_committed_text_that_the_structure_does_not_know_is_an_error(guide: Guide, tokenizer: Tokenizer) -> None:
    walk, wrong = Walk(guide, Structured("choice", '["abc", "abcd"]')), tokenizer.encode("xy")
    assert walk.may_follow(place(wrong, 0)) is None, "in flight it may be"
    with pytest.raises(CannotFollow):
        walk.may_follow(place(wrong, len(wrong)))
    over = [*tokenizer.encode("abc"), END, *tokenizer.encode("more")]
    assert walk.may_follow(place(over, len(over))) is None, "behind the end of a structure the text is free"


def test_a_place_behind_another() -> None:
    base = place([1, 2, 3, 4], 2)
    then = base.then([5, 6])
    assert (then.length, then.sure) == (6, 2)
    assert [then.last(count) for count in (0, 1, 2, 3, 9)] == [[], [6], [5, 6], [4, 5, 6], [1, 2, 3, 4, 5, 6]]
    assert base.last(9) == [1, 2, 3, 4] and base.then([]).last(2) == [3, 4]


def test_a_row_has_its_place_by_slots() -> None:
    """Prompt 7, 8; answer 9, 10 committed, 11 and 12 not."""
    table = SlotTable(Opening(ArenaId(0), 2, SamplingParams()), Slots())
    table.apply(Part(ArenaId(0), [], [-1] * 4, [7, 8, 9, 10], [0, 1, 2, 3], [0, 1, 2, 3], [[]] * 4, [False] * 4))
    part = Part(ArenaId(0), [0, 1, 2, 3], [5, 6], [11, 12], [4, 5], [4, 5], [[4], [4, 5]], [True, True])
    table.apply(part)
    where = Place.of(table, part, 1)
    assert (where.length, where.sure, where.last(3), where.last(99)) == (4, 2, [10, 11, 12], [9, 10, 11, 12])
    assert Place.of(table, part, 0).last(2) == [10, 11]


# ---- stations --------------------------------------------------------------------------------------------------------


def opened(asked: Structured | None, ends: list[int]) -> SlotTable:
    return SlotTable(Opening(ArenaId(1), 1, SamplingParams(structured=asked), ends=ends), Slots())


def test_a_station_without_a_tokenizer(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    table = opened(structured.JSON, [END])
    hopeless = Structures().walk(table)
    assert hopeless is not None
    with pytest.raises(CannotFollow):
        hopeless.may_follow(place([]))
    for draft in (Structures(strict=False), Structures(tmp_path / "nothing", strict=False)):
        assert draft.walk(table) is None and draft.walk(opened(structured.JSON, [END])) is None
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING", "WARNING"], "told once"
    assert Structures().walk(opened(None, [])) is None


def test_each_request_has_a_walk_of_its_own(tokenizer: Tokenizer, tmp_path: Path) -> None:
    structured.byte_level().save(str(tmp_path / "tokenizer.json"))
    known = Structures(tmp_path, SIZE)
    one, other = opened(structured.JSON, [END]), opened(structured.JSON, [END])
    assert known.walk(one) is known.walk(one) is not known.walk(other)
    del one
    assert len(known._walks) == 1, "what is closed is forgotten"


# ---- the front door --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [*structured.STRUCTURES.values(), Structured("json_object"),
                                   Structured("json", '{"type": "array", "items": {"type": "number"}}'),
                                   Structured("grammar", 'root ::= "a" | "b" root'),
                                   Structured("grammar", 'start: "<x>" /a+/'),
                                   Structured("grammar", 'start: "a" <|stop|> "b"')], ids=lambda one: one.kind)
def test_structures_that_can_be(asked: Structured, tokenizer: Tokenizer) -> None:
    check_structure(asked, tokenizer)


@pytest.mark.parametrize(("asked", "said"), [
    (Structured("json", "{"), "JSON schema cannot be followed"),
    (Structured("json", "[1]"), "it is not a JSON object"),
    (Structured("json", '{"type": "wrong"}'), "JSON schema cannot be followed"),
    (Structured("json", "[" * 100_000), "JSON schema cannot be followed"),
    (Structured("regex", "(a"), "regular expression cannot be followed"),
    (Structured("choice", "[]"), "it is not a JSON list of texts"),
    (Structured("choice", '["a", 1]'), "it is not a JSON list of texts"),
    (Structured("choice", "a"), "choice cannot be followed"),
    (Structured("grammar", "start: nobody"), "grammar cannot be followed: .*nobody"),
    (Structured("grammar", "start: <|nobody|>"), "grammar cannot be followed: .*nobody"),
    (Structured("grammar", 'start: "<x>" nobody'), "grammar cannot be followed: .*nobody"),
    (Structured("regex", "a" * (MOST_TEXT + 1)), "262,144 at most"),
])
def test_structures_that_cannot_be(asked: Structured, said: str, tokenizer: Tokenizer) -> None:
    for _ in range(2):  # a fault is remembered
        with pytest.raises(UsageError, match=said) as raised:
            check_structure(asked, tokenizer)
        assert raised.value.param == "structured" and len(str(raised.value)) < 600


@pytest.mark.parametrize(("asked", "said"), [
    (Structured("grammar", "\n".join(["start: r0", *(f"r{at}: r{at + 1}" for at in range(6000)), 'r6000: "a"'])),
     "nested too deep"),
    (Structured("json", '{"type": "integer", "multipleOf": 1000003}'), "takes more than"),
    (Structured("json", json.dumps({"allOf": [{"type": "string", "pattern": f".*{word}.{{3,9}}"} for word in (
        "ab", "bc", "cd", "de", "ef", "fg", "gh", "hi", "ij", "jk", "kl", "lm", "mn", "no", "op")]})),
     "cannot be followed"),
    (Structured("json", json.dumps({"$ref": "#/$defs/d0", "$defs": {
        f"d{at}": {"properties": {"a": {"$ref": f"#/$defs/d{at + 1}"}}} for at in range(4000)} | {"d4000": {}}})),
     "nested too deep"),
])
def test_structures_that_would_take_a_process_down(asked: Structured, said: str, tokenizer: Tokenizer) -> None:
    """The next one is looked at as if nothing had happened."""
    with pytest.raises(UsageError, match=said):
        check_structure(asked, tokenizer)
    check_structure(structured.JSON, tokenizer)


class Endless:
    """A tokenizer without an end token."""

    eos_ids: frozenset[int] = frozenset()
    special: ClassVar[dict[str, int]] = {}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


def test_a_model_that_never_ends() -> None:
    with pytest.raises(UsageError, match="no end token"):
        check_structure(structured.JSON, Endless())
    with pytest.raises(UsageError, match="needs an end token"):
        Guide(Endless(), 256, [])


@pytest.fixture
def without_llguidance(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    yield


@pytest.mark.usefixtures("without_llguidance")
def test_without_the_extra_it_is_told_what_to_install(tokenizer: Tokenizer) -> None:
    with pytest.raises(MissingExtra) as raised:
        check_structure(structured.JSON, tokenizer)
    assert raised.value.hint == "pip install 'fullpipe[structured]'"


# ---- forced texts ----------------------------------------------------------------------------------------------------


def vocabulary(tokenizer: Tokenizer) -> matching._Vocabulary:
    return matching._Vocabulary(tokenizer, SIZE, tokenizer.eos_ids)


@pytest.mark.parametrize("text", ['{"kind":"ab","n":12}', " a", "été", "", "<|end|>", "x" * 40])
def test_tokens_of_a_forced_text_have_its_bytes(tokenizer: Tokenizer, text: str) -> None:
    words = vocabulary(tokenizer)
    tokens = words(text)
    assert b"".join(words.tokens[token] for token in tokens) == text.encode()
    assert not {*tokenizer.special.values()} & {*tokens}
    if "<|" not in text:
        assert tokens == tokenizer.encode(text), "and they are the model's own"


class Spaced(Endless):
    """A tokenizer that puts a space before every text, as those of sentencepiece's kind do."""

    eos_ids = frozenset({0})

    def encode(self, text: str) -> list[int]:
        return list(b" " + text.encode())


def test_a_space_that_the_tokenizer_puts_before_a_text_is_left_out() -> None:
    assert matching._Vocabulary(Spaced(), 256, {0})("ab") == list(b"ab")


def test_a_token_that_is_no_text_can_never_follow(tokenizer: Tokenizer) -> None:
    words = vocabulary(tokenizer)
    assert tokenizer.bytes_of_all(SIZE + 1) == [tokenizer.token_bytes(token) for token in range(SIZE + 1)]
    [odd] = [token for token in range(256) if tokenizer.token_bytes(token) == b"\xff"]
    assert words.tokens[odd] == b""

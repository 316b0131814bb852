"""The window on the draft station, fed by hand: it says what training showed, whatever comes in whatever order."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fullpipe.errors import UsageError
from fullpipe.messages import Expansion, Flight, Opening, Part, Tap
from fullpipe.models.spd_module import Layout
from fullpipe.request import SamplingParams
from fullpipe.stations.drafts.module import ModuleDraft
from fullpipe.stations.sampling import RowContext, rank
from fullpipe.training.objective import Fillings
from tiny_module import HIDDEN, VOCAB, Tiny, tiny

FOUR, EIGHT = ((2, 4, 6, 8),), (tuple(range(1, 9)),)
GREEDY = SamplingParams()
PROMPT = (3, 9, 4)
SIZE = 14  # a prompt, and what may be in flight at most

# Row types of their own for all depths, and shared ones: with 8 stages, depths 0 and 1, 2 and 3, ... are alike.
MODULES = {
    f"{name}, {layers} layers{', q/k norm' if qk_norm else ''}": tiny(layers, qk_norm=qk_norm, stages=stages, **more)
    for layers in (1, 2, 3) for qk_norm in (False, True)
    for name, stages, more in (("4 stages", FOUR, {}), ("8 stages", EIGHT, {}),
                               ("exit", FOUR, {"kind": "exit", "bounds": (2,)}))
} | {"biases": tiny(2, attention_bias=True), "two bounds": tiny(2, bounds=(0, 8))}
SPD, EXIT = tiny(2), tiny(2, kind="exit", bounds=(2,))
both_kinds = pytest.mark.parametrize("one", [SPD, EXIT], ids=["spd", "exit"])

Text = tuple[int, ...]


def state_of(one: Tiny, text: Text) -> Tensor:
    """What is known of a text's last token: [bounds, hidden]. It follows from the whole text, as hidden states do."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(text).encode()))
    hidden = torch.randn(len(one.config.bounds), HIDDEN, generator=generator)
    if one.config.bounds[0] == 0:
        hidden[0] = one.embedding[text[-1]]
    return hidden


def truth(one: Tiny, text: Text, in_flight: Sequence[int] = ()) -> Tensor:
    """Logits of what follows: float32 [draft vocab]. in_flight: row types of the newest tokens, newest first; all
    before them are complete."""
    types = [*in_flight, *[one.last] * len(text)][: len(text)][::-1]
    return one.logits([state_of(one, text[: end + 1]) for end in range(len(text))], types)


def check(one: Tiny, expansion: Expansion, text: Text, in_flight: Sequence[int] = ()) -> None:
    found = torch.empty(VOCAB).index_copy_(0, torch.tensor(expansion.tokens), torch.tensor(expansion.logprobs))
    torch.testing.assert_close(found, truth(one, text, in_flight).log_softmax(-1), atol=1e-5, rtol=0)
    assert expansion.parents == [-1] * VOCAB and sorted(expansion.tokens) == list(range(VOCAB))


@dataclass(frozen=True)
class Token:
    """One row. node: -1 in a prompt. path: of slots of what is not committed, its own last."""

    node: int
    text: Text
    slot: int
    path: tuple[int, ...] = ()

    def after(self, node: int, token: int, slot: int) -> Token:
        """A guess that follows it."""
        return Token(node, (*self.text, token), slot, (*self.path, slot))


@dataclass
class Hand:
    """Engine and stages, played by hand. There is a stage for each tap."""

    one: Tiny
    request: int = 0
    params: SamplingParams = GREEDY
    prompt_len: int = len(PROMPT)
    source: ModuleDraft = field(init=False)

    def __post_init__(self) -> None:
        one = self.one
        self.source = ModuleDraft(one.module, one.config, dtype=torch.float32, draft_ids=None, vocab=VOCAB,
                                embedding=one.embedding if one.config.bounds[0] == 0 else None)
        self.taps = [bound for bound in one.config.bounds if bound]
        self.flights = self.jobs = 0
        self.opens = [self.opening()]  # by the first flight

    def beside(self, request: int, **values: object) -> Hand:
        """Another request at the same station."""
        other = Hand(self.one, request, **values)  # type: ignore[arg-type]
        other.source = self.source
        return other

    def opening(self, drafts: bool = True) -> Opening:
        return Opening(self.request, self.prompt_len, self.params, drafts=drafts)

    def end(self) -> None:
        """The stages close the arena."""
        flight = Flight(self.flights, closes=[self.request])
        self.flights += 1
        self.take(*(Tap(flight, [tap, 99], torch.empty(0, 2, HIDDEN)) for tap in self.taps))

    def part(self, tokens: Sequence[Token], commits: Sequence[int] = (), asked: Sequence[Token] = ()) -> Part:
        base = 512 * (self.request % 7)  # slots are the station's, so that each request has others
        return Part(self.request, [base + slot for slot in commits], [token.node for token in tokens],
                    [token.text[-1] for token in tokens], [len(token.text) - 1 for token in tokens],
                    [base + token.slot for token in tokens], [[base + slot for slot in token.path] for token in tokens],
                    [token in asked for token in tokens])

    def flight(self, *tokens: Token) -> list[Tap]:
        """The taps that come of a flight, one from each stage. More than a module reads, as with two drafts."""
        flight = Flight(self.flights, [self.part(tokens)], self.opens)
        self.flights += 1
        self.opens = []
        hidden = torch.stack([state_of(self.one, token.text) for token in tokens])
        first = 1 if self.one.config.bounds[0] == 0 else 0
        return [Tap(flight, [tap, 99], torch.stack([hidden[:, first + stage], torch.full_like(hidden[:, 0], 7.0)], 1))
                for stage, tap in enumerate(self.taps)]

    def take(self, *taps: Tap) -> None:
        for tap in taps:
            self.source.take(tap)

    def through(self, *tokens: Token, stages: int | None = None) -> None:
        """A flight passes this many stages, or all."""
        self.take(*self.flight(*tokens)[:stages])

    def job(self, *parts: Part, opens: bool = False, closes: bool = False) -> Flight:
        return Flight(-1, list(parts), [self.opening()] if opens else [], [self.request] if closes else [], VOCAB)

    def send(self, job: Flight) -> list[Expansion]:
        """Hand a job in and have it answered."""
        job.id = self.jobs
        self.jobs += 1
        assert self.source.ready(job)
        return self.source.run(job)

    def ask(self, *asked: Token, tokens: Sequence[Token] | None = None, commits: Sequence[int] = (),
            opens: bool = False) -> list[Expansion]:
        """A job about `asked`, which it brings, or behind other `tokens`."""
        rows = [*(tokens or ()), *(token for token in asked if token not in (tokens or ()))]
        return self.send(self.job(self.part(rows, commits, asked), opens=opens))

    def begin(self, text: Text = PROMPT) -> Token:
        """Open the request; all of the prompt but its last token, the root, is through. Returns the root."""
        before = [Token(-1, text[: end + 1], end) for end in range(len(text) - 1)]
        root = Token(0, text, len(text) - 1)
        assert self.send(self.job(self.part(before), opens=True)) == []
        if before:
            self.through(*before)
        return root


def laid_out(one: Tiny, types: Sequence[int], text: Text) -> list[Token]:
    """A text in a pipeline: its first tokens are the prompt, then nodes; the newest are in flight, all of them guesses
    but the oldest, the root."""
    tokens, root = [], len(text) - max(1, len(types))
    for end in range(len(text)):
        path = tuple(range(root + 1, end + 1))
        tokens.append(Token(-1 if end < len(PROMPT) and end < root else end, text[: end + 1], end, path))
    return tokens


def depth_of(one: Tiny, kind: int) -> int:
    """Stages that a token has passed whose row is of this type."""
    return kind if one.config.bounds[0] == 0 else kind + 1


def expected(one: Tiny, text: Text, types: Sequence[int]) -> Tensor:
    """The layout for training, the text's last token as the newest: log-probabilities [vocab]."""
    features = torch.stack([state_of(one, text[: end + 1]) for end in range(len(text))])
    layout = Layout.of(types, one.last, len(text), one.config.num_layers)
    hidden, _ = one.module(layout.rows(one.module, features[None]), layout.positions(), layout.masks, layout.queries)
    return one.module.logits(hidden)[0, -1].log_softmax(-1)


@pytest.mark.parametrize("one", MODULES.values(), ids=MODULES)
def test_a_window_says_what_the_layout_for_training_says(one: Tiny) -> None:
    """The newest token, at every filling that training draws: whatever the depths of those before it are."""
    fillings = Fillings(one.config.bounds, one.config.stages)
    text = tuple(random.Random(5).choices(range(VOCAB), k=SIZE))
    for ends in one.config.stages:
        for fill in range(1, len(ends) + 1):
            for shift, lead in [*((shift, 0) for shift in range(len(ends))), (0, 1), (0, 3)]:
                types = fillings.of(ends, fill, shift, lead).types
                hand, tokens = Hand(one), laid_out(one, types, text)
                root = SIZE - max(1, len(types))
                for token, kind in zip(tokens, [*types, *[one.last] * SIZE][SIZE - 1 :: -1]):
                    hand.through(token, stages=depth_of(one, kind))
                (answer,) = hand.ask(tokens[-1], tokens=tokens, commits=range(root + 1), opens=True)
                found = torch.empty(VOCAB).index_copy_(0, torch.tensor(answer.tokens), torch.tensor(answer.logprobs))
                torch.testing.assert_close(found, expected(one, text, types), atol=1e-5, rtol=0)


@both_kinds
def test_a_run_from_the_prompt_to_a_full_pipeline_and_on(one: Tiny) -> None:
    """Tokens enter one by one, all stages move at once, the oldest is committed when it leaves: every answer is that of
    a module to which everything is new."""
    hand, stages = Hand(one), len(one.config.bounds) - (one.config.bounds[0] == 0)
    newest = hand.begin()
    flying: list[tuple[Token, list[Tap]]] = []  # oldest first, with the taps that are to come
    commits = [0, 1]
    for step in range(14):
        flying.append((newest, hand.flight(newest)))
        if one is EXIT:  # asked about what has left the first stage
            hand.take(flying[-1][1].pop(0))
        commits += [newest.slot] if step == 0 else []
        (answer,) = hand.ask(newest, commits=commits)
        commits = []
        passed = [stages - len(taps) for _, taps in flying]
        types = [count - (one is EXIT) for count in passed][::-1]
        check(one, answer, newest.text, types)
        for _, taps in flying:
            if taps:
                hand.take(taps.pop(0))
        if not flying[0][1] and len(flying) > 1:
            flying.pop(0)
            commits = [flying[0][0].slot]
        tail = [token.slot for token, _ in flying[1:]]
        newest = Token(step + 1, (*newest.text, (5 * step) % VOCAB), newest.slot + 1, (*tail, newest.slot + 1))


# ---- order -----------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("seed", range(12))
def test_the_order_in_which_taps_and_jobs_come_does_not_matter(one: Tiny, seed: int) -> None:
    """Whatever has come when an answer is computed counts. The stages have links of their own: only the flights of one
    stage keep their order."""
    shuffler, types = random.Random(seed), (0, 0, 1, 2, 3) if one is SPD else (0, 0)
    text = tuple(shuffler.choices(range(VOCAB), k=SIZE))
    tokens = laid_out(one, types, text)
    root = SIZE - len(types)
    hand, by_stage = Hand(one), [[] for _ in range(4)]
    for token, kind in zip(tokens, [*types, *[one.last] * SIZE][SIZE - 1 :: -1]):
        for stage, tap in enumerate(hand.flight(token)[: depth_of(one, kind)]):
            by_stage[stage].append(tap)
    steps: list[Tap | Flight] = []
    while any(by_stage):
        steps.append(shuffler.choice([taps for taps in by_stage if taps]).pop(0))
    cut = shuffler.randint(1, SIZE - 2)
    jobs = [hand.job(hand.part(tokens[:cut], range(min(cut, root + 1))), opens=True),
            hand.job(hand.part(tokens[cut:], range(min(cut, root + 1), root + 1), tokens[-1:]))]
    jobs[0].id, jobs[1].id = 0, 1
    first, second = sorted(shuffler.choices(range(len(steps) + 1), k=2))
    steps = [*steps[:first], jobs[0], *steps[first:second], jobs[1], *steps[second:]]
    for step in steps:
        if isinstance(step, Tap):
            hand.source.take(step)
        elif step is jobs[0]:
            assert hand.source.ready(step) and hand.source.run(step) == []
        else:
            hand.source.ready(step)  # it waits, and all that is to come comes meanwhile
    assert hand.source.ready(jobs[1])
    (answer,) = hand.source.run(jobs[1])
    check(one, answer, text, types)


def test_a_later_stages_tap_counts_once_the_earlier_one_is_there() -> None:
    hand = Hand(SPD)
    root = hand.begin()
    first, second, third, _ = hand.flight(root)
    hand.take(second, third)
    (answer,) = hand.ask(root, commits=[0, 1, 2])
    check(SPD, answer, root.text, [0])
    hand.take(first)
    (answer,) = hand.ask(root)
    check(SPD, answer, root.text, [3])


@both_kinds
def test_a_request_may_be_opened_after_its_taps(one: Tiny) -> None:
    hand = Hand(one)
    before = [Token(-1, PROMPT[: end + 1], end) for end in range(2)]
    root = Token(0, PROMPT, 2)
    hand.through(*before)
    hand.through(root, stages=1)
    (answer,) = hand.ask(root, tokens=[*before, root], commits=[0, 1, 2], opens=True)
    check(one, answer, PROMPT, [1 if one is SPD else 0])


def test_nothing_is_guessed_before_the_prompt_is_through() -> None:
    hand = Hand(SPD)
    before = [Token(-1, PROMPT[: end + 1], end) for end in range(2)]
    root = Token(0, PROMPT, 2)
    job = hand.job(hand.part([*before, root], [0, 1, 2], [root]), opens=True)
    job.id = 0
    first, second = hand.flight(before[0]), hand.flight(before[1])
    for tap in (*first, *second):
        assert not hand.source.ready(job)
        hand.take(tap)
    assert hand.source.ready(job)
    (answer,) = hand.source.run(job)
    check(SPD, answer, PROMPT, [0])


# ---- slots -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [(5, 9), (9, 5)], ids=["made later", "made earlier, launched later"])
@both_kinds
def test_a_slot_belongs_to_whom_was_launched_last(one: Tiny, ids: tuple[int, int]) -> None:
    """A node may be made long before it is launched, so a slot's later owner may have the lower id."""
    dead, alive = ids
    hand = Hand(one)
    root = hand.begin()
    hand.through(root)
    loser, winner = root.after(dead, 11, 3), root.after(alive, 12, 3)
    taps = hand.flight(loser)
    hand.take(taps[0])
    if one is SPD:
        (answer,) = hand.ask(loser, tokens=[root, loser], commits=[0, 1, 2])
        check(one, answer, loser.text, [1])
        job = hand.job(hand.part([winner], (), [winner]))
        (answer,) = hand.send(job)  # the slot has a new owner, of whom nothing is known yet
        check(one, answer, winner.text, [0])
    hand.through(winner, stages=1)
    hand.take(*taps[1:])  # the dead one was computed all the same
    (answer,) = hand.ask(winner, tokens=[root, winner], commits=[] if one is SPD else [0, 1, 2])
    check(one, answer, winner.text, [1] if one is SPD else [0])


def test_a_slot_passes_from_owner_to_owner_through_a_long_run() -> None:
    """Each token has a rival in the slot that the next one will take; rivals die, and their taps come late."""
    hand = Hand(SPD)
    token, late = hand.begin(), []
    hand.through(token, stages=2)
    (answer,) = hand.ask(token, commits=[0, 1, 2])
    check(SPD, answer, token.text, [2])
    for step in range(8):
        slot = 3 + step
        rival = token.after(100 - step, 20, slot)
        late.append(hand.flight(rival))
        hand.take(late[-1].pop(0))
        (answer,) = hand.ask(rival)
        check(SPD, answer, rival.text, [1, *([4] * step), 2][: 2 + step])
        token = Token(1 + step, (*token.text, step), slot)  # the target's word: committed at once
        hand.through(token)
        for taps in late:
            hand.take(*taps[:1])
            del taps[:1]
        (answer,) = hand.ask(token, commits=[slot])
        check(SPD, answer, token.text, [4] * (1 + step) + [2])


def test_what_dies_while_it_waits_is_not_answered_once_its_slot_is_anothers() -> None:
    hand = Hand(EXIT)
    root = hand.begin()
    hand.through(root)
    loser, winner = root.after(1, 11, 3), root.after(2, 12, 3)
    assert [one.node for one in hand.ask(root, loser, commits=[0, 1, 2])] == [0]
    hand.through(winner)
    (answer,) = hand.ask(winner)
    assert answer.node == 2
    check(EXIT, answer, winner.text)


# ---- committed tokens that were never guessed --------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("stages", [0, 2, None])
def test_tokens_that_come_as_committed_without_a_node(one: Tiny, stages: int | None) -> None:
    """What n-gram guessed and the target confirmed: a node to the stages, only a token to the draft. It is known by
    what it is and where it stands."""
    if one is EXIT and stages == 0:
        return
    hand = Hand(one)
    root = hand.begin()
    hand.through(root)
    first = Token(7, (*root.text, 6), 3)
    second = Token(8, (*first.text, 2), 4)
    third = Token(9, (*second.text, 17), 5)
    hand.through(first)
    hand.through(second, stages=stages)
    hand.through(third, stages=1)
    silent = [Token(-1, token.text, token.slot) for token in (root, first, second)]
    (answer,) = hand.ask(third, tokens=[*silent, third], commits=[0, 1, 2, 3, 4, 5])
    check(one, answer, third.text, [1, {0: 0, 2: 2, None: 4}[stages]] if one is SPD else [])


def test_another_token_in_the_slot_does_not_stand_for_it() -> None:
    hand = Hand(SPD)
    root = hand.begin()
    hand.through(root)
    hand.through(root.after(5, 11, 3))  # died
    silent = Token(-1, (*root.text, 12), 3)
    newest = Token(9, (*silent.text, 1), 4)
    (answer,) = hand.ask(newest, tokens=[root, silent, newest], commits=[0, 1, 2, 3, 4])
    check(SPD, answer, newest.text, [0, 0])


# ---- answers that come later, or never -----------------------------------------------------------------------------


def test_an_exit_module_answers_in_the_reply_to_a_later_job() -> None:
    hand = Hand(EXIT)
    root = hand.begin()
    taps = hand.flight(root)
    hand.take(taps[0])
    left, right = root.after(1, 11, 3), root.after(2, 12, 4)
    answers = hand.ask(root, left, right, commits=[0, 1, 2])
    assert [one.node for one in answers] == [0]
    check(EXIT, answers[0], root.text)
    empty = hand.job()
    empty.id = hand.jobs
    assert not hand.source.ready(empty)
    hand.through(right)
    assert hand.source.ready(empty)
    (answer,) = hand.send(empty)
    assert answer.node == 2
    check(EXIT, answer, right.text)
    hand.through(left)
    (answer,) = hand.send(hand.job())
    assert answer.node == 1
    check(EXIT, answer, left.text)
    assert hand.send(hand.job()) == []


def test_what_was_cancelled_is_not_answered() -> None:
    hand = Hand(EXIT)
    root = hand.begin()
    hand.through(root)
    left, right = root.after(1, 11, 3), root.after(2, 12, 4)
    assert len(hand.ask(root, left, right, commits=[0, 1, 2])) == 1
    hand.source.forget([1, 77])
    hand.through(left, right)
    assert [one.node for one in hand.send(hand.job())] == [2]
    job = hand.job(hand.part([root.after(3, 13, 5)], (), [root.after(3, 13, 5)]))
    job.id = hand.jobs
    assert not hand.source.ready(job)
    hand.source.forget([3])
    assert hand.source.ready(job) and hand.source.run(job) == []


def test_asking_again_is_answered_again_and_deeper() -> None:
    hand = Hand(SPD)
    root = hand.begin()
    leaf = root.after(1, 11, 3)
    taps = [hand.flight(root), hand.flight(leaf)]
    (answer,) = hand.ask(leaf, tokens=[root, leaf], commits=[0, 1, 2])
    check(SPD, answer, leaf.text, [0, 0])
    hand.take(*taps[0][:2], taps[1][0])
    (answer,) = hand.ask(leaf)
    check(SPD, answer, leaf.text, [1, 2])
    (deep, shallow) = hand.ask(leaf, root)
    check(SPD, deep, leaf.text, [1, 2])
    check(SPD, shallow, root.text, [2])


# ---- trees -------------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("seed", range(4))
def test_leaves_of_a_tree_are_answered_as_if_each_were_alone(one: Tiny, seed: int) -> None:
    shuffler, hand = random.Random(seed), Hand(one)
    root = hand.begin()
    stages = len(hand.taps)
    tree, depth = [root], {root.node: stages - 1 if one is SPD else 1}
    for node in range(1, 12):
        parent = shuffler.choice(tree)
        child = parent.after(node, shuffler.randrange(VOCAB), 2 + node)
        depth[node] = shuffler.randint(0 if one is SPD else 1, depth[parent.node])
        tree.append(child)
    for token in tree:
        hand.through(token, stages=depth[token.node])
    for answer, token in zip(hand.ask(*tree, commits=[0, 1, 2]), tree, strict=True):
        assert answer.node == token.node
        path = [other for other in tree if token.text[: len(other.text)] == other.text and other.slot in
                (root.slot, *token.path)]
        types = [depth[other.node] - (one is EXIT) for other in reversed(path)]
        check(one, answer, token.text, types)


# ---- rows that are kept --------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("length", [1, 2, 257, 300, 600])
def test_rows_of_a_prompt_are_kept_a_part_at_a_time(one: Tiny, length: int) -> None:
    text = tuple(random.Random(length).choices(range(VOCAB), k=length))
    hand = Hand(one, prompt_len=length)
    root = hand.begin(text)
    hand.through(root, stages=1)
    types = [1] if one is SPD else []
    (answer,) = hand.ask(root, commits=range(length))
    found = torch.empty(VOCAB).index_copy_(0, torch.tensor(answer.tokens), torch.tensor(answer.logprobs))
    torch.testing.assert_close(found, expected(one, text, types), atol=1e-5, rtol=0)
    follower = Token(1, (*text, 5), length)
    hand.through(follower, stages=1)
    (answer,) = hand.ask(follower, commits=[length])
    found = torch.empty(VOCAB).index_copy_(0, torch.tensor(answer.tokens), torch.tensor(answer.logprobs))
    torch.testing.assert_close(found, expected(one, follower.text, [1, 1] if one is SPD else []), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("length", "cut"), [(40, False), (41, True), (300, True)])
def test_a_row_sees_no_further_back_than_a_training_text_is_long(length: int, cut: bool) -> None:
    text = tuple(random.Random(0).choices(range(VOCAB), k=length))
    answers = []
    for span in (40, 1024):
        hand = Hand(tiny(1, train_span=span), prompt_len=length)
        root = hand.begin(text)
        hand.through(root, stages=1)
        (answer,) = hand.ask(root, commits=range(length))
        answers.append((answer.tokens, answer.logprobs))
    assert (answers[0] != answers[1]) == cut


def test_a_question_about_what_has_been_kept_takes_the_rows_after_it_back() -> None:
    hand = Hand(SPD)
    tokens = [hand.begin()]
    hand.through(tokens[0])
    for node in range(1, 8):
        tokens.append(Token(node, (*tokens[-1].text, 3 * node % VOCAB), 2 + node))
        hand.through(tokens[-1])
    (answer,) = hand.ask(tokens[-1], tokens=tokens, commits=range(10))
    check(SPD, answer, tokens[-1].text)
    for asked in ([tokens[2]], [tokens[6], tokens[1]], [tokens[0]], [tokens[7]]):
        for answer, token in zip(hand.ask(*asked), asked, strict=True):
            check(SPD, answer, token.text)
    newest = Token(20, (*tokens[-1].text, 1), 10)
    (answer,) = hand.ask(newest, commits=[10])
    check(SPD, answer, newest.text, [0])


# ---- several requests ----------------------------------------------------------------------------------------------


def test_requests_of_one_job_do_not_see_each_other() -> None:
    hand = Hand(SPD)
    other = hand.beside(1)
    text = (8, 8, 2, 19, 1)
    first, hand.jobs = hand.begin(), 1
    other.jobs, other.flights, other.prompt_len = 1, hand.flights, len(text)
    second = other.begin(text)
    hand.jobs, hand.flights = other.jobs, other.flights
    hand.take(*hand.flight(first)[:3])
    hand.flights, other.flights = hand.flights, hand.flights
    other.take(*other.flight(second)[:1])
    job = hand.job(hand.part([first], [0, 1, 2], [first]), other.part([second], range(5), [second]))
    one, two = hand.send(job)
    check(SPD, one, first.text, [3])
    check(SPD, two, second.text, [1])


ORDERS = [(5, 3), (2**40, 7), (3, 2**40, 5, 4)]


def _one_more(hand: Hand, arena: int, *, early: bool, slow: bool = False) -> Hand:
    """A request in this arena, of whose root stage 0 has told. early: the taps come before the job that opens it.
    slow: those of the last stage come only at the end."""
    other = hand.beside(arena)
    other.jobs, other.flights = hand.jobs, hand.flights
    before = [Token(-1, PROMPT[: end + 1], end) for end in range(2)]
    root = Token(arena, PROMPT, 2)
    opening = other.job(other.part(before), opens=True)
    taps = other.flight(*before)
    if not early:
        assert other.send(opening) == []
    other.take(*taps[: -1 if slow else None])
    other.through(root, stages=1)
    if early:
        assert other.send(opening) == []
    other.take(*taps[-1 if slow else len(taps) :])
    (answer,) = other.ask(root, commits=[0, 1, 2])
    assert answer.node == arena
    check(SPD, answer, PROMPT, [1])
    hand.jobs, hand.flights = other.jobs, other.flights
    return other


@pytest.mark.parametrize("arenas", ORDERS, ids=str)
@pytest.mark.parametrize(("early", "slow"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("keep", [False, True], ids=["one after another", "at once"])
def test_the_numbers_of_arenas_say_nothing_about_order(arenas: tuple[int, ...], early: bool, slow: bool,
                                                       keep: bool) -> None:
    """Priorities open them out of order, and a preempted request comes back with one that is higher than what comes
    after it. All are answered, and nothing is left of them."""
    hand, running = Hand(SPD), []
    for arena in arenas:
        running.append(_one_more(hand, arena, early=early, slow=slow))
        if not keep:
            _finish(hand, running.pop(), stages_first=early)
    for number, other in enumerate(running):
        _finish(hand, other, stages_first=bool(number % 2))
    assert not hand.source._arenas


def _finish(hand: Hand, other: Hand, *, stages_first: bool) -> None:
    other.jobs, other.flights = hand.jobs, hand.flights
    if stages_first:
        other.end()
    assert other.send(other.job(closes=True)) == []
    if not stages_first:
        other.end()
    hand.jobs, hand.flights = other.jobs, other.flights


def test_a_request_that_is_over_leaves_nothing_and_holds_nobody_up() -> None:
    hand = Hand(SPD)
    root = hand.begin()
    hand.through(root, stages=1)
    late = hand.flight(root.after(1, 11, 3))
    assert hand.send(hand.job(closes=True)) == []
    hand.take(*late)
    hand.end()
    assert not hand.source._arenas
    other = hand.beside(1)
    other.jobs, other.flights = hand.jobs, hand.flights
    root = other.begin()
    (answer,) = other.ask(root, commits=[0, 1, 2])
    check(SPD, answer, root.text, [0])


def test_a_request_whose_method_asks_for_no_drafts_leaves_nothing() -> None:
    hand = Hand(SPD)
    hand.opens = [hand.opening(drafts=False)]
    hand.through(Token(-1, PROMPT[:1], 0))
    hand.through(Token(-1, PROMPT[:2], 1))
    assert not hand.source._arenas
    hand.end()
    assert not hand.source._arenas and not hand.source._undrafted


@pytest.mark.parametrize("first", [0, 1, 2, 3, 4])
def test_a_request_that_ends_before_the_draft_was_asked_leaves_nothing(first: int) -> None:
    """The draft is told of its end all the same, before or after so many stages have told of its beginning and end."""
    hand = Hand(SPD)
    taps = hand.flight(Token(-1, PROMPT[:1], 0))
    taps[0].flight.closes = [0]
    hand.take(*taps[:first])
    assert hand.send(hand.job(closes=True)) == []
    hand.take(*taps[first:])
    assert not hand.source._arenas


def test_a_request_may_be_over_before_the_job_that_opens_it_comes() -> None:
    """A short answer, and a slow way to the draft: what the job asks is no longer wanted, and must not wait for hidden
    states that were thrown away."""
    hand = Hand(SPD)
    root = Token(0, PROMPT[:2], 1)
    taps = hand.flight(Token(-1, PROMPT[:1], 0), root)
    taps[-1].flight.closes = [0]
    hand.take(*taps)
    assert hand.send(hand.job(hand.part([Token(-1, PROMPT[:1], 0), root], [0, 1], [root]), opens=True)) == []
    assert hand.send(hand.job(closes=True)) == []
    assert not hand.source._arenas


@pytest.mark.parametrize("first", [0, 2, 4])
def test_a_request_that_ends_before_the_stages_have_opened_it_leaves_nothing(first: int) -> None:
    """Some stages tell of its end before the job that opens it comes, others after the job that closes it."""
    hand = Hand(SPD)
    ends = [Tap(Flight(0, closes=[0]), [tap, 99], torch.empty(0, 2, HIDDEN)) for tap in hand.taps]
    hand.take(*ends[:first])
    assert hand.send(hand.job(hand.part([Token(-1, PROMPT[:1], 0)]), opens=True)) == []
    assert hand.send(hand.job(closes=True)) == []
    hand.take(*ends[first:])
    assert not hand.source._arenas


def test_what_a_job_asks_of_a_request_that_ends_meanwhile_is_not_waited_for() -> None:
    hand = Hand(EXIT)
    root = hand.begin()
    job = hand.job(hand.part([root], [0, 1, 2], [root]))
    job.id = hand.jobs
    assert not hand.source.ready(job)
    hand.source.take(Tap(Flight(9, closes=[0]), hand.taps, torch.empty(0, 1, HIDDEN)))
    assert hand.source.ready(job) and hand.source.run(job) == []


# ---- what is done with the logits ----------------------------------------------------------------------------------


def test_guesses_share_the_requests_sampling() -> None:
    params = SamplingParams(temperature=0.7, seed=5, top_k=12, repetition_penalty=1.3, presence_penalty=0.4,
                            frequency_penalty=0.2, logit_bias={4: 1.0})
    hand = Hand(SPD, params=params)
    root = hand.begin()
    leaf = root.after(1, 11, 3).after(2, 11, 4)
    middle = root.after(1, 11, 3)
    (answer,) = hand.ask(leaf, tokens=[root, middle, leaf], commits=[0, 1, 2])
    text = torch.tensor(leaf.text).numpy()
    (tokens,), (logprobs,) = rank(truth(SPD, leaf.text, [0, 0, 0])[None],
                                  [RowContext(params, 5, lambda: (text[:3], text[3:]))], VOCAB)
    assert answer.tokens == tokens
    wanted = dict(zip(tokens, logprobs))
    assert answer.logprobs == pytest.approx([wanted[token] for token in answer.tokens], abs=1e-4)


def test_tokens_outside_the_draft_vocabulary_are_impossible() -> None:
    one, ids = tiny(1, shared_head=False, draft_vocab_size=4), [2, 3, 11, 23]
    hand = Hand(one)
    hand.source = ModuleDraft(one.module, one.config, dtype=torch.float32, embedding=one.embedding,
                            draft_ids=torch.tensor(ids), vocab=VOCAB)
    root = hand.begin()
    (answer,) = hand.ask(root, commits=[0, 1, 2])
    assert sorted(answer.tokens) == ids
    wanted = dict(zip(ids, truth(one, root.text, [0]).log_softmax(-1).tolist()))
    assert answer.logprobs == pytest.approx([wanted[token] for token in answer.tokens], abs=1e-5)


def test_taps_of_slots_that_nobody_has_named_may_come_before_the_job() -> None:
    hand = Hand(SPD)
    newest = hand.begin()
    for step in range(8):
        taps, early = hand.flight(newest), step % 2 == 1
        taps[0].flight.opens = []
        if early:
            hand.take(*taps)
        (answer,) = hand.send(hand.job(hand.part([newest], [newest.slot] if step else [0, 1, newest.slot], [newest])))
        check(SPD, answer, newest.text, [] if early else [0])
        if not early:
            hand.take(*taps)
        newest = Token(step + 1, (*newest.text, 5 * step % VOCAB), 200 * (step + 1))


def test_a_request_cannot_begin_with_rows_of_another() -> None:
    hand = Hand(SPD)
    hand.begin()
    job = hand.beside(1).job(opens=True)
    job.id, job.opens[0].path = 7, [0, 1]
    with pytest.raises(UsageError, match="cannot begin with rows of another"):
        hand.source.ready(job)

"""The text of each request, asked alone and among the others: a server over stage processes must say the same.

    python bench/serving/alone.py [--model smollm2-135m] [--draft ngram] [--requests 17] [--max-tokens 64] [--rounds 2]
        [--dtypes fp32 bf16] [--prompts FILE ...] [--out alone.json] [--serve-options "..."]

For each dtype `fullpipe serve` (2 stage processes, dynamic batching) is asked every prompt alone, then all at once, in
another order each round; a second server with `--method pp` and no draft is asked each alone. Every fourth request is
sampled with a seed of its own, the others are greedy. The first answers, alone, are what all later ones are held
against, token for token; the server keeps what it has computed, so later ones also begin with rows that others left.

In fp32 every difference is a failure. In bf16 one is a near-tie where `fullpipe verify` would call it one: of the first
two tokens that differ, each stands above the other in its own run by no more than `cli/verify.py:NEAR_TIE`, noise
included. Exits with 1 after a failure, also where not all requests ran at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
from _receipt import receipt
from serving.servers import CONTENDERS, MODEL_NAME, Running, Setup, grown, running

from fullpipe.bench.datasets import bundled, read_all
from fullpipe.cli.console import print_table
from fullpipe.cli.verify import NEAR_TIE
from fullpipe.errors import FullpipeError, StationFailed, UsageError
from fullpipe.hub import resolve
from fullpipe.models.tokenizer import Tokenizer
from fullpipe.prompts import FilePrompt
from fullpipe.stations.noise import gumbel

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_TOLD = 20  # top_logprobs: OpenAI's most
_LIMIT_S = 600.0  # for one answer
_POLL_S = 0.05
_SAMPLED = 4  # every so many requests one is sampled, at these temperatures in turn
_HEATS = (0.7, 1.0)


def main(arguments: list[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    try:
        prompts = spread(read_all(asked.prompts) if asked.prompts else bundled(), asked.requests)
        if asked.rounds < 1 or not asked.dtypes:
            raise UsageError("there must be a round and a dtype")
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        runs = [run for dtype in asked.dtypes for run in measure(dtype, questions(prompts), asked)]
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except FullpipeError as error:
        sys.exit(f"error: {error}")
    failures = show(runs)
    value = receipt("serving_alone", {"failures": failures, "runs": [run.figures() for run in runs]},
                    [run.sample() for run in runs])
    asked.out.write_text(json.dumps(value, indent=1) + "\n")
    say(f"wrote {asked.out}")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="catalogue name, GGUF file, or transformers folder")
    parser.add_argument("--draft", default="ngram", help="as `fullpipe serve` takes it")
    parser.add_argument("--requests", type=int, default=17)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--prompts", type=Path, nargs="+", help="JSON lines; default: the bundled ones")
    parser.add_argument("--out", type=Path, default=Path("alone.json"), help="the receipt; logs come beside it")
    parser.add_argument("--serve-options", type=shlex.split, default=[], help="more options for `fullpipe serve`")
    return parser


# ---- what is asked ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    temperature: float = 0.0
    seed: int = 0

    def body(self, max_tokens: int) -> dict[str, Any]:
        return {"model": MODEL_NAME, "messages": [{"role": "user", "content": self.text}], "max_tokens": max_tokens,
                "temperature": self.temperature, "seed": self.seed, "logprobs": True, "top_logprobs": _TOLD}


def spread(prompts: Sequence[FilePrompt], count: int) -> list[FilePrompt]:
    """The first `count`, taking one of each category in turn. Raises UsageError when there are fewer."""
    if not 2 <= count <= len(prompts):
        raise UsageError(f"{count} requests cannot be made of {len(prompts)} prompts",
                         hint="Ask for two or more, and for no more than there are prompts.")
    seen: Counter[str] = Counter()
    turns = []
    for prompt in prompts:
        turns.append(seen[prompt.category])
        seen[prompt.category] += 1
    return [prompt for _, prompt in sorted(zip(turns, prompts), key=lambda pair: pair[0])][:count]


def questions(prompts: Sequence[FilePrompt]) -> list[Question]:
    """Greedy ones, and each fourth sampled."""
    made = []
    for place, prompt in enumerate(prompts):
        turn, rest = divmod(place, _SAMPLED)
        sampled = rest == _SAMPLED - 1
        made.append(Question(prompt.id, prompt.text, temperature=_HEATS[turn % len(_HEATS)] if sampled else 0.0,
                             seed=1000 + place if sampled else 0))
    return made


# ---- what is said ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """One answer. told: for each token the log-probabilities that came with it, by token id, its own among them;
    probabilities are of the model's logits as they are, before temperature and noise."""

    tokens: list[int]
    told: list[dict[int, float]]
    text: str
    finish: str
    prompt_tokens: int
    cached: int

    def margin(self, index: int, rival: int, asked: Question) -> float:
        """By how much the logit of the token at `index`, noise included, stands above the rival's; inf where the
        rival is not among the likeliest that were told."""
        token, told = self.tokens[index], self.told[index]
        if rival not in told:
            return math.inf
        noise = 0.0
        if asked.temperature:
            drawn = gumbel(asked.seed, self.prompt_tokens + index, max(token, rival) + 1)
            noise = asked.temperature * float(drawn[token] - drawn[rival])
        return told[token] - told[rival] + noise


class Words:
    """Token ids of what the API spells as bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._ids: dict[bytes, list[int]] = {}
        for token in tokenizer.tokens:
            self._ids.setdefault(tokenizer.token_bytes(token), []).append(token)

    def __call__(self, entry: Mapping[str, Any]) -> int:
        ids = self._ids[bytes(entry["bytes"])]
        if len(ids) > 1:
            raise UsageError(f"tokens {ids} are all spelled {entry['token']!r}, so that they cannot be told apart")
        return ids[0]


def read_answer(value: Mapping[str, Any], word: Callable[[Mapping[str, Any]], int]) -> Said:
    """Of the JSON of a chat completion. Raises StationFailed for one without a log-probability for each token."""
    choice, usage = value["choices"][0], value["usage"]
    content = choice["logprobs"]["content"]
    if len(content) != usage["completion_tokens"]:
        raise StationFailed("server", f"it told {len(content)} log-probabilities of "
                                      f"{usage['completion_tokens']} tokens")
    return Said([word(one) for one in content],
                [{word(entry): entry["logprob"] for entry in (*one["top_logprobs"], one)} for one in content],
                choice["message"]["content"], choice["finish_reason"], usage["prompt_tokens"],
                usage["prompt_tokens_details"]["cached_tokens"])


# ---- asking ----------------------------------------------------------------------------------------------


@dataclass
class Run:
    """All questions asked of one server in one way. at_once: most that ran at a time, as the server says; counters:
    what its counters grew by. reference: of each question, what it is held against; its own answers if it is the
    first."""

    dtype: str
    how: str
    questions: list[Question]
    expected_at_once: int
    said: dict[str, Said] = field(default_factory=dict)
    reference: Mapping[str, Said] = field(default_factory=dict)
    at_once: int = 0
    counters: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_reference(self) -> bool:
        return self.reference is self.said

    def differences(self) -> Iterator[Difference]:
        for asked in self.questions:
            found = first_difference(asked, self.said[asked.id], self.reference[asked.id], NEAR_TIE[DTYPES[self.dtype]])
            if found is not None:
                yield found if self.dtype != "fp32" else found.as_failure()

    def figures(self) -> dict[str, Any]:
        found = list(self.differences())
        near = sum(one.near_tie for one in found)
        flights, rows = (self._count(name) for name in ("flights", "launched_rows"))
        changed, largest = logprob_changes(self)
        return {"dtype": self.dtype, "run": self.how, "reference": self.is_reference, "requests": len(self.questions),
                "tokens": sum(len(one.tokens) for one in self.said.values()),
                "equal": len(self.questions) - len(found), "near_ties": near, "different": len(found) - near,
                "differences": [asdict(one) for one in found], "at_once": self.at_once,
                "all_at_once": self.at_once == self.expected_at_once,
                "hits": int(self._count("hits")), "rows_a_flight": rows / flights if flights else 0.0,
                "cached_prompt_tokens": sum(one.cached for one in self.said.values()),
                "logprobs_changed": changed, "largest_logprob_change": largest, "seconds": self.seconds}

    def sample(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "run": self.how, "counters": dict(self.counters), "answers": [
            {**asdict(asked), "tokens": " ".join(map(str, said.tokens)), "finish": said.finish,
             "prompt_tokens": said.prompt_tokens, "cached": said.cached}
            for asked in self.questions for said in (self.said[asked.id],)]}

    def _count(self, name: str) -> float:
        return self.counters.get(f"fullpipe_{name}_total", 0.0)


def measure(dtype: str, asked: list[Question], options: argparse.Namespace) -> list[Run]:
    """Every run of one dtype, all held against the first."""
    path = resolve(options.model)
    setup = Setup(path, options.draft, DTYPES[dtype], options.max_model_len, len(asked),
                  ("--log-level", "warning", *options.serve_options))
    word = Words(Tokenizer.load(path))
    runs: list[Run] = []
    with running(CONTENDERS["dynamic"], setup, _log(options.out, dtype, "dynamic")) as server:
        for number in range(1, options.rounds + 1):
            here = reordered(asked, number)
            runs.append(_run(server, dtype, f"alone, round {number}", here, one_after_another, word, options))
            runs.append(_run(server, dtype, f"among {len(asked) - 1}, round {number}", here[::-1], all_at_once, word,
                             options))
    with running(CONTENDERS["pp"], setup, _log(options.out, dtype, "pp")) as server:
        runs.append(_run(server, dtype, "alone, pp", asked, one_after_another, word, options))
    for run in runs:
        run.reference = runs[0].said
    return runs


def _log(out: Path, dtype: str, name: str) -> Path:
    return out.with_name(f"{out.stem}-{dtype}-{name}.log")


def reordered(asked: list[Question], number: int) -> list[Question]:
    """As they stand in round 1, shuffled in later ones; the same on every run."""
    return asked if number == 1 else random.Random(number).sample(asked, len(asked))


Ask = Callable[[Question], Awaitable[Said]]
Order = Callable[[Ask, Sequence[Question]], Awaitable[dict[str, Said]]]


async def one_after_another(ask: Ask, asked: Sequence[Question]) -> dict[str, Said]:
    return {one.id: await ask(one) for one in asked}


async def all_at_once(ask: Ask, asked: Sequence[Question]) -> dict[str, Said]:
    return dict(zip((one.id for one in asked), await asyncio.gather(*map(ask, asked))))


def _run(server: Running, dtype: str, how: str, asked: list[Question], order: Order,
         word: Callable[[Mapping[str, Any]], int], options: argparse.Namespace) -> Run:
    run = Run(dtype, how, asked, 1 if order is one_after_another else len(asked))
    counters, begun = server.counters(), time.monotonic()
    run.said, run.at_once = asyncio.run(_ask_all(server.url, asked, order, word, options.max_tokens))
    run.seconds, run.counters = time.monotonic() - begun, grown(counters, server.counters())
    say(f"{dtype}, {how}: {run.seconds:.1f} s, {run.at_once} at once")
    return run


async def _ask_all(url: str, asked: list[Question], order: Order, word: Callable[[Mapping[str, Any]], int],
                   max_tokens: int) -> tuple[dict[str, Said], int]:
    """The answers, and how many ran at a time at most."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=_LIMIT_S, limits=limits, trust_env=False) as client:
        async def ask(one: Question) -> Said:
            try:
                response = await client.post("/v1/chat/completions", json=one.body(max_tokens))
            except httpx.HTTPError as error:
                raise StationFailed("server", f"{one.id}: {type(error).__name__} {error}") from error
            if response.status_code != 200:
                raise StationFailed("server", f"{one.id}: status {response.status_code}: {response.text[:300]}")
            return read_answer(response.json(), word)

        seen: Counter[int] = Counter()
        watch = asyncio.create_task(_watch(client, seen))
        try:
            return await order(ask, asked), max(seen, default=0)
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch


async def _watch(client: httpx.AsyncClient, seen: Counter[int]) -> None:
    """Look again and again how many requests run. A look that fails is none."""
    while True:
        with suppress(httpx.HTTPError, ValueError, LookupError):
            seen[(await client.get("/ready")).json()["running"]] += 1
        await asyncio.sleep(_POLL_S)


# ---- comparing -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The first token at which an answer left the reference's; both -1 where only length, end or text differ.
    margins: how far each stood above the other in its own run, None where that cannot be told."""

    question: str
    index: int
    token: int
    reference: int
    margin: float | None
    reference_margin: float | None
    near_tie: bool

    def as_failure(self) -> Difference:
        return Difference(self.question, self.index, self.token, self.reference, self.margin, self.reference_margin,
                          near_tie=False)


def first_difference(asked: Question, said: Said, reference: Said, near: float) -> Difference | None:
    """None when they are the same. Past it both are right about different texts, so nothing is compared there."""
    for index, (token, wanted) in enumerate(zip(said.tokens, reference.tokens)):
        if token != wanted:
            own, theirs = said.margin(index, wanted, asked), reference.margin(index, token, asked)
            return Difference(asked.id, index, token, wanted, _finite(own), _finite(theirs),
                              near_tie=max(own, theirs) <= near)
    if (said.tokens, said.text, said.finish) != (reference.tokens, reference.text, reference.finish):
        return Difference(asked.id, min(len(said.tokens), len(reference.tokens)), -1, -1, None, None, near_tie=False)
    return None


def logprob_changes(run: Run) -> tuple[int, float]:
    """At how many tokens a log-probability is another than the reference's, in any bit, and the largest change; up to
    the first token that differs. It is no failure: it tells how near rounding comes."""
    changed, largest = 0, 0.0
    for asked in run.questions:
        said, reference = run.said[asked.id], run.reference[asked.id]
        for token, wanted, here, there in zip(said.tokens, reference.tokens, said.told, reference.told):
            change = max((abs(here[id] - there[id]) for id in here.keys() & there.keys()), default=0.0)
            changed += change > 0
            largest = max(largest, change)
            if token != wanted:
                break
    return changed, largest


def _finite(margin: float) -> float | None:
    return margin if math.isfinite(margin) else None


# ---- telling ---------------------------------------------------------------------------------------------


def show(runs: Sequence[Run]) -> list[str]:
    """Print the tables; what failed."""
    figures = [run.figures() for run in runs]
    print_table(["dtype", "run", "requests", "tokens", "equal", "near-ties", "different", "most at once",
                 "rows a flight", "hits", "cached", "log-probs changed", "by at most", "seconds"],
                [_row(one) for one in figures])
    failures = []
    for one in figures:
        if not one["all_at_once"]:
            failures.append(f"{one['dtype']}, {one['run']}: at most {one['at_once']} requests ran at a time")
        for difference in one["differences"]:
            print(line := f"{one['dtype']}, {one['run']}: {_told(difference)}")
            if not difference["near_tie"]:
                failures.append(line)
    print("\n".join(("FAILED:", *failures)) if failures else "no text differs" if all(
        not one["differences"] for one in figures) else "no text differs but at near-ties")
    return failures


def _row(one: dict[str, Any]) -> list[str]:
    verdict = [""] * 3 if one["reference"] else [str(one[name]) for name in ("equal", "near_ties", "different")]
    changed = ["", ""] if one["reference"] else [str(one["logprobs_changed"]), f"{one['largest_logprob_change']:.1e}"]
    return [one["dtype"], one["run"], str(one["requests"]), str(one["tokens"]), *verdict, str(one["at_once"]),
            f"{one['rows_a_flight']:.1f}", str(one["hits"]), str(one["cached_prompt_tokens"]), *changed,
            f"{one['seconds']:.1f}"]


def _told(one: dict[str, Any]) -> str:
    where = f"{'near-tie' if one['near_tie'] else 'DIFFERENT'}: {one['question']}, token {one['index']}: "
    if one["token"] == one["reference"]:
        return where + "the same tokens, but another length, end or text"
    return where + " against ".join(
        f"{token} ({'margin unknown' if margin is None else f'margin {margin:.4f}'})"
        for token, margin in ((one["token"], one["margin"]), (one["reference"], one["reference_margin"])))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers must be ended on the way out
    sys.exit(main())

"""Two states of our server side by side, and requests with a structure beside the same ones without.

    python -m fullpipe_lab.studies.serving.two_states --before CHECKOUT [--model MODEL] [--draft DRAFT] [--levels 1 8]
        [--prompts N] [--rounds 4] [--max-tokens 64] [--log FILE] [--write NAME]

CHECKOUT is a folder with another commit, its kernels built. Both servers run all the time, on two stages with the
weights as they are stored, and one is asked while the other waits; who begins changes from round to round. `now` and
`before` get plain requests; on this state's server `anything` gets the same ones with a regular expression that every
text fits, so that only the mask is between them, and `schema` has to answer in JSON. All get the same prompts, of which
no caches are kept. A ratio is the median over prompts of one time between tokens over the other, of the
same prompt in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

from fullpipe.errors import FullpipeError
from fullpipe.hub import resolve
from fullpipe.prompts import bundled
from fullpipe.server.load import LoadResult, Traffic, distinct, run_load, take
from fullpipe.server.openai_stream import Server
from fullpipe_lab.ending import run
from fullpipe_lab.receipts import STUDIES, save_receipt, study_receipt
from fullpipe_lab.studies.serving.servers import MODEL_NAME, Contender, Running, Setup, running
from fullpipe_lab.studies.serving.under_load import say

_SCHEMA = {"type": "object", "additionalProperties": False, "required": ["title", "answer"], "properties": {
    "title": {"type": "string"}, "answer": {"type": "string"}}}
ASKED: dict[str, dict[str, Any]] = {
    "now": {}, "before": {}, "anything": {"structured_outputs": {"regex": r"(.|\n)*"}},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": _SCHEMA}}}}
"""Who is asked, and the fields beside those that all get."""


def main() -> None:
    given = _parser().parse_args()
    file = resolve(given.model)
    setup = Setup(file, given.draft, "auto", 1024, max(given.levels), file=file)
    options = ("--draft", given.draft, "--stages", "2", "--no-enable-prefix-caching", "--log-level", "warning")
    now = Contender("now", "this state", options, stored=True)
    before = Contender("before", "the other", options, {"PYTHONPATH": str(_source_of(given.before))}, stored=True)
    with running(now, setup, given.log) as ours, running(before, setup, given.log) as other:
        samples = _measure({name: other if name == "before" else ours for name in ASKED}, given)
    results = {"before": _commit_of(given.before), "model": given.model, "draft": given.draft,
               "rows": [row(samples, level, name, than) for level in given.levels
                        for name, than in (("now", "before"), ("anything", "now"), ("schema", "now"))]}
    for one in results["rows"]:
        say(str(one))
    if given.write:
        save_receipt(study_receipt(given.write, results, samples), STUDIES / f"{given.write}.json")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--draft", default="auto", help="as `fullpipe serve` takes it")
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 8], help="requests at once")
    parser.add_argument("--prompts", type=int, help="of each level; default: two for each request, eight at least")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--log", type=Path, default=Path("two-states.log"), help="what the servers say")
    parser.add_argument("--write", metavar="NAME", help="keep the receipt in lab/receipts")
    return parser


def _source_of(checkout: Path) -> Path:
    if not (source := checkout.absolute() / "src").joinpath("fullpipe").is_dir():
        raise FullpipeError(f"{checkout} is no checkout of Fullpipe", hint="Make one with `git worktree add`.")
    return source


def _commit_of(checkout: Path) -> str:
    return subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True,
                          check=True).stdout.strip()


def _measure(servers: dict[str, Running], given: argparse.Namespace) -> list[dict[str, Any]]:
    samples = []
    for name in servers:
        _load(servers[name], name, 1, "warm", given)
    for round_, level in product(range(given.rounds), given.levels):
        for name in list(servers)[:: -1 if round_ % 2 else 1]:
            load = _load(servers[name], name, level, f"{round_}.{level}", given)
            if failures := load.summary().failures:
                raise FullpipeError(f"{name} failed at {level} at once: {failures}", hint=f"See {given.log}.")
            say(f"round {round_ + 1}, {level} at once: {name} {_tbt_ms(load):.1f} ms between tokens")
            samples.append({"who": name, "round": round_, "level": level, "load": load.to_dict()})
    return samples


def _load(server: Running, name: str, level: int, tag: str, given: argparse.Namespace) -> LoadResult:
    prompts = distinct(take(bundled(), given.prompts or max(8, 2 * level)), tag)
    traffic = Traffic(level, max_tokens=given.max_tokens, extra=ASKED[name])
    return run_load(Server(server.url, MODEL_NAME), prompts, traffic)


def _tbt_ms(load: LoadResult) -> float:
    spread = load.summary().tbt_s
    return 1e3 * spread.median if spread else 0.0


# ---- what is made of it ----------------------------------------------------------------------------------


def row(samples: list[dict[str, Any]], level: int, name: str, than: str) -> dict[str, Any]:
    """Milliseconds between tokens of one and of the other, and their ratio; of how many answers the texts are equal."""
    ones, others = _answers(samples, level, name), _answers(samples, level, than)
    both = [key for key in ones if key in others]
    ratios = [ones[key][0] / others[key][0] for key in both]
    return {"level": level, "who": name, "than": than,
            "tbt_ms": round(1e3 * statistics.median(one for one, _ in ones.values()), 2),
            "than_tbt_ms": round(1e3 * statistics.median(one for one, _ in others.values()), 2),
            "ratio": round(statistics.median(ratios), 3), "answers": len(both),
            "same_text": sum(ones[key][1] == others[key][1] for key in both)}


def _answers(samples: list[dict[str, Any]], level: int, name: str) -> dict[tuple[int, int], tuple[float, str]]:
    """By round and place: seconds between tokens, and the text."""
    return {(one["round"], answer.index): (answer.tbt_s, answer.text)
            for one in samples if (one["who"], one["level"]) == (name, level)
            for answer in LoadResult.from_dict(one["load"]).whole if answer.tbt_s}


if __name__ == "__main__":
    run(main)

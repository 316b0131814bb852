"""Fullpipe's server and vLLM's CPU server through the OpenAI API: one machine, one run, the wall clock.

    python -m fullpipe_lab.studies.serving.against_vllm [--model smollm2-135m] [--draft ngram] [--levels 1 4 8 16]
        [--rounds 3] [--contenders fullpipe-stored fullpipe-native fullpipe pp vllm] [--max-tokens 64]
        [--out serving-out] [--quick] [--write] [--report-only] [--serve-options "..."]

Both have the same weights, on the same cores, and are asked the same prompts by the same load generator
(`fullpipe.server.load`), which is this process. vLLM reads them in --dtype from a folder that is written from the GGUF
file; `fullpipe` and `pp` read that folder too and compute in it with torch, `fullpipe-native` with our kernels.
`fullpipe-stored` and `pp-stored` read the GGUF file itself and compute with its weights as they are. Each server runs
alone, and in each round each one is started once; every other round goes through them backwards. Every prompt begins
with a number of its own, so that no server finds what it has computed before; the same numbers in all rounds and for
all, so that texts can be compared.

A level that is done is in --out/journal.jsonl when the next begins: a run that is killed goes on where it was. At the
end --out has receipt.json and report.md; with --write they also become lab/receipts/serving_vllm.json and
lab/reports/serving/report.md.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fullpipe.cluster.provenance import provenance
from fullpipe.errors import FullpipeError, StationFailed, UsageError
from fullpipe.prompts import FilePrompt, bundled, read_prompts
from fullpipe.server.load import LoadResult, Spread, Traffic, distinct, run_load, take
from fullpipe.server.openai_stream import Server
from fullpipe_lab.files import Journal
from fullpipe_lab.receipts import HERE, STUDIES, save_receipt
from fullpipe_lab.report import render
from fullpipe_lab.studies.serving.figures import Level, levels_of, same_texts
from fullpipe_lab.studies.serving.servers import (
    CONTENDERS,
    MODEL_NAME,
    Running,
    Setup,
    gguf_of,
    grown,
    machine_notes,
    missing,
    running,
    shared_folder,
)

RECEIPT = STUDIES / "serving_vllm.json"
REPORT = STUDIES.parent / "reports" / "serving" / "report.md"


def main(arguments: list[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    if asked.quick:
        asked.levels, asked.rounds, asked.max_tokens = [1, 4], 1, 16
    try:
        if not asked.report_only:
            measure(asked)
        conclude(asked.out, write=asked.write)
    except KeyboardInterrupt:
        sys.exit("interrupted; the levels that are done are kept, and the same command goes on")
    except FullpipeError as error:
        sys.exit(f"error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="catalogue name, GGUF file, or transformers folder")
    parser.add_argument("--draft", default="ngram", help="as `fullpipe serve` takes it")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 4, 8, 16], help="requests at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", help=", ".join(CONTENDERS),
                        default=["fullpipe-stored", "fullpipe-native", "fullpipe", "pp", "vllm"])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--prompts", type=Path, help="JSON lines; default: the bundled ones")
    parser.add_argument("--out", type=Path, default=Path("serving-out"))
    parser.add_argument("--serve-options", type=shlex.split, default=[], help="more options for `fullpipe serve`")
    parser.add_argument("--quick", action="store_true", help="1 and 4 at once, one round, 16 tokens")
    parser.add_argument("--write", action="store_true", help="keep receipt and report in lab/")
    parser.add_argument("--report-only", action="store_true", help="make receipt and report of what is in --out")
    return parser


# ---- measuring -------------------------------------------------------------------------------------------


def measure(asked: argparse.Namespace) -> None:
    """Everything that the journal lacks. A server that fails is noted and left out; the others go on."""
    if lacking := missing(asked.contenders):
        raise UsageError(lacking)
    journal = Journal(asked.out / "journal.jsonl")
    prompts = read_prompts(asked.prompts) if asked.prompts else bundled()
    _bind(journal, asked, prompts)
    setup = Setup(shared_folder(asked.model, asked.dtype, (asked.out / "weights").absolute()), asked.draft, asked.dtype,
                  asked.max_model_len, max(asked.levels), tuple(asked.serve_options),
                  gguf_of(asked.model, asked.contenders))
    for round_ in range(asked.rounds):
        for name in asked.contenders[:: -1 if round_ % 2 else 1]:
            levels = [level for level in asked.levels if key_of(round_, name, level) not in journal]
            if levels:
                _round(journal, name, round_, levels, prompts, setup, asked)


def key_of(round_: int, name: str, level: int) -> str:
    return f"{round_}/{name}/{level}"


def _bind(journal: Journal, asked: argparse.Namespace, prompts: list[FilePrompt]) -> None:
    """A journal is of one plan. Raises UsageError when this one is of another."""
    digest = hashlib.sha256("\0".join(prompt.text for prompt in prompts).encode()).hexdigest()[:16]
    plan = {"model": asked.model, "draft": asked.draft, "dtype": asked.dtype, "max_tokens": asked.max_tokens,
            "max_model_len": asked.max_model_len, "max_num_seqs": max(asked.levels), "prompts": digest,
            "serve_options": asked.serve_options}
    journal.bind(plan, **machine_notes())


def _round(journal: Journal, name: str, round_: int, levels: list[int], prompts: list[FilePrompt], setup: Setup,
           asked: argparse.Namespace) -> None:
    about = provenance(HERE)
    say(f"round {round_ + 1}: starting {name}")
    try:
        with running(CONTENDERS[name], setup, asked.out / f"{name}.log") as server:
            journal.add(f"run/{round_}/{name}/{about['date']}", about | {
                "contender": name, "round": round_, "load_s": server.load_s, "server": server.command,
                "version_served": server.version(), "environment": dict(server.contender.environment)})
            _load(server, distinct(take(prompts, max(levels)), "warm"), Traffic(max(levels), max_tokens=16))
            for level in levels:
                row = _level(server, level, prompts, asked.max_tokens)
                journal.add(key_of(round_, name, level), {"contender": name, "round": round_, "level": level, **row})
    except FullpipeError as error:
        reason = error.reason if isinstance(error, StationFailed) else error.message
        journal.add(f"failed/{round_}/{name}/{about['date']}", {"contender": name, "round": round_, "reason": reason})
        say(f"{name} failed: {reason}")


def _level(server: Running, level: int, prompts: list[FilePrompt], max_tokens: int) -> dict[str, Any]:
    """The load, and what the server's counters and processors did in the meantime."""
    chosen = distinct(take(prompts, requests_at(level)), f"{level}")
    counters, cpu = server.counters(), server.cpu()
    result = _load(server, chosen, Traffic(level, max_tokens=max_tokens))
    row = {"load": result.to_dict(), "counters": grown(counters, server.counters()), "cpu": grown(cpu, server.cpu())}
    summary = result.summary()
    tbt = f", {1e3 * summary.tbt_s.median:.1f} ms between tokens" if summary.tbt_s else ""
    say(f"    {server.contender.name}, {level} at once: {summary.tokens_per_s:.1f} tokens/s{tbt}"
        + (f"; FAILED {summary.failures}" if summary.failed else ""))
    return row


def requests_at(level: int) -> int:
    """Two for each place, so that ends and beginnings overlap; some more where there are few places."""
    return max(8, 2 * level)


def _load(server: Running, prompts: list[FilePrompt], traffic: Traffic) -> LoadResult:
    return run_load(Server(server.url, MODEL_NAME), prompts, traffic)


# ---- what is made of it ----------------------------------------------------------------------------------


def conclude(out: Path, *, write: bool) -> None:
    receipt = make_receipt(Journal(out / "journal.jsonl"))
    text = report_of(receipt)
    for path, report in ((out / "receipt.json", out / "report.md"), *([(RECEIPT, REPORT)] if write else [])):
        save_receipt(receipt, path)
        report.write_text(text)
    print(text)


def make_receipt(journal: Journal) -> dict[str, Any]:
    """The receipt of what there is; the command, commit and machine are those of the first run, `runs` has each.

    Raises UsageError for a journal without a level.
    """
    rows = {key: {name: value for name, value in row.items() if name != "key"} for key, row in journal.rows.items()}
    cells = [row for row in rows.values() if "load" in row]
    runs = [row for key, row in rows.items() if key.startswith("run/")]
    if not cells:
        raise UsageError(f"{journal.path} has no level yet", hint="Measure first; a server's log says why it failed.")
    about = {name: runs[0][name] for name in ("command", "commit", "dirty", "date", "versions", "machine")}
    return {"benchmark": "serving_vllm", **about, "clock": "wall", "plan": rows["plan"], "runs": runs,
            "failed": [row for key, row in rows.items() if key.startswith("failed/")],
            "cells": sorted(cells, key=lambda cell: (cell["level"], cell["contender"], cell["round"]))}


def report_of(receipt: dict[str, Any]) -> str:
    """The report, from its receipt and nothing else."""
    levels = levels_of(receipt)
    names = [name for name in CONTENDERS if any(contender == name for _, contender in levels)]
    pairs = [(one, other) for one in names for other in names if CONTENDERS[one].ours and not CONTENDERS[other].ours]

    def table(cell: Callable[[Level], str], ratio: Callable[[Level, Level], float | None]) -> list[list[str]]:
        rows = []
        for level in sorted({level for level, _ in levels}):
            here = {name: levels[level, name] for name in names if (level, name) in levels}
            rows.append([str(level), *(cell(here[name]) if name in here else "" for name in names),
                         *(f"**{value:.2f}**" if one in here and other in here
                           and (value := ratio(here[one], here[other])) else "" for one, other in pairs)])
        return rows

    return render("serving.md.j2", receipt=receipt, names=names, pairs=pairs, table=table, same=same_texts(levels),
                  titles={name: CONTENDERS[name].title for name in names}, tells=_TELLS,
                  rounds=1 + max(cell["round"] for cell in receipt["cells"]))


_TELLS: dict[str, Callable[..., Any]] = {
    "rate": lambda one: f"{one.tokens_per_s:.1f} ({min(one.rates):.1f} to {max(one.rates):.1f})",
    "rate_ratio": lambda one, other: one.tokens_per_s / other.tokens_per_s,
    "tbt": lambda one: _spread(one.tbt), "ttft": lambda one: _spread(one.ttft),
    "tbt_ratio": lambda one, other: other.tbt.median / one.tbt.median if one.tbt and other.tbt else None,
    "ttft_ratio": lambda one, other: other.ttft.median / one.ttft.median if one.ttft and other.ttft else None,
    "cpu": lambda one: f"{1e3 * one.cpu_per_token:.2f}",
    "cpu_ratio": lambda one, other: other.cpu_per_token / one.cpu_per_token if one.cpu_per_token else None,
}


def _spread(spread: Spread | None) -> str:
    return " / ".join(f"{1e3 * value:.1f}" for value in (spread.median, spread.p90, spread.p99)) if spread else ""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers must be ended on the way out
    main()

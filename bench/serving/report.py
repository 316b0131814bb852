"""The report of the comparison of servers, from its receipt and nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from serving.figures import Level, agreement, blame, levels_of, parts_of, steady
from serving.servers import CONTENDERS

from fullpipe.bench.load import Spread

Levels = dict[tuple[int, str], Level]


def report_of(receipt: dict[str, Any]) -> str:
    levels = levels_of(receipt)
    names = list(dict.fromkeys(name for name in CONTENDERS if any(key[1] == name for key in levels)))
    sections = [_head(receipt, names), _throughput(levels, names), _times(levels, names), _blame(levels, names),
                _processors(levels, names), _texts(levels, names), _notes(receipt)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(receipt: dict[str, Any], names: Sequence[str]) -> str:
    plan, machine = receipt["plan"], receipt["machine"]
    rounds = 1 + max(cell["round"] for cell in receipt["cells"])
    versions = {run["contender"]: run["version_served"] for run in receipt["runs"]}
    kinds = "\n".join(f"- `{name}`: {CONTENDERS[name].title} (version {versions.get(name, 'unknown')})"
                      for name in names)
    return (f"# Fullpipe's server and vLLM's, side by side\n\n"
            f"Wall clock, one machine ({machine['cpu']}, {machine['cores']} cores), one run of {rounds} "
            f"round{'s' * (rounds > 1)}, {receipt['date'][:10]}, commit `{receipt['commit'][:12]}`"
            f"{' with changes' * receipt['dirty']}. {plan['model']} in {plan['dtype']}, the same files for all; "
            f"greedy, at most {plan['max_tokens']} tokens an answer; draft: {plan['draft']}. Each server ran alone, "
            f"asked by one load generator through `/v1/chat/completions`, streaming.\n\n{kinds}")


# ---- the tables ------------------------------------------------------------------------------------------


def _throughput(levels: Levels, names: Sequence[str]) -> str:
    pairs = _pairs(names)
    head = ["at once", *(f"`{name}`" for name in names), *(f"`{one}` / `{other}`" for one, other in pairs)]
    rows = []
    for level in _numbers(levels):
        rates = {name: levels[level, name] for name in names if (level, name) in levels}
        cells = [f"{rates[name].tokens_per_s:.1f} ({min(rates[name].rates):.1f} to {max(rates[name].rates):.1f})"
                 if name in rates else "" for name in names]
        ratios = [_ratio(rates[one].tokens_per_s, rates[other].tokens_per_s) if one in rates and other in rates else ""
                  for one, other in pairs]
        rows.append([str(level), *cells, *ratios])
    return ("## Throughput\n\nOutput tokens per second, median over the rounds (lowest to highest). Ratios above 1: "
            "ours is faster.\n\n" + _table(head, rows))


def _times(levels: Levels, names: Sequence[str]) -> str:
    """The ratios are turned round, so that above 1 is ours everywhere."""
    sections = []
    for title, what in (("Time between tokens", "tbt"), ("Time to the first token", "ttft")):
        pairs = _pairs(names)
        head = ["at once", *(f"`{name}`" for name in names), *(f"`{other}` / `{one}`" for one, other in pairs)]
        rows = []
        for level in _numbers(levels):
            found: dict[str, Spread | None] = {name: getattr(levels[level, name], what) for name in names
                                               if (level, name) in levels}
            ratios = [_ratio(theirs.median, ours.median) if ours and theirs else ""
                      for ours, theirs in ((found.get(one), found.get(other)) for one, other in pairs)]
            rows.append([str(level), *(_spread(found.get(name)) for name in names), *ratios])
        sections.append(f"## {title}\n\nMilliseconds: median / p90 / p99 over all answers of all rounds. Ratios of "
                        f"medians; above 1: ours is faster.\n\n" + _table(head, rows))
    return "\n\n".join(sections)


def _blame(levels: Levels, names: Sequence[str]) -> str:
    ours = [name for name in names if CONTENDERS[name].ours]
    seen = [(level, name) for level in _numbers(levels) for name in ours if (level, name) in levels]
    rows = [[str(level), f"`{name}`", *_where(levels[level, name]), *_verdict(levels, level, name, names)]
            for level, name in seen if levels[level, name].token_s is not None]
    head = ["at once", "server", "time per token", "busiest stage: useful", "wasted", "waiting", "other stages",
            "draft", "engine", "rows a flight", "hit rate", "against vLLM"]
    return ("## Where a token's time goes\n\nMilliseconds per output token, all requests together, of our servers' own "
            "counters (`/metrics`, before and after each level). The busiest stage's three parts add up to the whole; "
            "the others work beside it. Work is timed by the wall clock: when more processes have work than there are "
            "cores, each one's work takes longer. The last column names the part that, added to those before it, "
            "exceeds all that vLLM takes.\n\n" + _table(head, rows)) if rows else ""


def _where(one: Level) -> list[str]:
    parts, whole = parts_of(one), one.token_s or 0.0
    if parts is None:
        return [f"{1e3 * whole:.2f}", *[""] * 8]
    busy = one.per_token("stage_busy_seconds") or {}
    flights, rows = one.per_token("flights"), one.per_token("launched_rows")
    hits, misses = (sum((one.per_token(name) or {}).values()) for name in ("hits", "misses"))
    return [*(f"{1e3 * value:.2f}" for value in (whole, parts.useful, parts.wasted, parts.waiting)),
            ", ".join(f"{1e3 * value:.2f}" for station, value in sorted(busy.items()) if station != parts.station),
            *(f"{1e3 * sum((one.per_token(name) or {}).values()):.2f}" for name in ("draft_seconds", "engine_seconds")),
            f"{rows[''] / flights['']:.1f}" if rows and flights else "",
            f"{hits / (hits + misses):.0%}" if hits + misses else ""]


def _verdict(levels: Levels, level: int, name: str, names: Sequence[str]) -> list[str]:
    """Against the better of vLLM's settings."""
    theirs = [levels[level, other] for other in names if not CONTENDERS[other].ours and (level, other) in levels]
    return [blame(levels[level, name], max(theirs, key=lambda one: one.tokens_per_s)) if theirs else ""]


def _processors(levels: Levels, names: Sequence[str]) -> str:
    rows = []
    for level in _numbers(levels):
        for name in names:
            if (one := levels.get((level, name))) is not None and (spent := one.cpu_per_token()):
                told = ", ".join(f"{label} {1e3 * value:.2f}" for label, value in spent.items())
                rows.append([str(level), f"`{name}`", f"{1e3 * sum(spent.values()):.2f}", told,
                             f"{one.cores_busy:.2f}"])
    return ("## Processor time\n\nMilliseconds of processor time per output token, by process, as the system counts "
            "it; threads that wait by spinning count, too.\n\n"
            + _table(["at once", "server", "all", "by process", "cores kept busy by the server"], rows))


def _texts(levels: Levels, names: Sequence[str]) -> str:
    rows = []
    for level in _numbers(levels):
        here = [levels[level, name] for name in names if (level, name) in levels]
        for place, one in enumerate(here):
            several, same = steady(one)
            again = f"{same} of {several} the same in every round" if several else ""
            for other in here[place + 1 :]:
                found = agreement(one, other)
                rows.append([str(level), f"`{one.contender}`, `{other.contender}`",
                             f"{found.same_text} of {found.compared}", f"{found.same_prompt} of {found.compared}",
                             again])
                again = ""
            if again:
                rows.append([str(level), f"`{one.contender}`", "", "", again])
    if not rows:
        return ""
    return ("## Texts\n\nGreedy answers to the same prompts. In bfloat16 a near-tie may be decided either way by "
            "another order of summing, and the texts part from there.\n\n"
            + _table(["at once", "servers", "same text", "same number of prompt tokens", "the first one's again"],
                     rows))


def _notes(receipt: dict[str, Any]) -> str:
    failed = "".join(f"- round {row['round'] + 1}, `{row['contender']}` failed: {row['reason']}\n"
                     for row in receipt["failed"])
    broken = [cell for cell in receipt["cells"] if cell["load"]["summary"]["failed"]]
    failed += "".join(f"- round {cell['round'] + 1}, `{cell['contender']}` at {cell['level']}: failed requests: "
                      f"{cell['load']['summary']['failures']}\n" for cell in broken)
    commands = {run["contender"]: run for run in receipt["runs"]}
    told = "".join(f"- `{name}`: `{_environment(run)}{shlex.join(run['server'])}`, ready after {run['load_s']:.0f} s\n"
                   for name, run in commands.items())
    return ("## How it was measured\n\n"
            f"`{receipt['command']}`\n\n{told}\n"
            "Tokens are counted by each server's `usage`; times are taken where chunks arrive, and a chunk may bring "
            "several tokens. TBT is each answer's time from first to last chunk over its tokens less one. The load "
            "generator runs on the same cores; its processor time is in the table above. Prefix caches are as each "
            "server has them by default; no prompt is asked twice in a server's life, so that only the chat "
            "template's beginning can be found in one."
            + (f"\n\nWhat failed:\n\n{failed}" if failed else "")).rstrip()


# ---- small things ----------------------------------------------------------------------------------------


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each of ours over each of vLLM's; and dynamic batching over `pp`."""
    pairs = [(one, other) for one in names for other in names
             if CONTENDERS[one].ours and not CONTENDERS[other].ours]
    return pairs + ([("dynamic", "pp")] if {"dynamic", "pp"} <= set(names) else [])


def _numbers(levels: Levels) -> list[int]:
    return sorted({level for level, _ in levels})


def _ratio(one: float, other: float) -> str:
    return f"**{one / other:.2f}**" if other else ""


def _spread(spread: Spread | None) -> str:
    return " / ".join(f"{1e3 * value:.1f}" for value in (spread.median, spread.p90, spread.p99)) if spread else ""


def _environment(run: dict[str, Any]) -> str:
    return "".join(f"{key}={value} " for key, value in run["environment"].items())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

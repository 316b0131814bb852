"""From a receipt to a report: one HTML file that opens without a network, Markdown, and the figures. No torch.

Whoever reads it must be able to tell what was measured from what was imagined: every figure of time names its clock,
and every cluster whether its device times are modelled or measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from fullpipe.bench import figures
from fullpipe.bench.chapter import Chapter
from fullpipe.bench.claims import CLAIMS, Claim
from fullpipe.bench.document import (
    Block,
    Bullets,
    Cell,
    Document,
    Folded,
    Grid,
    Heading,
    Prose,
    Tile,
    Tiles,
    Verbatim,
    to_html,
    to_markdown,
)
from fullpipe.bench.metrics import ALL, PLAIN, Estimate, Results, Summary
from fullpipe.bench.receipt import ClusterInfo, Receipt, Sample, write_whole
from fullpipe.bench.wording import LABELS, OURS, free_grid, interval, many, number, setting, show
from fullpipe.errors import UsageError

_ALLOWANCE = 1.02  # `fullpipe` may be this much slower than the best other method and still count as even

_REPLAYED = ("The samples are replays of recorded texts: every method says the recorded text by construction, so there "
             "is nothing to compare.")
_UNCHECKED = " Whether it would say so with the stages computing was not checked in this run."


def write_report(receipt: Receipt, folder: str | Path) -> list[Path]:
    """Write report.html, report.md and figures/*.svg into `folder`; returns what was written, the page first.

    Everything is made before anything is written. Raises MissingExtra without matplotlib, and UsageError for samples
    that cannot be compared and for a folder that cannot be written.
    """
    figures.require_plots()
    document = make_report(receipt)
    texts = {"report.html": to_html(document), "report.md": to_markdown(document)}
    texts |= {f"figures/{one.name}.svg": _standalone(one.svg) for one in document.pictures()}
    folder = Path(folder)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror}",
                         hint="Name a folder that can be made and written.") from error
    for name, text in texts.items():
        write_whole(folder / name, text)
    return [folder / name for name in texts]


def _standalone(svg: str) -> str:
    """Outside the page nothing gives a background, and a viewer's may be dark."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + svg.replace("<svg ", '<svg style="background:#fff" ', 1) + "\n"


def make_report(receipt: Receipt) -> Document:
    """The report as data. Raises as `write_report` does."""
    results = Results(receipt)
    chapters = [Chapter(results, cluster, f"c{index}") for index, cluster in enumerate(results.clusters)]
    return Document("Fullpipe benchmark", [
        *_headline(results), *_comparisons(results), *(block for one in chapters for block in one.blocks()),
        *_exactness(results), *_free("Other programs", "From a run of its own (`fullpipe bench --peers`), by the wall "
                                     "clock: all programs on the same prompts and the same machine. It is not the run "
                                     "of the figures above; each row names its date and commit.", receipt.peers),
        *_free("Virtual time and the wall clock", "From a run of its own (`fullpipe bench --agreement`): what the "
               "virtual clock predicts, beside what real processes took on the same machine. Each row names its date "
               "and commit.", receipt.agreement),
        *_origin(receipt, results.clock), *_samples(receipt, results.clock),
    ])


# ---- what is said first ----------------------------------------------------------------------------------


def _headline(results: Results) -> list[Block]:
    receipt, samples = results.receipt, [one for group in results.groups.values() for one in group.values()]
    methods, tasks = (list(dict.fromkeys(names)) for names in
                      ((one.method for one in samples), (one.task for one in samples)))
    clock = ("in virtual time: the tokens, trees and acceptances are real, the machines imagined"
             if receipt.clock == "virtual" else "by the wall clock")
    dirty = ", with uncommitted changes" if receipt.dirty else ""
    clusters = ", ".join(f"{one.name} ({many(one.stages, 'stage')}, {one.label})" for one in results.clusters)
    blocks: list[Block] = [
        Prose(f"{', '.join(methods)} on the same {many(len({one.prompt for one in samples}), 'prompt')} "
              f"({', '.join(tasks)}) on {clusters}, {clock}. Target `{receipt.model.target}`, drafts "
              f"`{receipt.model.draft}`, {receipt.model.dtype}."),
        Prose(f"{receipt.date}, commit `{receipt.commit[:12]}`{dirty}.", small=True),
    ]
    tiles = [_tile(results, cluster, temperature, ours) for cluster, temperature, ours in _ours(results)
             if ours.over_pp]
    return [*blocks, *([Tiles(tiles)] if tiles else []), *([Bullets(receipt.notes)] if receipt.notes else [])]


def _tile(results: Results, cluster: ClusterInfo, temperature: float, ours: Summary) -> Tile:
    assert ours.over_pp is not None
    between = f"95% interval {interval(ours.over_pp)}; " if ours.over_pp.low is not None else ""
    return Tile(f"{ours.over_pp.value:.2f}x", f"{OURS} over pp, {cluster.name}, temperature {temperature:g}",
                f"{between}{results.clock}, {cluster.label}, {many(cluster.stages, 'stage')}")


def _ours(results: Results) -> Iterator[tuple[ClusterInfo, float, Summary]]:
    for cluster in results.clusters:
        for temperature in results.temperatures(cluster.name):
            if ours := results.at(cluster.name, temperature, OURS):
                yield cluster, temperature, ours


def _comparisons(results: Results) -> list[Block]:
    """`fullpipe` against papers, the other methods, and itself at temperature 0; a column per task class."""
    grids = [
        Grid(f"{OURS} beside the papers' ranges, {results.clock}. The ranges are theirs: their models, prompts and "
             f"machines, with as many stages (arXiv 2504.04104, abstracts).",
             ["cluster", "T", "speedup over", "theirs", *results.tasks], _papers(results)),
        Grid(f"{OURS} and the best other method, {results.clock}: TBT of that method / TBT of {OURS}. Even: slower "
             f"by 2% at most.", ["cluster", "T", *results.tasks], _others(results)),
        Grid(f"What temperature takes of the speedup of {OURS} over pp, {results.clock}",
             ["cluster", "T", *results.tasks], _temperature(results)),
    ]
    found: list[Block] = [grid for grid in grids if grid.rows]
    return [Heading("At a glance"), *found] if found else []


def _papers(results: Results) -> list[list[Cell]]:
    return [[Cell(cluster.name), number(temperature, "g"), Cell(claim.baseline),
             Cell(f"{claim.low}-{claim.high}x", f"{claim.paper}, {claim.stages} stages"),
             *(_beside(results.at(cluster.name, temperature, OURS, task), claim) for task in results.tasks)]
            for cluster, temperature, ours in _ours(results) for claim in CLAIMS
            if claim.stages == cluster.stages and ours.over(claim.baseline)]


def _beside(ours: Summary | None, claim: Claim) -> Cell:
    found = ours.over(claim.baseline) if ours else None
    if found is None:
        return Cell("-")
    verdict = "above" if found.value > claim.high else "below" if found.value < claim.low else "within"
    return Cell(f"{found.value:.2f}x", verdict, found.value, best=verdict == "above")


def _others(results: Results) -> list[list[Cell]]:
    return [[Cell(cluster.name), number(temperature, "g"),
             *(_best_other(results, cluster.name, temperature, task) for task in results.tasks)]
            for cluster, temperature, _ in _ours(results)
            if any(results.at(cluster.name, temperature, method) for method in results.methods(cluster.name)
                   if method != OURS)]


def _best_other(results: Results, cluster: str, temperature: float, task: str) -> Cell:
    ours = results.at(cluster, temperature, OURS, task)
    others = {other.tbt_s: method for method in results.methods(cluster)
              if method != OURS and (other := results.at(cluster, temperature, method, task))}
    if ours is None or not ours.tbt_s or not others:
        return Cell("-")
    ratio = min(others) / ours.tbt_s
    verdict = "" if ratio > 1 else "even with " if ratio * _ALLOWANCE >= 1 else "SLOWER than "
    return Cell(f"{ratio:.2f}x", verdict + others[min(others)], ratio)


def _temperature(results: Results) -> list[list[Cell]]:
    return [[Cell(cluster.name), number(temperature, "g"),
             *(_lost(*(found.over_pp if (found := results.at(cluster.name, at, OURS, task)) else None
                       for at in (0.0, temperature))) for task in results.tasks)]
            for cluster, temperature, ours in _ours(results)
            if temperature and ours.over_pp and results.at(cluster.name, 0.0, OURS)]


def _lost(greedy: Estimate | None, sampled: Estimate | None) -> Cell:
    if greedy is None or sampled is None:
        return Cell("-")
    lost = 1 - sampled.value / greedy.value
    return Cell(f"{100 * lost:.1f}%", f"{greedy.value:.2f}x to {sampled.value:.2f}x", lost)


# ---- what holds for all clusters -------------------------------------------------------------------------


def _exactness(results: Results) -> list[Block]:
    found = [(key, one) for key, one in results.summaries.items() if key.task == ALL and key.method != PLAIN]
    if not found and not results.receipt.checks:
        return []
    rows = [[Cell(key.cluster), number(key.temperature, "g"), Cell(key.method),
             Cell(f"{one.same_texts} of {one.compared}", value=one.same_texts / one.compared),
             number(one.compared - one.same_texts), number(one.near_ties)] for key, one in found if one.compared]
    blocks: list[Block] = [
        Heading("Exactness"),
        Prose("No method may change what is said. A text that leaves the other at a near-tie (two candidates whose "
              "scores lie closer than rounding) counts as different; near-ties stand beside it."),
    ]
    if rows:
        blocks.append(Grid("", ["cluster", "T", "method", "texts equal to pp", "texts that differ", "near-ties"], rows))
    else:
        blocks.append(Prose(_REPLAYED if results.receipt.checks else _REPLAYED + _UNCHECKED))
    return [*blocks, *_checks(results.receipt.checks)]


def _checks(checks: list[dict[str, object]]) -> list[Block]:
    """By combination, how often each column that is true or false was true; below it, every row."""
    if not checks:
        return []
    runs: dict[tuple[str, ...], list[dict[str, object]]] = {}
    for row in checks:
        runs.setdefault(tuple(show(row.get(name)) for name in ("cluster", "temperature", "method")), []).append(row)
    compared = [name for name in dict.fromkeys(name for row in checks for name in row)
                if any(isinstance(row.get(name), bool) for row in checks)]
    counted = ["near-ties"] if any("near-ties" in row for row in checks) else []
    rows = [[*map(Cell, where), number(len(mine)), *(_agreeing(mine, name) for name in compared),
             *(_count(mine, name) for name in counted)] for where, mine in runs.items()]
    return [Grid("Checked: the same with the target's stages computing, all in one process. Texts are compared with "
                 "the recorded ones, what was counted with the replay's.",
                 ["cluster", "T", "method", "prompts", *compared, *counted], rows),
            Folded(f"{many(len(checks), 'run')}, one prompt each", [free_grid("", checks)])]


def _agreeing(rows: list[dict[str, object]], name: str) -> Cell:
    values = [value for row in rows if isinstance(value := row.get(name), bool)]
    return Cell(f"{sum(values)} of {len(values)}", value=sum(values) / len(values)) if values else Cell("-")


def _count(rows: list[dict[str, object]], name: str) -> Cell:
    return number(sum(value for row in rows if isinstance(value := row.get(name), int)))


def _free(heading: str, words: str, rows: list[dict[str, object]]) -> list[Block]:
    return [Heading(heading), Prose(words), free_grid("", rows)] if rows else []


def _origin(receipt: Receipt, clock: str) -> list[Block]:
    dirty = "dirty: the checkout had uncommitted changes" if receipt.dirty else "clean"
    facts = {"date": receipt.date, "commit": f"{receipt.commit} ({dirty})", "clock": clock,
             **{f"machine: {name}": value for name, value in receipt.machine.items()},
             **{f"version: {name}": value for name, value in receipt.versions.items()},
             **{f"setting: {name}": value for name, value in receipt.settings.items()}}
    return [
        Heading("How it was made"), Verbatim(receipt.command),
        Grid("", ["what", "value"], [[Cell(name), Cell(show(value))] for name, value in facts.items()]),
        *(Folded(f"Cluster {one.name}: {many(one.stages, 'stage')}, {LABELS[one.label]}",
                 [Prose(one.note), Verbatim(one.text)]) for one in receipt.clusters),
    ]


def _samples(receipt: Receipt, clock: str) -> list[Block]:
    columns: list[tuple[str, Callable[[Sample], Cell]]] = [
        ("prompt", lambda one: Cell(one.prompt)), ("tasks", lambda one: Cell(one.task)),
        ("cluster", lambda one: Cell(one.cluster)), ("T", lambda one: number(one.temperature, "g")),
        ("method", lambda one: Cell(one.method)), ("setting", lambda one: Cell(setting(one))),
        ("phase", lambda one: Cell(one.phase)), ("repeat", lambda one: number(one.repeat)),
        ("tokens", lambda one: number(one.tokens)), ("finish", lambda one: Cell(one.finish)),
        ("same text", lambda one: Cell(show(one.same_text))),
        ("TTFT s", lambda one: number(one.ttft_s, ".4g")), ("TBT s", lambda one: number(one.tbt_s, ".4g")),
        ("steps/token", lambda one: number(one.steps_per_token, ".3f")),
        ("hits", lambda one: number(one.hits)), ("misses", lambda one: number(one.misses)),
        ("wasted rows", lambda one: number(one.wasted_rows)), ("fill", lambda one: number(one.fill, ".2f")),
        ("took s here", lambda one: number(one.wall_s, ".3g")),
    ]
    grid = Grid(f"TTFT and TBT: {clock}; with unit costs, units. Took: wall clock.", [name for name, _ in columns],
                [[cell(one) for _, cell in columns] for one in receipt.samples])
    return [Heading("Samples"), Prose("Each with all its fields is in the receipt."),
            Folded(f"{many(len(receipt.samples), 'sample')}, one prompt and one combination each", [grid],
                   in_markdown=False)]

"""What the report says of one cluster. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from fullpipe.bench import figures
from fullpipe.bench.claims import CLAIMS
from fullpipe.bench.document import Block, Cell, Folded, Grid, Heading, Picture, Prose
from fullpipe.bench.metrics import (
    ALL,
    PLAIN,
    STATIC,
    Blame,
    Estimate,
    Results,
    Summary,
    listed,
    speedup_by_prompt,
    without_tbt,
)
from fullpipe.bench.receipt import ClusterInfo, Tuning
from fullpipe.bench.wording import LABELS, interval, many, number, percent, setting, unit_of, where

_WITH_ENGINE = (" With engine time: the speedup over pp if every second of the engine's own time were added to the "
                "time between tokens, of pp as of the method. Virtual time charges the engine nothing; this charges "
                "it in full, which is an upper bound, for on real machines it overlaps with the stages.")


class Chapter:
    """What is said of one cluster. `prefix` makes the names of its figures unique."""

    def __init__(self, results: Results, cluster: ClusterInfo, prefix: str) -> None:
        self.results, self.cluster, self.prefix = results, cluster, prefix
        self.methods, self.temperatures = results.methods(cluster.name), results.temperatures(cluster.name)
        self.tasks, self.where = results.tasks, where(results.receipt.clock, cluster)
        self.unit, self.scale = unit_of(cluster, max(one.tbt_s for *_, one in self._all()))

    def _all(self, task: str = ALL) -> Iterator[tuple[float, str, Summary]]:
        for temperature in self.temperatures:
            for method in self.methods:
                if found := self.results.at(self.cluster.name, temperature, method, task):
                    yield temperature, method, found

    def blocks(self) -> list[Block]:
        cluster = self.cluster
        return [
            Heading(cluster.name),
            Prose(f"{many(cluster.stages, 'stage')}, {LABELS[cluster.label]}. Times are {self.where}. "
                  f"{cluster.note}"),
            *self._left_out(), *self._speedups(PLAIN), *self._main_table(), *self._speedups(STATIC),
            *self._metrics(), *self._time(), *self._acceptance(), *self._occupancy(), *self._prompts(),
            *self._tuning(),
        ]

    # ---- speedups --------------------------------------------------------------------------------------------

    def _left_out(self) -> list[Block]:
        """Which prompts no speedup is of."""
        found = {f"{prompt} (temperature {temperature:g})": None for temperature, method, _ in self._all()
                 for prompt in without_tbt(self.results.groups[self.cluster.name, temperature, method])}
        if not found:
            return []
        return [Prose(f"Left out of every speedup, for an answer of one token has no time between tokens: "
                      f"{listed(list(found))}.", small=True)]

    def _speedups(self, baseline: str) -> list[Block]:
        panels = [figures.Panel(f"temperature {temperature:g}", {
            method: [self._over(temperature, method, task, baseline) for task in self.tasks]
            for at, method, _ in self._all() if at == temperature and method not in (PLAIN, baseline)
        }) for temperature in self.temperatures]
        if not any(one for panel in panels for values in panel.series.values() for one in values):
            return []
        bands = [figures.Band(claim.label, claim.low, claim.high) for claim in CLAIMS
                 if claim.stages == self.cluster.stages and claim.baseline == baseline]
        name = f"{self.prefix}-speedup-over-{baseline}"
        theirs = " The grey band is what a paper states of its own models and machines." if bands else ""
        return [Picture(name, figures.speedups(name, panels, self.tasks, baseline, bands),
                        f"Speedup over {baseline}: its TBT / that of the method on the same prompts, {self.where}; "
                        f"the line at 1 is {baseline} itself. Whiskers: 95% intervals by a paired bootstrap over "
                        f"prompts.{theirs}")]

    def _over(self, temperature: float, method: str, task: str, baseline: str) -> Estimate | None:
        found = self.results.at(self.cluster.name, temperature, method, task)
        return found.over(baseline) if found else None

    def _main_table(self) -> list[Block]:
        best = {(temperature, task): max((one.value for method in self.methods
                                          if (one := self._over(temperature, method, task, PLAIN))), default=0.0)
                for temperature in self.temperatures for task in self.tasks}
        rows = [[number(temperature, "g"), Cell(method),
                 *(self._main_cell(temperature, method, task, best[temperature, task]) for task in self.tasks)]
                for temperature, method, _ in self._all()]
        return [Grid(f"Speedup over pp, TBT / TBT (95% interval), and steps per token; {self.where}. "
                     f"1 step per token is the ideal of one token per period, pp needs {self.cluster.stages}.",
                     ["T", "method", *self.tasks], rows)]

    def _main_cell(self, temperature: float, method: str, task: str, best: float) -> Cell:
        one = self.results.at(self.cluster.name, temperature, method, task)
        if one is None:
            return Cell("-")
        steps = f"{one.steps_per_token:.2f} steps"
        if one.over_pp is None:
            return Cell(steps, value=one.steps_per_token)
        between = "" if method == PLAIN or one.over_pp.low is None else f"{interval(one.over_pp)} · "
        return Cell(f"{one.over_pp.value:.2f}x", between + steps, one.over_pp.value, one.over_pp.value == best)

    # ---- everything else that was counted ----------------------------------------------------------------------

    def _metrics(self) -> list[Block]:
        overall = self._metric_grid(ALL)
        per_task = [self._metric_grid(task) for task in self.tasks if task != ALL]
        hops = max(len(one.bytes_per_token) for *_, one in self._all())
        links = Grid(f"Bytes per token, {self.where}", ["T", "method", *(f"hop {index}" for index in range(hops))],
                     [[number(temperature, "g"), Cell(method),
                       *(number(size, ",.0f") for size in one.bytes_per_token),
                       *[Cell("-")] * (hops - len(one.bytes_per_token))] for temperature, method, one in self._all()])
        return [Heading("Everything that was counted", 3), overall,
                *([Folded("The same by task class", per_task)] if per_task else []),
                *([Folded("Bytes over each hop", [links])] if hops else [])]

    def _metric_grid(self, task: str) -> Grid:
        columns = ["T", "method", f"TBT {self.unit}", f"TTFT {self.unit}", "tokens/s", "steps/token", "hit rate",
                   "accepted length", "fill", "waste", "restarts", "draft busy", "link bytes",
                   "engine", *(["with engine time"] if self._has_engine_column else [])]
        rows = [[number(temperature, "g"), Cell(method, self._chosen(temperature, method)),
                 number(one.tbt_s * self.scale, ".3g"), number(one.ttft_s * self.scale, ".3g"),
                 number(1 / one.s_per_token, ".3g"), number(one.steps_per_token, ".2f"), percent(one.hit_rate),
                 number(one.mean_acceptance_length, ".2f"), percent(one.fill), number(one.waste, ".2f"),
                 percent(one.restarts), percent(one.draft_busy),
                 number(max(one.bytes_per_token, default=0.0), ",.0f"),
                 Cell(f"{1e6 * one.engine_s_per_step:,.0f} µs", value=one.engine_s_per_step),
                 *([_with_engine(one)] if self._has_engine_column else [])]
                for temperature, method, one in self._all(task)]
        if self.cluster.label == "unit":
            columns[4] = "tokens/unit"
        return Grid(f"{'All tasks' if task == ALL else task}, {self.where}. Accepted length: 1 + accepted "
                    f"drafts per verification. Waste: rows thrown away per token. Restarts: share of the tokens that "
                    f"left the pipeline empty. Link bytes: per token, over the busiest hop. Engine: its own time per "
                    f"step, wall clock.{_WITH_ENGINE if self._has_engine_column else ''}", columns, rows)

    @property
    def _has_engine_column(self) -> bool:
        """Where times are seconds to which the engine's could be added, and do not hold them already."""
        return self.results.receipt.clock == "virtual" and self.cluster.label != "unit" and PLAIN in self.methods

    def _chosen(self, temperature: float, method: str) -> str:
        group = self.results.groups[self.cluster.name, temperature, method]
        return "; ".join(dict.fromkeys(words for one in group.values() if (words := setting(one)) != "-"))

    def _time(self) -> list[Block]:
        blamed = [(temperature, method, one.blame) for temperature, method, one in self._all() if one.blame]
        if not blamed:
            return []
        name = f"{self.prefix}-time"
        rows = [(self._label(temperature, method), one) for temperature, method, one in blamed]
        heads = [label for _, label, _ in figures.PARTS]
        grid = Grid(f"Time per token, {self.unit}, {self.where}",
                    ["T", "method", *heads, "saved", "sum", "of what exceeds the ideal"],
                    [[number(temperature, "g"), Cell(method),
                      *(number(getattr(one, part) * self.scale, ".3g") for part, _, _ in figures.PARTS),
                      number(one.together * self.scale, ".3g"), number(one.total * self.scale, ".3g"),
                      Cell(_shares(one))]
                     for temperature, method, one in blamed])
        return [Heading("Where the time goes", 3),
                Picture(name, figures.time_per_token(name, rows, f"{self.unit} ({self.results.clock})", self.scale),
                        f"Mean decode time of a token and its causes, {self.where}; the number is the sum, less "
                        f"what was saved. The first token's way counts, so it is more than the TBT. One row's stage "
                        f"times and the links are read off pp. A miss costs a whole traversal; what no other cause "
                        f"explains is waiting for guesses. The formula is in `bench/metrics.py`."),
                Folded("The same in numbers", [grid])]

    def _label(self, temperature: float, method: str) -> str:
        return f"{method}, T={temperature:g}" if len(self.temperatures) > 1 else method

    def _acceptance(self) -> list[Block]:
        panels = [figures.Panel(f"temperature {temperature:g}", {
            method: one.acceptance for at, method, one in self._all()
            if at == temperature and any(hits for hits, _ in one.acceptance)
        }) for temperature in self.temperatures]
        if not any(panel.series for panel in panels):
            return []
        name = f"{self.prefix}-acceptance"
        return [Heading("Acceptance by depth", 3),
                Picture(name, figures.acceptance(name, panels),
                        "Of the tokens that many places after the last miss, the share that was in flight already. "
                        "Shaded: 95% intervals (Wilson).")]

    def _occupancy(self) -> list[Block]:
        rows = [(self._label(temperature, method), [1 - idle for idle in one.bubbles], one.draft_busy, one.fill)
                for temperature, method, one in self._all()]
        name = f"{self.prefix}-busy"
        return [Heading("How full the pipeline was", 3),
                Picture(name, figures.occupancy(name, rows),
                        f"Busy share of every stage and of the draft station, per cent of the decode time "
                        f"({self.results.clock}); what is missing to 100 is the bubble. Fill is the share of stage "
                        f"time spent on rows that were still alive at its end.")]

    def _prompts(self) -> list[Block]:
        panels = []
        for temperature in self.temperatures:
            plain = self.results.groups.get((self.cluster.name, temperature, PLAIN))
            panels.append(figures.Panel(f"temperature {temperature:g}", {
                method: list(values) for at, method, _ in self._all() if at == temperature and method != PLAIN
                if (values := speedup_by_prompt(
                    plain, self.results.groups[self.cluster.name, temperature, method]).values())
            } if plain else {}))
        if not any(panel.series for panel in panels):
            return []
        name = f"{self.prefix}-prompts"
        return [Heading("From prompt to prompt", 3),
                Picture(name, figures.cumulative(name, panels, PLAIN),
                        f"Share of the prompts on which the speedup over pp was at least so much, {self.where}.")]

    def _tuning(self) -> list[Block]:
        found = [one for one in self.results.receipt.tuning if one.cluster == self.cluster.name]
        if not found:
            return []
        blocks: list[Block] = [Heading("How the methods were tuned", 3)]
        for temperature in sorted({one.temperature for one in found}):
            mine = [one for one in found if one.temperature == temperature]
            name = f"{self.prefix}-tuning-{temperature:g}".replace(".", "p")
            unit, scale = unit_of(self.cluster, max(each.tbt_s for one in mine for each in one.candidates))
            blocks.append(Picture(name, figures.sweeps(name, [_sweep(one) for one in mine],
                                                       f"{unit} ({self.results.clock})", scale),
                                  f"Temperature {temperature:g}: TBT over all tuning prompts, of every setting "
                                  f"tried, {self.where}. The ring is the setting that was chosen."))
        rows = [[number(one.temperature, "g"), Cell(one.method), Cell(setting(each)),
                 number(each.tbt_s * self.scale, ".4g"), number(one.prompts),
                 Cell("chosen" if index == one.best else "")]
                for one in found for index, each in enumerate(one.candidates)]
        grid = Grid("", ["T", "method", "setting", f"TBT, {self.unit} ({self.results.clock})", "prompts", ""], rows)
        return [*blocks, Folded(f"All {len(rows)} settings", [grid])]


def _with_engine(one: Summary) -> Cell:
    if one.over_pp is None or one.over_pp_with_engine is None:
        return Cell("-")
    return Cell(f"{one.over_pp_with_engine:.2f}x", f"{one.over_pp.value:.2f}x without", one.over_pp_with_engine)


def _shares(blame: Blame) -> str:
    """Each cause's share of the time over the ideal, the greatest first; more than 100% where some was saved."""
    over = blame.total - blame.ideal
    if over <= 0:
        return "nothing exceeds it"
    shares = {label: getattr(blame, part) / over for part, label, _ in figures.PARTS if part != "ideal"}
    listed = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{label} {share:.0%}" for label, share in listed if share >= 0.005)


def _sweep(tuning: Tuning) -> figures.Sweep:
    """Across: the number that was varied most. A line for every setting of the rest."""
    tried = tuning.candidates
    values = {knob: {getattr(one, knob) for one in tried} - {None} for knob in ("width", "depth", "floor")}
    knob = max(values, key=lambda name: len(values[name])) if any(values.values()) else "no number was varied"
    rest = [name for name in ("width", "depth", "draft", "floor")
            if name != knob and len({getattr(one, name) for one in tried}) > 1]
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in tried:
        label = ", ".join(f"{name} {getattr(one, name)}" for name in rest)
        lines.setdefault(label, []).append((getattr(one, knob, None) or 0, one.tbt_s))
    best = tried[tuning.best]
    return figures.Sweep(tuning.method, knob, {label: sorted(points) for label, points in lines.items()},
                         (getattr(best, knob, None) or 0, best.tbt_s))

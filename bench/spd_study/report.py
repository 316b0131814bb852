"""From journals to the receipt, and from the receipt to the report and its figure."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _receipt import receipt
from spd_study.cells import STAGES, Cell, main_cells, study_cells
from spd_study.cost import summary_of
from spd_study.journal import Journal
from spd_study.measure import NEAR
from spd_study.pooled import Sample, interval, pooled, saved

PARTS = ("study", "main", "cost", "clusters")

# arXiv 2605.30852, Qwen3.5-4B: equivalent acceptance length by number of stages.
PAPER = {"SPD, T = 0": {4: 2.64, 8: 3.51, 16: 3.70}, "SPD, T = 1": {4: 2.48, 8: 3.13, 16: 3.19},
         "PPSD, T = 0": {4: 1.54, 8: 1.68, 16: 1.40}}

# What is compared, chain against chain: a title, and the cell of a number of stages.
CHAINS: dict[str, Callable[[int], Cell]] = {
    "SPD": lambda n: Cell("spd", "spd", n),
    "PPSD": lambda n: Cell("exit", "ppsd", n, free=True),
    "ablation": lambda n: Cell("ablation", "spd", n),
    "SPD, one for all n": lambda n: Cell("shared", "spd", n),
    "n-gram": lambda n: Cell("ngram", "spd", n),
    "SPD, one hour": lambda n: Cell("main", "spd", n),
}
LONG = {"SPD": lambda n: Cell("long-spd", "spd", n), "PPSD": lambda n: Cell("long-exit", "ppsd", n, free=True),
        "ablation": lambda n: Cell("long-ablation", "spd", n)}
HOT = {"SPD, T = 1": lambda n: Cell("spd", "spd", n, temperature=1.0),
       "PPSD, T = 1": lambda n: Cell("exit", "ppsd", n, temperature=1.0, free=True),
       "SPD, one hour, T = 1": lambda n: Cell("main", "spd", n, temperature=1.0)}
_COLOURS = {"SPD": "#8b5fbf", "PPSD": "#b0548c", "ablation": "#8a8f98", "SPD, one for all n": "#3d9bd6",
            "n-gram": "#c99700", "SPD, one hour": "#d9541e"}


def write_report(journals: Path, modules: Sequence[Path], out: Path) -> None:
    """receipt.json anew if there are journals, then report.md and acceptance.svg. findings.md, if it is there, stands
    in the report as it is: it says in words what the tables show, and is written by whoever has read them."""
    path = out / "receipt.json"
    if journals.exists():
        write_receipt(collect(journals, modules), path)
    value = json.loads(path.read_text())
    findings = out / "findings.md"
    (out / "report.md").write_text(report_of(value, findings.read_text() if findings.exists() else ""))
    draw(value["samples"]["answers"], out / "acceptance.svg")


# ---- the receipt -----------------------------------------------------------------------------------------


def collect(journals: Path, modules: Sequence[Path]) -> dict[str, Any]:
    rows = {part: list(Journal(journals / f"{part}.jsonl").rows.values()) for part in PARTS}
    answers = [row for part in ("study", "main") for row in rows[part] if "cell" in row]
    truths = {row["key"]: {"tokens": row["tokens"], "margins": [round(margin, 3) for margin in row["margins"]]}
              for part in ("study", "main") for row in rows[part] if row["key"].startswith("truth/")}
    runs = [row for part in PARTS for row in rows[part] if row["key"].startswith("run/")]
    samples = {"answers": answers, "truths": [{"key": key, **value} for key, value in truths.items()],
               "cost": [row for row in rows["cost"] if not row["key"].startswith("run/")],
               "clusters": [row for row in rows["clusters"] if not row["key"].startswith("run/")]}
    return receipt("spd", {"runs": runs, "modules": [module_of(folder) for folder in modules]}, samples)


def module_of(folder: Path) -> dict[str, Any]:
    """What was trained, and on how much."""
    config, summary = (json.loads((folder / name).read_text()) for name in ("config.json", "summary.json"))
    plan = summary["plan"]
    return {"name": folder.name, "kind": plan["kind"], "bounds": config["bounds"], "stages": plan["stages"],
            "layers": plan["layers"], "parameters": parameters(folder / "model.safetensors"),
            "megabytes": round((folder / "model.safetensors").stat().st_size / 1e6, 1), "steps": summary["steps"],
            "seconds": summary["seconds"], "text_tokens": summary["text_tokens"], "acceptance": summary["acceptance"]}


def parameters(path: Path) -> int:
    """Numbers in the floating-point tensors of a safetensors file."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items()
               if name != "__metadata__" and entry["dtype"] in ("BF16", "F16", "F32"))


def write_receipt(value: dict[str, Any], path: Path) -> None:
    """JSON, every sample on a line of its own."""
    samples = value.pop("samples")
    lines = ",\n".join(f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in samples.items())
    head = json.dumps(value, indent=1)
    path.write_text(f'{head[:-2]},\n "samples": {{\n{lines}\n}}}}\n')
    value["samples"] = samples


# ---- the report ------------------------------------------------------------------------------------------


def report_of(value: dict[str, Any], findings: str) -> str:
    answers, results = value["samples"]["answers"], value["results"]
    parts = [
        "# Draft modules: what they are worth, and what they cost",
        _provenance(value),
        findings.strip(),
        "## What was trained", _modules(results["modules"]),
        "## Acceptance by number of stages", "![Hit rate and equivalent acceptance length](acceptance.svg)",
        chains(answers, CHAINS, "Hit rate, and **equivalent acceptance length** n / (steps per token), temperature 0:"),
        chains(answers, LONG, "The same after 1500 steps instead of 300:"),
        chains(answers, HOT, "The same at temperature 1, seed 7:"), _paper(),
        "## Siblings, late ones too", refreshes(answers),
        "## Cost on this machine", _taps(value["samples"]["cost"]), _module_costs(value["samples"]["cost"]),
        "## Virtual-time speedup over pp", _clusters(value["samples"]["clusters"]),
        "## Exactness", _exactness(answers),
        "## What is missing", missing(answers) or "Nothing of the plan.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    """Markdown, below a line that says what it is; nothing without rows."""
    if not rows:
        return ""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return (title and f"{title}\n\n") + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of(answers: Sequence[Sample], cell: Cell) -> list[Sample]:
    """A cell's answers; none of a cell that was not asked all prompts, for prompts differ more than cells do."""
    wanted = cell.to_dict()
    found = [one for one in answers if one["cell"] == wanted]
    return found if {one["prompt"] for one in found} == {one["prompt"] for one in answers} else []


def missing(answers: Sequence[Sample]) -> str:
    """Cells of the plan that were not measured, or not to the end."""
    names = [cell.key for cell in (*study_cells(), *main_cells()) if not of(answers, cell)]
    return f"Not measured, or not on all prompts: {', '.join(f'`{name}`' for name in names)}." if names else ""


def chains(answers: Sequence[Sample], columns: dict[str, Callable[[int], Cell]], title: str) -> str:
    """Hit rate and equivalent acceptance length of every kind, by number of stages."""
    shown = [name for name in columns if any(of(answers, columns[name](n)) for n in STAGES)]
    rows = []
    for n in STAGES:
        found = [of(answers, columns[name](n)) for name in shown]
        if any(found):
            rows.append([str(n), *(_chain(samples) if samples else "-" for samples in found)])
    return table(["stages", *shown], rows, title)


def _chain(samples: Sequence[Sample]) -> str:
    figures = pooled(samples)
    low, high = interval(samples, lambda one: one.length)
    return f"{figures.hit_rate:.1%}, **{figures.length:.2f}** ({low:.2f}-{high:.2f})"


def refreshes(answers: Sequence[Sample]) -> str:
    """Widths, without and with refreshed answers. Saved: share of the miss penalty."""
    rows = []
    for draft in ("spd", "main", "main,ngram"):
        for n in STAGES:
            for method, width in (("spd", 1), ("spd", 4), ("fullpipe", 8)):
                off, on = (of(answers, Cell(draft, method, n, width, refresh)) for refresh in (False, True))
                if off:
                    rows.append([f"{draft}, n = {n}, {method}, w = {width}", *_wide(off), *(_wide(on) if on else "---"),
                                 f"{saved(off, on):.1%}" if on else "-"])
    return table(["draft, stages, method, width", "hit rate", "length", "draft rows", "hit rate, refreshed", "length",
                  "draft rows", "penalty saved"], rows)


def _wide(samples: Sequence[Sample]) -> list[str]:
    figures = pooled(samples)
    return [f"{figures.hit_rate:.1%}", f"{figures.length:.2f}", f"{figures.draft_rows:.1f}"]


def _modules(modules: Sequence[dict[str, Any]]) -> str:
    """Right first: on held-out text, a full pipeline, the newest token not yet computed."""
    rows = []
    for one in modules:
        right = {row["stages"]: row["top1"] for row in one["acceptance"]
                 if row["fill"] == row["stages"] and row["depth"] == 0}
        rows.append([one["name"], one["kind"], ",".join(map(str, one["bounds"])), str(one["layers"]),
                     f"{one['parameters'] / 1e6:.1f}", f"{one['megabytes']:.1f}", str(one["steps"]),
                     f"{one['seconds']:.0f}", ", ".join(f"n = {n}: {share:.1%}" for n, share in right.items())])
    return table(["module", "kind", "taps", "layers", "M parameters", "MB", "steps", "seconds",
                  "right first, held-out text"], rows)


def _paper() -> str:
    return table(["stages", *PAPER], [[str(n), *(f"{row[n]:.2f}" for row in PAPER.values())] for n in (4, 8, 16)],
                 "Equivalent acceptance length in the paper (arXiv 2605.30852: Qwen3.5-4B, another model, trained for "
                 "much longer; for the shape of the curve):")


def _taps(cost: Sequence[Sample]) -> str:
    """Rows without a control are left out: they say nothing. Told apart: the lower quartile is above the control's
    upper one."""
    rows = []
    for row in cost:
        if row["key"].startswith("taps/") and row.get("control_s"):
            added, noise = (spread(row[name]) for name in ("pairs_s", "control_s"))
            clear = added[0] > max(0.0, noise[2])
            rows.append([str(row["stages"]), _spread(added), _spread(noise), "yes" if clear else "no",
                         f"{row['bytes'] / row['rows']:,.0f}", f"{row['load'][0]:.1f}"])
    return table(["stages", "with taps, median (middle half)", "control, none and none", "told apart",
                  "tap bytes per row", "load"], rows,
                 "Processes on this machine, `pp`: what a draft station that is sent taps adds to the time per token:")


def spread(pairs: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """What the second of each pair takes more than the first, as a share: lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles([second / first - 1 for first, second in pairs], n=4)
    return low, middle, high


def _spread(quartiles: tuple[float, float, float]) -> str:
    low, middle, high = quartiles
    return f"{middle:+.1%} ({low:+.1%} to {high:+.1%})"


def _module_costs(cost: Sequence[Sample]) -> str:
    rows = []
    for row in cost:
        if row["key"].startswith("module/"):
            figures = summary_of(row)
            rows.append([f"{row['stages']}, {row['method']}" + ", refreshed" * row["refresh"],
                         f"{figures['stage_ms']:.1f}", f"{figures['draft_ms']:.1f}", f"{figures['share']:.0%}",
                         f"{row['bytes'] / row['tokens']:,.0f}", f"{row['taps'] / row['tokens']:.1f}"])
    return table(["stages, method", "stage ms", "draft job ms", "draft / stage", "tap bytes per emitted token",
                  "tap messages per emitted token"], rows,
                 "One process, one thread, measured work, medians: a flight at the slowest stage, and a draft job:")


def _clusters(rows: Sequence[Sample]) -> str:
    """TBT of `pp` / TBT, over all prompts that `pp` was asked there."""
    plain = {(row["cluster"], row["prompt"]): row["tbt_s"] for row in rows if row["method"] == "pp"}
    setups: dict[tuple[Any, ...], list[Sample]] = {}
    for row in rows:
        if row["method"] != "pp" and (row["cluster"], row["prompt"]) in plain:
            key = row["cluster"], row["draft"], row["method"], row["width"], row["refresh"]
            setups.setdefault(key, []).append(row)
    lines = []
    for (cluster, draft, method, width, refresh), own in sorted(setups.items()):
        if len(own) < sum(place == cluster for place, _ in plain):
            continue  # cut short
        ratio = sum(plain[cluster, one["prompt"]] for one in own) / sum(one["tbt_s"] for one in own)
        each = sorted(plain[cluster, one["prompt"]] / one["tbt_s"] for one in own)
        hits = sum(one["hits"] for one in own) / sum(one["hits"] + one["misses"] for one in own)
        lines.append([f"{cluster} ({own[0]['stages']} stages)", draft, method + ", refreshed" * refresh, str(width),
                      f"**{ratio:.2f}x** ({each[0]:.2f}-{each[-1]:.2f})", f"{hits:.1%}"])
    return table(["cluster", "draft", "method", "width", "speedup (range of prompts)", "hit rate"], lines)


def _exactness(answers: Sequence[Sample]) -> str:
    ties = [one for one in answers if one["near_tie"]]
    worst = max((one["near_tie"]["margin"] for one in ties), default=0.0)
    return (f"{len(answers)} answers, {len(answers) - len(ties)} of them token for token what `pp` says. {len(ties)} "
            f"leave it at a pick that led by less than {NEAR} in bfloat16 logits (the widest: {worst:.3f}); another "
            "difference would have stopped the run.")


def _provenance(value: dict[str, Any]) -> str:
    prompts = sorted({one["prompt"] for one in value["samples"]["answers"]})
    return (f"SmolLM2-135M, bfloat16, prompts {', '.join(prompts)}. {value['date']}, receipt made at commit "
            f"`{value['commit'][:12]}`; commands and commits of the runs are in [receipt.json](receipt.json). Steps "
            "are virtual time: every stage step is one unit, whatever its rows. Tokens, hidden states, guesses and "
            "hits are real. Intervals: 95%, over prompts.")


# ---- the figure ------------------------------------------------------------------------------------------


def draw(answers: Sequence[Sample], path: Path) -> None:
    """Hit rate and equivalent acceptance length of chains at temperature 0, by number of stages."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "spd"
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2)
    for name, cell in CHAINS.items():
        found = {n: of(answers, cell(n)) for n in STAGES}
        found = {n: samples for n, samples in found.items() if samples}
        if not found:
            continue
        whole = {n: pooled(samples) for n, samples in found.items()}
        look: dict[str, Any] = {"color": _COLOURS[name], "marker": "o", "markersize": 4, "label": name}
        left.plot(list(whole), [100 * one.hit_rate for one in whole.values()], **look)
        right.plot(list(whole), [one.length for one in whole.values()], **look)
    for name, style in (("SPD, T = 0", "--"), ("PPSD, T = 0", ":")):
        right.plot(list(PAPER[name]), list(PAPER[name].values()), style, color="#8a8f98", linewidth=1,
                   label=f"the paper's {name.split(',')[0]}, Qwen3.5-4B")
    left.set(xlabel="stages", ylabel="hit rate (%)", ylim=(0, None), xticks=STAGES)
    right.set(xlabel="stages", ylabel="equivalent acceptance length", ylim=(0, None), xticks=(*STAGES, 16))
    right.axhline(1, color="black", linewidth=0.5)
    right.legend(fontsize=7, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})

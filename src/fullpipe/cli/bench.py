"""`fullpipe bench`: all methods on the same prompts and clusters, each at its best setting."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from fullpipe.cli import beside, console, options
from fullpipe.cli.generate import fetch_all
from fullpipe.cli.record import Limit, Prompts, Turns, fill, read
from fullpipe.errors import UsageError
from fullpipe.request import SamplingParams

if TYPE_CHECKING:
    from fullpipe.bench.receipt import Receipt, Tuning
    from fullpipe.bench.recording import Answer, Recording
    from fullpipe.bench.run import Plan
    from fullpipe.bench.settings import Setting
    from fullpipe.planning.cluster import Cluster

_Number = TypeVar("_Number", int, float)
_METHODS = "pp,chain,static-tree,pipedec,fullpipe"


def bench(
    model: options.Model = options.DEFAULT_MODEL,
    draft: options.Draft = "auto",
    methods: Annotated[str, typer.Option("--methods", help="With commas between.")] = _METHODS,
    cluster: Annotated[list[str] | None, typer.Option("--cluster", metavar="FILE", help="A cluster file or a preset; "
                                                      "may be repeated.")] = None,
    stages: Annotated[str | None, typer.Option("--stages", help="Numbers of stages, with commas between, on which "
                                               "every step takes one unit of time; in place of --cluster.")] = None,
    widths: Annotated[str, typer.Option("--widths", help="Tree widths to try, with commas between.")] = "4,8,16,32,64",
    depths: Annotated[str | None, typer.Option("--depths", help="Depths to try for chain and static-tree. Default: "
                                               "2 to 16, and 3 to 12.")] = None,
    temperatures: Annotated[str, typer.Option("--temperatures", help="With commas between.")] = "0",
    prompts: Prompts = None,
    limit: Limit = None,
    turns: Turns = 1,
    max_new_tokens: options.MaxNewTokens = 128,
    seed: options.Seed = 7,
    dtype: options.DtypeOption = options.Dtype.auto,
    tune: Annotated[int, typer.Option("--tune", help="Prompts per class on which each method's settings are tried.")
                    ] = 2,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes. Default: one per core.")] = None,
    threads: options.Threads = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Recordings, samples, receipt and report "
                                      "go here; an interrupted run is gone on with.")] = Path("bench-out"),
    peers: Annotated[bool, typer.Option("--peers", help="Instead: Fullpipe and other programs side by side, on the "
                                        "wall clock (python -m fullpipe.bench.peers sets them up).")] = False,
    agreement: Annotated[bool, typer.Option("--agreement", help="Instead: two stages by the virtual and by the wall "
                                            "clock.")] = False,
    repeats: Annotated[int, typer.Option("--repeats", help="Rounds of --agreement.")] = 5,
) -> None:
    """Measure every method on the same prompts: exact steps and tokens, on the virtual time of described clusters.

    The model answers each prompt once; then each method runs with the real draft against those tokens, first to
    find its best setting on each cluster, then on all prompts. Writes FOLDER/receipt.json and a report.
    """
    chosen = read(prompts, limit)
    if peers or agreement:
        if peers:
            beside.run_peers(model, draft, chosen, max_new_tokens, dtype.value, threads, out)
        if agreement:
            beside.run_agreement(model, draft, chosen, max_new_tokens, repeats, dtype.value, out)
        return
    clusters = _clusters(cluster, stages)
    heats = _numbers(temperatures, float, "temperatures")
    names = _draft_variants(model, draft)
    settings = _settings(methods, names, _numbers(widths, int, "widths"),
                         None if depths is None else _numbers(depths, int, "depths"))
    params = SamplingParams(max_tokens=max_new_tokens, temperature=heats[0], seed=seed)
    from fullpipe.bench.record import recording_path, wanted_ids

    recordings = fill({heat: recording_path(out, heat) for heat in heats}, model, chosen, turns, params, dtype.value,
                      threads)
    ids = wanted_ids(chosen, turns)
    fetch_all(model, draft, "fullpipe")
    receipt = _measure(recordings, ids, clusters, settings, _draft_path(model, draft), tune,
                       workers or len(os.sched_getaffinity(0)), out, model, draft)
    _conclude(receipt, out)


def _measure(recordings: dict[float, Recording], ids: list[str], clusters: dict[str, Cluster],
             settings: list[Setting], draft_model: str | None, tune: int, workers: int, out: Path, model: str,
             draft: str) -> Receipt:
    from fullpipe.bench.run import Journal, choose, run_units

    journal = Journal(out / "samples.jsonl")
    tunings: list[Tuning] = []
    everything = dict.fromkeys(clusters, settings)
    wanted = set()
    for heat, recording in recordings.items():
        plan = _plan(recording, clusters, draft_model, out, workers)
        answers = [recording.answers[id] for id in ids]
        first = _first_of_each_task(answers, max(tune, 1))
        with console.StepBar(f"tuning, temperature {heat:g}") as bar:
            run_units(plan, first, everything, "tuning", journal, bar)
        tuning_ids = {answer.id for answer in first}
        tried = [one for one in journal.samples if one.prompt in tuning_ids]
        best, found = choose(tried, clusters, heat, everything)
        tunings += found
        with console.StepBar(f"measuring, temperature {heat:g}") as bar:
            run_units(plan, answers, best, "main", journal, bar)
        wanted |= {(heat, name, setting.key, id) for name in clusters for setting in best[name] for id in ids}
    samples = [one for one in journal.samples if one.phase == "main" and (
        one.temperature, one.cluster, (one.method, one.draft, one.width or 0, one.depth or 0, one.floor or 0.0),
        one.prompt) in wanted]
    from fullpipe.bench.provenance import make_receipt

    return make_receipt(samples, tunings, clusters, recordings, model, draft, _settings_note(recordings, ids, tune),
                        **beside.kept(out))


def _plan(recording: Recording, clusters: dict[str, Cluster], draft_model: str | None, out: Path,
          workers: int) -> Plan:
    from fullpipe.bench.run import Plan

    return Plan({name: (cluster.text, cluster.folder) for name, cluster in clusters.items()}, recording.head,
                draft_model, str(out / "memo"), workers)


def _settings_note(recordings: dict[float, Recording], ids: list[str], tune: int) -> dict[str, object]:
    head = next(iter(recordings.values())).head
    return {"max_new_tokens": head.max_new_tokens, "temperatures": list(recordings), "seed": head.seed,
            "prompts": len(ids), "prompts per class for tuning": max(tune, 1),
            "landings": "replayed from recordings of the target; the draft is real"}


def _first_of_each_task(answers: list[Answer], count: int) -> list[Answer]:
    taken: dict[str, int] = {}
    first = []
    for answer in answers:
        taken[answer.task] = taken.get(answer.task, 0) + 1
        if taken[answer.task] <= count:
            first.append(answer)
    return first


def _conclude(receipt: Receipt, out: Path) -> None:
    from fullpipe.bench.receipt import save_receipt
    from fullpipe.bench.report import write_report

    path = out / "receipt.json"
    save_receipt(receipt, path)
    _print_table(receipt)
    console.print_note(f"wrote {path}")
    for written in write_report(receipt, out)[:1]:
        console.print_note(f"wrote {written}")


def _print_table(receipt: Receipt) -> None:
    """Speed-ups over pp by cluster, temperature and class; over all prompts together at the end."""
    from fullpipe.bench.metrics import ALL, Results

    results = Results(receipt)
    tasks = [*dict.fromkeys(sample.task for sample in receipt.samples), ALL]
    rows = []
    for cluster in receipt.clusters:
        for heat in results.temperatures(cluster.name):
            for method in results.methods(cluster.name):
                found = [results.at(cluster.name, heat, method, task) for task in tasks]
                cells = [f"{one.over_pp.value:.2f}x" if one and one.over_pp else "-" for one in found]
                rows.append([cluster.name, f"{heat:g}", method, *cells])
    console.print_table(["cluster", "T", "method", *tasks], rows)
    console.print_note("Speed-up over pp in virtual time: the devices are imagined, the tokens are real.")


# ---- options -----------------------------------------------------------------------------------------------


def _numbers(text: str, kind: type[_Number], what: str) -> list[_Number]:
    try:
        values = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values or min(values) < 0:
        raise UsageError(f"{what} are numbers with commas between (got {text!r})")
    return list(dict.fromkeys(values))


def _clusters(names: list[str] | None, stages: str | None) -> dict[str, Cluster]:
    from fullpipe.planning.cluster import Cluster, unit_cluster

    if names and stages:
        raise UsageError("a cluster says how many stages there are", hint="Give --cluster or --stages, not both.")
    if names:
        loaded = [Cluster.load(name) for name in names]
    else:
        loaded = [unit_cluster(count) for count in _numbers(stages or "8", int, "stages")]
    clusters = {cluster.name: cluster for cluster in loaded}
    if len(clusters) < len(loaded):
        raise UsageError("two clusters have the same name", hint="Change [cluster] name in one of the files.")
    for cluster in loaded:
        if cluster.is_measured:
            raise UsageError(f"the devices of {cluster.name!r} have no costs of their own, and a replay measures none",
                             hint="Give them a profile (`fullpipe profile`), a cost curve, or bandwidth and FLOP/s.")
    return clusters


def _draft_variants(model: str, draft: str) -> list[str]:
    """What each method's draft may be; which is best is for the tuning to say."""
    from fullpipe.assembly import draft_names

    names = draft_names(model, draft)
    models = [name for name in names if name != "ngram"]
    if len(models) > 1:
        raise UsageError("a benchmark takes one draft model", hint="Run it once for each.")
    if not models:
        return ["ngram"] if names else []
    return ["model", "model,ngram"] if "ngram" in names else ["model"]


def _draft_path(model: str, draft: str) -> str | None:
    from fullpipe import hub
    from fullpipe.assembly import draft_names

    models = [name for name in draft_names(model, draft) if name != "ngram"]
    return str(hub.resolve(models[0])) if models else None


def _settings(methods: str, drafts: list[str], widths: list[int], depths: list[int] | None) -> list[Setting]:
    from fullpipe.bench.settings import candidates

    names = [name.strip() for name in methods.split(",") if name.strip()]
    if "pp" not in names:
        names.insert(0, "pp")  # what every speed-up is over
    if not drafts and names != ["pp"]:
        raise UsageError("the methods need a draft", hint="Name one with --draft, or give --methods pp.")
    return [setting for name in dict.fromkeys(names) for setting in candidates(name, drafts, widths, depths)]

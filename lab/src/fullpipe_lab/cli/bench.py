"""`fullpipe-lab bench`: all methods on the same prompts and clusters, each at its best setting."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from fullpipe.cli import console
from fullpipe.cli.fetch import fetch_all
from fullpipe.cli.lists import decimals, integers
from fullpipe.cli.options import Only
from fullpipe.errors import UsageError
from fullpipe.options import ModelOptions
from fullpipe.prompts import FilePrompt, choose
from fullpipe.request import SamplingParams
from fullpipe.threads import cores
from fullpipe_lab.cli import beside, options

if TYPE_CHECKING:
    from fullpipe_lab.clusters import Cluster
    from fullpipe_lab.receipts import Receipt, Sample, Tuning
    from fullpipe_lab.recording import Answer, Recording
    from fullpipe_lab.sweep import Journal, Plan, Setting

_Number = TypeVar("_Number", int, float)
_METHODS = "pp,chain,static-tree,pipedec,fullpipe"


def bench(
    model: options.Model,
    sampling: Annotated[SamplingParams, Only("max_tokens", "seed")] = options.SEED_7,
    methods: Annotated[str, typer.Option("--methods", help="With commas between.")] = _METHODS,
    cluster: Annotated[list[str] | None, typer.Option("--cluster", metavar="FILE", help="A cluster file or a preset; "
                                                      "may be repeated.")] = None,
    hosts: Annotated[str | None, typer.Option("--hosts", metavar="ray|FILE", help="Measure these hosts as they are, on "
                                              "the wall clock, in place of --cluster.")] = None,
    ray_address: Annotated[str | None, typer.Option("--ray-address", metavar="HEAD:6379", help="Of the cluster for "
                                                    "--hosts ray.")] = None,
    stages: Annotated[str | None, typer.Option("--stages", help="Numbers of stages, with commas between, on which "
                                               "every step takes one unit of time; in place of --cluster.")] = None,
    widths: Annotated[str, typer.Option("--widths", help="Tree widths to try, with commas between.")] = "4,8,16,32,64",
    depths: Annotated[str | None, typer.Option("--depths", help="Depths to try for chain and static-tree. Default: "
                                               "2 to 16, and 3 to 12.")] = None,
    temperatures: Annotated[str | None, typer.Option("--temperatures", help="With commas between. Default: 0.")] = None,
    prompts: options.Prompts = None,
    limit: options.Limit = None,
    turns: options.Turns = None,
    tune: Annotated[int | None, typer.Option("--tune", min=1, help="Prompts per class on which each method's settings "
                                             "are tried. Default: 2.")] = None,
    real: Annotated[int | None, typer.Option("--real", min=0, help="Prompts to run with all stages real, too, on the "
                                             "first cluster: the text and the steps must be those replayed. Default: "
                                             "1.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes. Default: one per core.")] = None,
    threads: options.Threads = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Recordings, samples, receipt and report "
                                      "go here; an interrupted run is gone on with.")] = Path("bench-out"),
) -> None:
    """Measure every method on the same prompts: exact steps and tokens, on the virtual time of described clusters.

    The model answers each prompt once; then each method runs with the real draft against those tokens, first to find
    its best setting on each cluster, then on all prompts. Writes FOLDER/receipt.json and a report. With --hosts the
    stages are real, on hosts as a plan puts them there: methods take turns, greedily, the first turn of each prompt
    counts, and the last prompt is for trying settings on.
    """
    if hosts is not None:
        _refuse_on_hosts(cluster=cluster, stages=stages, temperatures=temperatures, turns=turns, tune=tune, real=real,
                         workers=workers, threads=threads)
        _measure_hosts(model, sampling, methods, hosts, ray_address, widths, depths, choose(prompts, limit), out)
        return
    if ray_address is not None:
        raise UsageError("ray_address is of hosts, and none are asked for", param="ray_address",
                         hint="Give `hosts=ray`, or leave it out.")
    from fullpipe_lab.files import make_folder
    from fullpipe_lab.record import fill, recording_path, wanted_ids

    chosen, clusters = choose(prompts, limit), _clusters(cluster, stages)
    heats = _once(decimals(temperatures or "0", "--temperatures"))
    settings = _settings(methods, _draft_variants(model), _once(integers(widths, "--widths")),
                         None if depths is None else _once(integers(depths, "--depths")))
    draft_model = _draft_path(model) if any("model" in one.draft for one in settings) else None
    for described in clusters.values() if draft_model else ():
        described.check_draft()
    make_folder(out)  # what cannot be written had better be known before a model is fetched
    paths = {heat: recording_path(out, heat) for heat in heats}
    if not all(path.exists() for path in paths.values()):
        fetch_all(model, "pp")
    with console.StepBar("recording") as bar:
        recordings = fill(paths, model.model, chosen, turns, sampling, model.dtype, threads, progress=bar,
                          say=console.print_note)
    wanted = _Wanted(model.model, model.draft, draft_model, wanted_ids(chosen, turns), clusters, settings,
                     2 if tune is None else tune, 1 if real is None else real,
                     workers or cores(), out)
    _conclude(_measure(wanted, recordings), out)


def _refuse_on_hosts(**given: object) -> None:
    """Raise UsageError for what was said and has no effect on real hosts."""
    if name := next((name for name, value in given.items() if value is not None), None):
        raise UsageError(f"{name} is for replays on virtual time, and hosts have the wall clock", param=name,
                         hint="Leave it out, or describe the hosts: `cluster`.")


def _measure_hosts(model: ModelOptions, sampling: SamplingParams, methods: str, hosts: str, ray_address: str | None,
                   widths: str, depths: str | None, prompts: list[FilePrompt], out: Path) -> None:
    from fullpipe_lab.cli.bench_hosts import OnHosts, measure_hosts, sizes_of

    names = [name.strip() for name in methods.split(",") if name.strip()]
    sizes = sizes_of(names, _once(integers(widths, "--widths")), _once(integers(depths or "2,3,4,6,8", "--depths")))
    measure_hosts(model, OnHosts(hosts, ray_address, names, sizes, sampling.max_tokens), prompts, out)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is to be measured, as the options say it."""

    model: str
    draft: str
    draft_model: str | None
    ids: list[str]
    clusters: dict[str, Cluster]
    settings: list[Setting]
    tune: int
    real: int
    workers: int
    out: Path

    def plan(self, recording: Recording) -> Plan:
        from fullpipe_lab.sweep import Plan

        return Plan({name: (cluster.text, cluster.folder) for name, cluster in self.clusters.items()}, recording.head,
                    self.draft_model, str(self.out / "memo"), self.workers)

    def about(self, recordings: dict[float, Recording]) -> dict[str, object]:
        head = next(iter(recordings.values())).head
        return {"max_tokens": head.max_new_tokens, "temperatures": list(recordings), "seed": head.seed,
                "prompts": len(self.ids), "tuned on": f"{self.tune} prompts of each class, at each temperature",
                "landings": "replayed from recordings of the target; the draft is real"}


def _measure(wanted: _Wanted, recordings: dict[float, Recording]) -> Receipt:
    from fullpipe_lab.receipts import make_receipt
    from fullpipe_lab.sweep import Journal, edges, matching, run_units

    journal = Journal(wanted.out / "samples.jsonl")
    tunings: list[Tuning] = []
    samples: list[Sample] = []
    first: dict[str, list[Setting]] = {}
    for heat, recording in recordings.items():
        best, found = _tune(wanted, recording, journal)
        first, tunings = first or best, tunings + found
        with console.StepBar(f"measuring, temperature {heat:g}") as bar:
            run_units(wanted.plan(recording), [recording.answers[id] for id in wanted.ids], best, "main", journal, bar)
        samples += matching(journal.samples, heat, best, wanted.ids)
    checks = _check(wanted, next(iter(recordings.values())), first, samples)
    return make_receipt(samples, tunings, wanted.clusters, recordings, wanted.model, wanted.draft,
                        wanted.about(recordings), notes=edges(tunings), checks=checks,
                        **beside.kept(wanted.out, wanted.model))


def _tune(wanted: _Wanted, recording: Recording, journal: Journal) -> tuple[dict[str, list[Setting]], list[Tuning]]:
    """Every setting on the first prompts of each class; the best of each method on each cluster."""
    from fullpipe_lab import sweep

    plan, heat = wanted.plan(recording), recording.head.temperature
    journal.bind(plan)
    first = _first_of_each_task([recording.answers[id] for id in wanted.ids], wanted.tune)
    everything = dict.fromkeys(wanted.clusters, wanted.settings)
    with console.StepBar(f"tuning, temperature {heat:g}") as bar:
        sweep.run_units(plan, first, everything, "tuning", journal, bar)
    ids = {answer.id for answer in first}
    return sweep.choose([one for one in journal.samples if one.prompt in ids], wanted.clusters, heat, everything)


def _check(wanted: _Wanted, recording: Recording, best: dict[str, list[Setting]],
           samples: list[Sample]) -> list[dict[str, Any]]:
    """The first prompts with all stages real, on the first cluster: same text, same steps as replayed?"""
    if not wanted.real:
        return []
    from fullpipe_lab.real import check_real

    name = next(iter(wanted.clusters))
    answers = [recording.answers[id] for id in wanted.ids][: wanted.real]
    try:
        with console.StepBar("checking with real stages") as bar:
            return check_real(wanted.model, wanted.draft, wanted.clusters[name], best[name], recording.head, answers,
                              samples, bar)
    except UsageError as error:  # such as more stages than layers; what was measured is not lost over that
        console.print_note(f"no check with real stages: {error.message}")
        return []


def _first_of_each_task(answers: list[Answer], count: int) -> list[Answer]:
    taken: Counter[str] = Counter()
    first = []
    for answer in answers:
        taken[answer.task] += 1
        if taken[answer.task] <= count:
            first.append(answer)
    return first


def _conclude(receipt: Receipt, out: Path) -> None:
    from fullpipe_lab.receipts import save_receipt
    from fullpipe_lab.report import write_report

    path = out / "receipt.json"
    save_receipt(receipt, path)
    _print_table(receipt)
    console.print_note(f"wrote {path}")
    for written in write_report(receipt, out)[:1]:
        console.print_note(f"wrote {written}")


def _print_table(receipt: Receipt) -> None:
    """Speed-ups over pp by cluster, temperature and class; over all prompts together at the end."""
    from fullpipe_lab.metrics import ALL, Results

    results = Results(receipt)
    tasks = [*(task for task in results.tasks if task != ALL), ALL]
    rows = []
    for cluster in receipt.clusters:
        for heat in results.temperatures(cluster.name):
            for method in results.methods(cluster.name):
                found = [results.at(cluster.name, heat, method, task) for task in tasks]
                cells = [f"{one.over_pp.value:.2f}x" if one and one.over_pp else "-" for one in found]
                rows.append([cluster.name, f"{heat:g}", method, *cells])
    console.print_table(["cluster", "T", "method", *tasks], rows)
    console.print_note("Speed-up over pp, simulated: the devices are imagined, the tokens are real.")


# ---- options -----------------------------------------------------------------------------------------------


def _once(numbers: list[_Number]) -> list[_Number]:
    """Without repetitions, in order."""
    return list(dict.fromkeys(numbers))


def _clusters(names: list[str] | None, stages: str | None) -> dict[str, Cluster]:
    from fullpipe_lab.clusters import Cluster, unit_cluster

    if names and stages:
        raise UsageError("a cluster says how many stages there are", hint="Give --cluster or --stages, not both.")
    if names:
        loaded = [Cluster.load(name) for name in names]
    else:
        loaded = [unit_cluster(count) for count in _once(integers(stages or "8", "--stages"))]
    clusters = {cluster.name: cluster for cluster in loaded}
    if len(clusters) < len(loaded):
        raise UsageError("two clusters have the same name", hint="Change [cluster] name in one of the files.")
    for cluster in loaded:
        if cluster.is_measured:
            raise UsageError(f"the devices of {cluster.name!r} have no costs of their own, and a replay measures none",
                             hint="Give them a profile (`fullpipe profile`), a cost curve, or bandwidth and FLOP/s.")
    return clusters


def _draft_variants(model: ModelOptions) -> list[str]:
    """What each method's draft may be; which is best is for the tuning to say."""
    from fullpipe.assembly import draft_names
    from fullpipe.stations.drafts.names import module_folder

    names = draft_names(model.model, model.draft)
    if modules := [name for name in names if module_folder(name)]:
        raise UsageError(f"{modules[0]} reads the target's hidden states, and a recording, which is what is replayed "
                         "here, holds none", hint="Run it with real stages: `fullpipe-lab simulate`, once for each "
                         "method.")
    models = [name for name in names if name != "ngram"]
    if len(models) > 1:
        raise UsageError("a benchmark takes one draft model", hint="Run it once for each.")
    if not models:
        return ["ngram"] if names else []
    return ["model", "model,ngram"] if "ngram" in names else ["model"]


def _draft_path(model: ModelOptions) -> str | None:
    """The draft model's weights, fetched if need be. Raises DraftMismatch for a vocabulary that is not the target's."""
    from fullpipe import hub
    from fullpipe.assembly import draft_names
    from fullpipe.models.tokens.loading import load_tokenizer
    from fullpipe.models.tokens.tokenizer import check_same_vocabulary

    models = [name for name in draft_names(model.model, model.draft) if name != "ngram"]
    if not models:
        return None
    fetch_all(model)
    path = hub.resolve(models[0])
    check_same_vocabulary(load_tokenizer(hub.resolve(model.model)), load_tokenizer(path))
    return str(path)


def _settings(methods: str, drafts: list[str], widths: list[int], depths: list[int] | None) -> list[Setting]:
    from fullpipe_lab.sweep import candidates

    names = [name.strip() for name in methods.split(",") if name.strip()]
    if "pp" not in names:
        names.insert(0, "pp")  # what every speed-up is over
    if not drafts and names != ["pp"]:
        raise UsageError("the methods need a draft", hint="Name one with --draft, or give --methods pp.")
    settings = [setting for name in dict.fromkeys(names) for setting in candidates(name, drafts, widths, depths)]
    for setting in settings:
        setting.make()  # refuses what it cannot be set to, before anything runs
    return settings

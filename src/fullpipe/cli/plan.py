"""`fullpipe plan` says which layout of hosts is quickest, and what others would be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullpipe.cli import console
from fullpipe.cli.lists import integers
from fullpipe.cli.options import Only, one_of
from fullpipe.errors import UsageError
from fullpipe.options import ModelOptions, PipelineOptions

if TYPE_CHECKING:
    from fullpipe.cluster.planner import Candidate, Found

_METHODS = one_of("auto", "fullpipe", "pp", "chain")
_AUTO = _METHODS("auto")
_CUTS = one_of("uniform", "compute-balanced", "communication-aware")
_TASKS = one_of("mixed", "chat", "code", "edit")


def plan(
    model: Annotated[ModelOptions, Only("model", "draft")],
    write: Annotated[Path | None, typer.Option("--write", "-w", help="Write the best plan to this file, for "
                                               "--plan.")] = None,
    order: Annotated[str | None, typer.Option("--order", help="Pin which hosts have stages, in this order: A,B,...")
                     ] = None,
    layers: Annotated[str | None, typer.Option("--layers", help="Pin how many layers each of these has.")] = None,
    cut: Annotated[_CUTS | None, typer.Option("--cut", help="Pin how layers are cut.")] = None,  # type: ignore[valid-type]
    draft_host: Annotated[str | None, typer.Option("--draft-host", help="Pin where the draft sits.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pin how many nodes a flight has at most.")] = None,
    method: Annotated[_METHODS, typer.Option("--method", help="Pin the method.")  # type: ignore[valid-type]
                      ] = _AUTO,
    task: Annotated[_TASKS | None, typer.Option("--task", help="What texts will be like. Default: as counted, where "  # type: ignore[valid-type]
                                                "there was anything to count.")] = None,
    pipeline: Annotated[PipelineOptions, Only("hosts", "stages", "ray_address", "interface", "host_ip", "data_port",
                                              "device", "threads")] = PipelineOptions(),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Measure hosts and links, and say which layout of the model is quickest. Without --hosts: on this machine."""
    if write is not None and not write.parent.is_dir():
        raise UsageError(f"cannot write {write}: there is no folder {write.parent}",
                         hint="Name a file in one that exists.")
    from fullpipe.assembly.planning import plan_for
    from fullpipe.cli.fetch import fetch_all
    from fullpipe.cli.hosts import print_hosts
    from fullpipe.cluster.pins import Pins
    from fullpipe.cluster.verdict import verdict

    if pipeline.stages is not None and pipeline.hosts is None:
        raise UsageError("stages of a plan are hosts, and there is one", param="stages",
                         hint="Name the hosts: `hosts=ray`.")
    pins = Pins(order=tuple(order.split(",")) if order else None, cut=cut and str(cut), draft_host=draft_host,
                layers=tuple(integers(layers, "--layers", least=0)) if layers else None, width=width,
                method=str(method))
    fetch_all(model, "fullpipe")
    planned = plan_for(model, pipeline, pins, task and str(task), say=console.print_note,  # type: ignore[arg-type]
                       tell=print_hosts)
    found, best = planned.found, planned.plan
    lines = verdict(found, planned.survey, planned.guesser)
    if as_json:
        console.print_json(_json(found) | {"verdict": lines, "plan": best.model_dump(by_alias=True, mode="json")})
    else:
        _print(found, lines)
    if write is not None:
        best.save(write)
        console.print_note(f"wrote {write}")


def _print(found: Found, lines: list[str]) -> None:
    console.print_table(("", "STAGES", "DRAFT ON", "CUT", "METHOD", "WIDTH", "MS A TOKEN", "PP THERE"),
                        [_row(name, one) for name, one in _named(found)])
    typer.echo()
    for line in lines:
        typer.echo(line)


def _named(found: Found) -> list[tuple[str, Candidate]]:
    """What is shown, by what it is the best of; the best of all first, and nothing twice."""
    rows = [("best", found.best)]
    rows += [(f"{len(one.layout.order)} host{'s' if len(one.layout.order) > 1 else ''}", one)
             for one in found.by_hosts]
    rows += [(one.cut, one) for one in found.by_cut]
    rows.append(("no draft", found.pp))
    if found.guessing:
        rows.append(("with a draft", found.guessing))
    if found.here:
        rows.append(("the head alone", found.here))
    seen: dict[Candidate, str] = {}
    for name, one in rows:
        seen.setdefault(one, name)
    return [(name, one) for one, name in seen.items()]


def _row(name: str, one: Candidate) -> tuple[str, ...]:
    width = str(one.mode.width) if one.method != "pp" else "1"
    return (name, _stages(one), one.layout.draft_host or "-", one.cut if len(one.layout.order) > 1 else "-",
            one.method, width, f"{1e3 * one.seconds:.1f}", f"{1e3 * one.pp_seconds:.1f}")


def _stages(one: Candidate) -> str:
    return ", ".join(f"{host} {layers}" for host, layers in zip(one.layout.order, one.layout.layers))


def _json(found: Found) -> dict[str, Any]:
    return {"best": _object(found.best), "by_hosts": list(map(_object, found.by_hosts)),
            "by_cut": list(map(_object, found.by_cut)), "pp": _object(found.pp),
            "guessing": _object(found.guessing) if found.guessing else None,
            "one_host": _object(found.here) if found.here else None}


def _object(one: Candidate) -> dict[str, Any]:
    return {"hosts": list(one.layout.order), "layers": list(one.layout.layers), "draft_host": one.layout.draft_host,
            "cut": one.cut, "method": one.method, "width": one.mode.width, "levels": one.mode.levels,
            "hit_rate": round(one.mode.hit, 4), "ms_per_token": round(1e3 * one.seconds, 3),
            "pp_ms_per_token": round(1e3 * one.pp_seconds, 3)}

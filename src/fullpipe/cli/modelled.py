"""`fullpipe modelled`: speedups by arithmetic, for set-ups that nobody has built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullpipe.cli import console, options
from fullpipe.cli.lists import decimals, integers
from fullpipe.errors import UsageError

if TYPE_CHECKING:
    from fullpipe.planning.modelled import Point

_ASSUMED = ("modelled: equal stages, costs that depend on neither rows nor context, acceptance by chance; no model "
            "runs. What else the recurrence leaves out stands in planning/modelled.py.")


def modelled(
    stages: Annotated[str, typer.Option("--stages", help="Numbers of pipeline stages.")] = "2,4,8,16,32,64",
    acceptance: Annotated[str, typer.Option("--acceptance", help="Chances that the draft's first guess is right.")]
    = "0.5,0.6,0.7,0.8,0.9",
    link_ms: Annotated[str, typer.Option("--link-ms", help="Latencies of every hop; other than 0 they need "
                                         "--stage-ms.")] = "0",
    draft_cost: Annotated[str, typer.Option("--draft-cost", help="Costs of a draft call, in stage times.")] = "1",
    methods: Annotated[str, typer.Option("--methods", help="Methods to compare with pp.")]
    = "chain,static-tree,pipedec,fullpipe",
    width: Annotated[str, typer.Option("--width", help="Nodes in a layer (not of chain).")] = "1",
    depth: Annotated[str, typer.Option("--depth", help="Tokens guessed per traversal (chain, static-tree); the best "
                                       "of them is shown.")] = "1,2,4,8,16",
    stage_ms: Annotated[float | None, typer.Option("--stage-ms", help="Time of a stage's step. Default: one unit.")]
    = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens per combination.")] = 1000,
    seed: options.Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Model the speedup over pp of every combination, by a recurrence, without running anything.

    Lists go with commas between. A thousand combinations take seconds.
    """
    links = decimals(link_ms, "--link-ms")
    if any(links) and stage_ms is None:
        raise UsageError("--link-ms in milliseconds needs a stage's time in milliseconds", hint="Add --stage-ms.")
    if stage_ms is not None and not 0 < stage_ms < float("inf"):
        raise UsageError(f"--stage-ms must be above 0 (got {stage_ms:g})")
    from fullpipe.planning.modelled import sweep

    unit = 1.0 if stage_ms is None else stage_ms / 1e3
    points = sweep(methods=[name.strip() for name in methods.split(",")],
                   stages=integers(stages, "--stages"),
                   acceptances=decimals(acceptance, "--acceptance"),
                   links=[link / 1e3 for link in links],
                   drafts=[cost * unit for cost in decimals(draft_cost, "--draft-cost")],
                   widths=integers(width, "--width"), depths=integers(depth, "--depth"),
                   stage=unit, tokens=tokens, seed=seed)
    if as_json:
        console.print_json({"clock": "modelled", "assumed": _ASSUMED, "tokens": tokens, "seed": seed,
                            "unit": "stage times" if stage_ms is None else "seconds",
                            "points": [_plain(point) for point in points]})
        return
    _print(points, unit)


def _plain(point: Point) -> dict[str, Any]:
    setup = point.outcome.setup
    return {"method": setup.method, "stages": len(setup.stages), "acceptance": point.acceptance, "link": setup.hops,
            "draft": setup.draft, "width": setup.width,
            "depth": setup.depth if setup.method in ("chain", "static-tree") else None,
            "hit_rate": point.outcome.hit_rate, "modelled_tbt": point.outcome.tbt,
            "modelled_steps_per_token": point.outcome.steps_per_token, "modelled_speedup": point.speedup}


def _print(points: list[Point], unit: float) -> None:
    """A line per set-up, a column per method."""
    columns = list(dict.fromkeys(_column(point) for point in points))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for point in points:
        setup = point.outcome.setup
        assert isinstance(setup.hops, float)
        key = (str(len(setup.stages)), f"{point.acceptance:g}", f"{1e3 * setup.hops:g}", f"{setup.draft / unit:g}")
        deep = f" (depth {setup.depth})" if setup.method in ("chain", "static-tree") else ""
        lines.setdefault(key, {})[_column(point)] = f"{point.speedup:.2f}x{deep}"
    typer.echo("Modelled speedup over pp:")
    console.print_table(("STAGES", "ACCEPTANCE", "LINK MS", "DRAFT COST", *columns),
                        [(*key, *(cells.get(column, "") for column in columns)) for key, cells in lines.items()])
    console.print_note(f"\n{_ASSUMED}")


def _column(point: Point) -> str:
    setup = point.outcome.setup
    return setup.method if setup.width == 1 else f"{setup.method} (width {setup.width})"

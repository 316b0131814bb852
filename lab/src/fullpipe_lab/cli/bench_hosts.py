"""`fullpipe-lab bench --hosts`: all methods in turn on the hosts as they are, on the wall clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fullpipe.cli import console
from fullpipe.cli.fetch import fetch_all
from fullpipe.errors import UsageError
from fullpipe.methods import METHODS, WITH_DEPTH
from fullpipe.options import ModelOptions, Options
from fullpipe.prompts import FilePrompt
from fullpipe_lab.turns import AS_IT_COMES

_LEAST_PROMPTS = 2


@dataclass(frozen=True, slots=True)
class OnHosts:
    """Is what `bench --hosts` measures. hosts: "ray", or a hosts file. sizes: of each method that has one."""

    hosts: str
    ray_address: str | None
    methods: Sequence[str]
    sizes: dict[str, list[int]]
    tokens: int

    def check(self, prompts: Sequence[FilePrompt]) -> None:
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise UsageError(f"unknown method {unknown[0]!r}", param="methods", hint=f"One of {', '.join(METHODS)}.")
        if len(prompts) < _LEAST_PROMPTS:
            raise UsageError("one prompt is not enough: on the last one sizes are tried, and it does not count",
                             param="prompts", hint="Give another prompt, or a larger `limit`.")


def measure_hosts(model: ModelOptions, wanted: OnHosts, prompts: Sequence[FilePrompt], out: Path) -> None:
    """Print a row for each method, and keep the receipt in the folder. Raises UsageError and its kin, and SystemExit
    where two texts differ."""
    wanted.check(prompts)
    fetch_all(model, "fullpipe")
    from fullpipe_lab.asking import Placed
    from fullpipe_lab.files import make_folder
    from fullpipe_lab.receipts import save_receipt, study_receipt
    from fullpipe_lab.turns import measure

    make_folder(out)
    options = Options.of(model=model.model, draft=model.draft, dtype=model.dtype, method="fullpipe", hosts=wanted.hosts,
                         ray_address=wanted.ray_address)
    with Placed(options, progress=console.print_note) as on:
        asked = [(one.id, on.encode([{"role": "user", "content": one.text}])) for one in prompts]
        rows, said = measure(on, asked, wanted.methods, wanted.sizes, tokens=wanted.tokens, done=console.print_note)
        plan = on.plan.model_dump(mode="json")
    settings = {"model": model.model, "draft": model.draft, "dtype": model.dtype, "tokens": wanted.tokens, "plan": plan}
    save_receipt(study_receipt("bench_hosts", settings | {"cells": rows}, said), out / "receipt.json")
    console.print_table(list(rows[0]), [[str(value) for value in one.values()] for one in rows])
    console.print_note(f"On the wall clock, {len(asked) - 1} prompts. Wrote {out / 'receipt.json'}")
    if not all(one["identical"] for one in rows):
        raise SystemExit("two texts differ")


def sizes_of(methods: Sequence[str], widths: Sequence[int], depths: Sequence[int]) -> dict[str, list[int]]:
    """What to try for each method that is not run as it comes."""
    return {name: list(depths if name in WITH_DEPTH else widths) for name in methods if name not in AS_IT_COMES}

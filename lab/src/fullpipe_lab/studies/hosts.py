"""Several hosts on the wall clock: what links cost `pp`, what speculation does about it, and llama.cpp over RPC beside.

    python -m fullpipe_lab.studies.hosts [--hosts 2,3,4] [--delays 0.1,10,50,100] [--sets FILE ...] [--prompts 5]
        [--methods pp,chain,static-tree,pipedec,fullpipe] [--tokens 64] [--rival] [--quick] [--write [NAME]]

Hosts are network namespaces that share this machine's cores, links have the delay of --delays one way. Every host has
a stage, cut by the planner; all methods run on the same stages, one after another, all prompts in turn, greedily. `pp`
and `fullpipe` run as they come; any other method has its best of --widths (or --depths) on a prompt that is not
counted, tried before. With --rival llama.cpp is asked the same prompts by token ids, on two hosts with one core each,
half of its layers on the second, in each of --modes. Whoever is asked, the asker sits on the first host, and its clock
counts.

Cells that are done are in --out/journal.jsonl: the same command goes on where it was, with the same code; one that
fails is told and left for the next time. --out/report.md is the table. Ends with 1 when texts differ or a cell failed.
`--write` keeps the receipt in lab/receipts, as hosts.json or NAME.json.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from fullpipe.cli.lists import decimals, integers
from fullpipe.cluster.netlab import Netlab, Shape
from fullpipe.cluster.provenance import commit_of, provenance
from fullpipe.errors import FullpipeError
from fullpipe.files import write_whole
from fullpipe.hub import resolve
from fullpipe.models.weights import open_model
from fullpipe_lab.ending import run
from fullpipe_lab.files import Journal
from fullpipe_lab.hosts.asking import Sizes, ask_ours, ask_rival, questions
from fullpipe_lab.hosts.figures import MESH_LLM, beside, rival_rows, rows_of
from fullpipe_lab.hosts.llamacpp_rpc import Server, llamacpp_rpc, settings
from fullpipe_lab.hosts.ours import Cluster, Running, start_cluster
from fullpipe_lab.hosts.places import Places
from fullpipe_lab.peers.process import RunnerFailed
from fullpipe_lab.peers.run import Question
from fullpipe_lab.receipts import HERE, STUDIES, save_receipt, study_receipt
from fullpipe_lab.report import render

Measure = Callable[[], dict[str, Any]]


def opened(hosts: int, delay_ms: float) -> AbstractContextManager[Places]:
    return Netlab(hosts, Shape(delay_ms=delay_ms))


class Study:
    """One run of it. asked, other: prompts that are counted, and the one that is not."""

    def __init__(self, given: argparse.Namespace, asked: list[Question], other: list[int]) -> None:
        self._given, self._asked, self._other = given, asked, other
        self._open = ExitStack()
        self._stands: tuple[tuple[int, float], Places, Running] | None = None
        self._sizes: Sizes = {"width": tuple(integers(given.widths, "--widths")),
                              "depth": tuple(integers(given.depths, "--depths"))}

    def wanted(self) -> dict[str, Measure]:
        """All cells, by their key."""
        given = self._given
        delays = decimals(given.delays, "--delays")
        cells: dict[str, Measure] = {}
        for hosts, ms, method in product(integers(given.hosts, "--hosts"), delays, given.methods.split(",")):
            cells[f"{hosts}/{ms:g}/{method}"] = partial(self._ours, hosts, ms, method)
        if given.rival:
            for ms, mode in product(delays, given.modes.split(",")):
                cells[f"rival/{ms:g}/{mode}"] = partial(self._rival, ms, mode)
        return cells

    def _ours(self, hosts: int, ms: float, method: str) -> dict[str, Any]:
        lab, running = self._cluster(hosts, ms)
        try:
            samples = ask_ours(running, lab, method, self._asked, self._other, self._sizes, self._given.tokens)
        except BaseException:
            self.close()
            raise
        return {"hosts": hosts, "delay_ms": ms, "method": method, "settings": running.settings, "samples": samples}

    def _cluster(self, hosts: int, ms: float) -> tuple[Places, Running]:
        """The one that stands, if it is of this kind: all methods are asked on the same stages."""
        if self._stands is None or self._stands[0] != (hosts, ms):
            self.close()
            given = self._given
            lab = self._open.enter_context(opened(hosts, ms))
            cluster = Cluster(given.model, given.draft, hosts, given.dtype)
            running = self._open.enter_context(start_cluster(lab, cluster))
            self._stands = (hosts, ms), lab, running
        return self._stands[1], self._stands[2]

    def close(self) -> None:
        """End the cluster that stands."""
        self._stands = None
        self._open.close()

    def _rival(self, ms: float, mode: str) -> dict[str, Any]:
        path = resolve(self._given.model)
        draft = resolve(self._given.rival_draft) if mode == "draft" else None
        server = Server(path, open_model(path).config.num_layers, mode, draft)
        self.close()
        with opened(2, ms) as lab, llamacpp_rpc(lab, server) as rival:
            samples = ask_rival(rival, lab, self._asked, self._other, self._given.tokens)
            return {"hosts": 2, "delay_ms": ms, "mode": mode, "settings": settings(server), "samples": samples}


def measure_missing(journal: Journal, wanted: dict[str, Measure]) -> list[str]:
    """What failed, and why."""
    failed = []
    for key, measure in wanted.items():
        if key in journal:
            continue
        print(f"{key}: measuring", file=sys.stderr, flush=True)
        try:
            journal.add(key, measure() | {"date": provenance()["date"]})
        except (RunnerFailed, FullpipeError) as error:
            failed.append(f"{key}: {error}")
            print(failed[-1], file=sys.stderr, flush=True)
    return failed


def tell(results: dict[str, Any]) -> str:
    """The report. results: a receipt, whose cells are in "results"."""
    return render("hosts.md.j2", receipt=results, mesh=MESH_LLM, **results["results"])


def figures(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    ours = [cell for cell in cells if "method" in cell]
    rivals = [cell for cell in cells if "mode" in cell]
    return {"cells": rows_of(ours), "beside": beside(ours, rivals), "rivals": rival_rows(ours, rivals)}


def main() -> None:
    given = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    asked, other = questions(given.model, given.sets, given.prompts)
    plan = {"commit": commit_of(HERE)[0], "model": given.model, "draft": given.draft, "dtype": given.dtype,
            "tokens": given.tokens, "prompts": [one.id for one in asked], "widths": given.widths,
            "depths": given.depths}
    journal = Journal(given.out / "journal.jsonl")
    journal.bind(plan)
    with closing(Study(given, asked, other)) as study:
        wanted = study.wanted()
        failed = measure_missing(journal, wanted)
    cells = [journal.rows[key] for key in wanted if key in journal]
    receipt = study_receipt("hosts", plan | figures(cells), cells)
    report = tell(receipt)
    write_whole(given.out / "report.md", report)
    print(report)
    if given.write:
        save_receipt(receipt, STUDIES / f"{given.write}.json")
    if failed:
        sys.exit("\n".join(["cells failed:", *failed]))
    if not all(row["identical"] for row in receipt["results"]["cells"]):
        sys.exit("texts differ")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default="2,3,4")
    parser.add_argument("--delays", default="0.1,10,50,100", help="of every link, one way, in ms")
    parser.add_argument("--methods", default="pp,chain,static-tree,pipedec,fullpipe")
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b,ngram")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sets", type=Path, nargs="+", help="files of prompts; default: the bundled ones")
    parser.add_argument("--prompts", type=int, default=5, help="of each file, or category, at most")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--widths", default="1,2,4,8")
    parser.add_argument("--depths", default="2,4,8")
    parser.add_argument("--rival", action="store_true", help="llama.cpp over RPC too, on two hosts")
    parser.add_argument("--modes", default="plain,ngram-simple", help="of llama.cpp; there is draft, too")
    parser.add_argument("--rival-draft", default="qwen2.5-coder-0.5b", help="model of its mode draft")
    parser.add_argument("--out", type=Path, default=Path("lab-out/hosts"))
    parser.add_argument("--quick", action="store_true", help="SmolLM2 with n-gram, two hosts, a prompt a category")
    parser.add_argument("--write", nargs="?", const="hosts", metavar="NAME", help="keep the receipt in lab/receipts")
    given = parser.parse_args()
    if given.quick:
        given.model, given.draft, given.hosts, given.delays = "smollm2-135m", "ngram", "2", "0.1,20"
        given.prompts, given.tokens, given.widths, given.depths = 1, 16, "2,4", "4"
    return given


if __name__ == "__main__":
    run(main)

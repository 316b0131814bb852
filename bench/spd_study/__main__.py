"""The study of draft modules: SPD against an exit head, an ablation and n-gram, by number of stages.

    python bench/spd_study measure --modules DIR --main DIR --prompts DIR [--part study|main] [--tokens 64] [--limit 2]
    python bench/spd_study cost --main DIR [--stages 2 4 8]
    python bench/spd_study clusters --main DIR --prompts DIR [--clusters gpus-8 gpus-14]
    python bench/spd_study report --modules DIR --main DIR

Everything goes to journals in --out (default: bench/reports/spd/journal), a line per answer, and a run that is
killed goes on where it was. `report` makes receipt.json, report.md and the figure in bench/reports/spd of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spd_study.cells import STAGES, main_cells, study_cells
from spd_study.journal import Journal

MODEL = "smollm2-135m"
REPORT = Path(__file__).resolve().parents[1] / "reports" / "spd"
SETS = ("humaneval", "gsm8k", "mt_bench")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "cost", "clusters", "report"))
    parser.add_argument("--modules", type=Path, default=Path("study"))
    parser.add_argument("--main", type=Path, default=Path("main48"))
    parser.add_argument("--prompts", type=Path, default=Path("prompts"), help="humaneval, gsm8k and mt_bench .jsonl")
    parser.add_argument("--part", choices=("study", "main"), default="study")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--limit", type=int, default=2, help="prompts of each set")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--clusters", nargs="+", default=["gpus-8", "gpus-14"])
    parser.add_argument("--out", type=Path, default=REPORT / "journal")
    asked = parser.parse_args()
    if asked.what == "report":
        from spd_study.report import write_report

        names = [f"{kind}{n}" for kind in ("spd", "exit") for n in STAGES]
        names += ["ablation", "spdall", "long_exit8", "long_ablation", "long_spd48"]
        folders = [asked.modules / name for name in names]
        write_report(asked.out, [one for one in (*folders, asked.main) if (one / "summary.json").exists()], REPORT)
        return
    import torch
    from spd_study.measure import Modules, Study

    from fullpipe.bench.datasets import read_all
    from fullpipe.bench.provenance import provenance

    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(asked.out / f"{asked.part if asked.what == 'measure' else asked.what}.jsonl")
    about = provenance()
    journal.add(f"run/{about['date']}", about)
    modules = Modules(asked.modules, asked.main)
    prompts = read_all([asked.prompts / f"{name}.jsonl" for name in SETS], asked.limit)
    if asked.what == "measure":
        study = Study(MODEL, modules, prompts, asked.tokens, journal)
        study.run(study_cells() if asked.part == "study" else main_cells())
    elif asked.what == "clusters":
        from spd_study.clusters import run_clusters

        run_clusters(MODEL, modules, prompts, asked.tokens, asked.clusters, journal)
    else:
        from spd_study.cost import run_cost

        run_cost(MODEL, modules, prompts, asked.tokens, asked.stages, journal)


if __name__ == "__main__":
    main()

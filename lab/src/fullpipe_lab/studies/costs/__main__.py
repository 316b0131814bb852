import argparse
import os
from pathlib import Path
from fullpipe.cluster.provenance import provenance
from fullpipe_lab.files import Journal, make_folder
from fullpipe_lab.receipts import HERE
from fullpipe_lab.studies.costs.measuring import DRAFTS, OTHERS, OURS, PLAIN, Measuring


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser()
    parser.add_argument("--bench", type=Path)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--only", default="pp,chain,pipedec,static-tree,fullpipe")
    parser.add_argument("--clusters", nargs="+")
    parser.add_argument("--drafts", default="ngram,model,both")
    asked = parser.parse_args()
    journal = Journal(asked.bench / f"journal-t{asked.temperature:g}.jsonl")
    about = provenance(HERE)
    journal.add(f"run/{about['date']}", about)
    m = Measuring(asked.bench, "qwen2.5-coder-0.5b", asked.clusters, asked.temperature, 5, journal)
    for cell in m.cells(asked.drafts.split(",")):
        for method in asked.only.split(","):
            m.run(cell, method)

main()

"""What every benchmark's receipt says: command, commit, machine, raw samples."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from fullpipe.bench.provenance import commit_of, machine, versions

ROOT = Path(__file__).resolve().parent.parent


def receipt(name: str, results: dict[str, Any], samples: Any) -> dict[str, Any]:
    """results: the figures. samples: all that they were computed from."""
    (commit, dirty), (_, scripts_dirty) = commit_of(ROOT / "src"), commit_of(ROOT / "bench")
    return {"benchmark": name, "results": results, "command": " ".join([Path(sys.executable).name, *sys.argv]),
            "commit": commit, "dirty": dirty or scripts_dirty,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine() | versions(),
            "samples": samples}


def finish(value: dict[str, Any], *, write: bool) -> None:
    """Print the receipt as the last line; with `write`, keep it in bench/receipts."""
    if write:
        path = ROOT / "bench" / "receipts" / f"{value['benchmark']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value, indent=1) + "\n")
        print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)
    print(json.dumps({key: part for key, part in value.items() if key != "samples"}))

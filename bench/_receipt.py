"""What every benchmark's receipt says: command, commit, machine, raw samples."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def receipt(name: str, results: dict[str, Any], samples: Any) -> dict[str, Any]:
    """results: the figures. samples: all that they were computed from."""
    return {"benchmark": name, "results": results, "command": " ".join([Path(sys.executable).name, *sys.argv]),
            "commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--", "src", "bench")),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine(), "samples": samples}


def machine() -> dict[str, Any]:
    import torch

    return {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version(),
            "torch": torch.__version__}


def finish(value: dict[str, Any], *, write: bool) -> None:
    """Print the receipt as the last line; with `write`, keep it in bench/receipts."""
    if write:
        path = ROOT / "bench" / "receipts" / f"{value['benchmark']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value, indent=1) + "\n")
        print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)
    print(json.dumps({key: part for key, part in value.items() if key != "samples"}))


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())

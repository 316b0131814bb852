"""What has been measured so far, a line each: a run that is killed goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """JSON lines with a `key`. A line that was cut off by a kill does not count; the next one stands on its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.rows[row["key"]] = row
        self._torn = bool(text) and not text.endswith("\n")

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def add(self, key: str, row: dict[str, Any]) -> None:
        """On disk when this returns."""
        self.rows[key] = {"key": key, **row}
        with self.path.open("a") as file:
            file.write("\n" * self._torn + json.dumps(self.rows[key]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._torn = False

"""Files that survive a kill: written whole, or line by line with a torn end that does not count."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fullpipe.errors import CacheError, UsageError


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """A disk that is full or gone ends the run with the reason; what is in the file stays."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"cannot write {path}: {error.strerror or error}",
                         hint="Make room and run the same command again: it goes on where it stopped.") from error


def make_folder(folder: Path) -> None:
    """The folder is there when this returns. Raises UsageError when it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror or error}",
                         hint="Name a folder that is writable.") from error


class Lines:
    """JSON objects in a file, a line each, on the disk when `add` returns.

    A line without its end is that of a run that was killed: it does not count, and the first `add` cuts it off. Raises
    UsageError naming any other line that is not a JSON object, and for a file that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = 0  # bytes up to the end of the last whole line
        self.rows = list(self._read()) if path.exists() else []

    def add(self, row: dict[str, Any]) -> None:
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with on_disk(self.path), open(self.path, "ab") as file:
            file.truncate(self._whole)
            file.write(line)
        self._whole += len(line)
        self.rows.append(row)

    def _read(self) -> Iterator[dict[str, Any]]:
        try:
            written = self.path.read_bytes()
            self._whole = written.rfind(b"\n") + 1
            text = written[: self._whole].decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {self.path}: {error}", hint="Name the file that was recorded.") from error
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UsageError(f"{self.path}, line {number}: not a JSON object",
                                 hint="The file is damaged; delete the line, and run the same command again.")
            yield row


class Journal:
    """What has been measured so far, by key: a run that is killed goes on where it was. The newest row of a key
    counts. The one called "plan" says of what all are."""

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self._lines = Lines(path)
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in self._lines.rows if "key" in row}

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def bind(self, plan: Mapping[str, Any], **notes: Any) -> None:
        """Say what is measured here, if nobody has. notes: kept beside it.

        Raises UsageError when the journal is of another plan: its rows would be mixed with others.
        """
        if "plan" not in self:
            self.add("plan", {**plan, **notes})
        for name, value in plan.items():
            if (kept := self.rows["plan"].get(name)) != value:
                raise UsageError(f"{self.path} was measured with {name} {kept!r}, not {value!r}",
                                 hint="Name another --out, or the same settings.")

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = {"key": key, **row}
        self._lines.add(self.rows[key])

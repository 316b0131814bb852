"""Files that change in one move."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from fullpipe.errors import UsageError


def write_whole(path: Path, text: str) -> None:
    """Replace what is in a file. Raises UsageError, and leaves what was there, when it cannot be written."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}",
                         hint="Name a file in a folder that exists, is writable and has room.") from error
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)  # after the move there is none

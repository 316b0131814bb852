"""A picture is written without harm to what was there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fullpipe.errors import UsageError

_HINT = "Name a file in a folder that exists and is writable."


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path`, with the same suffix, that takes its place when the block ends well.

    Raises `UsageError` when it cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        try:
            handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
            os.close(handle)
            temporary = Path(name)
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except OSError as error:
            raise UsageError(f"cannot write the trace {path}: {error.strerror or error}", hint=_HINT) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def check_writable(path: Path) -> None:
    """Raise `UsageError` when `path` surely cannot be written, before anybody works for it."""
    folder = path.parent
    if path.is_dir():
        reason = "Is a directory"
    elif not folder.is_dir():
        reason = "No such file or directory"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        reason = "Permission denied"
    else:
        return
    raise UsageError(f"cannot write the trace {path}: {reason}", hint=_HINT)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""A GGUF model that llama.cpp's gguf-split cut into several files: which files those are."""

from __future__ import annotations

import re
from pathlib import Path

from fullpipe.errors import DamagedModel, ModelNotFound
from fullpipe.models.gguf_header import Header, read_header

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def first_part(path: Path) -> Path:
    """The first of the parts that a file's name says it is one of, where that is there; else the file itself."""
    name = _PART.fullmatch(path.name)
    first = path.with_name(f"{name['stem']}-00001-of-{name['count']}.gguf") if name else path
    return first if first.is_file() else path


def gguf_parts(path: Path) -> list[Path]:
    """All files of the model that a file is, or is a part of; the first has the metadata.

    Raises `ModelNotFound` when one is missing, `DamagedModel` when they do not belong together.
    """
    count = int(read_header(path, arrays=False).metadata.get("split.count", 1))
    if count <= 1:
        return [path]
    name = _PART.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise DamagedModel(f"{path} is one of {count} parts of a split GGUF file, and its name does not say which",
                           hint=f"Give the parts their names back: NAME-00001-of-{count:05}.gguf and so on.")
    parts = [path.with_name(f"{name['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if missing := [part for part in parts if not part.is_file()]:
        raise ModelNotFound(f"of the {count} parts of a split GGUF file {_names(missing)} "
                            f"{'is' if len(missing) == 1 else 'are'} missing in {path.parent}",
                            hint="Fetch what is missing, and leave the parts side by side under their names.")
    return parts


def check_parts(parts: dict[Path, Header]) -> None:
    """Raise `DamagedModel` unless these headers are those of all parts of one file, in their order."""
    if len(parts) == 1:
        return
    held = sum(len(header.tensors) for header in parts.values())
    wanted = next(iter(parts.values())).metadata.get("split.tensors.count", held)
    for number, (path, header) in enumerate(parts.items()):
        place = header.metadata.get("split.no"), header.metadata.get("split.count")
        if place != (number, len(parts)):
            raise DamagedModel(f"{path} is not part {number + 1} of {len(parts)}: its header says part "
                               f"{(place[0] or 0) + 1} of {place[1]}", hint="Fetch this part again.")
    if held != wanted:
        raise DamagedModel(f"the parts of {next(iter(parts))} hold {held} tensors, and their headers say {wanted}",
                           hint="The parts are of different files; fetch them all again.")


def gguf_in_folder(folder: Path) -> Path | None:
    """The one GGUF model of a folder: its file, or the first of its parts; None when there is none.

    What reads pictures for it ("mmproj") is not one. Raises `ModelNotFound` when there are several.
    """
    files = sorted(file for file in folder.glob("*.gguf") if "mmproj" not in file.name.lower())
    models = {(part["stem"], part["count"]) if (part := _PART.fullmatch(file.name)) else file: file
              for file in reversed(files)}
    if len(models) > 1:
        raise ModelNotFound(f"the folder {folder} holds several models: {_names(sorted(models.values()))}",
                            hint=f"Name one of them, such as {sorted(models.values())[0]}; of a split model any part "
                                 "will do.")
    return first_part(next(iter(models.values()))) if models else None


def _names(files: list[Path]) -> str:
    return ", ".join(file.name for file in files)

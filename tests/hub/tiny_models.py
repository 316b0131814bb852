"""Tiny models in tiny wheels."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fullpipe.hub.catalogue import CatalogueModel, Part


@dataclass(frozen=True)
class TinyModel:
    """A catalogue model of a few hundred kilobytes, and the folder with its wheels."""

    model: CatalogueModel
    content: bytes
    wheels: Path

    def wheel(self, part: int) -> Path:
        return self.wheels / f"tiny_model_part{part}-1.0-py3-none-any.whl"


def write_wheel(folder: Path, package: str, member: str, content: bytes) -> None:
    name = package.replace("-", "_")
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        info = f"{name}-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def make_tiny(folder: Path, *, parts: int = 3, part_size: int = 100_000) -> TinyModel:
    folder.mkdir(exist_ok=True)
    pieces = [bytes([65 + n]) * (part_size - n) for n in range(parts)]
    entries = []
    for number, piece in enumerate(pieces, start=1):
        package = f"tiny-model-part{number}"
        member = f"tiny_model_part{number}/data/part{number:02d}.bin"
        write_wheel(folder, package, member, piece)
        entries.append(Part(package, "1.0", member, len(piece), hashlib.sha256(piece).hexdigest()))
    content = b"".join(pieces)
    model = CatalogueModel(
        name="tiny", title="Tiny", licence="Apache-2.0", draft="ngram",
        sha256=hashlib.sha256(content).hexdigest(), parts=tuple(entries),
    )
    return TinyModel(model, content, folder)

"""Parts of a model for those who have no files of it: what it consists of, which bytes a stage reads. No torch.

    manifest = manifest_of(path, sha256)                             # on the head
    ranges = needed(open_model(path), 3, 6, has_embedding=False, has_head=False)
    chunk = Source(path, manifest).read(ranges[0])                   # for whoever asks

On the other side `copies.Copy` takes the chunks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta, Struct

from fullpipe.errors import DamagedModel, UsageError
from fullpipe.models.gguf_parts import gguf_parts
from fullpipe.models.ranges import CHUNK, Range, merged
from fullpipe.models.shards import ADAPTER, ADAPTER_WEIGHTS, CONFIG, INDEX, shard_files

if TYPE_CHECKING:
    from fullpipe.models.files import ModelFiles, Place

# What lies in the folder of a draft module beside its weights.
_FIXTURE = "parity_fixture.safetensors"
# What a tokenizer is read from, by stations that hold texts to a structure.
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json")

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class File(Struct, frozen=True, array_like=True):
    """One file of a model. name: with slashes, seen from the folder that the model lies in."""

    name: str
    size: Annotated[int, Meta(ge=0)]
    sha256: Sha256

    def __post_init__(self) -> None:
        name = PurePosixPath(self.name)
        if name.is_absolute() or ".." in name.parts or not name.name:
            raise ValueError(f"{self.name!r} is no name of a model's file")


class Manifest(Struct, frozen=True, array_like=True):
    """What a model consists of. name: of its file, of the first of its parts, or of its folder."""

    name: str
    files: tuple[File, ...]

    def __post_init__(self) -> None:
        if not self.files or self.name != PurePosixPath(self.files[0].name).parts[0]:
            raise ValueError(f"{self.name!r} is not where the files of this manifest lie")

    @property
    def digest(self) -> str:
        """What is the same for models of the same content, whatever the name: of one file its SHA-256."""
        if len(self.files) == 1:
            return self.files[0].sha256
        listed = "".join(f"{file.sha256}  {PurePosixPath(file.name).name}\n" for file in self.files)
        return hashlib.sha256(listed.encode()).hexdigest()

    def paths(self, folder: Path) -> list[Path]:
        """Where its files lie if the model lies in this folder."""
        return [folder / file.name for file in self.files]

    def everything(self) -> list[Range]:
        """All bytes: what a draft module needs."""
        return merged(Range(number, 0, file.size) for number, file in enumerate(self.files))


def manifest_of(path: Path, sha256: Callable[[Path], str]) -> Manifest:
    """The manifest of a model. path: as `hub.resolve` gives it. sha256: of a file, in hexadecimal.

    Raises what `files_of` raises.
    """
    files, folder = files_of(path), _folder_of(path)
    return Manifest(files[0].relative_to(folder).parts[0], tuple(
        File(file.relative_to(folder).as_posix(), file.stat().st_size, sha256(file)) for file in files))


def files_of(path: Path) -> list[Path]:
    """The files that a stage may read of a model, a LoRA adapter or a draft module, by their absolute names, in a fixed
    order.

    Raises `ModelNotFound` or `DamagedModel` where there are none, or one is missing.
    """
    path = Path(os.path.abspath(path))
    if not path.is_dir():
        return gguf_parts(path)
    adapter = [path / name for name in (ADAPTER, ADAPTER_WEIGHTS)]
    if all(file.is_file() for file in adapter) and not any(path.glob("model*.safetensors")):
        return adapter
    before, behind = ([path / name for name in names if (path / name).is_file()]
                      for names in ((CONFIG, INDEX, _FIXTURE), _TOKENIZER))
    return list(dict.fromkeys([*before, *shard_files(path), *behind]))


def opening(files: ModelFiles) -> list[Range]:
    """What `open_model` reads of a model; whoever has these bytes alone opens a model of zeros."""
    return _ranges(files, files.opening())


def needed(files: ModelFiles, first: int, last: int, *, has_embedding: bool, has_head: bool) -> list[Range]:
    """What `open_model` and `load_slice` read for these layers of a model, whatever the dtype and the device, and with
    the head what the tokenizer is read from."""
    names = files.names_of(first, last, has_embedding=has_embedding, has_head=has_head)
    read = _ranges(files, [*files.opening(), *map(files.place, names)])
    return merged([*read, *_tokenizer(files)]) if has_head else read


def _tokenizer(files: ModelFiles) -> list[Range]:
    """All of its files in a folder; in a GGUF file it stands in the header."""
    return [Range(number, 0, size) for number, file in enumerate(files_of(files.path))
            if file.name in _TOKENIZER and (size := file.stat().st_size)]


def _ranges(files: ModelFiles, places: Iterable[Place]) -> list[Range]:
    numbers = {path: number for number, path in enumerate(files_of(files.path))}
    return merged(Range(numbers[Path(os.path.abspath(path))], start, start + size) for path, start, size in places)


def _folder_of(path: Path) -> Path:
    """The folder that a model lies in: a file of it, or its own folder."""
    return Path(os.path.abspath(path)).parent


# ---- what is sent ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of a model on their way. checksum: of the data."""

    range: Range
    data: bytes | memoryview
    checksum: bytes


def checksum(data: bytes | memoryview) -> bytes:
    """Sixteen bytes that tell whether others arrived than were sent."""
    return hashlib.blake2b(data, digest_size=16).digest()


class Source:
    """Reads chunks for those who ask. One thread at a time.

    Raises `DamagedModel` when a file is not as the manifest says.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._open: list[int] = []
        self.manifest = manifest
        self._paths = manifest.paths(_folder_of(path))
        for file in self._paths:
            self._open.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
        self._states = [self._state(number) for number in range(len(self._open))]
        for number, listed in enumerate(manifest.files):
            if self._states[number][0] != listed.size:
                raise self._changed(number)

    def __del__(self) -> None:
        for file in self._open:
            os.close(file)

    def read(self, wanted: Range) -> Chunk:
        """At most `CHUNK` bytes. Raises UsageError for a range that is none of this model's, `DamagedModel` when the
        file was changed since."""
        if wanted.file >= len(self._open) or not 0 < wanted.size <= CHUNK or (
                wanted.stop > self.manifest.files[wanted.file].size):
            raise UsageError(f"{wanted} was asked for, and {self.manifest.name} has no such bytes",
                             hint="Ask for ranges of its manifest, a chunk at a time.")
        data = os.pread(self._open[wanted.file], wanted.size, wanted.start)
        if len(data) < wanted.size or self._state(wanted.file) != self._states[wanted.file]:
            raise self._changed(wanted.file)
        return Chunk(wanted, data, checksum(data))

    def _state(self, number: int) -> tuple[int, int]:
        stat = os.fstat(self._open[number])
        return stat.st_size, stat.st_mtime_ns

    def _changed(self, number: int) -> DamagedModel:
        return DamagedModel(f"{self._paths[number]} was changed while other hosts were given parts of it",
                            hint="Leave the model's files alone while it is served, and start again.")

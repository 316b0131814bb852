"""What is to be placed on hosts: a model, with who guesses for it, and its bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fullpipe.cluster.agent import Opening
from fullpipe.cluster.layout import Guesser
from fullpipe.cluster.plan import Plan
from fullpipe.cluster.report import HostReport
from fullpipe.errors import DamagedModel
from fullpipe.hub import cache
from fullpipe.models.partial import Manifest, Source, needed, opening
from fullpipe.models.ranges import CHUNK, Range, chunks
from fullpipe.models.weights import open_model
from fullpipe.stations.spec import StationSpec


@dataclass(frozen=True, slots=True)
class Wanted:
    """Says what is to be placed.

    model, draft: as plans name them. models: names of the target, and of the draft model if there is one; paths: where
    they lie on the head. guesser: who guesses; None: nobody. describe: the stations of a plan, with the head's paths.
    dtype, quantization, device: see options. threads: of a station; None: as many as its host has cores. kernels:
    whether stages compute with the native ones. manifests: what is known of the models' files, by path; the first that
    was seen counts. adapter: where the LoRA adapter lies on the head that stages merge; None: they merge none.
    """

    model: str
    draft: str
    models: tuple[str, ...]
    paths: tuple[Path, ...]
    guesser: Guesser | None
    describe: Callable[[Plan], tuple[list[StationSpec], StationSpec | None]]
    dtype: str = "auto"
    quantization: str | None = None
    device: str = "cpu"
    threads: int | None = None
    kernels: bool = True
    manifests: dict[Path, Manifest] = field(default_factory=dict)
    adapter: Path | None = None

    @property
    def read(self) -> tuple[Path, ...]:
        """Everything that stations read."""
        return (*self.paths, self.adapter) if self.adapter else self.paths

    def manifest(self, path: Path) -> Manifest:
        """What a model consists of. Hosts are measured with it and given parts of it, so it stays what it was."""
        if path not in self.manifests:
            self.manifests[path] = cache.manifest(path)
        return self.manifests[path]

    def check_unchanged(self) -> None:
        """Raises DamagedModel where files are others than they were: no text is to be begun with one model and ended
        with another."""
        for path in self.read:
            if cache.manifest(path) != self.manifest(path):
                raise DamagedModel(f"{path} has been changed while this runs",
                                   hint="Start again to run with what is there now, or put back what was there.")

    def opening(self, path: Path) -> Opening:
        """What a host needs to open a model of zeros."""
        source = Source(path, self.manifest(path))
        parts = [source.read(part) for part in chunks(opening(open_model(path)), CHUNK)]
        return Opening(source.manifest, [(one.range, bytes(one.data), one.checksum) for one in parts])


def own_path(wanted: Wanted, host: HostReport, at: int, head: str) -> str | None:
    """Where a host has the target (0) or the draft model (1); None where it does not."""
    return str(wanted.paths[at]) if host.name == head else host.model(wanted.models[at]).path


def everything(path: Path) -> list[Range]:
    """All bytes that a station reads of a model."""
    files = open_model(path)
    return needed(files, 0, files.config.num_layers, has_embedding=True, has_head=True)

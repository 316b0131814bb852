"""A host without the model's files gets what its stage reads of them from the engine's host, while the stage starts."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters import shapes_of, write_adapter
from fullpipe.errors import DamagedModel
from fullpipe.messages import Failed, Flight, Landed, Opening, Part
from fullpipe.models.copies import Copy
from fullpipe.models.partial import Chunk, Manifest, Source, manifest_of, needed
from fullpipe.models.ranges import Range, merged, total, without
from fullpipe.models.weights import open_model
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.fetching import reads
from fullpipe.pipeline.frames import Fetch
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.starting import Hosting, Place
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.request import SamplingParams
from fullpipe.stations.spec import StationSpec
from fullpipe.stations.target import build_stage
from tiny import LAYERS, tiny_model, write_gguf

pytestmark = pytest.mark.processes

CUT = 2  # layers of the first stage
FLIGHTS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some MiB, so that they come in several chunks."""
    return write_gguf(tiny_model("llama", hidden_size=256, intermediate_size=1536), tmp_path_factory.mktemp("head") /
                      "model.gguf")


@pytest.fixture(scope="module")
def manifest(model: Path) -> Manifest:
    return manifest_of(model, lambda path: hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture(scope="module")
def ranges(model: Path) -> list[Range]:
    """What the second stage reads."""
    return needed(open_model(model), CUT, LAYERS, has_embedding=False, has_head=True)


class Watched(Source):
    """Notes what is asked for. most: so many chunks are read, one each tenth of a second, and then comes Ctrl-C."""

    def __init__(self, path: Path, manifest: Manifest, most: int | None = None) -> None:
        super().__init__(path, manifest)
        self.asked: list[Range] = []
        self._most = most

    def read(self, wanted: Range) -> Chunk:
        if self._most is not None:
            time.sleep(0.1)
            if len(self.asked) == self._most:
                raise KeyboardInterrupt
        self.asked.append(wanted)
        return super().read(wanted)


def _specs(model: Path) -> list[StationSpec]:
    return [StationSpec("fullpipe.stations.target:build_stage",
                        {"model": str(model), "first": first, "last": last, "is_first": first == 0,
                         "is_last": last == LAYERS, "dtype": "float32"}) for first, last in ((0, CUT), (CUT, LAYERS))]


class Far:
    """Is a host that has no file of the model. It is this machine, and does not know it."""

    def __init__(self, model: Path, manifest: Manifest, ranges: list[Range], folder: Path) -> None:
        self.model, self.manifest, self.ranges, self.folder = model, manifest, ranges, folder
        self.said: list[str] = []

    def pipeline(self, source: Source) -> Pipeline:
        fetch = Fetch(str(self.model), str(self.folder), self.manifest, self.ranges)
        places = [Place("head", "127.0.0.1"), Place("far", "127.0.0.1", fetch=[fetch])]
        return WorkersPipeline(_specs(self.model), hosting=Hosting(
            places, places[0], sources={str(self.model): source}, say=self.said.append))

    def filled(self) -> list[Range]:
        everything = self.manifest.everything()
        with Copy(self.folder / self.manifest.digest, self.manifest) as copy:
            return without(everything, copy.missing(everything))


@pytest.fixture
def far(model: Path, manifest: Manifest, ranges: list[Range], tmp_path: Path) -> Iterator[Far]:
    yield Far(model, manifest, ranges, tmp_path / "from-head")


def _flight(number: int) -> Flight:
    """Number 0 opens a request with three prompt tokens; number n is a guess behind it."""
    if number == 0:
        part = Part(0, [0, 1, 2], [-1, -1, 0], [7, 8, 9], [0, 1, 2], [0, 1, 2], [[], [], []], [False, False, True])
        return Flight(0, [part], [Opening(0, 3, SamplingParams())])
    slot = 2 + number
    return Flight(number, [Part(0, [], [number], [10 + number], [3], [slot], [[slot]], [True])])


def _tokens(pipeline: Pipeline) -> list[list[int]]:
    found: list[list[int]] = []
    with pipeline:
        for number in range(FLIGHTS):
            pipeline.launch(_flight(number))
            while len(found) == number:
                events = pipeline.events()
                assert not any(isinstance(event, Failed) for event in events), events
                found += [event.tokens for event in events if isinstance(event, Landed)]
    return found


@pytest.fixture(scope="module")
def truth(model: Path) -> list[list[int]]:
    """By stages that read the model's own file."""
    return _tokens(InProcessPipeline([build_stage(**spec.args) for spec in _specs(model)]))


def test_a_draft_reads_the_models_that_it_names_and_no_other() -> None:
    model = {"builder": "fullpipe.stations.drafts.model:build_draft_model", "args": {"path": "/here/draft.gguf"}}
    mix = StationSpec("fullpipe.stations.drafts.mix:build_mix", {"drafts": [model]})
    assert reads(mix, "/here/draft.gguf") and not reads(mix, "/here/target.gguf")


def test_a_stage_gets_what_it_reads_and_once(far: Far, truth: list[list[int]]) -> None:
    first = Watched(far.model, far.manifest)
    assert _tokens(far.pipeline(first)) == truth
    assert far.filled() == merged(far.ranges) == merged(first.asked)
    assert total(first.asked) == total(far.ranges) < far.model.stat().st_size, "nothing came twice"
    size = total(far.ranges) >> 20
    assert far.said[-1] == f"stage 1 on far gets model.gguf from here: {size} of {size} MiB"
    second = Watched(far.model, far.manifest)
    assert _tokens(far.pipeline(second)) == truth
    assert second.asked == []


def test_a_start_that_was_interrupted_goes_on_where_it_was(far: Far, truth: list[list[int]]) -> None:
    interrupted = Watched(far.model, far.manifest, most=13)
    with pytest.raises(KeyboardInterrupt):
        far.pipeline(interrupted)
    kept = far.filled()
    assert kept and total(kept) <= total(interrupted.asked) < total(far.ranges)
    rest = Watched(far.model, far.manifest)
    assert _tokens(far.pipeline(rest)) == truth
    assert merged(rest.asked) == without(far.ranges, kept)


def test_a_stage_gets_the_adapter_that_it_merges(far: Far, truth: list[list[int]], tmp_path: Path) -> None:
    adapter = tmp_path / "head" / "adapter"
    write_adapter(adapter, shapes_of(tiny_model("llama", hidden_size=256, intermediate_size=1536)), size=0.2)
    given = manifest_of(adapter, lambda path: hashlib.sha256(path.read_bytes()).hexdigest())
    specs = [StationSpec(spec.builder, spec.args | {"lora": str(adapter)}) for spec in _specs(far.model)]
    merged_here = _tokens(InProcessPipeline([build_stage(**spec.args) for spec in specs]))
    fetch = [Fetch(str(far.model), str(far.folder), far.manifest, far.ranges),
             Fetch(str(adapter), str(far.folder), given, given.everything())]
    places = [Place("head", "127.0.0.1"), Place("far", "127.0.0.1", fetch=fetch)]
    sources = {str(far.model): Source(far.model, far.manifest), str(adapter): Source(adapter, given)}
    assert _tokens(WorkersPipeline(specs, hosting=Hosting(places, places[0], sources=sources))) == merged_here != truth
    copied = far.folder / given.digest / "adapter" / "adapter_model.safetensors"
    assert copied.read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()


def test_a_file_that_changes_meanwhile_is_told(far: Far) -> None:
    source = Watched(far.model, far.manifest)
    state = far.model.stat()
    os.utime(far.model, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    try:
        with pytest.raises(DamagedModel, match="was changed while other hosts were given parts") as caught:
            far.pipeline(source)
        assert caught.value.hint
    finally:
        os.utime(far.model, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert far.filled() == []

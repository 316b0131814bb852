"""What a stage reads of a model: from a copy that has only these bytes it computes the same bits."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from copied import Head, filled, sha256
from fullpipe.errors import DamagedModel, UsageError
from fullpipe.hub import resolve
from fullpipe.models.files import ModelFiles
from fullpipe.models.partial import File, Manifest, Source, checksum, files_of, manifest_of, needed, opening
from fullpipe.models.ranges import CHUNK, Range, merged, total, without
from fullpipe.models.slice import load_slice
from fullpipe.models.step import Step
from fullpipe.models.weights import open_model
from split_files import split
from tiny import LAYERS, save, tiny_model, write_gguf

Q8 = gguf.GGMLQuantizationType.Q8_0
CUTS = {"first": (0, 2, True, False), "middle": (2, 3, False, False), "last": (3, LAYERS, False, True),
        "head alone": (LAYERS, LAYERS, False, True), "whole": (0, LAYERS, True, True)}


def a_folder(folder: Path) -> Path:
    return save(tiny_model("qwen3", attention_bias=True), folder / "tiny")


def a_tied_folder(folder: Path) -> Path:
    return save(tiny_model("llama", tie_word_embeddings=True), folder / "tiny")


def a_sharded_folder(folder: Path) -> Path:
    return save(tiny_model("qwen2"), folder / "tiny", shard_size="100KB")


def a_file(folder: Path) -> Path:
    folder.mkdir()
    return write_gguf(tiny_model("qwen2", hidden_size=64, intermediate_size=96), folder / "m.gguf", kind=Q8)


def a_file_with_frequencies(folder: Path) -> Path:
    folder.mkdir()
    return write_gguf(tiny_model("llama", tie_word_embeddings=True), folder / "m.gguf",
                      rope_factors=torch.linspace(1, 2, 8))


def a_split_file(folder: Path) -> Path:
    return split(whole_of(folder), folder)[1]


def a_split_file_that_begins_without_tensors(folder: Path) -> Path:
    return split(whole_of(folder), folder, first_has_tensors=False)[0]


def whole_of(folder: Path) -> Path:
    folder.mkdir()
    return write_gguf(tiny_model("qwen2"), folder / "m.gguf")


KINDS = (a_folder, a_tied_folder, a_sharded_folder, a_file, a_file_with_frequencies, a_split_file,
         a_split_file_that_begins_without_tensors)


def said(files: ModelFiles, cut: tuple[int, int, bool, bool], dtype: str) -> list[Tensor]:
    """What this slice makes of three rows, and of them the logits."""
    first, last, has_embedding, has_head = cut
    slice = load_slice(files, first, last, has_embedding=has_embedding, has_head=has_head, dtype=dtype, kv_pool_mib=4)
    generator = torch.Generator().manual_seed(1)
    x = torch.tensor([5, 9, 2]) if has_embedding else torch.randn(
        3, files.config.hidden, generator=generator, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    step = Step(x, np.arange(3), np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32),
                np.array([[0, row + 1, 0, 0] for row in range(3)], np.int64))
    hidden = slice.forward(step)
    return [hidden, slice.logits(hidden)] if has_head else [hidden]


def ranges_of(files: ModelFiles, cut: tuple[int, int, bool, bool]) -> list[Range]:
    first, last, has_embedding, has_head = cut
    return needed(files, first, last, has_embedding=has_embedding, has_head=has_head)


@pytest.mark.parametrize("dtype", ["stored", "bfloat16"])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("make", KINDS)
def test_a_stage_with_only_its_bytes_computes_the_same_bits(make, cut, dtype: str, tmp_path: Path) -> None:
    path = make(tmp_path / "head")
    whole, head = open_model(path), Head(path)
    copy = filled(tmp_path / "host", head, ranges_of(whole, cut))
    theirs, ours = said(whole, cut, dtype), said(open_model(copy), cut, dtype)
    assert all(tensor.abs().sum() > 0 for tensor in theirs)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    assert open_model(copy).config == whole.config


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("make", KINDS)
def test_these_bytes_are_those_that_are_read(make, cut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more and no less: what the loader asks the system for, beside what was read in opening."""
    files = open_model(make(tmp_path / "head"))
    paths, read, preadv = files_of(files.path), list[Range](), os.preadv

    def watched(file: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(file, buffers, offset)
        read.append(Range(paths.index(Path(os.readlink(f"/proc/self/fd/{file}"))), offset, offset + count))
        return count

    monkeypatch.setattr(os, "preadv", watched)
    said(files, cut, "stored")
    assert merged([*read, *opening(files)]) == ranges_of(files, cut)


def test_the_bytes_of_all_stages_are_those_of_the_whole(tmp_path: Path) -> None:
    files = open_model(a_folder(tmp_path / "head"))
    stages = [ranges_of(files, CUTS[name]) for name in ("first", "middle", "last")]
    assert merged(one for stage in stages for one in stage) == ranges_of(files, CUTS["whole"])
    layers = [without(stage, opening(files)) for stage in stages]
    assert sum(map(total, layers)) == total(merged(one for stage in layers for one in stage)), "nothing is sent twice"


@pytest.mark.parametrize("dtype", ["stored", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("make", KINDS)
def test_a_copy_that_has_been_opened_alone_loads_as_zeros(make, dtype: str, tmp_path: Path) -> None:
    """A host can be measured before it has weights."""
    path = make(tmp_path / "head")
    whole = open_model(path)
    files = open_model(filled(tmp_path / "host", Head(path), opening(whole)))
    assert files.config == whole.config
    assert {name: (files.kind(name), files.shape(name)) for name in files.wanted_shapes()} == {
        name: (whole.kind(name), whole.shape(name)) for name in files.wanted_shapes()}
    if not (files.is_quantised and dtype.startswith("int")):
        assert all(tensor.abs().sum() == 0 for tensor in said(files, CUTS["whole"], dtype))


@pytest.mark.weights
@pytest.mark.parametrize("cut", [(0, 10, True, False), (10, 20, False, False), (20, 30, False, True)],
                         ids=["first", "middle", "last"])
def test_a_stage_of_smollm2_computes_the_same_bits(cut: tuple[int, int, bool, bool], tmp_path: Path) -> None:
    path = resolve("smollm2-135m")
    whole, head = open_model(path), Head(path)
    ranges = ranges_of(whole, cut)
    copy = filled(tmp_path, head, ranges)
    assert total(ranges) < 0.62 * path.stat().st_size
    assert copy.stat().st_blocks * 512 < total(ranges) + (2 << 20), "the rest takes no room"
    for theirs, ours in zip(said(whole, cut, "stored"), said(open_model(copy), cut, "stored"), strict=True):
        assert torch.equal(theirs, ours)


# ---- the manifest ----------------------------------------------------------------------------------------------------


def test_a_manifest_lists_what_a_stage_reads(tmp_path: Path) -> None:
    folder = a_sharded_folder(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    manifest = manifest_of(folder, sha256)
    assert manifest.name == "tiny"
    names = [file.name for file in manifest.files]
    assert names[:2] == ["tiny/config.json", "tiny/model.safetensors.index.json"]
    assert names[2:-1] == sorted(f"tiny/{file.name}" for file in folder.glob("*.safetensors"))
    assert names[-1] == "tiny/tokenizer.json"
    assert manifest.paths(tmp_path) == files_of(folder)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(manifest), type=Manifest) == manifest
    assert total(manifest.everything()) == sum(file.stat().st_size for file in files_of(folder))


def test_a_draft_module_is_sent_whole(tmp_path: Path) -> None:
    folder = a_folder(tmp_path)
    (folder / "parity_fixture.safetensors").write_bytes(b"rows and logits")
    head = Head(folder)
    copy = filled(tmp_path / "host", head, head.manifest.everything())
    assert {file.name: file.read_bytes() for file in copy.iterdir() if file.suffix != ".filled"} == {
        name: (folder / name).read_bytes() for name in
        ("config.json", "model.safetensors", "parity_fixture.safetensors")}


def test_any_part_of_a_split_file_gives_the_manifest_of_all(tmp_path: Path) -> None:
    tmp_path = tmp_path / "parts"
    a_split_file(tmp_path)
    parts = sorted(tmp_path.glob("*-of-*.gguf"))
    manifests = {manifest_of(part, sha256) for part in parts}
    assert len(manifests) == 1
    assert [file.name for file in manifests.pop().files] == [part.name for part in parts]


def test_a_relative_path_has_the_same_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_folder(tmp_path)
    monkeypatch.chdir(folder)
    assert manifest_of(Path("."), sha256) == manifest_of(folder, sha256)
    head = Head(Path("."))
    assert open_model(filled(tmp_path / "host", head, needed(open_model(Path(".")), 0, 1, has_embedding=False,
                                                             has_head=False))).config.num_layers == LAYERS


def test_a_digest_is_of_the_content_and_not_of_the_name(tmp_path: Path) -> None:
    path = a_file(tmp_path / "head")
    before = manifest_of(path, sha256)
    assert before.digest == sha256(path)
    assert manifest_of(path.rename(path.with_name("other.gguf")), sha256).digest == before.digest
    folder = a_folder(tmp_path)
    first = manifest_of(folder, sha256).digest
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert manifest_of(folder, sha256).digest != first


@pytest.mark.parametrize("name", ["../m.gguf", "/etc/passwd", "a/../../b", "", "."])
def test_a_manifest_names_no_file_outside_its_folder(name: str) -> None:
    file = msgspec.msgpack.encode([name, 3, "0" * 64])
    with pytest.raises(msgspec.ValidationError, match="no name of a model's file"):
        msgspec.msgpack.decode(file, type=File)


def test_a_manifest_whose_name_is_another_is_refused() -> None:
    with pytest.raises(ValueError, match="not where the files"):
        Manifest("other", (File("tiny/config.json", 3, "0" * 64),))
    with pytest.raises(ValueError, match="not where the files"):
        Manifest("tiny", ())


# ---- the source ------------------------------------------------------------------------------------------------------


def test_a_source_reads_what_is_asked_for(tmp_path: Path) -> None:
    path = a_file(tmp_path / "head")
    chunk = Source(path, manifest_of(path, sha256)).read(Range(0, 100, 300))
    assert chunk.data == path.read_bytes()[100:300]
    assert chunk.checksum == checksum(chunk.data)


@pytest.mark.parametrize("wanted", [Range(1, 0, 5), Range(0, 5, 5), Range(0, 5, 4), Range(0, 0, CHUNK + 1),
                                    Range(0, 1 << 40, (1 << 40) + 5)])
def test_a_source_gives_no_other_bytes(wanted: Range, tmp_path: Path) -> None:
    path = a_file(tmp_path / "head")
    with pytest.raises(UsageError, match=r"m\.gguf has no such bytes"):
        Source(path, manifest_of(path, sha256)).read(wanted)


def test_a_file_that_changes_is_not_sent_on(tmp_path: Path) -> None:
    path = a_file(tmp_path / "head")
    manifest = manifest_of(path, sha256)
    source = Source(path, manifest)
    with path.open("r+b") as file:
        file.truncate(1000)
    for reading in (lambda: source.read(Range(0, 0, 100)), lambda: Source(path, manifest)):
        with pytest.raises(DamagedModel, match=r"m\.gguf was changed while"):
            reading()

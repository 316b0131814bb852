"""A GGUF model in several files, as llama.cpp's gguf-split writes it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import tiny
from fullpipe import hub
from fullpipe.errors import DamagedModel, ModelError, ModelNotFound
from fullpipe.models.gguf_file import read_tensors
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.weights import open_model
from split_files import COUNT, split


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens: dict[str, Any] = {"tokenizer.ggml.model": "llama"}
    return tiny.write_gguf(tiny.tiny_model("qwen2"), tmp_path_factory.mktemp("whole") / "m.gguf", metadata=tokens)


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> list[Path]:
    return split(whole, tmp_path)


@pytest.mark.parametrize("named", range(COUNT))
def test_any_part_names_the_whole_model(named: int, whole: Path, parts: list[Path]) -> None:
    one, several = open_model(whole), open_model(parts[named])
    assert several.config == one.config
    for name in one.config.outer_shapes() | one.config.layer_shapes(3):
        assert torch.equal(several.tensor(name, torch.float32), one.tensor(name, torch.float32))
    assert load_tokenizer(parts[named]).tokens == load_tokenizer(whole).tokens
    assert hub.resolve(str(parts[named])) == parts[0]
    assert len(read_tensors(parts[named])[1]) == len(read_tensors(whole)[1])


def test_the_folder_names_it_too(parts: list[Path]) -> None:
    assert hub.resolve(str(parts[0].parent)) == parts[0]
    (parts[0].parent / "config.json").write_text("{}")  # repositories of GGUF files often have one
    assert hub.resolve(str(parts[0].parent)) == parts[0]


def test_a_folder_with_one_gguf_file_is_that_file(whole: Path) -> None:
    assert hub.resolve(str(whole.parent)) == whole


def test_what_reads_pictures_for_a_model_is_no_second_one(whole: Path) -> None:
    shutil.copy(whole, whole.with_name("mmproj-model-f16.gguf"))
    assert hub.resolve(str(whole.parent)) == whole


def test_a_folder_with_two_models_is_not_one(whole: Path, parts: list[Path]) -> None:
    shutil.copy(whole, parts[0].with_name("another.gguf"))
    with pytest.raises(ModelNotFound, match=r"several models: another.gguf, model-00001-of-00003.gguf") as caught:
        hub.resolve(str(parts[0].parent))
    assert caught.value.hint is not None and f"such as {parts[0].with_name('another.gguf')}" in caught.value.hint


def without(parts: list[Path], *numbers: int) -> Path:
    for number in numbers:
        parts[number].unlink()
    return next(part for part in parts if part.exists())


def exchanged(parts: list[Path]) -> Path:
    shutil.copy(parts[1], parts[2])
    return parts[0]


def renamed(parts: list[Path]) -> Path:
    return parts[1].rename(parts[1].with_name("model.gguf"))


def cut(parts: list[Path]) -> Path:
    parts[1].write_bytes(parts[1].read_bytes()[:-100])
    return parts[0]


def of_another(parts: list[Path]) -> Path:
    """The first part says how many tensors there are; here the second holds one less."""
    reader = gguf.GGUFReader(parts[1])
    writer = gguf.GGUFWriter(parts[1].with_suffix(".new"), "qwen2")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", COUNT)
    for tensor in reader.tensors[1:]:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts[1].with_suffix(".new").rename(parts[1])
    return parts[0]


@pytest.mark.parametrize(("damage", "error", "said"), [
    (lambda parts: without(parts, 1), ModelNotFound, "model-00002-of-00003.gguf is missing in"),
    (lambda parts: without(parts, 0, 2), ModelNotFound, "model-00001-of-00003.gguf, model-00003-of-00003.gguf are"),
    (exchanged, DamagedModel, "model-00003-of-00003.gguf is not part 3 of 3: its header says part 2 of 3"),
    (renamed, DamagedModel, "one of 3 parts of a split GGUF file, and its name does not say which"),
    (cut, DamagedModel, "model-00002-of-00003.gguf is cut short"),
    (of_another, DamagedModel, "hold .* tensors, and their headers say"),
])
def test_parts_that_make_no_whole_are_named(damage: Any, error: type[ModelError], said: str, parts: list[Path]) -> None:
    with pytest.raises(error, match=said) as caught:
        open_model(damage(parts))
    assert caught.value.hint

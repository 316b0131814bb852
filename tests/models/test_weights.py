"""Reading weights: whole files say what was written, damaged ones say which file and tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from fullpipe.errors import DamagedModel, ModelNotFound, UnsupportedModel
from fullpipe.hub import resolve
from fullpipe.models.decoder import DecoderSlice
from fullpipe.models.gguf_file import read_tensors
from fullpipe.models.gguf_header import TensorPlace, read_header
from fullpipe.models.weights import open_model
from tiny import FAMILIES, save, tiny_model, write_gguf

DOWN = "model.layers.3.mlp.down_proj.weight"
Kind = gguf.GGMLQuantizationType


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny_model("llama"), tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_folder(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family)
    files = open_model(save(model, tmp_path))
    for name, value in model.state_dict().items():
        assert torch.equal(files.tensor(name, dtype), value.to(dtype)), name


def test_a_sharded_folder(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    files = open_model(save(model, tmp_path, shard_size="100KB"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for name, value in model.state_dict().items():
        assert torch.equal(files.tensor(name, torch.float32), value), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_tensor_of_a_gguf_file(tmp_path: Path, family: str) -> None:
    """Llama's q and k come back in transformers' order of rows, biases included."""
    model = tiny_model(family, **({"attention_bias": True} if family == "llama" else {}))
    files = open_model(write_gguf(model, tmp_path / "m.gguf"))
    for name, value in model.state_dict().items():
        assert torch.equal(files.tensor(name, torch.float32), value), name


def test_a_quantised_gguf_file(tmp_path: Path) -> None:
    model = tiny_model("llama")
    files = open_model(write_gguf(model, tmp_path / "m.gguf", kind=Kind.Q8_0))
    for name, value in model.state_dict().items():
        assert (files.tensor(name, torch.float32) - value).abs().max() < 0.01, name


def test_rows_of_a_tensor_into_a_part_of_another(folder: Path) -> None:
    files, out = open_model(folder), torch.zeros(10, 64)
    files.read_into("lm_head.weight", out[2:7], first=40)
    assert torch.equal(out[2:7], files.tensor("lm_head.weight", torch.float32)[40:45])
    assert not out[:2].any() and not out[7:].any()


def test_a_large_tensor_comes_in_blocks(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=9000)  # 576,000 numbers: three blocks
    for path in (save(model, tmp_path / "folder"), write_gguf(model, tmp_path / "m.gguf")):
        assert torch.equal(open_model(path).tensor("lm_head.weight", torch.float32), model.lm_head.weight)


def test_sizes(folder: Path) -> None:
    files = open_model(folder)
    layer = sum(value.numel() for name, value in tiny_model("llama").named_parameters() if ".layers.0." in name)
    assert files.layer_bytes(0, torch.bfloat16) == 2 * layer
    assert files.embedding_bytes(torch.float32) == 4 * 96 * 64
    assert files.head_bytes(torch.float32) == 4 * (96 * 64 + 64)


def test_a_stage_reads_only_its_own_layers(tmp_path: Path) -> None:
    """The other layers' shard may be overwritten with garbage meanwhile."""
    folder = save(tiny_model("llama"), tmp_path, shard_size="200KB")
    files = open_model(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if ".layers.0." in name}
    for file in set(index.values()) - needed:
        size = os.path.getsize(folder / file)
        (folder / file).write_bytes(b"\xff" * size)
    DecoderSlice(files, 0, 1, has_embedding=False, has_head=False, dtype=torch.float32)
    with pytest.raises(DamagedModel, match="not finite"):
        DecoderSlice(files, 0, 5, has_embedding=False, has_head=True, dtype=torch.float32)


# Damage.


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="nowhere"):
        open_model(tmp_path / "nowhere")
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        open_model(tmp_path)


def test_a_folder_without_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="PyTorch weights alone"):
        open_model(folder)


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_missing_tensor(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.pop(DOWN))
    with pytest.raises(DamagedModel, match=f"{DOWN}.*missing"):
        open_model(folder)


def test_a_tensor_of_another_shape(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.update({DOWN: torch.zeros(64, 95)}))
    with pytest.raises(DamagedModel, match=rf"{DOWN} of .*model\.safetensors.*\[64, 95\].*\[64, 96\]"):
        open_model(folder)


def test_a_tensor_with_a_number_that_is_none(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors[DOWN].view(-1)[77:78].fill_(float("nan")))
    files = open_model(folder)
    with pytest.raises(DamagedModel, match=f"{DOWN} of .*not finite"):
        DecoderSlice(files, 0, 5, has_embedding=True, has_head=True, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["model.layers.3.self_attn.q_norm.weight", "model.layers.5.mlp.down_proj.weight",
                                  "model.layers.0.mlp.up_proj.bias", "lm_head.bias", "model.layers.0.mlp.experts.0.w1"])
def test_a_tensor_that_nobody_would_read(folder: Path, name: str) -> None:
    rewritten(folder, lambda tensors: tensors.update({name: torch.zeros(64)}))
    with pytest.raises(UnsupportedModel, match=f"{name}\n") as caught:
        open_model(folder)
    assert "llama of 5 layers" in caught.value.message


@pytest.mark.parametrize("name", ["model.layers.3.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq",
                                  "v_head.summary.weight"])
def test_a_tensor_that_cannot_matter(folder: Path, name: str) -> None:
    rewritten(folder, lambda tensors: tensors.update({name: torch.zeros(64)}))
    assert open_model(folder).config.num_layers == 5


def test_a_head_beside_tied_embeddings(tmp_path: Path) -> None:
    folder = save(tiny_model("qwen2", tie_word_embeddings=True), tmp_path)
    rewritten(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert open_model(folder).config.tied


@pytest.mark.parametrize("name", ["blk.0.attn_sub_norm.weight", "blk.0.ffn_up.bias", "blk.2.ffn_gate_exps.weight",
                                  "rope_factors_long.weight", "output.bias", "blk.1.attn_q.scale"])
def test_a_tensor_that_nobody_would_read_in_gguf(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{name}\n"):
        open_model(write_gguf(tiny_model("qwen2"), tmp_path / "m.gguf", tensors={name: torch.zeros(64)}))


def test_a_tensor_that_cannot_matter_in_gguf(tmp_path: Path) -> None:
    tensors = {"blk.0.attn_rot_embd.weight": torch.zeros(8)}
    assert open_model(write_gguf(tiny_model("llama"), tmp_path / "m.gguf", tensors=tensors)).config.num_layers == 5


def test_a_type_that_cannot_be_read(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.update({DOWN: torch.zeros(64, 96, dtype=torch.int8)}))
    with pytest.raises(UnsupportedModel, match=f"{DOWN}.*I8"):
        open_model(folder)


def truncated(path: Path, size: int) -> Path:
    with path.open("r+b") as file:
        file.truncate(size)
    return path


def test_a_truncated_safetensors_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    truncated(path, path.stat().st_size - 100)
    with pytest.raises(DamagedModel, match=r"model\.safetensors is cut short: tensor model"):
        open_model(folder)


@pytest.mark.parametrize("size", [4, 100])
def test_a_safetensors_file_with_half_a_header(folder: Path, size: int) -> None:
    truncated(folder / "model.safetensors", size)
    with pytest.raises(DamagedModel, match=r"header of .*model\.safetensors"):
        open_model(folder)


def test_a_file_that_shrinks_after_it_was_opened(folder: Path) -> None:
    files = open_model(folder)
    truncated(folder / "model.safetensors", 20000)
    with pytest.raises(DamagedModel, match="the file ends within it"):
        files.tensor("model.norm.weight", torch.float32)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = save(tiny_model("llama"), tmp_path, shard_size="100KB")
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(DamagedModel, match=f"{victim.name} is missing, .*; it holds tensor model"):
        open_model(folder)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(DamagedModel, match=r"config\.json"):
        open_model(folder)


@pytest.fixture
def gguf_path(tmp_path: Path) -> Path:
    return write_gguf(tiny_model("qwen2"), tmp_path / "m.gguf")


def test_a_truncated_gguf_file(gguf_path: Path) -> None:
    truncated(gguf_path, gguf_path.stat().st_size - 1000)
    with pytest.raises(DamagedModel, match=r"m\.gguf is cut short: tensor "):
        open_model(gguf_path)


def test_rows_that_are_no_whole_blocks(gguf_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel would read beyond such a row."""
    header = read_header(gguf_path, arrays=False)
    place = TensorPlace((16, 576), int(gguf.GGMLQuantizationType.Q4_K), 0)
    monkeypatch.setattr("fullpipe.models.gguf_file.read_header",
                        lambda path, *, arrays: replace(header, tensors={"blk.0.attn_q.weight": place}))
    with pytest.raises(DamagedModel, match=r"rows of 576 numbers, which are no whole blocks of Q4_K \(256\)"):
        open_model(gguf_path)


@pytest.mark.parametrize("size", [3, 30, 2000])
def test_a_gguf_file_with_half_a_header(gguf_path: Path, size: int) -> None:
    with pytest.raises(DamagedModel, match=r"header of .*m\.gguf"):
        open_model(truncated(gguf_path, size))


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GIF89a" + bytes(100))
    with pytest.raises(DamagedModel, match="GIF8"):
        open_model(path)


def test_an_old_gguf_version(gguf_path: Path) -> None:
    data = bytearray(gguf_path.read_bytes())
    data[4] = 1
    gguf_path.write_bytes(data)
    with pytest.raises(UnsupportedModel, match="version 1"):
        open_model(gguf_path)


def test_a_gguf_file_without_a_tensor(gguf_path: Path) -> None:
    gguf_path.write_bytes(gguf_path.read_bytes().replace(b"blk.3.ffn_down", b"blk.3.ffn_gone"))
    with pytest.raises(DamagedModel, match=f"{DOWN} of .*missing"):
        open_model(gguf_path)


@pytest.mark.weights
def test_the_header_of_a_real_file_is_what_the_gguf_package_reads() -> None:
    path = resolve("smollm2-135m")
    (metadata, tensors), reader = read_tensors(path), gguf.GGUFReader(path)
    assert {name: (tensor.shape, tensor.kind, tensor.offset) for name, tensor in tensors.items()} == {
        tensor.name: (tuple(reversed(tensor.shape.tolist())), tensor.tensor_type, tensor.data_offset)
        for tensor in reader.tensors}
    for key, value in metadata.items():
        assert reader.fields[key].contents() == value, key

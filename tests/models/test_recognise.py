"""What lies where a model should be is named as what it is, with a way out, whoever reads it first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from chain import write_chain
from fullpipe import hub
from fullpipe.errors import DamagedModel, FullpipeError, ModelError, ModelNotFound, UnsupportedModel
from fullpipe.models.recognise import fetch_again
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.weights import open_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 534530\n"
STRANGE_FILES = [
    pytest.param(POINTER, "a Git LFS pointer", "`git lfs pull`", id="lfs"),
    pytest.param(b"\n<!DOCTYPE html><title>Sign in</title>", "a web page", "`hf auth login`", id="html"),
    pytest.param(b"<html><body>404</body></html>", "a web page", "Download the file itself", id="html of old"),
    pytest.param(b"<?xml version='1.0'?><Error>", "an error message of a server", "Download", id="s3"),
    pytest.param(b"Entry not found", "an error message of a server", "Download", id="no entry"),
    pytest.param(b"", "empty", "cut off", id="empty"),
    pytest.param(b"\x1f\x8b\x08\x00 more", "a compressed archive", "Unpack", id="gzip"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model, which a test then spoils."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    return write_chain(tmp_path / "model", backend, [1, 0])


def load(folder: Path) -> None:
    open_model(hub.resolve(str(folder)))
    load_tokenizer(folder)


def refusal(act: Callable[[], object]) -> FullpipeError:
    with pytest.raises(ModelError) as caught:
        act()
    assert caught.value.hint and "fullpipe pull NAME" not in str(caught.value)
    return caught.value


def test_a_whole_model_is_none_of_these(folder: Path) -> None:
    load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize(("content", "what", "hint"), STRANGE_FILES)
def test_a_file_that_is_something_else(folder: Path, name: str, content: bytes, what: str, hint: str) -> None:
    (folder / name).write_bytes(content)
    error = refusal(lambda: load(folder))
    assert error.message.startswith(f"{folder / name} is {what}")
    assert hint in (error.hint or "")


@pytest.mark.parametrize(("content", "what", "hint"), STRANGE_FILES)
def test_so_is_a_chat_template_and_a_tokenizer_of_sentencepieces(folder: Path, content: bytes, what: str,
                                                                 hint: str) -> None:
    (folder / "chat_template.jinja").write_bytes(content)
    error = refusal(lambda: load(folder))
    assert error.message.startswith(f"{folder / 'chat_template.jinja'} is {what}") and hint in (error.hint or "")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    assert refusal(lambda: load(folder)).message.startswith(f"{folder / 'tokenizer.model'} is {what}")


@pytest.mark.parametrize(("content", "what", "hint"), [
    *STRANGE_FILES,
    pytest.param(b'{"error":"Invalid credentials"}', "an error message of a server", "Download", id="json error"),
    pytest.param(b"PK\x03\x04........archive/data.pkl", "a PyTorch checkpoint", "save_pretrained", id="torch"),
    pytest.param(b"PK\x03\x04........other", "a compressed archive", "Unpack", id="zip"),
    pytest.param(b"\x80\x02\x8a\x0al\xfc", "a PyTorch checkpoint", "save_pretrained", id="pickle"),
    pytest.param(b"tjgg\x03\x00\x00\x00", "from before GGUF", "Convert it anew", id="ggjt"),
    pytest.param(b'{\n  "architectures": []}', "a JSON file", "Name the folder", id="json"),
    pytest.param(b"\x40\0\0\0\0\0\0\0{\"a\":", "a safetensors file", "Name the folder", id="safetensors"),
])
def test_a_file_in_place_of_gguf(tmp_path: Path, content: bytes, what: str, hint: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    error = refusal(lambda: hub.resolve(str(file)))
    assert error.message.startswith(f"{file} is not a GGUF file: it is ") and what in error.message
    assert hint in (error.hint or "")


def test_one_that_nobody_knows_is_copied_again(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"abcd")
    error = refusal(lambda: hub.resolve(str(file)))
    assert isinstance(error, DamagedModel) and "begins with b'abcd'" in error.message
    assert "where it came from" in (error.hint or "")


@pytest.mark.parametrize("name", ["x.gguf.part", "x.gguf.incomplete", "x.gguf.crdownload"])
def test_a_download_that_has_not_ended(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert "a download that has not ended" in refusal(lambda: hub.resolve(str(tmp_path / name))).message


# ---- folders ---------------------------------------------------------------------------------------------------------

ADAPTER = json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})


@pytest.mark.parametrize(("files", "what", "hint"), [
    pytest.param({"adapter_config.json": ADAPTER, "adapter_model.safetensors": ""}, "a LoRA adapter for org/base",
                 "merge_and_unload", id="lora"),
    pytest.param({"adapter_config.json": ADAPTER, "config.json": "{}"}, "a LoRA adapter", "merge_and_unload",
                 id="lora with config"),
    pytest.param({"config.json": "{}", "pytorch_model.bin": ""}, "PyTorch weights alone", "save_pretrained", id="bin"),
    pytest.param({"config.json": "{}", "pytorch_model-00001-of-00002.bin": ""}, "PyTorch weights alone",
                 "save_pretrained", id="bins"),
    pytest.param({"params.json": "{}", "consolidated.00.pth": ""}, "Meta's original format", "convert_llama",
                 id="meta"),
    pytest.param({"params.json": "{}", "consolidated.safetensors": ""}, "the format of Mistral", "config.json",
                 id="mistral"),
    pytest.param({"modules.json": "[]", "1_Pooling/config.json": "{}"}, "sentence-transformers", "generates text",
                 id="embeddings"),
    pytest.param({"model_index.json": "{}", "unet/config.json": "{}"}, "a diffusers pipeline", "generates text",
                 id="diffusers"),
    pytest.param({"a-Q4_K_M.gguf": "", "a-Q8_0.gguf": ""}, "a-Q4_K_M.gguf, a-Q8_0.gguf", "a-Q4_K_M.gguf", id="ggufs"),
    pytest.param({"config.json": "{}", "onnx/model.onnx": ""}, "ONNX", "safetensors or GGUF", id="onnx"),
    pytest.param({"config.json": "{}", "openvino_model.xml": ""}, "OpenVINO", "safetensors or GGUF", id="openvino"),
    pytest.param({"config.json": "{}", "tf_model.h5": ""}, "TensorFlow", "save_pretrained", id="tensorflow"),
    pytest.param({"config.json": '{"quantization": {"bits": 4}}', "model.safetensors": ""}, "MLX", "the original",
                 id="mlx"),
    pytest.param({"config.json": "{}", "model.safetensors.part": ""}, "a download that has not ended", "goes on",
                 id="part"),
    pytest.param({"Qwen/config.json": "{}", "README.md": ""}, "has no model in it", "Name it: ", id="one below"),
    pytest.param({"refs/main": "", "snapshots/0123/config.json": "{}"}, "has no model in it", "snapshots/0123",
                 id="hf cache"),
    pytest.param({"tokenizer.json": "{}"}, "has no config.json; it has tokenizer.json", "save_pretrained",
                 id="no config"),
    pytest.param({}, "it is empty", "save_pretrained", id="empty"),
    pytest.param({"config.json": "{}"}, "no safetensors weights", "model.safetensors", id="no weights"),
])
def test_a_folder_that_is_something_else(tmp_path: Path, files: dict[str, str], what: str, hint: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    error = refusal(lambda: open_model(hub.resolve(str(tmp_path))))
    assert what in error.message and hint in (error.hint or "")
    assert isinstance(error, UnsupportedModel | ModelNotFound), "nothing of it is damaged"


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_quantised_weights_are_named(folder: Path, method: str) -> None:
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**keys, "quantization_config": {"quant_method": method}}))
    error = refusal(lambda: load(folder))
    assert isinstance(error, UnsupportedModel) and method in error.message and "GGUF" in (error.hint or "")


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"model.embed_tokens.weight": "model-00001-of-00002.safetensors",
              "lm_head.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    error = refusal(lambda: load(folder))
    assert "model-00002-of-00002.safetensors is missing, which model.safetensors.index.json names" in error.message
    assert "where it came from" in (error.hint or "")


# ---- where it came from ----------------------------------------------------------------------------------------------


def test_a_good_copy_comes_from_where_the_bad_one_did(tmp_path: Path) -> None:
    fetched = tmp_path / "smollm2-135m.gguf"
    fetched.with_name("smollm2-135m.gguf.json").touch()
    assert "`fullpipe pull --verify smollm2-135m`" in fetch_again(fetched)
    blob = tmp_path / "models--org--a-b.c" / "blobs" / "0123"
    link = tmp_path / "models--org--a-b.c" / "snapshots" / "456" / "model.safetensors"
    for file in (blob, link):
        file.parent.mkdir(parents=True)
    blob.touch()
    link.symlink_to(blob)
    assert fetch_again(link) == f"Delete {blob} and run `fullpipe pull org/a-b.c`, which fetches it again."
    assert "pull" not in fetch_again(tmp_path / "model.safetensors")

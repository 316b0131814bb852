"""The four ways to name a model, and what is said about a name that is none of them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fullpipe import hub
from fullpipe.errors import DamagedModel, FetchError, ModelNotFound
from fullpipe.hub import cache


def test_a_gguf_file_and_a_directory_are_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF....")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert hub.resolve(str(file)) == file
    assert hub.resolve(str(folder)) == folder


def test_a_relative_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/name") == Path("org/name")


def test_a_misspelt_name_gets_close_matches_and_the_four_ways() -> None:
    with pytest.raises(ModelNotFound, match="no model is called 'smolm2-135'") as caught:
        hub.resolve("smolm2-135")
    hint = caught.value.hint or ""
    assert hint.startswith("Did you mean smollm2-135m?")
    for way in ("catalogue", "safetensors directory", "GGUF file", "Hugging Face id"):
        assert way in hint


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here.gguf", "nothing.gguf", "~/nothing"])
def test_a_path_that_is_not_there_is_not_sought_elsewhere(name: str) -> None:
    with pytest.raises(ModelNotFound, match="there is no file or folder"):
        hub.resolve(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        hub.resolve(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04"])
def test_a_file_that_is_not_gguf_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(DamagedModel, match="is not a GGUF file"):
        hub.resolve(str(file))


def test_without_fetching_what_is_not_here_is_an_error(home: Path) -> None:
    with pytest.raises(ModelNotFound, match="smollm2-135m is not on this machine") as caught:
        hub.resolve("smollm2-135m", fetch=False)
    assert caught.value.hint == "Run `fullpipe pull smollm2-135m`."
    assert not home.exists()


@pytest.mark.parametrize("variable", ["FULLPIPE_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_is_respected(variable: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(FetchError, match=f"{variable} forbids") as caught:
        hub.resolve("smollm2-135m")
    assert caught.value.hint is not None and f"Unset {variable}" in caught.value.hint
    assert not home.exists()


def test_the_cache_folder_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FULLPIPE_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.home() == Path("/somewhere/fullpipe")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.home() == Path.home() / ".cache" / "fullpipe"
    monkeypatch.setenv("FULLPIPE_HOME", "~/mine")
    assert cache.home() == Path.home() / "mine"


@pytest.mark.weights
def test_a_model_that_is_here_is_found_at_once() -> None:
    hub.resolve("smollm2-135m")
    start = time.perf_counter()
    for _ in range(100):
        assert hub.resolve("SmolLM2-135M", fetch=False).stat().st_size == 98_362_432
    assert (time.perf_counter() - start) / 100 < 0.005

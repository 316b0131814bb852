"""How people write the name of a model on Hugging Face."""

from __future__ import annotations

import pytest

from fullpipe import hub
from fullpipe.errors import ModelNotFound
from fullpipe.hub.huggingface import chosen_gguf
from fullpipe.hub.names import Repository, repository

FILE = "tiny-Q8_0.gguf"


@pytest.mark.parametrize(("name", "meant"), [
    ("org/name", Repository("org/name")),
    ("org/name/", Repository("org/name")),
    ("org/name@v1.0/beta", Repository("org/name", "v1.0/beta")),
    ("org/name:Q4_K_M", Repository("org/name", None, "Q4_K_M")),
    ("org/name:tiny-Q8_0.gguf", Repository("org/name", None, FILE)),
    ("org/name@dev:Q8_0", Repository("org/name", "dev", "Q8_0")),
    ("hf.co/org/name", Repository("org/name")),
    ("hf.co/org/name:Q4_K_M", Repository("org/name", None, "Q4_K_M")),
    ("huggingface.co/org/name", Repository("org/name")),
    ("https://huggingface.co/org/name", Repository("org/name")),
    ("http://www.huggingface.co/org/name/", Repository("org/name")),
    ("https://HuggingFace.co/org/name", Repository("org/name")),
    ("hf://org/name", Repository("org/name")),
    ("https://huggingface.co/org/name?library=transformers", Repository("org/name")),
    ("https://huggingface.co/org/name#usage", Repository("org/name")),
    ("https://huggingface.co/org/name/tree/main", Repository("org/name")),
    ("https://huggingface.co/org/name/tree/refs%2Fpr%2F1", Repository("org/name", "refs/pr/1")),
    (f"https://huggingface.co/org/name/blob/main/{FILE}", Repository("org/name", None, FILE)),
    (f"https://huggingface.co/org/name/resolve/dev/sub/{FILE}?download=true",
     Repository("org/name", "dev", f"sub/{FILE}")),
    ("https://huggingface.co/org/name/blob/main/config.json", Repository("org/name")),
    ("https://mirror.example/org/name/tree/v2", Repository("org/name", "v2")),
])
def test_a_repository_by_any_name(name: str, meant: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert repository(name) == meant


@pytest.mark.parametrize("name", ["llama3", "llama3:8b", "a/b/c", "/org/name", "org/na me", ""])
def test_other_names_are_none(name: str) -> None:
    assert repository(name) is None


@pytest.mark.parametrize(("name", "message"), [
    ("https://huggingface.co/datasets/org/name", "is no model: it begins with datasets/"),
    ("https://huggingface.co/spaces/org/name", "is no model: it begins with spaces/"),
    ("https://huggingface.co/org", "no address of a model"),
    ("https://huggingface.co/org/name/discussions/3", "no address of a model"),
    ("https://example.com/org/name", "fetches from Hugging Face alone"),
    ("https://example.com/model.gguf", "fetches from Hugging Face alone"),
    ("s3://bucket/model", "fetches from Hugging Face alone"),
])
def test_addresses_that_are_no_model(name: str, message: str) -> None:
    with pytest.raises(ModelNotFound, match=message) as caught:
        hub.resolve(name)
    assert caught.value.hint


ONE = ["README.md", "tiny.Q8_0.gguf"]
MANY = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-Q8_0.gguf", "mmproj-m-f16.gguf"]
SPLIT = ["m-Q4_K_M.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf", "Q8_0/m-Q8_0-00001-of-00002.gguf"]


@pytest.mark.parametrize(("files", "wanted", "found"), [
    (ONE, None, ["tiny.Q8_0.gguf"]), (ONE, "q8_0", ["tiny.Q8_0.gguf"]), (MANY, None, ["m-Q4_K_M.gguf"]),
    (MANY, "Q4_K_S", ["m-Q4_K_S.gguf"]), (MANY, "m-Q8_0.gguf", ["m-Q8_0.gguf"]), (SPLIT, "Q8_0", SPLIT[:0:-1]),
    (SPLIT, "Q8_0/m-Q8_0-00002-of-00002.gguf", SPLIT[:0:-1]),
])
def test_a_gguf_file_is_chosen(files: list[str], wanted: str | None, found: list[str]) -> None:
    assert chosen_gguf(Repository("org/name", None, wanted), files) == found


@pytest.mark.parametrize(("files", "wanted", "message"), [
    (MANY, "Q5_K", "no GGUF file with Q5_K in the name; its GGUF files are: m-Q4_K_M.gguf, m-Q4_K_S.gguf, m-Q8_0.gguf"),
    (MANY, "Q4_K", "several GGUF files with Q4_K in the name; they are: m-Q4_K_M.gguf, m-Q4_K_S.gguf"),
    (MANY, "m", "several GGUF files with m in the name; they are: "),
    (["a-Q8_0.gguf", "b-Q8_0.gguf"], None, "several GGUF files; they are: a-Q8_0.gguf, b-Q8_0.gguf"),
    (["config.json"], "Q8_0", "no GGUF file with Q8_0 in the name; its GGUF files are: none"),
])
def test_what_is_not_clear_is_asked(files: list[str], wanted: str | None, message: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        chosen_gguf(Repository("org/name", None, wanted), files)
    assert message in caught.value.message and "org/name:Q8_0" in (caught.value.hint or "")

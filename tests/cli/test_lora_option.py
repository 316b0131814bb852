"""`--lora` on every way in: the stages merge the adapter, the API has its name, and nothing is confused with the
model without it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from command import CONTEXT, Models, asking, run
from gguf import GGMLQuantizationType as Kind
from spelled import save

from adapters import merge, shapes_of, write_adapter
from fullpipe.assembly import prepare
from fullpipe.assembly.costs import kept_costs, kept_fates
from fullpipe.assembly.prepare import Prepared
from fullpipe.cli import serve
from fullpipe.errors import FullpipeError, UsageError
from fullpipe.llm import LLM
from fullpipe.options import MethodOptions, ModelOptions, Options, ServerOptions
from fullpipe.request import SamplingParams
from fullpipe.server.protocol.tables import REFUSED
from tiny import tiny_model, write_gguf

SHORT = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
LETTERS = "".join(map(chr, range(32, 127)))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "pirate"
    write_adapter(folder, shapes_of(tiny_model("llama")))
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, adapter: Path) -> Path:
    """The target with the adapter in its weights."""
    model = tiny_model("llama", seed=1, max_position_embeddings=CONTEXT, eos_token_id=None)
    merge(model, write_adapter(adapter, shapes_of(model)))
    return save(model, tmp_path_factory.mktemp("merged"), LETTERS)


@pytest.mark.parametrize("method", ["pp", "chain", "fullpipe"])
def test_every_method_says_what_the_merged_model_says(models: Models, adapter: Path, merged: Path,
                                                      method: str) -> None:
    with LLM(str(merged), draft="none", dtype="float32", threads=1) as llm:
        truth = llm.generate("hello there", SHORT)[0].token_ids
    with LLM(str(models.target), draft=str(models.draft), dtype="float32", threads=1, method=method,
             lora=str(adapter)) as llm:
        assert llm.generate("hello there", SHORT)[0].token_ids == truth
    with LLM(str(models.target), draft="none", dtype="float32", threads=1) as llm:
        assert llm.generate("hello there", SHORT)[0].token_ids != truth


@pytest.mark.processes
def test_stages_merge_their_own_layers(models: Models, adapter: Path, merged: Path) -> None:
    asked = ("--max-tokens", "12", "--ignore-eos")
    truth = run(*asking(merged, *asked)).stdout
    ours = run(*asking(models.target, *asked, "--lora", adapter, stages=2))
    assert ours.exit_code == 0 and ours.stdout == truth
    assert f"the LoRA adapter {adapter} is merged into 35 matrices" in ours.stderr.replace("\n", "")


def prepared(models: Models, lora: Path | None, **more: object) -> Prepared:
    return prepare(Options.of(model=str(models.target), draft=str(models.draft), lora=lora and str(lora), **more))


def test_stations_are_told_but_not_the_draft(models: Models, adapter: Path) -> None:
    with_it = prepared(models, adapter, stages=2)
    assert [spec.args.get("lora") for spec in with_it.stages] == [str(adapter)] * 2
    assert with_it.draft is not None and "lora" not in with_it.draft.args
    assert all("lora" not in spec.args for spec in prepared(models, None, stages=2).stages)


def test_what_was_measured_and_learned_without_it_is_not_reused(models: Models, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_adapter(other, shapes_of(tiny_model("llama")), seed=2)
    found = [prepared(models, lora) for lora in (None, adapter, other)]
    assert len({kept_costs(one).path for one in found}) == 3
    assert len({fates.path for one in found if (fates := kept_fates(one))}) == 3


def test_matrices_that_were_quantised_are_told(adapter: Path, tmp_path: Path) -> None:
    write_gguf(tiny_model("llama"), tmp_path / "m.gguf", kind=Kind.Q8_0)
    said: list[str] = []
    with suppress(FullpipeError):  # the file's tokenizer is none
        prepare(Options.of(model=str(tmp_path / "m.gguf"), draft="none", lora=str(adapter)), said.append)
    assert any("quantised and take 16 bits now" in line for line in said)


@pytest.mark.parametrize(("text", "name", "ends"), [
    ("pirate=adapters/x", "pirate", "/adapters/x"), ("adapters/x", "x", "/adapters/x"), ("x", "x", "/x"),
    ("/a/b=c", "b=c", "/a/b=c"), ("n=/a/b=c", "n", "/a/b=c"), ("./x/", "x", "/x")])
def test_a_name_may_stand_before_the_folder(text: str, name: str, ends: str) -> None:
    found = ModelOptions(lora=text).adapter
    assert found is not None and found[0] == name
    assert str(found[1]).endswith(ends) and found[1].is_absolute()


@pytest.mark.parametrize("text", ["", " ", "=", "=x", "x="])
def test_what_names_no_adapter(text: str) -> None:
    with pytest.raises(UsageError, match="names no LoRA adapter") as caught:
        ModelOptions(lora=text)
    assert caught.value.param == "lora"


def test_a_folder_that_is_not_there_is_told_before_anything_is_loaded(models: Models) -> None:
    said = run(*asking(models.target, "--lora", "nowhere"))
    assert said.exit_code == 3 and "there is no LoRA adapter at" in said.stderr and "loading" not in said.stderr


@pytest.mark.parametrize(("lora", "own", "served"), [
    ("pirate=x", (), ("pirate",)), ("some/x", (), ("x",)), ("pirate=x", ("a", "b"), ("a", "b", "pirate")),
    (None, (), ("m",)), (None, ("a",), ("a",))])
def test_the_api_has_it_under_its_name(lora: str | None, own: tuple[str, ...], served: tuple[str, ...],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[tuple[str, ...]] = []
    monkeypatch.setattr(serve, "_server", lambda: lambda options, server, door: names.append(server.served_model_name))
    monkeypatch.setattr(serve, "fetch_all", lambda *_: None)
    serve.serve(ModelOptions(model="m", lora=lora), MethodOptions(), ServerOptions(served_model_name=own, port=0))
    assert names == [served]


def test_no_request_can_choose_another() -> None:
    assert "merged" in REFUSED["lora_name"]

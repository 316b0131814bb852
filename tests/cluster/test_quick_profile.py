"""A quick profile is measured once for each model, draft, number of threads and device, and kept on the host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tiny
from fullpipe.cluster import measure as measuring
from fullpipe.cluster.acceptance import Acceptance
from fullpipe.cluster.guesser import draft_model, guesser_of
from fullpipe.cluster.kept import KeptFates, kept_right
from fullpipe.cluster.modes import WIDTHS
from fullpipe.cluster.planner import search
from fullpipe.cluster.quick import fingerprint, kept_at, quick_profile
from fullpipe.cluster.survey import survey
from fullpipe.errors import UsageError
from fullpipe.hub import cache
from fullpipe.sequences.calibration import Calibration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(tiny.tiny_model("llama"), tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.HOME_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr("fullpipe.cluster.quick.CONTEXT", 16)
    return tmp_path / "cache"


def test_it_is_measured_once_and_found_again(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = quick_profile(model, model, 1, dtype="float32", say=said.append)
    assert first.layers.rows == WIDTHS and first.drafts is not None and first.head(1) > 0 == first.message(1000)
    assert kept_at(model, model, 1, dtype="float32", quantization=None, device="cpu").is_file()

    monkeypatch.setattr(measuring, "measure", lambda *args, **options: pytest.fail("measured again"))
    assert quick_profile(model, model, 1, dtype="float32", say=said.append) == first
    assert [line.partition(" ")[0] for line in said] == ["measuring", "kept", "what"]


def test_another_model_draft_or_number_of_threads_is_kept_apart(model: str) -> None:
    ways = {kept_at(model, None, 1), kept_at(model, model, 1), kept_at(model, None, 2),
            kept_at(model, None, 1, device="cuda:0")}
    assert len(ways) == 4
    for file in Path(model).iterdir():
        os.utime(file, (1, 1))
    assert kept_at(model, None, 1) not in ways, "the file is another one"


def test_a_damaged_file_is_measured_anew(model: str) -> None:
    path = kept_at(model, None, 1, dtype="float32", quantization=None, device="cpu")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    found = quick_profile(model, None, 1, dtype="float32")
    assert found.drafts is None and path.read_text() != "{}"


def test_a_file_of_which_only_the_header_is_real_will_do(model: str, tmp_path: Path) -> None:
    """As a host has it that gets its weights from the head later: of the right size, and nothing in it."""
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    for file in Path(model).iterdir():
        data = file.read_bytes()
        with open(hollow / file.name, "wb") as out:
            header = 8 + int.from_bytes(data[:8], "little") if file.suffix == ".safetensors" else len(data)
            out.write(data[:header])
            out.truncate(len(data))
    found = quick_profile(str(hollow), None, 1, dtype="float32")
    assert found.num_layers == quick_profile(model, None, 1, dtype="float32").num_layers and found.head(1) > 0


def test_this_machine_can_be_surveyed_and_planned_for(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = survey(model, None, threads=1)
    (name,) = found.hosts
    assert found.head == name and found.hosts[name].free_bytes > 0
    assert search(found).best.layout.order == (name,)


# ---- how often a draft is right ----------------------------------------------------------------------------


def test_what_was_counted_of_a_draft_is_what_is_expected_of_it(model: str, home: Path) -> None:
    what = {"version": "1", "model": [model, fingerprint(Path(model))], "dtype": "float32"}
    mix = {"builder": "mix", "args": {"drafts": [{"builder": "m", "args": {"model": model, "sharing": 3}},
                                                 {"builder": "ngram", "args": {}}]}}
    unknown = guesser_of(model, [model, "ngram"])
    assert unknown and not unknown.acceptance.measured and unknown.kind == "model+ngram"

    KeptFates.of(home / "profiles", what | {"draft": mix}).save(Calibration(right=(100.0, 70.0, 80.0)))
    KeptFates.of(home / "profiles", what | {"draft": mix, "modules": [1]}).save(Calibration(right=(100.0, 90.0, 90.0)))
    KeptFates.of(home / "profiles", what | {"draft": {"args": {}}}).save(Calibration(right=(50.0, 5.0, 6.0)))
    (home / "profiles" / "x.fates.json").write_text("no json")
    known = guesser_of(model, [model, "ngram"])
    assert known and known.acceptance == Acceptance(0.8, 0.85, measured=True)
    assert kept_right(home / "profiles", what["model"], frozenset()) == (50.0, 5.0, 6.0)
    ngram = guesser_of(model, ["ngram"])
    assert ngram and not ngram.acceptance.measured, "50 tokens say too little"
    code = guesser_of(model, [model, "ngram"], "code")
    assert code and code.acceptance == Acceptance.usual("model+ngram", "code"), "somebody knows better"


def test_no_draft_is_none_and_two_draft_models_are_one_too_many(model: str) -> None:
    assert guesser_of(model, []) is None and draft_model(["ngram"]) is None and draft_model(["m", "ngram"]) == "m"
    with pytest.raises(UsageError, match="these are 2: m, n"):
        draft_model(["m", "ngram", "n"])


def test_more_guesses_of_a_place_hit_more_often_up_to_what_is_among_them() -> None:
    one = Acceptance(0.7, 0.9)
    hits = [one.hit(guesses) for guesses in (0.5, 1, 2, 8, 1000)]
    assert hits[0] == hits[1] == 0.7 and hits == sorted(hits) and hits[-1] < 0.9
    assert Acceptance.counted(1000, 1200, 10) == Acceptance(1.0, 1.0, measured=True), "a damaged file"

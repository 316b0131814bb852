"""A receipt is read back as it was written, or refused with the field's name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from synthetic_receipt import cluster, receipt, sample, whole_receipt

from fullpipe.errors import UsageError
from fullpipe.files import write_whole
from fullpipe_lab.receipts import Candidate, Tuning, load_receipt, save_receipt

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-2**60, 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner,
                                                                max_size=3), max_leaves=8)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    whole = whole_receipt(stages=(3,), prompts=1, tokens=8)
    save_receipt(whole, tmp_path / "r.json")
    assert load_receipt(tmp_path / "r.json") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_receipt_without_checks_is_read(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda values: values.pop("checks"))
    assert load_receipt(path).checks == []


def test_what_was_not_compared_comes_back_as_nothing(tmp_path: Path) -> None:
    replayed = receipt([sample(same_text=None, near_ties=None)], checks=[{"method": "pp", "text equal": True}])
    save_receipt(replayed, tmp_path / "r.json")
    assert load_receipt(tmp_path / "r.json") == replayed


@given(settings=st.dictionaries(st.text(st.characters(codec="utf-8")), plain, max_size=3))
def test_any_plain_settings_come_back(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("receipts") / "r.json"
    save_receipt(receipt([sample()], settings=settings), path)
    assert load_receipt(path).settings == settings


def test_every_sample_has_a_line_of_its_own(tmp_path: Path) -> None:
    save_receipt(receipt([sample(prompt=f"set/{index}#0") for index in range(3)]), tmp_path / "r.json")
    lines = (tmp_path / "r.json").read_text().splitlines()
    assert [json.loads(line.rstrip(","))["prompt"] for line in lines if '"prompt"' in line] == [
        "set/0#0", "set/1#0", "set/2#0"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    path.write_text("before")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(UsageError, match=r"cannot write .*r\.json: No space left on device"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_who_reads_the_old_file_goes_on_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("before")
    with path.open() as reader:
        write_whole(path, "after")
        assert reader.read() == "before"
    assert path.read_text() == "after"


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory"):
        save_receipt(receipt([sample()]), tmp_path / "no" / "r.json")


# ---- bad files -------------------------------------------------------------------------------------------


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = tmp_path / "r.json"
    save_receipt(receipt([sample()]), path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return path


BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a field is missing": (lambda v: v.pop("command"), r"field command: Field required"),
    "an unknown field": (lambda v: v.update(colour="red"), r"field colour: Extra inputs are not permitted"),
    "a number as text": (lambda v: v["samples"][0].update(tokens="10"), r"field samples\.0\.tokens: .*integer"),
    "a negative time": (lambda v: v["samples"][0].update(decode_s=-1), r"field samples\.0\.decode_s: .*greater"),
    "a share over one": (lambda v: v["samples"][0].update(bubbles=[0.1, 1.1]), r"samples\.0\.bubbles\.1"),
    "NaN": (lambda v: v["samples"][0].update(fill=math.nan), r"NaN is not a number of strict JSON"),
    "Infinity": (lambda v: v["settings"].update(floor=math.inf), r"Infinity is not a number of strict JSON"),
    "bubbles of other stages": (lambda v: v["samples"][0].update(bubbles=[0.1]), r"samples\.0: .*1 bubbles for 2"),
    "more hits than asked": (lambda v: v["samples"][0].update(hits_by_depth=[10]), r"more hits than tokens"),
    "depths of two lengths": (lambda v: v["samples"][0].update(hits_by_depth=[]), r"differ in length"),
    "an unlisted cluster": (lambda v: v["samples"][0].update(cluster="moon"), r"'moon', which `clusters` does not"),
    "other stages": (lambda v: v["clusters"][0].update(stages=3), r"ran on 2 stages of cluster 'two'"),
    "a cluster twice": (lambda v: v["clusters"].append(v["clusters"][0]), r"two clusters have the same name"),
    "a newer version": (lambda v: v.update(version=2), r"version 2 cannot be read"),
    "an older version": (lambda v: v.update(version=0), r"version 0 cannot be read"),
    "no version": (lambda v: v.pop("version"), r"version None cannot be read"),
    "another format": (lambda v: v.update(format="something"), r"is not a benchmark receipt"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_bad_receipt_is_refused_by_name(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    path = changed(tmp_path, change)
    with pytest.raises(UsageError, match=message) as caught:
        load_receipt(path)
    assert str(path) in caught.value.message and caught.value.hint


def test_a_number_too_large_is_refused(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda v: None)
    path.write_text(path.read_text().replace('"fill": 0.5', '"fill": 1e999'))
    with pytest.raises(UsageError, match=r"samples\.0\.fill: .*finite"):
        load_receipt(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 200_000], ids=repr)
def test_what_is_no_receipt_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"r\.json"):
        load_receipt(path)


def test_a_cut_off_receipt_is_refused(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda v: None)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UsageError, match="cannot read the receipt"):
        load_receipt(path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_receipt(tmp_path / "none.json")


def test_the_best_candidate_must_be_there() -> None:
    one = Candidate(width=8, depth=None, draft="ngram", floor=None, tbt_s=0.1)
    with pytest.raises(ValidationError, match="best is 1, but there are 1 candidates"):
        Tuning(cluster="two", temperature=0.0, method="pipedec", candidates=[one], best=1, prompts=3)


def test_a_tuning_of_an_unlisted_cluster_is_refused() -> None:
    tuning = whole_receipt(stages=(3,), prompts=1, tokens=8).tuning[:1]
    with pytest.raises(ValidationError, match="which `clusters` does not list"):
        receipt([sample()], tuning=tuning, clusters=[cluster()])

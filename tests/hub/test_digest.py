"""What a model's files hash to is computed once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

import tiny
from fullpipe.hub import cache


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write_gguf(tiny.tiny_model("qwen2"), tmp_path / "m.gguf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save(tiny.tiny_model("qwen2"), tmp_path / "tiny", shard_size="100KB")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read."""
    names, real = list[str](), cache.file_sha256
    monkeypatch.setattr(cache, "file_sha256", lambda path, on_bytes: names.append(path.name) or real(path, on_bytes))
    return names


def test_a_file_is_hashed_once(home: Path, model: Path, hashed: list[str]) -> None:
    expected = hashlib.sha256(model.read_bytes()).hexdigest()
    assert [cache.digest(model) for _ in range(3)] == [expected] * 3
    assert hashed == ["m.gguf"]
    stamp, = (home / "stamps").iterdir()
    assert json.loads(stamp.read_text())["sha256"] == expected


def test_nothing_is_written_beside_it(home: Path, model: Path) -> None:
    before = set(model.parent.iterdir()) | {home}
    cache.digest(model)
    assert set(model.parent.iterdir()) == before


def test_each_file_of_a_folder_is_hashed_once_and_progress_runs_through_all(home: Path, folder: Path,
                                                                            hashed: list[str]) -> None:
    told: list[tuple[int, int]] = []
    found = cache.manifest(folder, lambda done, total: told.append((done, total)))
    size = sum(file.size for file in found.files)
    assert told == sorted(told) and told[-1] == (size, size)
    told.clear()
    assert cache.digest(folder, lambda done, total: told.append((done, total))) == found.digest
    assert sorted(hashed) == sorted(Path(file.name).name for file in found.files)
    assert told == []


def test_a_file_that_changed_is_hashed_again(home: Path, model: Path, hashed: list[str]) -> None:
    before = cache.digest(model)
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    os.utime(model, ns=(1, 1))
    assert cache.digest(model) == hashlib.sha256(content).hexdigest() != before
    assert len(hashed) == 2


def test_the_stamp_of_a_catalogue_model_vouches_too(home: Path, model: Path, hashed: list[str]) -> None:
    cache.write_stamp(model, "f" * 64)
    assert cache.digest(model) == "f" * 64
    assert hashed == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": 7}'])
def test_a_stamp_that_makes_no_sense_says_nothing(text: str, home: Path, model: Path) -> None:
    expected = cache.digest(model)
    stamp, = (home / "stamps").iterdir()
    stamp.write_text(text)
    assert cache.digest(model) == expected


def test_a_file_that_changes_while_it_is_read_gets_no_stamp(home: Path, model: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    real = cache.file_sha256

    def reading(path: Path, on_bytes: object) -> str:
        found = real(path)
        os.utime(path, ns=(1, 1))
        return found

    monkeypatch.setattr(cache, "file_sha256", reading)
    cache.digest(model)
    assert not (home / "stamps").exists()


def test_a_home_that_cannot_be_written_costs_time_alone(model: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FULLPIPE_HOME", str(tmp_path / "file"))
    assert cache.digest(model) == hashlib.sha256(model.read_bytes()).hexdigest()


def test_parts_from_the_head_lie_apart_from_models(home: Path) -> None:
    assert cache.from_head_folder("ab") == home / "from-head" / "ab"
    assert cache.model_file("ab").parent != cache.from_head_folder("ab").parent

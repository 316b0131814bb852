"""Programs of a peer that are compiled: fetched once, built, and nothing but the programs left."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from fullpipe.errors import FetchError
from fullpipe_lab.peers import envs
from fullpipe_lab.peers.sources import Source, compile_programs

SOURCE = Source("some-program>=1.2,<2", "vendor/it", ("-DFAST=ON",), ("serve", "help"))


class Tools:
    """Stands where pip and CMake do."""

    def __init__(self, folder: Path, inside: str = "vendor/it") -> None:
        self._folder, self._inside = folder, inside
        self.runs: list[Sequence[str]] = []
        (folder / "bin").mkdir(parents=True)

    def __call__(self, command: Sequence[str]) -> None:
        self.runs.append(command)
        if "download" in command:
            self._download(Path(command[command.index("--dest") + 1]))
        if "--build" in command:
            made = self._folder / "build" / "bin"
            made.mkdir(parents=True)
            for program in SOURCE.programs:
                (made / program).write_text(program)

    def _download(self, to: Path) -> None:
        project = self._folder / "packed" / "some_program-1.3" / self._inside
        project.mkdir(parents=True)
        (project / "CMakeLists.txt").touch()
        to.mkdir()
        with tarfile.open(to / "some_program-1.3.tar.gz", "w:gz") as file:
            file.add(self._folder / "packed" / "some_program-1.3", "some_program-1.3")


def test_the_programs_are_all_that_is_left(tmp_path: Path) -> None:
    tools = Tools(tmp_path)
    assert compile_programs(SOURCE, tmp_path, tools) == "1.3"
    assert [(tmp_path / "bin" / program).read_text() for program in SOURCE.programs] == ["serve", "help"]
    assert not any((tmp_path / name).exists() for name in ("source", "source.part", "build"))
    download, configure, build = tools.runs
    assert "some-program" in download and "-DFAST=ON" in configure and build[:3] == ["nice", "-n", "19"]


def test_a_build_that_was_cut_off_needs_no_second_download(tmp_path: Path) -> None:
    tools = Tools(tmp_path)
    project = tmp_path / "source" / "some_program-1.4" / "vendor" / "it"
    project.mkdir(parents=True)
    (project / "CMakeLists.txt").touch()
    assert compile_programs(SOURCE, tmp_path, tools) == "1.4"
    assert len(tools.runs) == 2


def test_a_package_that_lacks_the_project_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="has no vendor/it"):
        compile_programs(SOURCE, tmp_path, Tools(tmp_path, "elsewhere"))


def test_a_program_is_there_once_its_environment_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLPIPE_HOME", str(tmp_path))
    folder = tmp_path / "peers" / "llamacpp-rpc"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "llama-server").touch()
    assert envs.program("llamacpp-rpc", "llama-server") is None
    (folder / "fullpipe.json").write_text('{"cmake": "4"}')
    assert envs.program("llamacpp-rpc", "llama-server") == folder / "bin" / "llama-server"
    assert envs.versions_of("llamacpp-rpc") == {"cmake": "4"}

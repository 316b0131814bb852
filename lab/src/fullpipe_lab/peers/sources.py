"""Programs of a peer that are compiled here, from a source package of PyPI.

    <environment>/source/     the package, unpacked
    <environment>/build/      what CMake makes of it
    <environment>/bin/        the finished programs; the other two folders are gone then

A build that was cut off goes on where it was.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fullpipe.errors import FetchError
from fullpipe.threads import cores

Run = Callable[[Sequence[str]], None]
"""Raises FetchError for a command that fails."""


@dataclass(frozen=True, slots=True)
class Source:
    """package: a requirement for pip, of which the source is taken. inside: the CMake project in it. options: for
    CMake. programs: what is built, each a target and a file of the same name in the build's `bin`."""

    package: str
    inside: str
    options: tuple[str, ...]
    programs: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.package.split("=")[0].rstrip("<>~!")


def compile_programs(source: Source, folder: Path, run: Run) -> str:
    """Build the programs into the environment's bin; the version of the source. Raises FetchError.

    folder: an environment with CMake and Ninja in it. Compiling waits for whatever else runs on the machine.
    """
    unpacked, compiled, tools = folder / "source", folder / "build", folder / "bin"
    project = _unpacked(source, unpacked) or _fetch(source, unpacked, tools, run)
    cmake = str(tools / "cmake")
    run([cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", "-DCMAKE_BUILD_TYPE=Release",
         *source.options, "-S", str(project / source.inside), "-B", str(compiled)])
    run(["nice", "-n", "19", cmake, "--build", str(compiled), "--parallel", str(cores()), "--target",
         *source.programs])
    for program in source.programs:
        os.replace(compiled / "bin" / program, tools / program)
    shutil.rmtree(compiled)
    shutil.rmtree(unpacked)
    return project.name.rpartition("-")[2]


def _unpacked(source: Source, folder: Path) -> Path | None:
    """The whole package, if it is there."""
    return next((path for path in folder.glob("*") if (path / source.inside / "CMakeLists.txt").is_file()), None)


def _fetch(source: Source, folder: Path, tools: Path, run: Run) -> Path:
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    run([str(tools / "python"), "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", source.name, "--dest",
         str(part), source.package])
    for archive in part.glob("*.tar.gz"):
        with tarfile.open(archive) as file:
            file.extractall(part, filter="data")
        archive.unlink()
    os.replace(part, folder)
    if (found := _unpacked(source, folder)) is None:
        raise FetchError(f"the source of {source.package} has no {source.inside}",
                         hint="Another version has it elsewhere; name one that is known to work.")
    return found

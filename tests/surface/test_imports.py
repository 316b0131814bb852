"""Imports point one way, and what needs no torch loads none."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "fullpipe"

# From the bottom up. A module may import from lines above its own, and from its own entry, but not from its
# neighbours on the line. The longest name that fits decides. docs/architecture.md has the same list.
LAYERS = (
    ("errors", "threads", "text"),
    ("request", "prompts", "pipeline.links", "pipeline.pace"),
    ("messages",),
    ("tree", "stats", "trace", "kvcache.slots", "planning", "hub"),
    ("track", "policies", "pipeline.base", "pipeline.station"),
    ("batching", "kvcache.ledger"),
    ("engine", "pipeline.spec"),
    ("model.config", "calibrate"),
    ("kvcache.arena",),
    ("model",),
    ("pipeline",),
    ("sources",),
    ("assembly",),
    ("llm",),
    ("bench", "training", "server"),
    ("cli",),
    ("__init__", "__main__"),  # the public names; `python -m fullpipe`
)
LEVELS = {entry: level for level, line in enumerate(LAYERS) for entry in line}

TORCH_FREE = ("fullpipe", "fullpipe.sequences.tree", "fullpipe.methods", "fullpipe.batching", "fullpipe.engine.loop",
              "fullpipe.pipeline.inprocess", "fullpipe.stations.scripted", "fullpipe.stations.drafts.scripted",
              "fullpipe.stations.drafts.ngram", "fullpipe.stations.drafts.mix")


def module_name(path: Path) -> str:
    """Inside the package: "engine", "tree.token_tree", "policies" (its __init__), "__init__" (the package's own)."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py") if path.read_text().strip()}


def imports_of(path: Path) -> set[str]:
    """The package's modules that this one imports, inside functions too, for type checking not."""
    found: set[str] = set()
    for node in running_code(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module_of(name.removeprefix("fullpipe").removeprefix(".")) for name in found
            if name.split(".")[0] == "fullpipe"}


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


def entry_of(module: str) -> str:
    while module not in LEVELS:
        module, _, last = module.rpartition(".")
        assert module, f"{last} has no place in LAYERS"
    return module


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_layers_below(module: str) -> None:
    mine = entry_of(module)
    for other in imports_of(MODULES[module]) - {module}:
        theirs = entry_of(other)
        assert theirs == mine or LEVELS[theirs] < LEVELS[mine], f"{module} imports {other}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: imports_of(path) - {module} for module, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_the_list_is_the_documented_one() -> None:
    text = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    documented = [tuple(re.findall(r"`([\w.]+)`", cell)) for cell in table]
    start = documented.index(LAYERS[0])
    assert tuple(documented[start : start + len(LAYERS) - 1]) == LAYERS[:-1]


def test_every_entry_holds_a_module() -> None:
    assert set(LEVELS) == {entry_of(module) for module in MODULES}


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_it_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""What the documents point at is there: functions, links, commands and their options."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "lab").glob("*.md"),
                    *(ROOT / "lab" / "docs").rglob("*.md"), *(ROOT / "modules").rglob("*.md")])
CURRENT = [file for file in DOCUMENTS if file.parent.name != "log"]  # the log says what things were called on the day
PACKAGES = [ROOT / "src" / "fullpipe", ROOT / "lab" / "src" / "fullpipe_lab"]
SHELL = ("", "sh", "bash", "console")  # languages of code blocks that hold commands

POINTER = re.compile(r"`([\w./-]+\.py)(?::([\w.]+))?`")
LINK = re.compile(r"""\]\(([^)\s]+)\)|(?:src|srcset|href)="([^"]+)\"""")
COMMAND = re.compile(r"(?:^|\||&&|;)\s*(?:\$ )?(?:\w+=\S+ )*(?:\S*/)?(fullpipe(?:-lab)?) (.*)")


@dataclass(frozen=True)
class Found:
    """Something a document says, and where."""

    document: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}: {self.what}"


def lines_of(document: Path) -> Iterator[tuple[int, str, str | None]]:
    """Number, text, and the language of the code block that the line stands in (None: it does not)."""
    language = None
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith("```"):
            language = line.strip().removeprefix("```") if language is None else None
        else:
            yield number, line, language


def pointers() -> list[Found]:
    return [Found(document, number, match[0].strip("`")) for document in CURRENT
            for number, line, language in lines_of(document) if language is None
            for match in POINTER.finditer(line)]


def links() -> list[Found]:
    return [Found(document, number, match[1] or match[2]) for document in DOCUMENTS
            for number, line, language in lines_of(document) if language is None
            for match in LINK.finditer(line) if not re.match(r"[a-z]+:", match[1] or match[2])]


def commands() -> list[Found]:
    """Calls of our commands in shell blocks and in inline code, without strings, comments and what they pipe into."""
    found = []
    for document in CURRENT:
        for number, line, language in lines_of(document):
            spans = re.findall(r"`([^`]+)`", line) if language is None else [line] if language in SHELL else []
            for span in spans:
                plain = re.sub(r"\"[^\"]*\"|'[^']*'", "TEXT", span).split(" #")[0]
                found += [Found(document, number, f"{match[1]} {match[2].split(' | ')[0]}")
                          for match in COMMAND.finditer(plain)]
    return found


@cache
def names_in(file: Path) -> frozenset[str]:
    """Everything that a file defines: functions, classes, constants; "Class.method", "Class.field"."""
    return frozenset(_names(ast.parse(file.read_text(encoding="utf-8")).body, ""))


def _names(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        match node:
            case ast.ClassDef():
                yield prefix + node.name
                yield from _names(node.body, f"{prefix}{node.name}.")
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield prefix + node.name
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield prefix + name
            case ast.Assign(targets=targets):
                yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


def test_there_is_something_to_check() -> None:
    tour = [found for found in pointers() if found.document.name == "life-of-a-token.md"]
    assert len(tour) > 20 and len(links()) > 5 and len(commands()) > 5


@pytest.mark.parametrize("pointer", pointers(), ids=str)
def test_a_pointer_points_at_something(pointer: Found) -> None:
    path, _, name = pointer.what.partition(":")
    files = [file for file in (*(package / path for package in PACKAGES), ROOT / path) if file.is_file()]
    assert files, f"{pointer}: no such file"
    assert not name or name in names_in(files[0]), f"{pointer}: no such name"


@pytest.mark.parametrize("link", links(), ids=str)
def test_a_link_leads_somewhere(link: Found) -> None:
    path, _, anchor = link.what.partition("#")
    target = link.document.parent / path if path else link.document
    assert target.exists(), f"{link}: no such file"
    if anchor:
        headings = [line.lstrip("#") for _, line, language in lines_of(target)
                    if language is None and line.startswith("#")]
        assert anchor in [slug(heading) for heading in headings], f"{link}: no such heading"


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def app_of(name: str) -> Any:
    """The command line of `fullpipe` or `fullpipe-lab`."""
    module = importlib.import_module(f"{name.replace('-', '_')}.cli.main")
    return typer.main.get_command(module.app)


@pytest.mark.parametrize("command", commands(), ids=str)
def test_a_command_exists_with_its_options(command: Found) -> None:
    name, *words = command.what.split()
    root = app_of(name)
    verb = root if words[0].startswith("-") else root.commands.get(words[0])
    assert verb is not None, f"{command}: no verb {words[0]}"
    if hasattr(verb, "commands") and verb is not root:  # a family of verbs, such as `convert spd`
        assert words[1] in verb.commands, f"{command}: no verb {words[1]}"
        verb = verb.commands[words[1]]
    known = {option for parameter in verb.params for option in (*parameter.opts, *parameter.secondary_opts)}
    used = {word.split("=")[0].rstrip(",.;)]") for word in words if re.match(r"\[?--?[a-z]", word)}
    assert {word.lstrip("[") for word in used} <= known | {"--help", "-h"}, f"{command}: known are {sorted(known)}"

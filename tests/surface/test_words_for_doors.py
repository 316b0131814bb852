"""A hint fits where it is read: in the terminal, in Python, in an HTTP answer. So below the command line it names no
flags, and what stands in backticks is told to whom it helps."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import fullpipe
from fullpipe.cli.main import app
from fullpipe.cli.verb import verb
from fullpipe.errors import Overloaded, PromptError, UsageError, spelled, without
from fullpipe.options import EngineOptions, MethodOptions, ModelOptions, PipelineOptions, ServerOptions
from fullpipe.server.problems import problem_of, told

PACKAGE = Path(fullpipe.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
COMMAND = re.compile(r"`[a-z-]+ [^`]*`")  # `pip install x --flag` is the same everywhere
FLAG = re.compile(r"(?<![\w-])--[a-z]")
OPTION_NAMES = {one.name for part in (ModelOptions, MethodOptions, PipelineOptions, EngineOptions, ServerOptions)
                for one in fields(part) if "_" in one.name}


def prose(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Texts of more than one word, with their holes; docstrings, and help that only the command line shows, aside."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) or (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "option"):
            if isinstance(node, ast.Call) or isinstance(node.value, ast.Constant):
                skipped |= {id(inner) for inner in ast.walk(node)}
        elif isinstance(node, ast.JoinedStr):
            if id(node) not in skipped:
                yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}"
                                           for part in node.values)
            skipped |= {id(inner) for inner in ast.walk(node)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name != "cli"],
                         ids=lambda path: str(path.relative_to(PACKAGE)))
def test_below_the_command_line_nobody_names_flags(path: Path) -> None:
    found = [(line, text) for line, text in prose(ast.parse(path.read_text()))
             if " " in text and FLAG.search(COMMAND.sub("", text))]
    assert not found, "write options as `max_model_len` or `stages=2`; each front door spells them its own way"


def hints(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "hint":
            yield from prose(ast.Module([ast.Assign([], node.value)], []))


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name != "cli"],
                         ids=lambda path: str(path.relative_to(PACKAGE)))
def test_options_and_commands_in_hints_stand_in_backticks(path: Path) -> None:
    """Or no door would know them for what they are."""
    for line, text in hints(path):
        bare = re.sub(r"`[^`]*`", "", text)
        assert not OPTION_NAMES & set(re.findall(r"\w+", bare)), f"line {line}: {text}"
        assert not re.search(r"\b(fullpipe|pip|hf) [a-z]", bare.replace("pip install 'fullpipe", "")), f"{line}: {text}"


def test_the_test_finds_what_it_is_for() -> None:
    tree = ast.parse('def f(x):\n "Doc --flag doc."\n raise E(f"{x} a", hint=f"Use --flag {x}, or " "`pip a --b`.")\n')
    assert [text for _, text in prose(tree) if FLAG.search(COMMAND.sub("", text))] == ["Use --flag {}, or `pip a --b`."]


# ---- the doors -------------------------------------------------------------------------------------------------------


HINT = "Shorten it. Otherwise use `max_model_len`, or `chat_template=False`. `ngram` fits. Or `stages=2`."


def test_the_command_line_spells_options_as_flags() -> None:
    def ask(max_model_len: int = 1, chat_template: bool = True, rows: int = typer.Option(2, "--stages", "-s")) -> None:
        raise UsageError("`max_model_len` is 1", hint=HINT)

    small = typer.Typer()
    small.callback()(lambda debug=False: None)
    small.command()(verb(ask))
    said = CliRunner().invoke(small, ["ask"]).stderr.replace("\n", " ")
    assert "error: --max-model-len is 1 Shorten it. Otherwise use --max-model-len, or --no-chat-template." in said
    assert "`ngram` fits. Or `stages=2`." in said, "it is called otherwise here, so it is not this verb's"


def test_python_reads_names() -> None:
    assert str(UsageError("too long", hint=HINT)) == f"too long\n{HINT}"


@pytest.mark.parametrize(("error", "said", "logged"), [
    (PromptError("too long", hint=HINT), "too long. Shorten it.", True),
    (UsageError("no such", hint="Install it: `pip install x`."), "no such", True),
    (UsageError("too many", hint="Lower `max_tokens`, or `n=1`."), "too many. Lower max_tokens, or n=1.", False),
    (Overloaded("busy", retry_after_s=1.0, hint="Try again. A longer queue is `max_waiting`."), "busy. Try again.",
     True),
    (UsageError("no"), "no", False),
])
def test_a_server_tells_callers_what_they_can_do(error: UsageError, said: str, logged: bool,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="fullpipe.server")
    assert told(error) == problem_of(error).error.message == said
    assert ("for the operator" in caplog.text) == logged


def test_spelled_and_without_leave_other_texts_alone() -> None:
    text = "In `a b` or `C` nothing is an option. 2 > 1."
    assert spelled(text, lambda name, value: "x") == text
    assert without("No ticks. At all.", lambda name: False) == "No ticks. At all."


def test_verbs_know_the_options_that_hints_name() -> None:
    """A name that no verb has would reach the reader in backticks."""
    known: set[str] = set()
    todo = [typer.main.get_command(app)]
    while todo:
        one = todo.pop()
        todo += list(getattr(one, "commands", {}).values())
        known |= {parameter.name for parameter in one.params}
    named = {name for path in MODULES for _, text in hints(path)
             for name in re.findall(r"`([a-z][a-z_]*)(?:=[^`]*)?`", text)}
    assert named - known <= {"save_pretrained", "jq", "turns", "prompt", "host_ip", "interface"}, inspect.cleandoc(
        "an option has one name everywhere; a word in backticks that is none needs no backticks")

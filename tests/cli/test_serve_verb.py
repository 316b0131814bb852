"""`fullpipe serve` as a process: it answers, finishes what runs when it is told to end, and leaves nothing behind."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from command import Models, run
from openai.types.chat import ChatCompletion

LONG = 3000  # tokens: it takes a while, whatever the machine


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    url: str
    workers: list[psutil.Process]

    def ask(self, max_tokens: int) -> Iterator[str]:
        """Lines of a stream."""
        body = {"model": "m", "prompt": "hello there", "max_tokens": max_tokens, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as answer:
            assert answer.status_code == 200
            yield from (line for line in answer.iter_lines() if line)

    def has_ended(self, code: int) -> None:
        assert self.process.wait(30) == code
        _, alive = psutil.wait_procs(self.workers, timeout=10)
        assert not alive


@contextmanager
def serving(models: Models, *options: str) -> Iterator[Served]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "fullpipe", "serve", "--model", str(models.target), "--draft", "ngram", "--stages", "2",
         "--served-model-name", "m", "--port", str(port), "--threads", "1", "--log-level", "warning", *options])
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while not _is_ready(url):
            assert process.poll() is None and time.monotonic() < end, "it does not become ready"
            time.sleep(0.05)
        yield Served(process, url, psutil.Process(process.pid).children(recursive=True))
    finally:
        process.kill()
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_what_runs_is_finished_at_the_first_signal(models: Models, how: signal.Signals) -> None:
    with serving(models) as server:
        lines = server.ask(200)
        assert next(lines).startswith("data: {")
        server.process.send_signal(how)
        *rest, last, done = lines
        assert done == "data: [DONE]" and rest
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        server.has_ended(0)


def test_the_second_signal_ends_it_at_once(models: Models) -> None:
    with serving(models) as server:
        lines = server.ask(LONG)
        next(lines)
        end = time.monotonic() + 20
        while server.process.poll() is None and time.monotonic() < end:  # two that come together count as one
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        with pytest.raises(httpx.TransportError):
            for _ in lines:
                pass
        server.has_ended(128 + signal.SIGTERM)


def test_openais_client_is_answered_through_the_template_that_was_given(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}{% if quick %}!{% endif %}"
                    "{% if add_generation_prompt %}:{% endif %}")
    talk: Any = [{"role": "user", "content": [{"type": "text", "text": "ab"}]},
                 {"role": "assistant", "content": "He"}]
    options = ("--chat-template", str(file), "--default-chat-template-kwargs", '{"quick": true}')
    with serving(models, *options) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        for extra, prompt in (({}, "<ab><He>!:"), ({"add_generation_prompt": False}, "<ab><He>!"),
                              ({"chat_template_kwargs": {"quick": False}}, "<ab><He>:"),
                              ({"continue_final_message": True, "add_generation_prompt": False}, "<ab><He")):
            reply = client.chat.completions.create(model="m", messages=talk, max_tokens=2, user="me", store=True,
                                                   extra_body=extra)
            ChatCompletion.model_validate(reply.model_dump(), strict=True)
            assert reply.usage is not None and reply.usage.prompt_tokens == len(prompt)


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(models: Models) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("serve", "--model", models.target, "--port", port)
    assert result.exit_code == 2 and "--port" in result.output and "loading" not in result.output


@pytest.mark.parametrize(("options", "says"), [
    (["--max-num-seqs", "0"], "max_num_seqs must be 1 or more"),
    (["--log-level", "loud"], "--log-level"),
    (["--served-model-name", ""], "a served model's name is empty"),
    (["--allowed-origins", "foo"], "'foo' is no origin"),
    (["--allowed-origins", "https://a.b/c"], "is no origin"),
    (["--kv-cache-tokens", "5"], "5 cache slots are less than a block of 256"),
    (["--port", "70000"], "the port must be below 65536"),
    (["--max-model-len", "5000", "--kv-cache-tokens", "4096"], "not 5000"),
    (["--method", "pp", "--prefill-share", "2"], "the method pp has no prefill_share"),
    (["--chat-template", "missing.jinja"], "missing.jinja"), (["--chat-template", "{% for %}"], "cannot be read")])
def test_what_cannot_be_served_is_refused(models: Models, options: list[str], says: str) -> None:
    result = run("serve", "--model", models.target, "--draft", "ngram", "--stages", "1", *options)
    assert result.exit_code == 2 and says in result.output.replace("\n", " ")

"""llama.cpp over RPC on two hosts, one core each: the model's second half is computed on the second.

    with llamacpp_rpc(lab, Server(model, num_layers, "ngram-simple")) as rival:
        answer = rival.ask(prompt, 64)

It computes in the weights that the GGUF file has, as we do. `python -m fullpipe_lab.peers llamacpp-rpc` compiles it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fullpipe.errors import UsageError
from fullpipe_lab.hosts.places import HEAD, OTHER, Answer, Places
from fullpipe_lab.peers import envs
from fullpipe_lab.peers.known import SERVER_RUNNER
from fullpipe_lab.peers.process import Runner

ENVIRONMENT = "llamacpp-rpc"
MODES: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "ngram-simple": ("--spec-type", "ngram-simple"),
    "draft": ("--spec-type", "draft-simple", "--spec-draft-n-max", "8", "--spec-draft-ngl", "0"),
}
"""How it speculates. draft: a small model on the head, eight tokens ahead."""
_RPC_PORT, _HTTP_PORT = 50052, 8080
_SLOW_LINK_S = 600.0  # half of the weights go over the link


@dataclass(frozen=True, slots=True)
class Server:
    """model, draft: GGUF files. max_len: tokens of prompt and answer. cores: of the head, and of the other."""

    model: Path
    num_layers: int
    mode: str = "plain"
    draft: Path | None = None
    max_len: int = 2048
    cores: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"llama.cpp has no mode {self.mode!r} here", hint=f"Known are: {', '.join(MODES)}.")
        if self.mode == "draft" and self.draft is None:
            raise UsageError("llama.cpp's mode draft needs a draft model", hint="Name its GGUF file.")

    @property
    def words(self) -> list[str]:
        """What the server on the head is told. The other host has the second half of the layers, and the head of the
        model, which llama.cpp counts as one more."""
        draft = ("-md", str(self.draft)) if self.mode == "draft" else ()
        return ["-m", str(self.model), "-ngl", str(self.num_layers // 2 + 1), "-t", "1", "-np", "1", "-c",
                str(self.max_len), "--no-webui", *draft, *MODES[self.mode]]


class Rival:
    """It runs, and can be asked from the head."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def ask(self, prompt: Sequence[int], tokens: int, limit_s: float = 600.0) -> Answer:
        """Greedily. Raises RunnerFailed."""
        return Answer.of(self._runner.ask({"prompt": list(prompt), "max_tokens": tokens}, limit_s))


def settings(server: Server) -> dict[str, Any]:
    """What a receipt says of it."""
    return {"mode": server.mode, "words": [word for word in server.words if not word.startswith("/")],
            "weights": "as in the file (quantised)", "kv_cache": "float16", "threads": 1,
            **envs.versions_of(ENVIRONMENT)}


@contextmanager
def llamacpp_rpc(lab: Places, server: Server) -> Iterator[Rival]:
    """Both servers, until the context ends. Raises UsageError where it is not compiled, RunnerFailed where it does not
    start."""
    there, here = (_program(name) for name in ("ggml-rpc-server", "llama-server"))
    other, head = lab.address(OTHER), lab.address(HEAD)
    rpc = [there, "-H", other, "-p", str(_RPC_PORT), "-t", "1"]
    web = [here, *server.words, "--rpc", f"{other}:{_RPC_PORT}", "--host", head, "--port", str(_HTTP_PORT)]
    with _beside(lab, OTHER, server.cores[1]) as second, _beside(lab, HEAD, server.cores[0]) as first:
        _start(second, rpc, other, _RPC_PORT, http=False)
        _start(first, web, head, _HTTP_PORT, http=True)
        yield Rival(first)


def _program(name: str) -> str:
    if (path := envs.program(ENVIRONMENT, name)) is None:
        raise UsageError("llama.cpp with RPC is not compiled here",
                         hint=f"`python -m fullpipe_lab.peers {ENVIRONMENT}` does it.")
    return str(path)


def _beside(lab: Places, host: str, core: int) -> Runner:
    return Runner(lab.command(host, [sys.executable, str(SERVER_RUNNER)], core), os.environ)


def _start(runner: Runner, command: Sequence[str], address: str, port: int, *, http: bool) -> None:
    runner.ask({"command": list(command), "address": address, "port": port, "http": http, "patience_s": _SLOW_LINK_S},
               _SLOW_LINK_S + 10)

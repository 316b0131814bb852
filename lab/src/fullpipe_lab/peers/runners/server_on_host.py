"""A server that runs beside this process, on the same host: started, waited for, asked, ended.

    in   {"command": [...], "address": ..., "port": n, "http": true, "patience_s": seconds}
    out  {"version": "", "load_s": ..., "settings": {}}
    in   {"prompt": [token ids], "max_tokens": n}
    out  {"tokens": [...], "times": [...], "told": {...}}

http: it is llama.cpp's server, ready when it says so, and can be asked. Without, it is ready when it listens. told: the
server's own count, of which "tbt_ms" is its time per token. The end of this process is the end of the server.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Any

from peer_protocol import Reply, Setup, converse  # type: ignore[import-not-found]

_PATIENCE_S = 3600  # for an answer: who asks has a limit of its own, and is the one to give up
_PAUSE_S = 0.1
_TAIL_BYTES = 4096


def load(setup: Setup) -> tuple[str, Setup, Reply]:
    log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (it is the server's as long as this process lives)
    server = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *setup["command"]], stdin=subprocess.DEVNULL,
                              stdout=log, stderr=log)
    atexit.register(end, server)
    where = setup["address"], setup["port"]
    until = time.monotonic() + setup["patience_s"]
    while not (healthy(*where) if setup["http"] else listens(*where)):
        if (code := server.poll()) is not None:
            raise RuntimeError(f"{setup['command'][0]} ended with code {code}: {_last_line(log)}")
        if time.monotonic() > until:
            raise RuntimeError(f"{setup['command'][0]} was not ready in {setup['patience_s']:g} s: {_last_line(log)}")
        time.sleep(_PAUSE_S)
    return "", {}, lambda question: ask(*where, question)


def end(server: subprocess.Popen[bytes]) -> None:
    server.kill()
    server.wait()


def listens(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), 1.0):
        return True
    return False


def healthy(address: str, port: int) -> bool:
    connection = http.client.HTTPConnection(address, port, timeout=5.0)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    return False


def ask(address: str, port: int, question: dict[str, Any]) -> dict[str, Any]:
    tokens: list[int] = []
    times: list[float] = []
    told: dict[str, Any] = {}
    begun = time.perf_counter()
    for event in _events(address, port, question):
        now = time.perf_counter() - begun
        fresh = event.get("tokens", [])
        tokens += fresh
        times += [now] * len(fresh)
        if count := event.get("timings"):
            told = {"tbt_ms": count["predicted_per_token_ms"], "prompt_ms": count["prompt_ms"],
                    "drafted": count.get("draft_n", 0), "accepted": count.get("draft_n_accepted", 0)}
    return {"tokens": tokens, "times": times, "told": told}


def _events(address: str, port: int, question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What llama.cpp's server streams. A connection each: it closes one after a streamed answer."""
    asked = {"prompt": question["prompt"], "n_predict": question["max_tokens"], "temperature": 0, "stream": True,
             "return_tokens": True, "cache_prompt": False}
    connection = http.client.HTTPConnection(address, port, timeout=_PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("POST", "/completion", json.dumps(asked), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != http.HTTPStatus.OK:
            raise RuntimeError(f"the server answered {reply.status}: {reply.read().decode(errors='replace')}")
        for line in reply:
            kind, _, value = line.decode().strip().partition(": ")
            if kind == "error":
                raise RuntimeError(f"the server said {value}")
            if kind == "data" and value.startswith("{"):
                yield json.loads(value)


def _last_line(log: IO[bytes]) -> str:
    log.seek(0, 2)
    log.seek(max(0, log.tell() - _TAIL_BYTES))
    lines = log.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


if __name__ == "__main__":
    converse(load)

"""Thousands of requests, most of them wrong, to a real server: no 5xx, every refusal says why, every stream is one.

    python -m fullpipe_lab.studies.serving.fuzz [--requests 5000] [--model smollm2-135m] [--draft ngram] [--stages 2]
        [--callers 8] [--seed 1] [--out FILE] [--log FILE]

Starts `fullpipe serve`, reads its OpenAPI document, and asks what `shots` makes of it: two fifths are schemathesis',
where that is installed. Faults, and exit code 1:

- a status of 500 and more; a connection that breaks; no answer within a minute;
- an answer that is not what it says it is: JSON that is none, a stream that breaks the rules of server-sent events or
  ends with an error, a refusal without OpenAI's error in it;
- a server that has restarted, is not ready, or still has something to do when nobody asks; an error in its log.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from fullpipe.cli.console import print_table
from fullpipe.errors import FullpipeError
from fullpipe_lab.receipts import save_receipt, study_receipt
from fullpipe_lab.sse import DONE, BadStream, check_chunks, check_named
from fullpipe_lab.studies.serving.processes import add_common, server_of, setup_of
from fullpipe_lab.studies.serving.servers import Running, running
from fullpipe_lab.studies.serving.shots import Shot, by_schemathesis, own
from fullpipe_lab.studies.serving.soak import log_faults, say

_CONTEXT, _SEQS = 512, 8
_LIMIT_S = 60.0
_SETTLE_S = 30.0
_BUSY = 429


@dataclass
class Fuzzing:
    """What is known of the run so far. counts: answers by family, path and status. streams: that were whole."""

    client: httpx.AsyncClient
    counts: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    streams: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)

    async def caller(self, shots: Iterable[Shot]) -> None:
        for shot in shots:
            await self.ask(shot)

    async def ask(self, shot: Shot) -> None:
        """One request, and again where the server is too busy for it."""
        headers = {"content-type": shot.kind} if shot.kind else {}
        try:
            async with asyncio.timeout(_LIMIT_S):
                response = await self.client.request(shot.method, shot.path, content=shot.content, headers=headers)
                while response.status_code == _BUSY and "retry-after" in response.headers:
                    await asyncio.sleep(0.1)
                    response = await self.client.request(shot.method, shot.path, content=shot.content, headers=headers)
        except (httpx.HTTPError, TimeoutError) as error:
            self._fault(shot, 0, f"{type(error).__name__}: {error}")
            return
        self.counts[shot.family, shot.path, response.status_code] += 1
        if fault := fault_of(shot, response):
            self._fault(shot, response.status_code, fault)
        self.streams += _is_stream(response)

    def _fault(self, shot: Shot, status: int, what: str) -> None:
        self.faults.append({"family": shot.family, "request": f"{shot.method} {shot.path}", "status": status,
                            "what": what[:500], "body": shot.content[:2000].decode(errors="backslashreplace")})
        say(f"    FAULT {shot.method} {shot.path} {status}: {what[:200]}")


def fault_of(shot: Shot, response: httpx.Response) -> str:
    """What is wrong with an answer; "" for nothing."""
    status, raw = response.status_code, response.content
    if status >= 500:
        return raw[:300].decode(errors="replace")
    if status >= 400:
        return "" if shot.method in ("HEAD", "OPTIONS") else _refusal_fault(raw)
    if _is_stream(response):
        return _stream_fault(shot.path, raw)
    if response.headers.get("content-type", "").startswith("application/json") and shot.method != "HEAD":
        return _json_fault(raw)
    return ""


def _is_stream(response: httpx.Response) -> bool:
    return str(response.headers.get("content-type", "")).startswith("text/event-stream")


def _stream_fault(path: str, raw: bytes) -> str:
    try:
        told = (check_named(raw.removesuffix(f"data: {DONE}\n\n".encode())) if path.endswith("/responses") else
                check_chunks(raw))
    except BadStream as error:
        return f"the stream breaks a rule: {error}"
    failed = next((one for one in told if "error" in one and one["error"] is not None), None)
    return f"the stream ends with an error: {json.dumps(failed)}" if failed else ""


def _json_fault(raw: bytes) -> str:
    try:
        json.loads(raw)
    except ValueError as error:
        return f"the answer is not JSON: {error}"
    return ""


def _refusal_fault(raw: bytes) -> str:
    try:
        error = json.loads(raw)["error"]
    except (ValueError, LookupError, TypeError):
        return f"a refusal without an error: {raw[:200].decode(errors='replace')}"
    named = isinstance(error, dict) and {"message", "type", "param", "code"} <= error.keys() and error["message"]
    return "" if named else f"a refusal without a reason: {json.dumps(error)[:200]}"


# ---- the run ---------------------------------------------------------------------------------------------------------


async def run(server: Running, number: int, callers: int, seed: int) -> dict[str, Any]:
    """Ask it all; the figures, and the faults."""
    limits = httpx.Limits(max_connections=callers)
    async with httpx.AsyncClient(base_url=server.url, timeout=_LIMIT_S, limits=limits, trust_env=False) as client:
        document = (await client.get("/openapi.json")).raise_for_status().json()
        theirs = by_schemathesis(document, number * 2 // 5, seed)
        shots = [*theirs, *own(document, number - len(theirs), seed)]
        say(f"asking {len(shots)} requests, {len(theirs)} of them of schemathesis")
        fuzzing, left, began = Fuzzing(client), iter(shots), time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(fuzzing.caller(left))
        seconds = time.monotonic() - began
        faults = [*fuzzing.faults, *({"what": what} for what in await _unsettled(client))]
    statuses, families = Counter[str](), Counter[str]()
    for (family, _, status), times in fuzzing.counts.items():
        statuses[str(status)] += times
        families[family] += times
    return {"requests": len(shots), "seconds": round(seconds, 1), "whole_streams": fuzzing.streams,
            "statuses": dict(sorted(statuses.items())), "families": dict(families), "faults": faults,
            "samples": [{"family": family, "path": path, "status": status, "times": times}
                        for (family, path, status), times in sorted(fuzzing.counts.items())]}


async def _unsettled(client: httpx.AsyncClient) -> list[str]:
    """What is not as it was before anybody asked."""
    until = time.monotonic() + _SETTLE_S
    while True:
        ready = await client.get("/ready")
        said = ready.json()
        if ready.status_code == 200 and not said["running"] and not said["waiting"]:
            break
        if time.monotonic() > until:
            return [f"the server does not come to rest: {said}"]
        await asyncio.sleep(0.2)
    return [f"the server has restarted: {said['last_failure']}"] if said["restarts"] else []


def main(arguments: list[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    log = asked.log or Path(tempfile.mkdtemp(prefix="fullpipe-fuzz-")) / "server.log"
    log.unlink(missing_ok=True)
    setup = replace(setup_of(asked.model, _CONTEXT, _SEQS), dtype="auto")
    say(f"starting {asked.model}, draft {asked.draft}, in {asked.stages} stages; its log is {log}")
    try:
        with running(server_of(asked.draft, asked.stages), setup, log) as server:
            results = asyncio.run(run(server, asked.requests, asked.callers, asked.seed))
    except FullpipeError as error:
        sys.exit(f"error: {error}")
    results["faults"] += [{"what": what} for what in log_faults(log.read_text(errors="replace"))]
    samples = results.pop("samples")
    print_table(["status", "times"], [[status, str(times)] for status, times in results["statuses"].items()])
    print_table(["family", "times"], [[family, str(times)] for family, times in results["families"].items()])
    print(f"{results['requests']} requests in {results['seconds']:.0f} s, {results['whole_streams']} streams, "
          f"{len(results['faults'])} faults")
    if asked.out:
        save_receipt(study_receipt("serving_fuzz", results | {"server": server.command}, samples), asked.out)
        say(f"wrote {asked.out}")
    sys.exit(1 if results["faults"] else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    add_common(parser)
    parser.add_argument("--callers", type=int, default=8)
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must be ended on the way out
    main()

"""A picture of the server's page while it serves from several hosts, one of which is lost.

    python -m fullpipe_lab.studies.shoot_hosts_page docs/hosts-page.png

Three hosts of a `Netlab` have a Ray node each, and h1 runs `fullpipe serve --hosts FILE` with SmolLM2. A question is
typed in a browser on h1, everything on h2 is killed, and the picture is taken when the answer goes on without it. With
a second file another picture is taken there when h2 has come back and has a stage again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from threading import Thread
from typing import Any

from fullpipe.cluster.netlab import Netlab, Shape
from fullpipe_lab.hosts.ray_nodes import RayNodes
from fullpipe_lab.studies.shoot_page import ask, page, shoot, until

URL = "http://127.0.0.1:8000/"
SERVE = ["serve", "-m", "smollm2-135m", "--stages", "3", "--host-timeout", "3", "--port", "8000", "--hosts"]
LINKS = {("h1", "h2"): Shape(delay_ms=5), ("h2", "h3"): Shape(delay_ms=8, mbit=300), ("h1", "h3"): Shape(delay_ms=12)}
QUESTION = "Write a long story about a lighthouse keeper, a storm and a lost ship, with a happy end."
BESIDE = "Once upon a time, in a small town by the sea,"  # the little load
_HEIGHT, _START_S = 1180, 240.0


def main(lost: str, back: str = "") -> None:
    with Netlab(3, links=LINKS) as lab, RayNodes(lab, cpus=1) as ray:
        hosts = ray.folder / "hosts.toml"
        hosts.write_text("".join(f'[[host]]\nname = "{name}"\naddress = "{lab.address(name)}"\n'
                                 for name in lab.names))
        server = lab.popen("h1", [sys.executable, "-m", "fullpipe", *SERVE, str(hosts)], core=0,
                           env=ray.environment("h1"))
        try:
            visitor = lab.popen("h1", [sys.executable, "-m", __spec__.name, "--visit", lost, back], core=1, text=True,
                                stdout=subprocess.PIPE, stdin=subprocess.PIPE, env=ray.environment("h1"))
            expect(visitor, "asked")
            lab.kill("h2")
            expect(visitor, "lost")
            if back:
                ray.start("h2")
                expect(visitor, "back")
            if visitor.wait(30):
                raise RuntimeError("the pictures were not taken")
        finally:
            server.terminate()


def expect(visitor: subprocess.Popen[str], word: str) -> None:
    assert visitor.stdout
    if (said := visitor.stdout.readline().strip()) != word:
        raise RuntimeError(f"the visitor says {said!r} instead of {word!r}")
    print(word, flush=True)


# ---- on h1 ---------------------------------------------------------------------------------------------------------


def visit(lost: str, back: str = "") -> None:
    until_ready()
    Thread(target=load, daemon=True).start()
    with page(URL, _HEIGHT) as driver:
        ask(driver, QUESTION)
        print("asked", flush=True)
        news = "return [...document.querySelectorAll('#happened li')].some(e => e.textContent.includes(arguments[0]))"
        until(driver, news, "going on with h1, h3")
        time.sleep(3)
        shoot(driver, lost)
        print("lost", flush=True)
        if back:
            until(driver, news, "going on with h1, h2, h3")
            ask(driver, QUESTION)
            time.sleep(3)
            shoot(driver, back)
            print("back", flush=True)


def until_ready() -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            urllib.request.urlopen(f"{URL}ready", timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def load() -> None:
    """One request after another, whatever becomes of them."""
    body: dict[str, Any] = {"model": "smollm2-135m", "prompt": BESIDE, "max_tokens": 120, "temperature": 0}
    while True:
        asked = urllib.request.Request(f"{URL}v1/completions", json.dumps(body).encode(),
                                       {"Content-Type": "application/json"})
        try:
            urllib.request.urlopen(asked, timeout=120).close()
        except OSError:
            time.sleep(1)


if __name__ == "__main__":
    if sys.argv[1] == "--visit":
        visit(*sys.argv[2:])
    else:
        main(*(str(Path(name).resolve()) for name in sys.argv[1:]))

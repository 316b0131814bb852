"""Stands where llama.cpp's servers do: `--host` and `--port` are heeded, the answer counts on from the prompt's last
token. Told "crash" it ends with a word; told "mute" it listens and no more."""

from __future__ import annotations

import http.server
import json
import socket
import sys
import time


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["temperature"] == 0 and not asked["cache_prompt"]
        self.send_response(200 if asked["prompt"] else 400)
        self.end_headers()
        for index in range(asked["n_predict"]):
            self._say({"tokens": [asked["prompt"][-1] + 1 + index]})
        self._say({"tokens": [], "timings": {"predicted_per_token_ms": 7.0, "prompt_ms": 3.0, "draft_n": 2,
                                             "draft_n_accepted": 1}})

    def _say(self, value: object) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


if __name__ == "__main__":
    if "crash" in sys.argv:
        sys.exit("out of luck")
    if "mute" in sys.argv:
        with socket.create_server((option("-H"), int(option("-p")))):
            time.sleep(60)
    http.server.ThreadingHTTPServer((option("--host"), int(option("--port"))), Server).serve_forever()

"""The server's doors: paths without /v1, a model that is not named, keys of a file, TLS, a path of a proxy."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from one_word import OneWord, application
from openai_server import Serve, Served

from fullpipe.cli.serve import _config
from fullpipe.errors import UsageError
from fullpipe.options import ServerOptions
from fullpipe.server.doors import check_certificate, keys_in

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
ASKED: dict[str, dict[str, Any]] = {"chat/completions": CHAT, "completions": {"prompt": "Hello"},
                                    "responses": {"input": "Hello"}}


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


# ---- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ASKED)
def test_paths_without_v1_are_the_same(served: Served, client: httpx.Client, path: str) -> None:
    served.script("Hi")
    with_it, without = (client.post(f"{prefix}/{path}", json=ASKED[path] | {"temperature": 0})
                        for prefix in ("/v1", ""))
    assert with_it.status_code == without.status_code == 200
    assert set(with_it.json()) == set(without.json())
    assert served.service.submitted[0][0] == served.service.submitted[1][0]


def test_a_client_with_an_address_without_v1(served: Served) -> None:
    served.script("Hi")
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
        assert [card.id for card in client.models.list()] == ["tiny", "alias/tiny"]
        assert client.models.retrieve("alias/tiny").id == "alias/tiny"
        answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])
        assert answer.choices[0].message.content == "Hi"
        assert client.responses.create(model="tiny", input="Hello").output_text == "Hi"


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("model", [{}, {"model": None}])
def test_a_model_that_is_not_named_is_the_one_that_there_is(client: httpx.Client, path: str,
                                                            model: dict[str, None]) -> None:
    assert client.post(f"/v1/{path}", json=ASKED[path] | model).json()["model"] == "tiny"


@pytest.mark.parametrize("path", ASKED)
def test_the_key_is_asked_for_on_every_path(start: Serve, path: str) -> None:
    with start(ServerOptions(api_key=("k",))).client() as client:
        for prefix in ("/v1", ""):
            assert client.post(f"{prefix}/{path}", json=ASKED[path]).status_code == 401
            assert client.get(f"{prefix}/responses/x").status_code == 401
            assert client.get(f"{prefix}/models").status_code == 401
        assert client.get("/ping").status_code == client.post("/ping").status_code == 200


def test_a_probe_is_let_in_when_nobody_else_is(start: Serve) -> None:
    served = start(ServerOptions(max_connections=1, root_path="/api"))
    served.script("abc")
    served.service.hold_at = 1
    asked = ASKED["completions"] | {"stream": True}
    with served.client() as client, client.stream("POST", "/v1/completions", json=asked) as first:
        assert first.status_code == 200
        assert client.get("/v1/models").status_code == 429
        assert client.get("/ping").status_code == client.get("/api/health").status_code == 200


def test_a_proxys_path_may_be_left_on_or_not(start: Serve) -> None:
    with start(ServerOptions(root_path="/api")).client() as client:
        for path in ("/api/v1/models", "/v1/models", "/api/models", "/models"):
            assert client.get(path).json()["data"][0]["id"] == "tiny"
        assert client.get("/api2/v1/models").status_code == 404
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/api"}]


def test_what_pages_elsewhere_may_do(start: Serve) -> None:
    served = start(ServerOptions(allowed_origins=("https://page.example",), allowed_methods=("POST",),
                                 allowed_headers=("x-one",), allow_credentials=True))
    with served.client() as client:
        asking = {"origin": "https://page.example", "access-control-request-method": "POST"}
        told = client.options("/v1/completions", headers=asking | {"access-control-request-headers": "x-one"})
        assert told.status_code == 200 and told.headers["access-control-allow-methods"] == "POST"
        assert told.headers["access-control-allow-credentials"] == "true"
        for other in ({"access-control-request-headers": "x-two"}, {"access-control-request-method": "DELETE"}):
            assert client.options("/v1/completions", headers=asking | other).status_code == 400


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "param"), [
    ({"ssl_keyfile": "k"}, "ssl_keyfile"), ({"ssl_keyfile_password": "p"}, "ssl_keyfile_password"),
    ({"allowed_methods": ("GET",)}, "allowed_methods"), ({"allowed_headers": ("x",)}, "allowed_headers"),
    ({"allow_credentials": True}, "allow_credentials"),
])
def test_what_would_have_no_effect_is_refused(options: dict[str, Any], param: str) -> None:
    with pytest.raises(UsageError, match="has no effect without") as caught:
        ServerOptions(**options)
    assert caught.value.param == param


@pytest.mark.parametrize("path", ["api", "/api/", "/"])
def test_a_path_that_is_none(path: str) -> None:
    with pytest.raises(UsageError, match="root_path"):
        ServerOptions(root_path=path)


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n  twö  \r\n", encoding="utf-8")
    assert keys_in(str(file)) == ("one", "twö")


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"\xff\xfe"])
def test_a_file_without_keys_lets_nobody_in(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        keys_in(str(file))
    assert caught.value.param == "api_key_file" and str(file) in caught.value.message


# ---- TLS -------------------------------------------------------------------------------------------------------------


def _make(folder: Path, name: str, *more: str) -> ServerOptions:
    """A certificate of its own for 127.0.0.1."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2",
         "-subj", "/CN=here", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate),
         *(more or ("-nodes",))], check=True, capture_output=True, timeout=30)
    return ServerOptions(ssl_certfile=str(certificate), ssl_keyfile=str(key))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ServerOptions:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    return _make(tmp_path_factory.mktemp("tls"), "own")


@contextmanager
def listening(options: ServerOptions) -> Iterator[int]:
    """The port of a server as `fullpipe serve` runs it."""
    config = _config(application(OneWord(), options), options)
    config.lifespan, config.ws = "off", "none"
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def test_a_server_with_a_certificate(made: ServerOptions) -> None:
    check_certificate(made)
    trusting = ssl.create_default_context(cafile=made.ssl_certfile)
    with listening(made) as port, httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusting) as client:
        answer = client.post("/v1/completions", json=ASKED["completions"] | {"stream": True})
        assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/health")


def test_a_key_with_a_password(made: ServerOptions, tmp_path: Path) -> None:
    locked = _make(tmp_path, "locked", "-passout", "pass:sesame")
    check_certificate(ServerOptions(ssl_certfile=locked.ssl_certfile, ssl_keyfile=locked.ssl_keyfile,
                                    ssl_keyfile_password="sesame"))
    for password in (None, "wrong"):
        with pytest.raises(UsageError, match="cannot be used with its key") as caught:
            check_certificate(ServerOptions(ssl_certfile=locked.ssl_certfile, ssl_keyfile=locked.ssl_keyfile,
                                            ssl_keyfile_password=password))
        assert caught.value.param == "ssl_certfile"


def test_a_certificate_that_cannot_be_used(made: ServerOptions, tmp_path: Path) -> None:
    other, nothing, missing = _make(tmp_path, "other"), tmp_path / "nothing.pem", str(tmp_path / "missing")
    nothing.write_text("no certificate")
    for certificate, key, why in ((made.ssl_certfile, other.ssl_keyfile, "key values mismatch"),
                                  (str(nothing), made.ssl_keyfile, "cannot be used"),
                                  (made.ssl_certfile, None, "cannot be used"),
                                  (made.ssl_certfile, missing, "cannot be read"),
                                  (missing, made.ssl_keyfile, "cannot be read")):
        with pytest.raises(UsageError, match=why):
            check_certificate(ServerOptions(ssl_certfile=certificate, ssl_keyfile=key))


def test_without_a_certificate_there_is_nothing_to_look_at() -> None:
    check_certificate(ServerOptions())

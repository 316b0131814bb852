"""`fullpipe serve` runs an OpenAI-compatible server over one speculative pipeline."""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from fullpipe.cli import console, stopping
from fullpipe.cli.fetch import fetch_all
from fullpipe.errors import MissingExtra, UsageError
from fullpipe.options import (
    SERVING,
    EngineOptions,
    MethodOptions,
    ModelOptions,
    Options,
    PipelineOptions,
    ServerOptions,
)

if TYPE_CHECKING:
    import uvicorn

    from fullpipe.assembly import Assembly
    from fullpipe.models.generation import Generation
    from fullpipe.server.live import Live
    from fullpipe.server.metrics import Metrics
    from fullpipe.service import Service

_HINT = "Install it with: pip install 'fullpipe[serve]'"


def serve(
    model: ModelOptions,
    method: MethodOptions,
    server: ServerOptions,
    pipeline: PipelineOptions = SERVING.pipeline,
    engine: EngineOptions = SERVING.engine,
) -> None:
    """Serve the model over the OpenAI API.

    Many requests share one pipeline. GET / shows it live, /metrics is for Prometheus, /ready for load balancers.
    Ctrl-C or SIGTERM: no new requests, those that run are finished, within --shutdown-timeout; a second one ends
    everything at once.
    """
    run = _server()
    from fullpipe.server.doors import check_certificate

    logging.basicConfig(level=server.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if model.adapter:
        server = replace(server, served_model_name=(*server.served_model_name, model.adapter[0]))
    server = _with_names_and_keys(server, model.model)
    check_certificate(server)
    if pipeline.hosts is not None and not console.was_given("stages"):
        pipeline = replace(pipeline, stages=None)  # the plan says how many
    options = Options(model=model, method=method, pipeline=pipeline, engine=engine)
    with _bound(server.host, server.port) as door:  # before minutes go into loading
        fetch_all(model, method.method)
        run(options, server, door)


def _server() -> Callable[[Options, ServerOptions, socket.socket], None]:
    """The part that needs the extra. Raises MissingExtra without it."""
    try:
        import uvicorn  # noqa: F401

        import fullpipe.server.app
        import fullpipe.server.metrics  # noqa: F401
    except ImportError as error:
        raise MissingExtra(f"the server needs {error.name}, which is not installed", hint=_HINT) from error
    return _serve


def _with_names_and_keys(server: ServerOptions, model: str) -> ServerOptions:
    """Fill in the names that callers use, and the keys. A variable that is set but empty is an empty key, which is
    refused: whoever set it meant to ask for a key."""
    from fullpipe.server.doors import keys_in

    own = os.environ.get("FULLPIPE_API_KEY")
    given = (*server.api_key, *(keys_in(server.api_key_file) if server.api_key_file is not None else ()))
    keys = given or (() if own is None else (own,))
    return replace(server, api_key=keys, served_model_name=server.served_model_name or (model,))


def _serve(options: Options, server: ServerOptions, door: socket.socket) -> None:
    from fullpipe.adapting import adapting
    from fullpipe.assembly import assemble
    from fullpipe.cli.hosts import print_hosts
    from fullpipe.server.hosts import Hosts
    from fullpipe.server.live import Live
    from fullpipe.server.metrics import Metrics

    name = server.served_model_name[0]
    made = assemble(options, console.print_note, tell=print_hosts)
    hosts = Hosts(made.hosts.placing) if made.hosts else None
    metrics = Metrics(name, hosts=hosts)
    live = Live(lambda: service.engine.pipeline.num_stages, lambda: service.status(),
                lambda token: service.model.tokenizer.token_text(token), hosts=hosts, model_name=name,
                show_text=not server.api_key)
    service = _service(made, options, server, *([hosts] if hosts else []), metrics, live)
    watching = adapting(service, made)
    try:
        app = _application(service, server, metrics, live, made.prepared.generation)
        scheme = "https" if server.ssl_certfile else "http"
        console.print_note(f"{name}: {scheme}://{server.host}:{door.getsockname()[1]} (page), /v1 (API), /metrics")
        _run(_config(app, server), live, door)
    finally:
        if watching:
            watching.close()
        service.close()
        made.keep()
        made.close()


def _service(made: Assembly, options: Options, server: ServerOptions, *listeners: Any) -> Service[Any]:
    from fullpipe.service import Service

    try:
        service = Service(made.pipeline, made.method, made.prepared, rebuild=made.rebuild, listeners=listeners,
                          options=made.prepared.engine_options(options.engine), max_waiting=server.max_waiting,
                          calibration=made.calibration, patience_s=made.patience_s)
    except BaseException:
        made.pipeline.close()
        made.close()
        raise
    try:
        short = service.check_length(options.model.max_model_len)
    except UsageError:
        service.close()
        made.close()
        raise
    told = made.prepared.cache_told(service.status().kv_total)
    for line in (told, short, made.prepared.unshared(options.engine), *made.prepared.generation.told()):
        if line:
            console.print_note(line)
    return service


def _application(service: Service[Any], server: ServerOptions, metrics: Metrics, live: Live,
                 generation: Generation) -> Any:
    from fullpipe.server.app import ServedModel, create_app

    model = ServedModel(server.served_model_name, service.model.tokenizer, service.max_model_len,
                        sampling=generation.params)
    return create_app(service, model, server, [live.router(write_timeout_s=server.write_timeout)],
                      metrics=lambda: metrics.render(service.status()))


def _config(app: Any, server: ServerOptions) -> uvicorn.Config:
    """Who listens, and how."""
    import uvicorn

    return uvicorn.Config(app, host=server.host, port=server.port, log_level=server.log_level, log_config=None,
                          access_log=False, timeout_graceful_shutdown=server.shutdown_timeout,
                          ssl_certfile=server.ssl_certfile, ssl_keyfile=server.ssl_keyfile,
                          ssl_keyfile_password=server.ssl_keyfile_password)


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet. Raises UsageError when it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        door = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"there is no address {host!r} to listen on ({error})") from error
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(address)
    except OSError as error:
        door.close()
        hint = "Another server may be there: choose another --port." if error.errno == errno.EADDRINUSE else None
        raise UsageError(f"{host}:{port} cannot be had ({error.strerror})", hint=hint) from error
    return door


def _run(config: uvicorn.Config, live: Live, door: socket.socket) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Finishes what runs at the first signal, and leaves at the second."""

        asked_at = math.inf

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:
                if time.monotonic() - self.asked_at > stopping.SAME_S:
                    os._exit(128 + sig)  # stage processes end with this one
                return
            self.asked_at = time.monotonic()
            console.print_note("finishing what runs; once more ends at once")
            live.close()
            self.should_exit = True  # uvicorn's own would raise the signal again before the stations are closed

    Server(config).run([door])

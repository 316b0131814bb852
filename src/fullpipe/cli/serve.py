"""`fullpipe serve`: an OpenAI-compatible server over one speculative pipeline."""

from __future__ import annotations

import logging
import os
import socket
from enum import StrEnum
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from fullpipe.cli import console, options
from fullpipe.errors import MissingExtra, UsageError
from fullpipe.hub import DEFAULT_TARGET

if TYPE_CHECKING:
    import uvicorn

    from fullpipe.server.live import Live

_HINT = "Install it with: pip install 'fullpipe[serve]'"


class BatchingOption(StrEnum):
    auto = "auto"
    dynamic = "dynamic"
    balanced = "balanced"
    equal = "equal"
    separate = "separate"


def serve(
    model: options.Model = DEFAULT_TARGET,
    draft: options.Draft = "auto",
    stages: options.Stages = 2,
    method: options.MethodOption = options.Method.fullpipe,
    batching: Annotated[BatchingOption, typer.Option(help="How requests share flights. auto: dynamic with fullpipe, "
                                                     "balanced with pp, separate with the others.")]
    = BatchingOption.auto,
    width: options.Width = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    pipeline: options.PipelineOption = options.PipelineKind.distributed,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    api_key: Annotated[list[str] | None, typer.Option(
        help="Key that opens /v1 and the page's feed; may be repeated. If not given, FULLPIPE_API_KEY, which is one "
             "key. None: open to all who reach it.", show_default=False)] = None,
    served_model_name: Annotated[list[str] | None, typer.Option(
        help="Name in the API, in place of the model's; may be repeated.", show_default=False)] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at a time.")] = 16,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; more are turned away (429).")] = 256,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and answer together; the model's own "
                                                      "limit if not given.", show_default=False)] = None,
    kv_cache_tokens: Annotated[int, typer.Option(help="Cache slots of all requests together, on each stage.")] = 65536,
    enable_prefix_caching: Annotated[bool, typer.Option(help="Let requests that begin alike share what is computed; "
                                                        "off with draft modules.")] = True,
    prefill_share: Annotated[float, typer.Option(help="By how much tokens may slow down while a prompt comes in, as a "
                                                 "share.")] = 1.0,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds after which a request ends with what it has.",
                                                          show_default=False)] = None,
    timeout: Annotated[float, typer.Option(help="Seconds without progress after which a station counts as hung.")]
    = 30.0,
    shutdown_timeout: Annotated[int, typer.Option(help="Seconds that requests still have when the server is told to "
                                                  "end; then they are cut off.")] = 600,
    threads: Annotated[int | None, typer.Option(help="Compute threads of each stage.", show_default=False)] = None,
    log_level: Annotated[str, typer.Option(help="critical, error, warning, info, debug.")] = "info",
) -> None:
    """Serve the model over the OpenAI API.

    Many requests share one pipeline. GET / shows it live, /metrics is for Prometheus, /ready for load balancers.
    Ctrl-C or SIGTERM: no new requests, those that run are finished, within --shutdown-timeout; a second one ends
    everything at once.
    """
    level = getattr(logging, log_level.upper(), None)
    if not isinstance(level, int):
        raise UsageError(f"unknown log level {log_level!r}", hint="Known are: critical, error, warning, info, debug.")
    if max_num_seqs < 1 or max_queue < 0 or shutdown_timeout < 0 or not 0 <= port < 65536:
        raise UsageError("max-num-seqs must be 1 or more, max-queue and shutdown-timeout 0 or more, and the port below "
                         "65536")
    try:
        import uvicorn

        from fullpipe.server.app import ServedModel, ServerOptions, create_app
        from fullpipe.server.live import Live
        from fullpipe.server.metrics import Metrics
    except ImportError as error:
        raise MissingExtra(f"the server needs {error.name}, which is not installed", hint=_HINT) from error
    from fullpipe.server.build import Builder
    from fullpipe.service import Service

    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    server_options = ServerOptions(api_keys=_keys(api_key), request_timeout_s=request_timeout)
    names = served_model_name or [model]
    builder = Builder(
        model=model, draft=draft, stages=stages, method=method.value, batching=batching.value, width=width,
        dtype=dtype.value, pipeline=pipeline.value, max_num_seqs=max_num_seqs, max_model_len=max_model_len,
        kv_slots=kv_cache_tokens, share_prefixes=enable_prefix_caching, prefill_share=prefill_share, timeout=timeout,
        threads=threads, say=console.print_note)
    metrics = Metrics(names[0])
    live = Live(stages, lambda: service.status(), lambda token: service.built.words.decode([token]),
                model_name=names[0], show_text=not server_options.api_keys)
    with _bound(host, port) as door:  # before minutes go into loading
        service = Service(builder, max_num_seqs=max_num_seqs, max_waiting=max_queue, observers=[metrics, live])
        try:
            app = create_app(service, ServedModel(names, service.built.words, service.built.max_model_len),
                             server_options, [live.router(write_timeout_s=server_options.write_timeout_s)],
                             metrics=lambda: metrics.render(service.status()))
            where = f"http://{host}:{door.getsockname()[1]}"
            console.print_note(f"{names[0]} in {stages} stages: {where} (page), /v1 (API), /metrics")
            config = uvicorn.Config(app, host=host, port=port, log_level=log_level, log_config=None, access_log=False,
                                    timeout_graceful_shutdown=shutdown_timeout)
            _run(config, live, door)
        finally:
            service.close()


def _keys(given: list[str] | None) -> list[str]:
    """An empty variable is an empty key, which is refused: who set it wanted the door locked."""
    if given:
        return given
    own = os.environ.get("FULLPIPE_API_KEY")
    return [] if own is None else [own]


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
        raise UsageError(f"{host}:{port} cannot be had ({error.strerror})",
                         hint="Another server may be there: choose another --port.") from error
    return door


def _run(config: uvicorn.Config, live: Live, door: socket.socket) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Finishes what runs at the first signal, and leaves at the second."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:
                os._exit(128 + sig)  # stage processes end with this one
            console.print_note("finishing what runs; once more ends at once")
            live.close()
            self.should_exit = True  # uvicorn's own would raise the signal again before the stations are closed

    Server(config).run([door])

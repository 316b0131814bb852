"""`fullpipe load` sends requests to any OpenAI-compatible server, and says how fast it answers them."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullpipe.cli import console
from fullpipe.cli.lists import decimals, integers
from fullpipe.cli.options import Only
from fullpipe.errors import CacheError, FullpipeError, UsageError
from fullpipe.request import SamplingParams

if TYPE_CHECKING:
    from fullpipe.prompts import FilePrompt
    from fullpipe.server.load import LoadResult, Spread, Traffic
    from fullpipe.server.openai_stream import Server


def load(
    url: Annotated[str, typer.Option("--url", help="Where the server is, with /v1 behind it or not.")]
    = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option("--model", "-m", help="As the server calls it. Default: the first one "
                                              "that it names.")] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", envvar="FULLPIPE_API_KEY", help="If the server asks "
                                                "for one.", show_default=False)] = None,
    concurrency: Annotated[str | None, typer.Option("--concurrency", help="So many requests at once, until all are "
                                                    "answered; several numbers with commas between are taken one after "
                                                    "another. Default: 1.", show_default=False)] = None,
    rate: Annotated[str | None, typer.Option("--rate", help="Instead: so many requests per second, arriving at random "
                                             "(Poisson), whether answers come or not; lists as above.")] = None,
    num_prompts: Annotated[int | None, typer.Option("--num-prompts", min=1, help="Requests for each number. Default: "
                                                    "each prompt once.")] = None,
    prompts: Annotated[list[Path] | None, typer.Option("--prompts", metavar="FILE", help="Prompts, JSON lines with "
                                                       "turns; may be repeated. Default: the bundled set.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Prompts per file at most; of the bundled set, "
                                              "per category.")] = None,
    sampling: Annotated[SamplingParams, Only("max_tokens", "temperature", "seed", "ignore_eos")]
    = SamplingParams(seed=7),
    distinct: Annotated[bool, typer.Option("--distinct/--same", help="Put a number of its own before each prompt, so "
                                           "that no server finds what it has computed before.")] = True,
    completions: Annotated[bool, typer.Option("--completions", help="Ask /v1/completions with plain text in place of "
                                              "/v1/chat/completions.")] = False,
    extra_body: Annotated[str, typer.Option("--extra-body", metavar="JSON", help="More fields of every request, for "
                                            "example response_format.", show_default=False)] = "{}",
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Requests before the first that counts.")] = 1,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds that one answer may take.")] = 600.0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every sample and the "
                                                   "summaries.")] = None,
) -> None:
    """Put load on an OpenAI-compatible server and measure its answers: throughput, first token, time between tokens.

    Works on any server: Fullpipe, vLLM, SGLang, llama.cpp. Ends with 1 if a request failed.
    """
    from fullpipe.prompts import choose
    from fullpipe.server.load import Traffic, take
    from fullpipe.server.openai_stream import Server, require_httpx, served_model

    require_httpx()
    levels = [Traffic(at_once, per_second, sampling.max_tokens, sampling.temperature, sampling.seed,
                      sampling.ignore_eos, "completions" if completions else "chat", timeout, _fields(extra_body))
              for at_once, per_second in _levels(concurrency, rate)]
    chosen = take(choose(prompts, limit), num_prompts)
    server = Server(url, model or served_model(url, api_key), api_key)
    if json_file is not None:
        _make_folder(json_file.parent)  # what cannot be written had better be known now
    results: list[LoadResult] = []
    try:
        _measure(server, chosen, levels, warmup, distinct, results)
    except KeyboardInterrupt:
        _show(results, json_file, api_key)
        raise
    _show(results, json_file, api_key)
    if any(sample.error for result in results for sample in result.samples):
        raise typer.Exit(1)


def _fields(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(fields := json.loads(text), dict):
            return fields
    raise UsageError(f"--extra-body takes a JSON object, not {text!r}",
                     hint='For example --extra-body \'{"top_p": 0.9}\'.')


def _levels(concurrency: str | None, rate: str | None) -> list[tuple[int | None, float | None]]:
    """How many at once, or per second, one after another."""
    if concurrency is not None and rate is not None:
        raise UsageError("requests come by concurrency or by rate", hint="Give --concurrency or --rate, not both.")
    if rate is not None:
        return [(None, one) for one in decimals(rate, "--rate")]
    return [(one, None) for one in integers(concurrency or "1", "--concurrency")]


def _measure(server: Server, prompts: list[FilePrompt], levels: list[Traffic], warmup: int, distinct: bool,
             results: list[LoadResult]) -> None:
    """Take the levels in turn; what has been measured is in `results`, whatever ends it, without the warming up."""
    from fullpipe.server.load import take

    if warmup:
        first = replace(levels[0], concurrency=1, rate=None)
        warm = _run(server, take(prompts, warmup), first, "warm" if distinct else None, "warming up").samples
        if warm and all(sample.error for sample in warm):
            raise FullpipeError(f"warming up failed: {warm[0].error}: {warm[0].detail}",
                                hint="No load was put on the server. --warmup 0 does so all the same.")
    for level in levels:
        try:
            results.append(_run(server, prompts, level, _name(level) if distinct else None, _name(level)))
        except KeyboardInterrupt as interrupt:
            results += [told] if (told := getattr(interrupt, "load", None)) else []
            raise


def _run(server: Server, prompts: list[FilePrompt], traffic: Traffic, tag: str | None, name: str) -> LoadResult:
    from fullpipe.server.load import distinct, run_load

    with console.StepBar(name) as bar:
        return run_load(server, distinct(prompts, tag) if tag else prompts, traffic, bar)


def _name(traffic: Traffic | LoadResult) -> str:
    return f"{traffic.concurrency} at once" if traffic.rate is None else f"{traffic.rate:g} per second"


def _show(results: list[LoadResult], file: Path | None, api_key: str | None) -> None:
    """Table and file. An interrupted load is shown, too, if anything of it has ended."""
    seen = [result for result in results if result.samples]
    if seen:
        console.print_table(_COLUMNS, [_row(result) for result in seen])
        console.print_note("Tokens as the server counts them. TBT: each answer's mean time between tokens; gaps: "
                           "between chunks, of which one may bring several tokens.")
    for result in seen:
        for sample in [one for one in result.samples if one.error][:3]:
            console.print_note(f"{_name(result)}: {sample.prompt}: {sample.error}: {sample.detail}")
    if file is not None and seen:
        _write(seen, file, api_key)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror or error}",
                         hint="Name a folder that is writable.") from error


def _write(results: list[LoadResult], file: Path, api_key: str | None) -> None:
    from fullpipe.cluster.provenance import provenance

    # The command as it was given, but for the key: this file is for showing around.
    told = [argument.replace(api_key, "***") if api_key else argument for argument in sys.argv[1:]]
    value = {"benchmark": "load", **provenance(), "command": shlex.join(["fullpipe", *told]),
             "results": [result.to_dict() for result in results]}
    try:
        file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise CacheError(f"cannot write {file}: {error.strerror or error}",
                         hint="Name another file with --json.") from None
    console.print_note(f"wrote {file}")


_COLUMNS = ("load", "answered", "failed", "requests/s", "tokens/s", "TTFT ms: median, p90, p99",
            "TBT ms: median, p90, p99", "gaps ms: median, p90, p99")


def _row(result: LoadResult) -> list[str]:
    summary = result.summary()
    failed = ", ".join(f"{count} {kind}" for kind, count in summary.failures.items()) or "0"
    return [_name(result), str(summary.answered), failed, f"{summary.requests_per_s:.2f}",
            f"{summary.tokens_per_s:.1f}", *map(_ms, (summary.ttft_s, summary.tbt_s, summary.gap_s))]


def _ms(spread: Spread | None) -> str:
    values: list[Any] = [spread.median, spread.p90, spread.p99] if spread else []
    return ", ".join(f"{1e3 * value:.1f}" for value in values) or "-"

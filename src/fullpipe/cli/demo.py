"""`fullpipe demo` gives the same answer twice, without and with speculation: on hosts with real links between them
where it can make some, else on stage processes with emulated ones."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from fullpipe.cli import console
from fullpipe.cli.demo_show import LabHosts, Show, show
from fullpipe.cli.fetch import fetch_all
from fullpipe.cli.options import Only, read_prompt
from fullpipe.errors import FullpipeError, MissingExtra, UsageError
from fullpipe.options import MethodOptions, ModelOptions, Options, PipelineOptions
from fullpipe.request import SamplingParams

if TYPE_CHECKING:
    from fullpipe.cluster.netlab import Netlab

PROMPT = "Write a Python function that merges two sorted lists into one sorted list."
_PICTURE = Path("fullpipe-demo.png")
_END_S = 10.0  # until the process on the first host has cleaned up after a signal


def demo(
    model: Annotated[ModelOptions, Only("model", "draft", "dtype", "quantization")],
    prompt: Annotated[str, typer.Argument(metavar="[PROMPT]", help="The prompt.")] = PROMPT,
    pipeline: Annotated[PipelineOptions, Only("stages", "link_ms", "threads")]
    = PipelineOptions(stages=4, link_ms=25.0),
    sampling: Annotated[SamplingParams, Only("max_tokens")] = SamplingParams(max_tokens=96),
    picture: Annotated[Path, typer.Option("--picture", metavar="FILE", help="Where the picture of both pipelines over "
                                          "time goes, .png or .svg.")] = _PICTURE,
    namespaces: Annotated[bool | None, typer.Option("--namespaces/--processes", help="Have the stages on hosts of "
                                                    "their own (network namespaces, which takes root), or in "
                                                    "processes with emulated links. Default: hosts, where they can be "
                                                    "made.")] = None,
) -> None:
    """Answer a prompt with plain pipeline parallelism and with fullpipe, on the wall clock, and compare."""
    text, drawable = read_prompt(prompt), _can_draw(picture)
    why_not = _why_no_hosts(namespaces)
    fetch_all(model)
    options = Options(model=replace(model, generation_config="none"), method=MethodOptions(method="fullpipe"),
                      pipeline=pipeline)
    asked = Show(options=options, prompt=text, sampling=sampling, picture=str(picture) if drawable else None)
    if why_not is None:
        _on_hosts(asked)
    else:
        console.print_note(f"{model.model} on {pipeline.stages} stage processes of this machine{why_not}; every "
                           f"message between them is held for {pipeline.link_ms:g} ms, as a link between sites would.")
        show(asked)
    _what_next()


def _why_no_hosts(wanted: bool | None) -> str | None:
    """What is said of why there are none; None: there are. Raises UsageError where they are wanted and cannot be."""
    if wanted is False:
        return ""
    from fullpipe.cluster.netlab import available

    reason = available()
    if reason and wanted:
        raise UsageError(f"no hosts can be made here: {reason}", hint="Leave out --namespaces for processes.")
    return f" (not on hosts: {reason})" if reason else None


# ---- on hosts ---------------------------------------------------------------------------------------------------


def _on_hosts(asked: Show) -> None:
    """Show it from the first of new hosts, which are gone when this returns."""
    from fullpipe.cluster.netlab import Netlab, Shape

    own, cores = asked.options.pipeline, sorted(os.sched_getaffinity(0))
    assert own.stages is not None
    with Netlab(own.stages, Shape(delay_ms=own.link_ms)) as lab:
        core_of = {name: cores[index % len(cores)] for index, name in enumerate(lab.names)}
        used = len(set(core_of.values()))
        console.print_note(f"{asked.options.model.model} on {own.stages} hosts of this machine: network namespaces, "
                           f"{own.link_ms:g} ms apart one way, with one core each"
                           f"{f' (they share {used})' if used < len(lab.names) else ''}.")
        prefixes = {name: lab.command(name, [], core_of[name]) for name in lab.names[1:]}
        hosts = LabHosts({name: lab.address(name) for name in lab.names}, prefixes, used)
        # Any contact will do for "hosts"; adapting would exchange the pipeline, and the method with it.
        pipeline = PipelineOptions(stages=own.stages, threads=own.threads, hosts="ray", adaptive=False)
        there = msgspec.structs.replace(asked, options=replace(asked.options, pipeline=pipeline), hosts=hosts)
        code = _show_there(lab, there, core_of[hosts.head])
    if code:
        raise typer.Exit(code)


def _show_there(lab: Netlab, asked: Show, core: int) -> int:
    """Have a process on the first host show it; its exit code. Raises FullpipeError if somebody else ended it."""
    sys.stdout.flush()
    there = lab.popen(lab.names[0], [sys.executable, "-P", "-m", "fullpipe.cli.demo_show"], core,
                      stdin=subprocess.PIPE, start_new_session=True)  # Ctrl-C is for us, who pass it on
    try:
        assert there.stdin
        with contextlib.suppress(BrokenPipeError), there.stdin:
            there.stdin.write(msgspec.msgpack.encode(asked))
        code = there.wait()
    except BaseException:
        there.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            there.wait(_END_S)
        raise
    if code < 0:
        raise FullpipeError(f"the process on host {lab.names[0]} was ended by signal {-code}",
                            hint="Is there memory enough? With --processes no host is made.")
    return code


# ---- the picture, and the end -----------------------------------------------------------------------------------


def _can_draw(picture: Path) -> bool:
    """Raises UsageError for a file that cannot be written, now rather than after minutes."""
    from fullpipe.cli.trace import check_output

    try:
        check_output(picture)
    except MissingExtra as error:
        console.print_note(f"no picture: {error.message} ({error.hint})")
        return False
    return True


def _what_next() -> None:
    console.print_note(
        "\nWhat comes next:\n"
        "  fullpipe serve                            this model over the OpenAI API, for many at a time\n"
        "  fullpipe serve --hosts ray                the same on all hosts of a Ray cluster (docs/hosts.md)\n"
        "  fullpipe generate PROMPT --stages 4       your own prompt on stage processes; without --stages in one\n"
        "  fullpipe-lab simulate PROMPT --cluster F  the same on devices and links that you describe, in virtual time")

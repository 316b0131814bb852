"""What `fullpipe demo` shows, in the process that has the engine: here, or on the first host of a lab.

    python -m fullpipe.cli.demo_show          takes a `Show` in msgpack from standard input
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import typer

from fullpipe.cli import console, stopping
from fullpipe.cli.verb import verb
from fullpipe.messages import Event
from fullpipe.options import Options
from fullpipe.request import SamplingParams
from fullpipe.threads import share_the_machine

if TYPE_CHECKING:
    from fullpipe.cluster.contact import Contact
    from fullpipe.cluster.placing import Placing
    from fullpipe.llm import LLM, Completion


class LabHosts(msgspec.Struct, frozen=True):
    """Says which hosts there are, the head first: each one's address, and the command that runs another command on it.

    cores: of this machine, which they share.
    """

    addresses: dict[str, str]
    prefixes: dict[str, list[str]]
    cores: int

    @property
    def head(self) -> str:
        return next(iter(self.addresses))


class Show(msgspec.Struct, frozen=True, kw_only=True):
    """Says what is shown. picture: where it goes; None: nowhere. hosts: None: stages are processes of this machine."""

    options: Options
    prompt: str
    sampling: SamplingParams
    picture: str | None = None
    hosts: LabHosts | None = None


def show(asked: Show) -> None:
    """Answer with plain pipeline parallelism and with fullpipe, and compare. Raises typer.Exit(1) for two texts."""
    from fullpipe.cli.hosts import print_hosts
    from fullpipe.llm import LLM

    events: list[Event] = []
    contact = _contact(asked.hosts) if asked.hosts else None
    with LLM.of(asked.options, listeners=[events.append], progress=console.print_note, tell=print_hosts,
                contact=contact) as llm:
        lived = _lived(asked, llm.placing)
        messages = [{"role": "user", "content": asked.prompt}]
        llm.use("pp")
        llm.generate(messages, SamplingParams(max_tokens=1))  # pays for what is made once
        console.print_note(f"\n{asked.prompt}")
        plain, its_events = _run(llm, "pp", "plain pipeline parallelism: a token goes through all stages before the "
                                 "next one sets off", messages, asked.sampling, events)
        ours, our_events = _run(llm, "fullpipe", "fullpipe: the stages are filled with guesses of the same text",
                                messages, asked.sampling, events)
    _compare(plain, ours)
    console.print_note(f"Lived through here: {lived} No part of it was calculated.")
    if asked.picture:
        _draw(its_events, our_events, Path(asked.picture))
    if ours.token_ids != plain.token_ids:
        raise typer.Exit(1)


def _contact(hosts: LabHosts) -> Contact:
    from fullpipe.cluster.contact import CommandContact
    from fullpipe.cluster.hosts import HostEntry

    entries = [HostEntry(name=name, address=address) for name, address in hosts.addresses.items()]
    return CommandContact(hosts.head, entries, hosts.prefixes)


def _lived(asked: Show, placing: Placing | None) -> str:
    """Tell the hosts and what lies between them, if there are any; a sentence on where all this happens."""
    if asked.hosts is None or placing is None:
        pipeline = asked.options.pipeline
        return (f"{pipeline.stages} processes and a draft on this one machine, with emulated links of "
                f"{pipeline.link_ms:g} ms one way.")
    for host in placing.view():
        console.print_note(f"{host.name} ({host.address}): {', '.join(host.stations) or 'nothing'}")
    one_way = [1e3 * pair.latency_s for pair in placing.links().values()]
    links = f"links of {min(one_way):.1f} to {max(one_way):.1f} ms one way, as measured" if one_way else "no link"
    console.print_note(f"between them: {links}")
    shared = f"{asked.hosts.cores} cores" if asked.hosts.cores > 1 else "one core"
    return f"{len(asked.hosts.addresses)} hosts that share {shared} of this one machine, and {links}."


def _run(llm: LLM, method: str, title: str, asked: list[dict[str, str]], params: SamplingParams,
         events: list[Event]) -> tuple[Completion, list[Event]]:
    """Stream an answer as it comes; the answer, and what happened from its first launch on."""
    console.print_note(f"\n--- {title}\n")
    llm.use(method)
    events.clear()
    completion = None
    for chunk in llm.stream(asked, params):
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
        completion = chunk.completion
    sys.stdout.write("\n")
    assert completion is not None
    console.print_note(f"\n{_speed(completion)}")
    return completion, list(events)


def _speed(one: Completion) -> str:
    timing, told = one.timing, one.speculation
    return (f"{one.usage['completion_tokens']} tokens, {1e3 * timing['tbt_s']:.0f} ms each after the first "
            f"({timing['wall_s']:.1f} s in all; of {told['hits'] + told['misses']} tokens {told['hits']} were in "
            "flight when they were needed)")


def _compare(plain: Completion, ours: Completion) -> None:
    faster = plain.timing["tbt_s"] / ours.timing["tbt_s"] if ours.timing["tbt_s"] else 0.0
    typer.echo(f"\ntext identical: {_sameness(ours, plain)}\n"
               f"speedup: {faster:.2f}x on the wall clock, time between tokens")


def _sameness(ours: Completion, plain: Completion) -> str:
    """Say whether the texts are the same, and where they part."""
    if ours.token_ids == plain.token_ids:
        return "yes"
    index = next((i for i, pair in enumerate(zip(ours.token_ids, plain.token_ids)) if pair[0] != pair[1]), None)
    where = ": one text ends earlier" if index is None else f", from token {index}"
    return f"NO{where} (see docs/exactness.md on near-ties, and run fullpipe verify)"


def _draw(plain: list[Event], ours: list[Event], picture: Path) -> None:
    from fullpipe.trace.picture import write_comparison

    write_comparison(picture, [("pp", plain), ("fullpipe", ours)], clock="wall-clock time")
    typer.echo(f"picture of both pipelines over time: {picture}")


def _shown() -> None:
    """Show what standard input asks for."""
    show(msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Show))


def main() -> None:
    """Entry point on a host: signals and errors are those of a command."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(verb(_shown))
    share_the_machine()
    stopping.run(lambda: app(args=[], prog_name="fullpipe demo"))


if __name__ == "__main__":
    main()

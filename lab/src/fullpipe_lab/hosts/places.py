"""What is asked of a lab of hosts, and what comes back from a program that runs in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fullpipe_lab.peers.process import RunnerFailed

HEAD, OTHER = "h1", "h2"
"""Where questions are asked, and the host beside it."""


class Carried(Protocol):
    """What one direction of a link has carried, packets with their headers."""

    @property
    def bytes(self) -> int:
        """So far."""


class Places(Protocol):
    """Hosts h1, h2, ... with addresses of their own."""

    def address(self, name: str) -> str:
        """By which the others reach it."""

    def command(self, name: str, argv: list[str], core: int | None = None) -> list[str]:
        """The command that runs `argv` on a host, and on one core alone if that is said."""

    def counts(self) -> Mapping[tuple[str, str], Carried]:
        """Of each link, from one host to another."""


@dataclass(frozen=True, slots=True)
class Answer:
    """tokens: with the end token, where there is one. times: when the asker, on the head, had each token, seconds since
    the question. told: what the program itself says of the answer."""

    tokens: list[int]
    times: list[float]
    told: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Answer:
        """A runner's answer. Raises RunnerFailed for what is none."""
        tokens, times, told = said.get("tokens"), said.get("times"), said.get("told", {})
        if not (isinstance(tokens, list) and isinstance(times, list) and len(tokens) == len(times)
                and times == sorted(times) and isinstance(told, dict)):
            raise RunnerFailed("gave an answer that is not a list of tokens and their rising times")
        return cls(tokens, times, told)

    @property
    def tbt_s(self) -> float | None:
        """Mean time between tokens; None with fewer than two."""
        return between(self.times)


def between(times: Sequence[float]) -> float | None:
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def link_bytes(lab: Places) -> dict[str, int]:
    """What each link has carried so far, both ways together, by the names of its ends."""
    found: dict[str, int] = {}
    for ends, carried in lab.counts().items():
        link = "-".join(sorted(ends))
        found[link] = found.get(link, 0) + carried.bytes
    return found

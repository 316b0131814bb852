"""What a peer said and how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Status = Literal["ok", "missing", "failed"]


@dataclass(frozen=True, slots=True)
class PeerSample:
    """One answer to one prompt.

    prompt, task: the prompt's id and category. tokens: without end tokens. times: when the asker had each token,
    seconds since the question, on the wall clock. text_sha: SHA-256 of the text.
    """

    prompt: str
    task: str
    repeat: int
    tokens: list[int]
    times: list[float]
    text_sha: str

    @property
    def ttft_s(self) -> float | None:
        return self.times[0] if self.times else None

    @property
    def tbt_s(self) -> float | None:
        """Mean time between tokens; None with fewer than two."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ttft_s": self.ttft_s, "tbt_s": self.tbt_s}


@dataclass(slots=True)
class PeerResult:
    """One peer's part of the run.

    status: "missing": it is not installed, or cannot do this (`reason` says which); "failed": it stopped on the way,
    and `samples` are what there was until then.
    settings: as the peer itself reports them. load_s: until it was ready to answer. peak_rss_bytes: over all its
    processes, shared pages counted in each; None where the system does not tell.
    agreement: per prompt, where its tokens leave those of Fullpipe's `pp`: the index of the first that differs (of an
    answer that is the beginning of the other, its length), None for an equal text. Empty when there is no reference.
    """

    name: str
    title: str
    status: Status = "ok"
    reason: str = ""
    version: str = ""
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    load_s: float | None = None
    peak_rss_bytes: int | None = None
    samples: list[PeerSample] = field(default_factory=list)
    agreement: dict[str, int | None] = field(default_factory=dict)

    @property
    def by_prompt(self) -> dict[str, list[PeerSample]]:
        """Its samples, by prompt in the order in which they were asked."""
        found: dict[str, list[PeerSample]] = {}
        for sample in self.samples:
            found.setdefault(sample.prompt, []).append(sample)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, every raw sample in it."""
        return asdict(self) | {"samples": [sample.to_dict() for sample in self.samples]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PeerResult:
        """What `to_dict` gave."""
        names = {one.name for one in fields(PeerSample)}
        samples = [PeerSample(**{name: one[name] for name in names}) for one in values["samples"]]
        return cls(**values | {"samples": samples})

    def answers(self) -> list[dict[str, Any]]:
        """A row for each sample, times in whole tenths of a millisecond."""
        return [{"peer": self.name, **one.to_dict(), "times": [round(seconds, 4) for seconds in one.times]}
                for one in self.samples]


def first_difference(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """The first index at which they differ, None when they are the same."""
    differing = (index for index, (one, other) in enumerate(zip(tokens, reference)) if one != other)
    same_length = len(tokens) == len(reference)
    return next(differing, None if same_length else min(len(tokens), len(reference)))

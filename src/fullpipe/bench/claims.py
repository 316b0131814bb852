"""What others say of their own systems, to be shown beside ours and called theirs. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from fullpipe.bench.metrics import PLAIN, STATIC


@dataclass(frozen=True, slots=True)
class Claim:
    """A range of speedups that a paper states in its abstract (arXiv 2504.04104, v2 and v1)."""

    paper: str
    stages: int
    baseline: str
    low: float
    high: float

    @property
    def label(self) -> str:
        return f"{self.paper}, {self.stages} stages, theirs: {self.low}-{self.high}x"


CLAIMS = (
    Claim("SpecPipe", 8, PLAIN, 4.19, 5.53),
    Claim("PipeDec", 14, PLAIN, 4.46, 7.79),
    Claim("SpecPipe", 8, STATIC, 2.08, 2.38),
    Claim("PipeDec", 14, STATIC, 2.2, 2.69),
)

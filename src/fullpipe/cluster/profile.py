"""A profile says what this machine takes for the parts of a step: measured seconds, and what lies between. No torch.

`fullpipe profile` writes the file (`bench/measure.py` takes the times). A cost is the median of some samples and
their median absolute deviation. Between measured sizes, in rows and in context, a cost lies on a `CostCurve`; below the
smallest it is that of the smallest.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fullpipe.costs import CostCurve
from fullpipe.errors import UsageError
from fullpipe.files import write_whole

FORMAT: Literal["fullpipe-profile"] = "fullpipe-profile"
VERSION: Literal[1] = 1

_MEASURE_AGAIN = "Measure again: `fullpipe profile --out {path}`."

Seconds = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Sizes = Annotated[tuple[Count, ...], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Cost(_Part):
    """Is a measured time.

    seconds: the median. spread: median absolute deviation from it, in seconds. samples: of how many.
    """

    seconds: Seconds
    spread: Seconds
    samples: Count

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """A median below 0, which a difference of two noisy times can have, counts as 0."""
        median = statistics.median(samples)
        spread = statistics.median(abs(sample - median) for sample in samples)
        return cls(seconds=max(median, 0.0), spread=spread, samples=len(samples))


class Curve(_Part):
    """Gives costs by one size. sizes: rising. costs: one of each."""

    sizes: Sizes
    costs: tuple[Cost, ...]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _check_rising("sizes", self.sizes)
        _check_length("costs", len(self.costs), len(self.sizes))
        return self

    @cached_property
    def _curve(self) -> CostCurve:
        return _curve(self.sizes, self.costs)

    def at(self, size: float) -> float:
        return self._curve(max(size, self.sizes[0]))


class Surface(_Part):
    """Gives costs by rows and by tokens of context before them, both rising. costs: for each rows, by context."""

    rows: Sizes
    contexts: Sizes
    costs: tuple[tuple[Cost, ...], ...]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _check_rising("rows", self.rows)
        _check_rising("contexts", self.contexts)
        _check_length("costs", len(self.costs), len(self.rows))
        for line in self.costs:
            _check_length("costs of a number of rows", len(line), len(self.contexts))
        return self

    @cached_property
    def _by_context(self) -> list[CostCurve]:
        """A curve by context for each number of rows."""
        return [_curve(self.contexts, line) for line in self.costs]

    def at(self, rows: float, context: float) -> float:
        context = max(context, self.contexts[0])
        by_rows = CostCurve({rows: curve(context) for rows, curve in zip(self.rows, self._by_context)})
        return by_rows(max(rows, self.rows[0]))


class Shape(_Part):
    """Says how large the measured model is. Bytes are of weights in `dtype`; see `models/config.py:Sizes`.

    name: as it was given to `fullpipe profile`. kv_bytes: of a token in the cache of one layer. row_bytes: of a
    hidden state.
    """

    name: str
    num_layers: Count
    layer_bytes: Count
    head_bytes: Count
    embedding_bytes: Count
    kv_bytes: Count
    row_bytes: Count


class Profile(_Part):
    """Holds the costs of one target, and perhaps of one draft, on one machine, at the sizes that were measured.

    threads: compute threads of the measured process. machine: what the figures hold for, versions included. commit: of
    Fullpipe's checkout, "unknown" for an installed package; dirty: its sources differed. date: UTC, ISO 8601.
    layers: one decoder layer. flights: what a stage takes for a flight beside its layers, such as
    masks and rotations. heads: final norm, head and argmax by rows. lookups: embedding by rows. drafts: a
    draft call, the whole model and its ranking; None without a draft. messages: one way between two processes of
    the machine, by bytes.
    """

    format: Literal["fullpipe-profile"] = FORMAT
    version: Literal[1] = VERSION
    target: Shape
    draft_model: Shape | None
    dtype: Literal["float32", "bfloat16", "stored", "int8", "int4"]
    threads: Count
    machine: dict[str, str | int | float | None]
    commit: str
    dirty: bool
    date: str
    layers: Surface
    flights: Surface
    heads: Curve
    lookups: Curve
    drafts: Surface | None
    messages: Curve

    # ---- seconds -----------------------------------------------------------------------------------------

    def layer(self, rows: float, context: float) -> float:
        """One decoder layer over `rows` rows with `context` tokens before them."""
        return self.layers.at(rows, context)

    def flight(self, rows: float, context: float) -> float:
        """What a stage takes for a flight whatever the number of its layers."""
        return self.flights.at(rows, context)

    def head(self, rows: float) -> float:
        """Final norm, head, and the pick of a token for every row."""
        return self.heads.at(rows)

    def embedding(self, rows: float) -> float:
        return self.lookups.at(rows)

    def draft(self, rows: float, context: float) -> float:
        """A call of the whole draft model, its ranking included. Raises UsageError when none was measured."""
        if self.drafts is None:
            raise UsageError(f"the profile of {self.target.name} holds no draft model",
                             hint="Measure one too: `fullpipe profile --draft MODEL`.")
        return self.drafts.at(rows, context)

    def message(self, num_bytes: float) -> float:
        """From one process to another, packing and unpacking included."""
        return self.messages.at(num_bytes)

    def stage(self, num_layers: int, rows: float, context: float, *, is_first: bool, is_last: bool) -> float:
        """A flight's time at a stage of so many layers; the first has the embedding, the last the head."""
        seconds = self.embedding(rows) if is_first else 0.0
        if num_layers:
            seconds += self.flight(rows, context) + num_layers * self.layer(rows, context)
        return seconds + (self.head(rows) if is_last else 0.0)

    @property
    def num_layers(self) -> int:
        """Of the target."""
        return self.target.num_layers

    @property
    def row_bytes(self) -> int:
        """Of a hidden state between two stages of the target."""
        return self.target.row_bytes

    # ---- the file ----------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write it in one move: the file is the old one or the whole new one.

        Raises UsageError when it cannot be written; what was there stays.
        """
        write_whole(Path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile. Raises UsageError naming the file and the first field that is not as it must be."""
        again = _MEASURE_AGAIN.format(path=path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise UsageError(f"cannot read the profile {path}: {reason}",
                             hint="`fullpipe profile` writes one.") from error
        _check_kind(text, path)
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "the whole"
            raise UsageError(f"{path}: {field}: {first['msg'].removeprefix('Value error, ')}", hint=again) from None


def slower(profile: Profile, factor: float) -> Profile:
    """The profile of a machine that takes so many times as long for everything but messages."""
    def cost(one: Cost) -> Cost:
        return one.model_copy(update={"seconds": one.seconds * factor, "spread": one.spread * factor})

    def curve(one: Curve) -> Curve:
        return Curve(sizes=one.sizes, costs=tuple(map(cost, one.costs)))

    def surface(one: Surface) -> Surface:
        return Surface(rows=one.rows, contexts=one.contexts, costs=tuple(tuple(map(cost, line)) for line in one.costs))

    return profile.model_copy(update={
        "layers": surface(profile.layers), "flights": surface(profile.flights), "heads": curve(profile.heads),
        "lookups": curve(profile.lookups), "drafts": surface(profile.drafts) if profile.drafts else None})


def _check_kind(text: str, path: str | Path) -> None:
    """Raises UsageError for what is no profile, or one of another version."""
    try:
        values: Any = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}", hint=_MEASURE_AGAIN.format(path=path)) from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UsageError(f"{path}: format: this is no profile (it should say {FORMAT!r})",
                         hint="`fullpipe profile` writes profiles.")
    version = values.get("version")
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        raise UsageError(f"{path}: version: this is version {version!r}, and {VERSION} is the one that can be read",
                         hint="A newer Fullpipe made it: install that one, or measure again."
                         if newer else _MEASURE_AGAIN.format(path=path))


def _check_rising(what: str, sizes: Sequence[int]) -> None:
    if any(a >= b for a, b in pairwise(sizes)):
        raise ValueError(f"{what} must rise (got {list(sizes)})")


def _check_length(what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(f"{what}: {found} entries for {wanted} sizes")


def _curve(sizes: Sequence[int], costs: Sequence[Cost]) -> CostCurve:
    return CostCurve({size: cost.seconds for size, cost in zip(sizes, costs)})

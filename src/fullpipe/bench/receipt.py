"""The receipt of a benchmark: everything that was measured, in one file. No torch.

Tables, figures and the report are made from it and from nothing else, so a figure can always be traced to the
prompts behind it. A receipt is one JSON object; each sample stands on a line of its own, so that it can be
searched and compared with line tools. Numbers are finite: a receipt with NaN or Infinity is neither written nor
read.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fullpipe.errors import UsageError

FORMAT, VERSION = "fullpipe-bench", 1

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def _plain(value: Any) -> Any:
    """Refuse what strict JSON cannot hold, wherever in `value` it is."""
    match value:
        case dict():
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"key {key!r} is not a string")
                _plain(inner)
        case list() | tuple():
            for inner in value:
                _plain(inner)
        case float() if not math.isfinite(value):
            raise ValueError(f"{value} is not a finite number")
        case None | str() | bool() | int() | float():
            pass
        case _:
            raise ValueError(f"{type(value).__name__} is not plain JSON")
    return value


Table = Annotated[dict[str, Any], AfterValidator(_plain)]
"""One row of whatever columns its maker chose; values are plain JSON."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class ModelInfo(_Part):
    """Names as the user gave them. draft: every proposer, as in `--draft`."""

    target: str
    draft: str
    dtype: str


class ClusterInfo(_Part):
    """Where the stages stood.

    name: unique in the receipt. label: "modelled" (device times from arithmetic), "measured" (from a profile or by
    running), "unit" (every step takes one unit). note: the arithmetic, for people. text: the cluster file.
    """

    name: str
    label: Literal["modelled", "measured", "unit"]
    note: str
    stages: Annotated[int, Field(ge=1)]
    text: str


class Sample(_Part):
    """One prompt answered by one combination. Seconds are of the receipt's clock, but for `engine_s` and `wall_s`.

    prompt: "set/id#turn", unique within a combination. task: the class it is counted under. width, depth, floor:
    as given to the method, None where it has none. same_text: equal to what `pp` said; near_ties: places where it
    left that text at a near-tie. Both None of a replay, whose text is the recorded one: there is nothing to compare.
    ttft_s, tbt_s, decode_s, steps, hits, misses, launched_rows, wasted_rows, fill: as `RequestStats` counts them.
    restarts: misses that left the pipeline empty of live rows. bubbles: idle share of each stage during `decode_s`.
    draft_busy: busy share of the draft station in the same time. link_bytes: bytes over each hop, in the order of the
    hops.
    asked_by_depth[d], hits_by_depth[d]: of the tokens d places after the last miss (the root that a miss made is
    place 0's parent), how many there were, and how many were in flight already.
    engine_s: time in the engine's own code; wall_s: time that passed here. Both by the wall clock.
    """

    cluster: str
    stages: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0)]
    method: str
    width: Count | None
    depth: Count | None
    draft: str
    floor: float | None
    prompt: str
    task: str
    repeat: Count
    phase: Literal["tuning", "main"]
    tokens: Count
    finish: str
    same_text: bool | None
    near_ties: Count | None
    ttft_s: Seconds
    tbt_s: Seconds
    decode_s: Seconds
    steps: Seconds
    steps_per_token: Seconds
    hits: Count
    misses: Count
    restarts: Count
    launched_rows: Count
    wasted_rows: Count
    draft_calls: Count
    draft_rows: Count
    fill: Share
    bubbles: list[Share]
    draft_busy: Share
    link_bytes: list[Annotated[float, Field(ge=0)]]
    hits_by_depth: list[Count]
    asked_by_depth: list[Count]
    engine_s: Seconds
    wall_s: Seconds

    @model_validator(mode="after")
    def _adds_up(self) -> Sample:
        if len(self.bubbles) != self.stages:
            raise ValueError(f"{len(self.bubbles)} bubbles for {self.stages} stages")
        if len(self.hits_by_depth) != len(self.asked_by_depth):
            raise ValueError("hits_by_depth and asked_by_depth differ in length")
        if any(hit > asked for hit, asked in zip(self.hits_by_depth, self.asked_by_depth)):
            raise ValueError("more hits than tokens at some depth")
        return self


class Candidate(_Part):
    """One setting that was tried. tbt_s: its TBT over all tuning prompts together."""

    width: Count | None
    depth: Count | None
    draft: str
    floor: float | None
    tbt_s: Seconds


class Tuning(_Part):
    """The sweep by which one method got its setting on one cluster. best: index of the chosen candidate."""

    cluster: str
    temperature: Annotated[float, Field(ge=0)]
    method: str
    candidates: Annotated[list[Candidate], Field(min_length=1)]
    best: Count
    prompts: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _best_exists(self) -> Tuning:
        if self.best >= len(self.candidates):
            raise ValueError(f"best is {self.best}, but there are {len(self.candidates)} candidates")
        return self


class Receipt(_Part):
    """All of one benchmark. date: UTC, ISO 8601. dirty: whether the checkout differed from `commit`.

    agreement: rows that put the virtual clock's prediction beside the wall clock. peers: rows on other programs. Both
    are of runs of their own, whose date and commit each row names.
    checks: what stages that compute said, where the samples are replays: a row per prompt and combination, with
    "cluster", "temperature", "method", "prompt", and what was compared, such as "text equal": true, false, or None
    where it was not compared. "near-ties": how many, if they were counted.
    """

    format: Literal["fullpipe-bench"] = "fullpipe-bench"
    version: Literal[1] = 1
    command: str
    commit: str
    dirty: bool
    date: str
    versions: dict[str, str]
    machine: Table
    clock: Literal["virtual", "wall"]
    model: ModelInfo
    settings: Table
    clusters: list[ClusterInfo]
    samples: list[Sample]
    tuning: list[Tuning] = []
    agreement: list[Table] = []
    peers: list[Table] = []
    checks: list[Table] = []
    notes: list[str] = []

    @model_validator(mode="after")
    def _clusters_are_known(self) -> Receipt:
        stages = {cluster.name: cluster.stages for cluster in self.clusters}
        if len(stages) < len(self.clusters):
            raise ValueError(f"two clusters are called {_twice([cluster.name for cluster in self.clusters])!r}")
        for sample in self.samples:
            if stages.get(sample.cluster) != sample.stages:
                raise ValueError(f"a sample of {sample.prompt} ran on {sample.stages} stages of cluster "
                                 f"{sample.cluster!r}, which `clusters` does not list")
        for tuning in self.tuning:
            if tuning.cluster not in stages:
                raise ValueError(f"{tuning.method} was tuned on cluster {tuning.cluster!r}, which `clusters` does "
                                 f"not list")
        return self

    def cluster(self, name: str) -> ClusterInfo:
        return next(cluster for cluster in self.clusters if cluster.name == name)


def _twice(names: Sequence[str]) -> str:
    return next(name for name, count in Counter(names).items() if count > 1)


# ---- files -----------------------------------------------------------------------------------------------


def save_receipt(receipt: Receipt, path: str | Path) -> None:
    """Write it in one move: `path` holds the old file or the whole new one. Raises UsageError when it cannot."""
    write_whole(path, _text(receipt.model_dump(mode="json")))


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file in one move. Raises UsageError, and leaves what was there, when it cannot."""
    path = Path(path)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}",
                         hint="Name a file in a folder that exists, is writable and has room.") from error
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)  # after the move there is none


def _text(values: dict[str, Any]) -> str:
    """Fields one below the other, the entries of a list each on a line of their own."""
    lines = [f"{json.dumps(name)}: {_entry(value)}" for name, value in values.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _entry(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(_line(one) for one in value) + "\n]"
    return _line(value)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def load_receipt(path: str | Path) -> Receipt:
    """Read a receipt. Raises UsageError naming the file and the field for anything that is not a whole receipt of
    this version."""
    path = Path(path)
    values = _read(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UsageError(f"{path} is not a benchmark receipt", hint="Give the .json file that `fullpipe bench` wrote.")
    _check_version(path, values.get("version"))
    try:
        return Receipt.model_validate(values)
    except ValidationError as error:
        _refuse(path, error)


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UsageError(f"cannot read the receipt {path}: {reason}",
                         hint="Give the .json file that `fullpipe bench` wrote.") from error
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not whole JSON: {error}",
                         hint="The file is damaged. Take it from a backup, or run the benchmark again.") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of strict JSON")


def _check_version(path: Path, found: Any) -> None:
    if found == VERSION and isinstance(found, int) and not isinstance(found, bool):
        return
    if isinstance(found, int) and found > VERSION:
        raise UsageError(f"{path}: field version: {found}, made by a newer version of Fullpipe (this one reads "
                         f"{VERSION})", hint="Upgrade Fullpipe, or make the report with the version that measured.")
    raise UsageError(f"{path}: field version: {found!r} cannot be read (this version of Fullpipe reads {VERSION})",
                     hint="Run the benchmark again with this version.")


def _refuse(path: Path, error: ValidationError) -> NoReturn:
    """Say what is wrong with the first field that is."""
    first = error.errors(include_url=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    others = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    place = f"field {where}: " if where else ""
    raise UsageError(f"{path}: {place}{first['msg']}{others}",
                     hint="The file is damaged or was edited by hand. Take it from a backup, or run the benchmark "
                          "again.") from error

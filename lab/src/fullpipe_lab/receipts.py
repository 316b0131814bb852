"""The receipt of a benchmark: everything that was measured, in one file. No torch.

Tables, figures and the report are made from it and from nothing else, so a figure can always be traced to the prompts
behind it. A receipt is one JSON object; each sample stands on a line of its own, so that it can be searched and
compared with line tools. Numbers are finite: a receipt with NaN or Infinity is neither written nor read.

`Receipt` is that of `fullpipe-lab bench`; studies keep rows of their own kind (`study_receipt`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fullpipe.cluster.provenance import provenance
from fullpipe.errors import UsageError
from fullpipe.files import write_whole
from fullpipe_lab.clusters import Cluster
from fullpipe_lab.recording import Recording

FORMAT, VERSION = "fullpipe-bench", 1
HERE = Path(__file__).parent
STUDIES = HERE.parents[1] / "receipts"
"""Where a checkout keeps the receipts of studies."""

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
_NEAR = 0.05  # of logits: closer than that, another order of summing may pick the other token


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
    are of runs of their own, whose date and commit each row names. answers: what each peer said to each prompt, and
    when. better_mode: our times beside those of the better of llama.cpp's modes on each prompt.
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
    machine: dict[str, Any]
    clock: Literal["virtual", "wall"]
    model: ModelInfo
    settings: dict[str, Any]
    clusters: list[ClusterInfo]
    samples: list[Sample]
    tuning: list[Tuning] = []
    agreement: list[dict[str, Any]] = []
    peers: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    better_mode: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    notes: list[str] = []

    @model_validator(mode="after")
    def _clusters_are_known(self) -> Receipt:
        stages = {cluster.name: cluster.stages for cluster in self.clusters}
        if len(stages) < len(self.clusters):
            raise ValueError("two clusters have the same name")
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


# ---- making one ------------------------------------------------------------------------------------------


def make_receipt(samples: Sequence[Sample], tunings: Sequence[Tuning], clusters: Mapping[str, Cluster],
                 recordings: Mapping[float, Recording], model: str, draft: str, settings: dict[str, Any],
                 *, notes: Sequence[str] = (), **rows: Any) -> Receipt:
    """The receipt of replays, in virtual time. notes: to be said besides. rows: `checks`, `agreement`, `peers`."""
    head = next(iter(recordings.values())).head
    infos = [ClusterInfo(name=name, label=cluster.label, note=cluster.file.cluster.note.strip(),
                         stages=cluster.num_stages, text=cluster.text) for name, cluster in clusters.items()]
    return Receipt(**provenance(HERE), clock="virtual", model=ModelInfo(target=model, draft=draft, dtype=head.dtype),
                   settings=settings, clusters=infos, samples=list(samples), tuning=list(tunings),
                   notes=[_near_ties(recordings), *notes], **rows)


def wall_receipt(model: str, draft: str, dtype: str, settings: dict[str, Any], **rows: Any) -> Receipt:
    """The receipt of what ran on the wall clock: rows of `peers` with their `answers`, or of `agreement`."""
    return Receipt(**provenance(HERE), clock="wall", model=ModelInfo(target=model, draft=draft, dtype=dtype),
                   settings=settings, clusters=[], samples=[], **rows)


def study_receipt(name: str, results: Any, samples: Sequence[Any]) -> dict[str, Any]:
    """What a study found. results: the figures. samples: all that they were computed from."""
    return {"benchmark": name, **provenance(HERE), "results": results, "samples": list(samples)}


def _near_ties(recordings: Mapping[float, Recording]) -> str:
    answers = [answer for recording in recordings.values() for answer in recording.answers.values()]
    close = sum(margin is not None and margin < _NEAR for answer in answers for margin in answer.margins)
    return (f"Every text is the recorded one: a replay fails where it is not. Of the "
            f"{sum(len(answer.tokens) for answer in answers)} recorded picks {close} stand less than {_NEAR} above the "
            "second best; another machine may decide those otherwise.")


# ---- files -----------------------------------------------------------------------------------------------


def save_receipt(receipt: Receipt | Mapping[str, Any], path: Path) -> None:
    """Write it in one move: `path` holds the old file or the whole new one. Raises UsageError when it cannot."""
    values = receipt.model_dump(mode="json") if isinstance(receipt, Receipt) else receipt
    write_whole(path, "{\n" + ",\n".join(f"{json.dumps(name)}: {_entry(value)}" for name, value in values.items())
                + "\n}\n")


def _entry(value: Any) -> str:
    """A list's entries stand each on a line of their own."""
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(_line(one) for one in value) + "\n]"
    return _line(value)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def load_receipt(path: Path) -> Receipt:
    """Read a receipt. Raises UsageError naming the file and the field for anything that is not a whole receipt of this
    version."""
    again = "Give the .json file that `fullpipe-lab bench` wrote."
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read the receipt {path}: {error}", hint=again) from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UsageError(f"{path} is not a benchmark receipt", hint=again)
    if values.get("version") != VERSION:
        raise UsageError(f"{path}: version {values.get('version')!r} cannot be read (this is version {VERSION})",
                         hint="Make the report with the version that measured, or measure again.")
    try:
        return Receipt.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: field {place or '-'}: {first['msg']}",
                         hint="The file is damaged or was edited by hand; run the benchmark again.") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of strict JSON")

"""A plan says who sits where, and what that promises. It is a file that people read and edit: `plan.toml`."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fullpipe.cluster.layout import Guesser, Layout, stage_bytes
from fullpipe.cluster.planner import Candidate
from fullpipe.cluster.survey import HostCosts, Survey
from fullpipe.errors import UsageError
from fullpipe.files import write_whole

_HEAD = """\
# A plan of Fullpipe: which host has which layers of the model, and where the draft sits.
# `fullpipe plan` writes it. All of it may be edited; what must hold is said beside it, and checked when it is used.
"""
_STAGES = """
# The stages, in the order in which a flight passes them. host: a name of the hosts. first, last: its layers, first to
# last - 1; each stage begins where the one before ends, the first at 0, the last ends with the model's layers.
# threads: it computes with. device: cpu, or cuda:N.
"""
_PROMISE = """
# What was predicted of this plan when it was made, in milliseconds per token. pp_ms: with the same stages and no draft.
"""
_SAYS = {
    "model": "by name or file",
    "draft": "by name: ngram, a model, several with commas between; none: nobody guesses",
    "method": "fullpipe, pp, chain (all in one process on one host), or auto",
    "width": "tree nodes of a request in a flight, at most; without this line as many as pay",
    "draft_host": "a name of the hosts, with or without a stage; without this line the head's",
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class StagePlan(_Part):
    """Says where a stage sits and which layers it has: first to last - 1."""

    host: Annotated[str, Field(min_length=1)]
    first: Annotated[int, Field(ge=0)]
    last: Annotated[int, Field(ge=0)]
    threads: Annotated[int, Field(ge=1)] = 1
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"

    @property
    def num_layers(self) -> int:
        return self.last - self.first


class Promise(_Part):
    """Says what was predicted, in milliseconds per token: of the plan, and of the same stages without a draft."""

    plan_ms: Annotated[float, Field(gt=0)]
    pp_ms: Annotated[float, Field(gt=0)]


class Plan(_Part):
    """Says who sits where.

    model, draft: as in options. method: "auto" leaves it to what the options say. width: tree nodes of a request in a
    flight at most. draft_host: None: the head's. stages: in order.
    """

    model: Annotated[str, Field(min_length=1)]
    draft: Annotated[str, Field(min_length=1)] = "none"
    method: Literal["fullpipe", "pp", "chain", "auto"] = "auto"
    width: Annotated[int, Field(ge=1)] | None = None
    draft_host: Annotated[str, Field(min_length=1)] | None = None
    stages: Annotated[tuple[StagePlan, ...], Field(min_length=1, alias="stage")]
    promise: Promise | None = None

    @classmethod
    def of(cls, candidate: Candidate, survey: Survey, model: str, draft: str, width: int | None = None) -> Plan:
        """The plan of a layout that the planner found. width: the pinned one; None: as many nodes as pay."""
        layout, guesses = candidate.layout, candidate.method != "pp"
        ends = list(accumulate(layout.layers))
        stages = tuple(StagePlan(host=name, first=end - layers, last=end, threads=survey.hosts[name].profile.threads,
                                 device=survey.hosts[name].device)
                       for name, layers, end in zip(layout.order, layout.layers, ends))
        promise = Promise(plan_ms=round(1e3 * candidate.seconds, 3), pp_ms=round(1e3 * candidate.pp_seconds, 3))
        return cls(model=model, draft=draft if guesses else "none", method=candidate.method,  # type: ignore[arg-type]
                   width=width, draft_host=layout.draft_host, stages=stages, promise=promise)

    @property
    def hosts(self) -> tuple[str, ...]:
        """All that are named, each once."""
        return tuple(dict.fromkeys([*(stage.host for stage in self.stages),
                                    *([self.draft_host] if self.draft_host else [])]))

    @property
    def layout(self) -> Layout:
        return Layout(tuple(stage.host for stage in self.stages), tuple(stage.num_layers for stage in self.stages),
                      self.draft_host)

    # ---- the file ----------------------------------------------------------------------------------------

    def to_toml(self) -> str:
        """The file's text, with comments that say what may be edited."""
        values = {name: getattr(self, name) for name in _SAYS}
        lines = [f"{name} = {_toml(value)}  # {_SAYS[name]}" if value is not None else f"# {name} =  # {_SAYS[name]}"
                 for name, value in values.items()]
        stages = [f"\n[[stage]]\nhost = {_toml(stage.host)}\nfirst = {stage.first}\nlast = {stage.last}\n"
                  f"threads = {stage.threads}\ndevice = {_toml(stage.device)}\n" for stage in self.stages]
        promise = "" if self.promise is None else \
            f"{_PROMISE}[promise]\nplan_ms = {self.promise.plan_ms}\npp_ms = {self.promise.pp_ms}\n"
        return _HEAD + "\n" + "\n".join(lines) + "\n" + _STAGES + "".join(stages).lstrip("\n") + promise

    def save(self, path: str | Path) -> None:
        """Write it in one move. Raises UsageError when it cannot be written; what was there stays."""
        write_whole(Path(path), self.to_toml())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan. Raises UsageError naming the file and the first field that is not as it must be."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise UsageError(f"cannot read the plan {path}: {reason}",
                             hint="`fullpipe plan --write plan.toml` writes one.") from error
        try:
            return cls.model_validate(tomllib.loads(text), strict=False)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{path} is not TOML: {error}", hint="Texts stand in quotes, numbers do not.") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise UsageError(f"{path}: {_field(first['loc'])}: {first['msg'].removeprefix('Value error, ')}",
                             hint=_known(first["type"], first["loc"])) from None


def _toml(value: str | int) -> str:
    """A text in quotes; JSON's are TOML's too."""
    return json.dumps(value, ensure_ascii=False)


def _field(where: tuple[int | str, ...]) -> str:
    """As in "stage 1.last"; stages count from 0 as everywhere."""
    words = [f" {part}" if isinstance(part, int) else f".{part}" for part in where]
    return "".join(words).lstrip(".") or "the whole"


def _known(kind: str, where: tuple[int | str, ...]) -> str | None:
    if kind != "extra_forbidden":
        return "`fullpipe plan --write plan.toml` writes a plan in which every line says what it may be."
    parts: dict[str, type[_Part]] = {"stage": StagePlan, "promise": Promise}
    part = parts.get(str(where[0]), Plan) if len(where) > 1 else Plan
    return f"Known here are {', '.join(one.alias or name for name, one in part.model_fields.items())}."


# ---- whether it can be ---------------------------------------------------------------------------------------


def check(plan: Plan, hosts: Mapping[str, HostCosts], num_layers: int, guesser: Guesser | None = None) -> None:
    """Raises UsageError for a plan that cannot be: see `check_shape`, and one that takes more than the memory of a host
    allows. guesser: whose memory counts too."""
    check_shape(plan, list(hosts), num_layers)
    _check_memory(plan, hosts, guesser)


def check_shape(plan: Plan, hosts: Sequence[str], num_layers: int) -> None:
    """Raises UsageError for hosts that are not there, layers that do not fit together, a method that lacks a draft.
    Of hosts it takes nothing but their names, so this can be told before anything is measured."""
    missing = [name for name in plan.hosts if name not in hosts]
    if missing:
        raise UsageError(f"the plan names {_list('host', missing)} that {'is' if len(missing) == 1 else 'are'} not "
                         f"there: {', '.join(missing)}",
                         hint=f"There are {', '.join(hosts)}. Start what is missing, or make a plan for those: "
                              "`fullpipe plan --write plan.toml`.")
    _check_layers(plan, num_layers)
    if plan.method in ("fullpipe", "chain") and plan.draft == "none":
        raise UsageError(f"the plan has the method {plan.method} and no draft",
                         hint="Name a draft in it (a model, or ngram), or take the method pp.")
    if plan.method == "chain" and len(plan.stages) > 1:
        raise UsageError(f"the plan has the method chain, which is for one process, and {len(plan.stages)} stages",
                         hint="Take fullpipe, or one stage.")


def _check_layers(plan: Plan, num_layers: int) -> None:
    again = "Each stage begins where the one before ends: first = 0, then the last of the stage before."
    stages = plan.stages
    if stages[0].first != 0:
        raise UsageError(f"stage 0 begins with layer {stages[0].first}, not 0", hint=again)
    for index, (before, stage) in enumerate(pairwise(stages), 1):
        if stage.first != before.last:
            what = "are on no stage" if stage.first > before.last else "are on two"
            low, high = sorted((before.last, stage.first))
            raise UsageError(f"stage {index - 1} ends with layer {before.last} and stage {index} begins with "
                             f"{stage.first}: layers {low} to {high - 1} {what}", hint=again)
    for index, stage in enumerate(stages):
        head_alone = 0 < index == len(stages) - 1  # the last stage may have the head and nothing else
        if stage.num_layers < (0 if head_alone else 1):
            raise UsageError(f"stage {index} has the layers {stage.first} to {stage.last}, which is none", hint=again)
    if stages[-1].last != num_layers:
        raise UsageError(f"the stages have {stages[-1].last} layers, and the model has {num_layers}",
                         hint=f"The last stage must end with {num_layers}. Or is the plan for another model?")


def _check_memory(plan: Plan, hosts: Mapping[str, HostCosts], guesser: Guesser | None) -> None:
    for name, size in memory_of(plan, hosts, guesser).items():
        if size > hosts[name].room:
            raise UsageError(f"the plan wants {size / 1e9:.2f} GB of {name}, which has {hosts[name].room / 1e9:.2f} GB "
                             "to spare", hint="Give it fewer layers and others more, put the draft elsewhere, or make "
                                              "a plan anew: `fullpipe plan --write plan.toml`.")


def memory_of(plan: Plan, hosts: Mapping[str, HostCosts], guesser: Guesser | None) -> Counter[str]:
    """Bytes that a plan takes of each host. guesser: whose memory counts too."""
    need: Counter[str] = Counter()
    for index, stage in enumerate(plan.stages):
        shape = hosts[stage.host].profile.target
        need[stage.host] += stage_bytes(shape, stage.num_layers, is_first=index == 0,
                                        is_last=index == len(plan.stages) - 1)
    if guesser and plan.draft_host:
        need[plan.draft_host] += guesser.memory(hosts[plan.draft_host].profile)
    return need


def _list(what: str, names: list[str]) -> str:
    return f"a {what}" if len(names) == 1 else f"{what}s"

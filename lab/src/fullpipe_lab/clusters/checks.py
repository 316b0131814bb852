"""What cannot be is refused with the line of the file that says it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from fullpipe.cluster.profile import Profile
from fullpipe.errors import UsageError
from fullpipe_lab.clusters.file import ClusterFile, Device

if TYPE_CHECKING:
    from fullpipe_lab.clusters.cluster import Cluster

_HEADER = re.compile(r"\s*\[\[?[^,\[\]]+\]\]?\s*(#|$)")  # of a table; a line of an array has commas
_LONG_TEXT = re.compile(r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'')


def refusal(error: ValidationError, text: str, where: str) -> UsageError:
    first = error.errors()[0]
    place = [step for step in first["loc"] if isinstance(step, (str, int))]
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        what = "there is no such setting"
    elif first["type"] == "missing":
        what = "this setting is missing"
    name = ".".join(str(step) for step in place)
    return UsageError(f"{where}, line {line_of(text, place)}: {name}: {what}", hint="See lab/docs/clusters.md.")


def line_of(text: str, place: Sequence[str | int]) -> int:
    """The line of a TOML document on which a setting stands, or its table, or 1. place: keys and indices.

    Settings are looked for under table headers, as lab/docs/clusters.md writes them, not in dotted keys and inline
    tables.
    """
    lines = _without_texts(text).splitlines()
    tables = [step for step in place if isinstance(step, str)]
    number = next((step for step in place if isinstance(step, int)), 0)
    for depth in range(len(tables), 0, -1):
        header = re.escape(".".join(tables[:depth]))
        found = [index for index, line in enumerate(lines, 1) if re.match(rf"\s*\[\[?\s*{header}\s*\]\]?", line)]
        if found:
            best = found[min(number, len(found) - 1)]
            return _key_line(lines, best, tables[depth]) if depth < len(tables) else best
    return 1


def _key_line(lines: Sequence[str], header: int, key: str) -> int:
    for index in range(header, len(lines)):
        if _HEADER.match(lines[index]):
            break
        if re.match(rf"\s*{re.escape(key)}\s*=", lines[index]):
            return index + 1
    return header


def _without_texts(text: str) -> str:
    """The document with its texts of several lines left empty: what looks like a setting there is none."""
    return _LONG_TEXT.sub(lambda found: "\n" * found[0].count("\n"), text)


def check_file(file: ClusterFile, text: str, where: str) -> None:
    """Raises UsageError with the line for names, links and shapes that are missing or there twice."""
    _Check(file, text, where).run()


class _Check:
    """What cannot be said field by field."""

    def __init__(self, file: ClusterFile, text: str, where: str) -> None:
        self.file, self.text, self.where = file, text, where
        self.names = [name for device in file.devices for name in device.names]

    def run(self) -> None:
        self._names()
        self._placement()
        self._shapes()
        self._links()

    def refuse(self, place: Sequence[str | int], what: str, hint: str) -> UsageError:
        return UsageError(f"{self.where}, line {line_of(self.text, place)}: {what}", hint=hint)

    def _names(self) -> None:
        for index, name in enumerate(self.names):
            if name in self.names[:index]:
                raise self.refuse(["devices", self.file.blocks[name], "name"], f"two devices are called {name!r}",
                                  "Give each device a name of its own.")

    def _placement(self) -> None:
        place = self.file.placement
        for key, names in (("stages", place.stages), ("draft", [place.draft]), ("engine", [place.engine])):
            for name in names:
                if name is not None and name not in self.names:
                    raise self.refuse(["placement", key], f"there is no device {name!r}",
                                      f"Devices are: {', '.join(self.names)}.")
        for index, pair in enumerate(self.file.links.pair):
            for name in pair.ends:
                if name not in self.names:
                    raise self.refuse(["links", "pair", index, "ends"], f"there is no device {name!r}",
                                      f"Devices are: {', '.join(self.names)}.")

    def _shapes(self) -> None:
        place, blocks = self.file.placement, self.file.blocks
        for name in place.stages:
            device = self.file.devices[blocks[name]]
            if device.kind == "roofline" and self.file.target is None:
                raise self.refuse(["devices", blocks[name]], f"{name} has a bandwidth, but no model is "
                                  "described whose weights it reads", "Add [target] (see lab/docs/clusters.md).")
            if device.kind == "curve" and device.stage_ms is None:
                raise self.refuse(["devices", blocks[name]], f"{name} holds a stage but has no stage_ms",
                                  "Add stage_ms = [[rows, milliseconds], ...].")
        if place.draft is not None:
            missing = missing_for_draft(self.file, self.file.devices[blocks[place.draft]])
            if missing is not None:
                raise self.refuse(["placement", "draft"], *missing)

    def _links(self) -> None:
        place, table = self.file.placement, self.file.links
        for index, pair in enumerate(table.pair):
            if any(set(pair.ends) == set(other.ends) for other in table.pair[:index]):
                raise self.refuse(["links", "pair", index, "ends"], f"the link between {pair.ends[0]!r} and "
                                  f"{pair.ends[1]!r} is described twice", "It is the same both ways: leave one out.")
        engine, draft = place.engine or place.stages[0], place.draft or place.stages[0]
        needed = [*pairwise(place.stages), (engine, place.stages[0]), (place.stages[-1], engine), (engine, draft)]
        for a, b in needed:
            known = table.latency_ms is not None or any({a, b} == set(pair.ends) for pair in table.pair)
            if a != b and not known:
                raise self.refuse(["links"], f"there is no link between {a!r} and {b!r}",
                                  f'Add [[links.pair]] with ends = ["{a}", "{b}"], or links.latency_ms for all.')


def missing_for_draft(file: ClusterFile, device: Device) -> tuple[str, str] | None:
    """What is missing to say what a call of a draft model on this device costs, and what to do about it."""
    if device.kind == "roofline" and file.draft is None:
        return f"{device.name} holds the draft, but no draft is described", "Add [draft] (see lab/docs/clusters.md)."
    if device.kind == "curve" and device.draft_ms is None:
        return f"{device.name} holds the draft but has no draft_ms", "Add draft_ms = [[rows, milliseconds], ...]."
    return None


def load_profiles(file: ClusterFile, text: str, where: str, folder: Path) -> dict[str, Profile]:
    """By the name of the device block. Raises UsageError with the line that names a profile which cannot be used."""
    profiles: dict[str, Profile] = {}
    for index, device in enumerate(file.devices):
        if device.profile is None:
            continue
        line = f"{where}, line {line_of(text, ['devices', index, 'profile'])}"
        try:
            profile = profiles[device.name] = Profile.load(folder / device.profile)
        except UsageError as error:
            raise UsageError(f"{line}: {error.message}", hint=error.hint) from None
        first = next(iter(profiles.values()))
        if profile.num_layers != first.num_layers:
            raise UsageError(f"{line}: this profile is of a model of {profile.num_layers} layers, the one before of "
                             f"{first.num_layers}", hint="Profile the same model on every machine.")
        if file.placement.draft in device.names and profile.drafts is None:
            raise UsageError(f"{line}: {file.placement.draft} holds the draft, but its profile has none",
                             hint="Measure one too: `fullpipe profile --draft MODEL`.")
    return profiles


def check_layers(cluster: Cluster, text: str, where: str) -> None:
    given, total = cluster.file.placement.layers, cluster.layer_costs()[0]
    if given is None:
        if cluster.num_stages > total:
            raise UsageError(f"{where}, line {line_of(text, ['placement', 'stages'])}: {total} layers cannot be cut "
                             f"into {cluster.num_stages} stages", hint="Name fewer stages.")
    elif len(given) != cluster.num_stages or sum(given) != total:
        raise UsageError(f"{where}, line {line_of(text, ['placement', 'layers'])}: {len(given)} numbers of layers, "
                         f"{sum(given)} in all, for {cluster.num_stages} stages and {total} layers",
                         hint="Give one number per stage that add up to all layers, or leave it out.")


def check_memory(cluster: Cluster, text: str, where: str) -> None:
    """Weights alone: what the cache takes depends on requests."""
    held, file = _held(cluster), cluster.file
    for name, index in file.blocks.items():
        room = file.devices[index].memory_gb
        if room is not None and held[name] > room * 1e9:
            raise UsageError(
                f"{where}, line {line_of(text, ['devices', index])}: {name} has {room:g} GB, "
                f"and the weights placed there take {held[name] / 1e9:.1f} GB",
                hint="Use more stages, fewer bits, or placement.layers to give it less.")


def _held(cluster: Cluster) -> dict[str, float]:
    """Bytes of weights by device, of models that are described or profiled. A device that has both ends of the target
    holds one matrix for embedding and head."""
    file, place = cluster.file, cluster.file.placement
    held = dict.fromkeys(file.blocks, 0.0)
    profile = next(iter(cluster.profiles.values()), None)
    if target := file.target or (profile and profile.target):
        for index, name in enumerate(place.stages):
            held[name] += cluster.layers[index] * target.layer_bytes
        held[place.stages[0]] += target.embedding_bytes
        if place.stages[0] != place.stages[-1]:
            held[place.stages[-1]] += target.head_bytes
    if place.draft is not None and (draft := file.draft or (profile and profile.draft_model)):
        held[place.draft] += draft.num_layers * draft.layer_bytes + draft.head_bytes
    return held

"""`guesser_of` says of drafts by name what a planner must know: their kind, and how often they are right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fullpipe.cluster.acceptance import Acceptance, Task, kind_of
from fullpipe.cluster.kept import kept_right
from fullpipe.cluster.layout import Guesser
from fullpipe.cluster.quick import fingerprint
from fullpipe.errors import UsageError
from fullpipe.hub import cache, resolve
from fullpipe.stations.drafts.names import ModuleSize, module_folder


def guesser_of(model: str, drafts: Sequence[str], task: Task | None = None,
               adapter: Path | None = None) -> Guesser | None:
    """None without drafts. task: what the texts will be like; then the usual figures of such texts count. None: what
    was counted of these drafts before this model, and the usual figures only where too little was. adapter: that is
    merged into the model, which is then another one."""
    if not drafts:
        return None
    folders = [folder for name in drafts if (folder := module_folder(name))]
    kind = kind_of(tuple(drafts), modules=bool(folders))
    acceptance = _counted(model, drafts, adapter) if task is None else None
    return Guesser(tuple(drafts), kind, acceptance or Acceptance.usual(kind, task or "mixed"),
                   ModuleSize.of(folders[0]) if folders else None)


def draft_model(drafts: Sequence[str]) -> str | None:
    """The one among the drafts that is a model of its own, which must be measured. Raises UsageError for two."""
    models = [name for name in drafts if name != "ngram" and not module_folder(name)]
    if len(models) > 1:
        raise UsageError(f"a plan is made with one draft model, and these are {len(models)}: {', '.join(models)}",
                         hint="Name one of them, with ngram beside it or without.")
    return models[0] if models else None


def _counted(model: str, drafts: Sequence[str], adapter: Path | None) -> Acceptance | None:
    """What counts as one model: see `assembly.costs`."""
    identity = [one for path in (resolve(model), adapter) if path for one in (str(path), fingerprint(path))]
    files = frozenset(str(module_folder(name) or resolve(name)) for name in drafts if name != "ngram")
    return Acceptance.counted(*kept_right(cache.home() / "profiles", identity, files))

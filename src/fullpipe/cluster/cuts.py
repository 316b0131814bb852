"""Three ways to cut a model's layers over the hosts of a skeleton.

`uniform`: as many layers everywhere. `balanced`: the slowest stage takes least, for one row. `best`: the predicted time
per token is least, which counts what links and draft take too, so that a slow host behind a slow link may have less.

A time per token falls with the longest stage and with the sum of all. So for each bound on the longest that any cut
could have, `best` gives layers to the quickest hosts first, as many as the bound and their memory allow, and looks
which bound does best. Nothing is better where every host has its own cores; where several share some, moving single
layers from there finds what is.
"""

from __future__ import annotations

import numpy as np

from fullpipe.cluster.layout import Ints, Skeleton
from fullpipe.cluster.modes import Floats, Modes

UNIFORM, BALANCED, BEST = "uniform", "compute-balanced", "communication-aware"
CUTS = (UNIFORM, BALANCED, BEST)
_ROUNDING = 1e-9


def uniform(skeleton: Skeleton) -> Ints | None:
    """None where a host has no memory for its share."""
    stages = len(skeleton.order)
    share, over = divmod(skeleton.num_layers, stages)
    layers = np.array([share + (index < over) for index in range(stages)], dtype=np.intp)
    return layers if (layers <= skeleton.most).all() and (layers >= skeleton.least).all() else None


def balanced(skeleton: Skeleton) -> Ints:
    """Each next layer goes where it is through first; of stations that share cores, what all of them take counts."""
    layers, cost, beside = skeleton.least.copy(), skeleton.layer[0], skeleton.beside[0]
    together = [np.array(next((group.members for group in skeleton.groups if index in group.members), (index,)))
                for index in range(len(layers))]
    for _ in range(skeleton.num_layers - int(layers.sum())):
        stages = beside + layers * cost
        ends = np.array([stages[members].sum() for members in together]) + cost
        layers[np.where(layers < skeleton.most, ends, np.inf).argmin()] += 1
    return layers


def best(skeleton: Skeleton, modes: Modes) -> tuple[float, Ints, int]:
    """Seconds per token of the best cut, that cut, and the mode, by index."""
    cuts = _by_bounds(skeleton, modes)
    seconds = skeleton.seconds(cuts, modes)
    bound, mode = np.unravel_index(seconds.argmin(), seconds.shape)
    found = float(seconds[bound, mode]), cuts[bound, mode], int(mode)
    even = balanced(skeleton)
    evenly = skeleton.seconds(even[None], modes)
    if evenly.min() <= found[0] * (1 + _ROUNDING):
        found = float(evenly.min()), even, int(evenly.argmin())
    if any(len(group.members) > 1 for group in skeleton.groups):
        return _moved(skeleton, modes, *found)
    return found


def _by_bounds(skeleton: Skeleton, modes: Modes) -> Ints:
    """A cut for each bound on the longest stage and each mode, [bound, mode, stage]; what no bound allows has the
    bound that all fit in."""
    cost, most, least = skeleton.layer[modes.at], skeleton.most, skeleton.least
    beside = skeleton.beside[modes.at] + np.maximum(skeleton.pad, skeleton.shared_with_draft(modes))
    numbers = np.arange(skeleton.num_layers + 1)
    bounds = (beside[:, :, None] + numbers * cost[:, :, None]).reshape(len(modes), -1).T  # [bound, mode]
    room = np.floor((bounds[:, :, None] - beside) / cost + _ROUNDING).clip(-1, most).astype(np.intp)
    too_tight = (room < least).any(-1) | (room.sum(-1) < skeleton.num_layers)
    room = np.where(too_tight[:, :, None], most, room) - least
    return least + _quickest_first(room, _slowness(skeleton, modes), skeleton.num_layers - int(least.sum()))


def _slowness(skeleton: Skeleton, modes: Modes) -> Floats:
    """What a layer adds to the sum that a mode counts, [mode, stage]."""
    found: Floats = modes.first[:, None] * skeleton.layer[0] + modes.wide[:, None] * skeleton.layer[modes.at]
    return found


def _quickest_first(room: Ints, slowness: Floats, layers: int) -> Ints:
    """Layers handed out by rising slowness."""
    order = np.broadcast_to(slowness.argsort(-1, kind="stable"), room.shape)
    sorted_room = np.take_along_axis(room, order, -1)
    taken = np.minimum(sorted_room, (layers - (sorted_room.cumsum(-1) - sorted_room)).clip(0))
    out = np.empty_like(room)
    np.put_along_axis(out, order, taken, -1)
    return out


def _moved(skeleton: Skeleton, modes: Modes, seconds: float, layers: Ints, mode: int) -> tuple[float, Ints, int]:
    """The same with single layers moved as long as that helps."""
    stages = len(layers)
    moves = np.array([[(k == to) - (k == start) for k in range(stages)] for start in range(stages)
                      for to in range(stages) if to != start], dtype=np.intp)
    while True:
        tried = layers + moves
        tried = tried[((tried >= skeleton.least) & (tried <= skeleton.most)).all(-1)]
        if not len(tried):
            return seconds, layers, mode
        found = skeleton.seconds(tried[:, None, :], modes)
        move, at = np.unravel_index(found.argmin(), found.shape)
        if found[move, at] >= seconds * (1 - _ROUNDING):
            return seconds, layers, mode
        seconds, layers, mode = float(found[move, at]), tried[move], int(at)

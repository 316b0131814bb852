"""`ModuleSize` measures how large a draft module is, in layers of the model that it reads. No torch.

A cluster imagines the target: the tokens are those of a small model, the time is that of a large one. A module is then
imagined larger in the same proportion, so its size is counted in the target's layers and in the target's head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fullpipe.errors import UsageError

KINDS = ("spd", "exit")


def module_folder(name: str) -> Path | None:
    """The folder of a draft module ("spd:DIR" or "exit:DIR"); None for drafts of other kinds."""
    kind, colon, folder = name.partition(":")
    return Path(folder).expanduser() if colon and kind in KINDS else None


@dataclass(frozen=True, slots=True)
class ModuleSize:
    """Says how large a draft module is.

    layers: all its weights but the head's, over those of a layer of its target. depth: its decoder layers, each of
    which keeps keys and values. head: rows of its head, over those of the target's.
    """

    layers: float
    depth: int
    head: float

    @classmethod
    def of(cls, folder: Path) -> ModuleSize:
        """By the config.json of a checkpoint (docs/draft-modules.md). Norms and biases, less than a thousandth, are
        not counted. Raises UsageError for a file that does not say it."""
        path = folder / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            shape, taps, depth = values["transformer_layer_config"], len(values["bounds"]), values["num_spec_layers"]
            hidden, size = shape["hidden_size"], shape["head_dim"]
            attention = 2 * hidden * size * (shape["num_attention_heads"] + shape["num_key_value_heads"])
            layer = attention + 3 * hidden * shape["intermediate_size"]
            aggregation = taps * (taps + 1) / 2 * hidden * hidden  # row type k, from 0, reads k + 1 taps
            return cls(depth + aggregation / layer, depth, values["draft_vocab_size"] / shape["vocab_size"])
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise UsageError(f"{path} does not say how large a draft module is: {error}",
                             hint="Name a folder that `fullpipe train spd` or `fullpipe train exit` has written.") \
                from error

"""What a model's files say under their keys, read with its types checked. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fullpipe.errors import DamagedModel, UnsupportedModel
from fullpipe.models.config import FAMILIES

Neutral = Mapping[str, tuple[Any, ...]]
"""Keys that would change the results, and the values with which they do not. Null counts as leaving them out."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Reads keys; a wrongly typed one, and a missing one without a default, is a damaged file. Null counts as missing.

    source: what the keys stand in, for people to read.
    """

    values: Mapping[str, Any]
    source: str

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def number(self, key: str, default: float | None = None) -> float:
        value = self._or(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._damaged(key, value, "a number")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= 0:
            raise self._damaged(key, value, "a number above 0")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value) or value < 1:
            raise self._damaged(key, value, "a count")
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._or(key, default)
        if value not in (True, False):  # 1 and 0 too
            raise self._damaged(key, value, "true or false")
        return bool(value)

    def words(self, key: str) -> list[str]:
        """A list of words; empty where it is missing."""
        value = self._or(key, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self._damaged(key, value, "a list of words")
        return value

    def part(self, key: str) -> Mapping[str, Any]:
        """Keys within this one; none where it is missing."""
        value = self._or(key, {})
        if not isinstance(value, Mapping):
            raise self._damaged(key, value, "an object")
        return value

    def refuse(self, keys: Iterable[str], neutral: Neutral) -> None:
        """Raise UnsupportedModel for the first of `keys` with a value that is not neutral. Of those that `neutral` does
        not have, what says nothing is: 0, false, nothing at all."""
        for key in keys:
            value = self.get(key)
            if value is not None and (value not in neutral[key] if key in neutral else _says_something(value)):
                raise UnsupportedModel(
                    f"models with {key} = {_short(value)} in {self.source} are not supported",
                    hint="It may change what the model says. If you know that it does not, take it out of the file.")

    def _or(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def _damaged(self, key: str, value: Any, needed: str) -> DamagedModel:
        return DamagedModel(f"{self.source} has {_short(value)} for {key}, where {needed} is needed",
                            hint="Fetch the model again, or mend the file if it is your own.")


def unsupported(what: str) -> UnsupportedModel:
    """The error for a model of another kind."""
    return UnsupportedModel(f"{what} are not supported",
                            hint=f"Supported are dense models of the families {', '.join(FAMILIES)}.")


def _says_something(value: Any) -> bool:
    return any(value) if isinstance(value, list) else bool(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

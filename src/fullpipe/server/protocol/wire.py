"""All that comes in is checked as `Wire` checks it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from fullpipe.server.protocol.tables import IGNORED

MAX_ENTRIES = 1024  # of a dictionary


class Wire(BaseModel):
    """Checks what comes in. One fault is enough: a body of thousands would take seconds to describe, in the event loop.
    So lists fail at the first, dictionaries are measured first, and of unknown fields one is kept."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    no_effect: ClassVar[Mapping[str, str]] = IGNORED

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        names = [field.alias or name for name, field in cls.model_fields.items()]
        unknown = next((key for key in data if key not in names), None)
        return data if unknown is None else {key: data[key] for key in (*names, unknown) if key in data}

    def ignored(self, path: str = "") -> Iterator[str]:
        """Paths of what was sent and has no effect; of several messages with the same, each."""
        for name in self.model_fields_set:
            value, place = getattr(self, name), path + name
            if place in self.no_effect and value is not None:
                yield place
            for one in value if isinstance(value, list) and value and isinstance(value[0], Wire) else (value,):
                if isinstance(one, Wire):
                    yield from one.ignored(f"{place}.")


def measured(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise PydanticCustomError("too_long", "must have at most {most} entries", {"most": MAX_ENTRIES})
    return value


def boolean(value: Any) -> Any:
    """A literal of pydantic's takes 0 for False and 1 for True."""
    if not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "must be true or false")
    return value

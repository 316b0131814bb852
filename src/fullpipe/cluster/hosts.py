"""A hosts file says which machines take part, and what of each. It is TOML, and only name and address must be there:

    [[host]]
    name = "alpha"              # what it is called in tables and errors
    address = "10.0.0.1"        # by which Ray knows it: an address or a name of the network

    [[host]]
    name = "beta"
    address = "10.0.0.2"
    interface = "eth1"          # by which the others reach it; or its address itself: host_ip = "10.1.0.2"
    port = 5600                 # its data port, and the next where two listen; 0, the default: any that is free
    cores = 8                   # how much of it may be taken; left out: all that is free
    memory_mib = 16000
    device = "cuda:0"           # what its stages compute on; left out: cpu
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fullpipe.errors import UsageError

_LETTERS = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_EXAMPLE = 'For each host it has a line `[[host]]`, and under it `name = "alpha"` and `address = "10.0.0.1"`.'

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


def _ip(text: str) -> str:
    return str(ip_address(text))


class HostEntry(BaseModel):
    """Is what a hosts file says of one host; see above. None: nothing is said."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=_LETTERS)]
    address: Text
    interface: Text | None = None
    host_ip: Annotated[str, AfterValidator(_ip)] | None = None
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    cores: Count | None = None
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    memory_mib: Count | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    host: Annotated[list[HostEntry], Field(min_length=1)]


def read_hosts(path: Path) -> list[HostEntry]:
    """The hosts in the order of the file.

    Raises UsageError, which names the file and what is wrong in it, when it cannot be read, has a key that is not known
    or a value that cannot be, or has two hosts of one name or address.
    """
    hosts = _parsed(_table(path), path).host
    _require_different(hosts, "name", lambda host: host.name, path)
    _require_different(hosts, "address", lambda host: host.address, path)
    return hosts


def _table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the hosts file {path}: {error.strerror or error}",
                         hint=f"{_EXAMPLE} All hosts of a Ray cluster are `hosts=ray`.") from error
    except ValueError as error:  # no TOML, or no text
        raise UsageError(f"the hosts file {path} is not TOML: {error}", hint=_EXAMPLE) from error


def _parsed(table: dict[str, Any], path: Path) -> _File:
    try:
        return _File.model_validate(table)
    except ValidationError as error:
        # A key that is misspelt is missing too, so it is told first.
        first = min(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
        where, key = _owner(table, first["loc"]), str(first["loc"][-1])
        if first["type"] == "extra_forbidden":
            known = list(_File.model_fields if len(first["loc"]) == 1 else HostEntry.model_fields)
            close = difflib.get_close_matches(key, known, n=1)
            raise UsageError(f"{path}: {where}there is no key {key!r}",
                             hint=f"Did you mean {close[0]}?" if close else f"Known are: {', '.join(known)}.") from None
        if first["type"] == "missing":
            raise UsageError(f"{path}: {where}{key} is missing", hint=_EXAMPLE) from None
        said = first["msg"].removeprefix("Value error, ")
        said = said[:1].lower() + said[1:]
        raise UsageError(f"{path}: {where}{key}: {said} (got {first['input']!r})", hint=_hint(key)) from None


def _owner(table: dict[str, Any], loc: Sequence[int | str]) -> str:
    """The host that an error is about, by its name where it has one, else by its place."""
    if len(loc) < 3 or not isinstance(loc[1], int):
        return ""
    entry = table["host"][loc[1]]
    name = entry.get("name") if isinstance(entry, dict) else None
    return f"host {name}: " if isinstance(name, str) else f"host {loc[1] + 1}: "


def _hint(key: str) -> str:
    return {"host": _EXAMPLE, "name": "A name has letters, digits, dots, dashes and underscores.",
            "port": "Ports go up to 65535; 0 takes any that is free.",
            "device": 'Devices are "cpu", "cuda" and "cuda:N".',
            "host_ip": 'Give an address of the host, such as "10.0.0.2"; or an interface by its name: `interface`.',
            }.get(key, "Correct the file, or leave the line out.")


def _require_different(hosts: Sequence[HostEntry], what: str, of: Callable[[HostEntry], str], path: Path) -> None:
    seen: dict[str, int] = {}
    for number, host in enumerate(hosts, start=1):
        if (before := seen.setdefault(of(host), number)) != number:
            raise UsageError(f"{path}: hosts {before} and {number} have one {what}, {of(host)}",
                             hint="Each machine has one entry, and each entry a name of its own.")

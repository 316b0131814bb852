"""A host has several addresses, and one of them is that by which the others reach it.

What is asked of the system here sends no packet. Linux is asked by netlink, which knows all addresses of an interface.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

from fullpipe.errors import PipelineError, UsageError

_GET, _ADDRESS, _DONE, _ERROR = 22, 20, 3, 2  # RTM_GETADDR, RTM_NEWADDR, NLMSG_DONE, NLMSG_ERROR
_ASK, _ALL = 0x1, 0x300  # NLM_F_REQUEST, NLM_F_DUMP
_HEADER, _ABOUT, _PIECE = struct.Struct("=IHHII"), struct.Struct("=BBBBI"), struct.Struct("=HH")
_OTHER_END, _OWN = 1, 2  # IFA_ADDRESS, which of a line between two is the other end; IFA_LOCAL
_ANY_PORT = 9  # nothing is sent there


def address_towards(other: str) -> str:
    """The address of this machine by which `other`, an address or a name, is reached.

    Raises UsageError for a name that nobody knows, PipelineError where no way leads there.
    """
    try:
        found = socket.getaddrinfo(other, _ANY_PORT, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"nobody here knows the address of {other}: {getattr(error, 'strerror', None) or error}",
                         hint="Check the spelling, or give the address itself, such as 10.0.0.2.") from error
    reason = "there is no way"
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as asked:
                asked.connect(where)
                return str(asked.getsockname()[0])
        except OSError as error:
            reason = error.strerror or str(error)
    raise PipelineError(f"this machine cannot reach {other}: {reason}",
                        hint="Check that both are on one network: `ip route get ADDRESS` says the way.")


def own_addresses() -> dict[str, list[str]]:
    """All addresses of this machine by interface, those of IPv4 first; without those that hold on one cable only."""
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    for index, address in _asked():
        if not address.is_link_local:
            found.setdefault(_name(index), []).append(str(address))
    return {name: sorted(addresses, key=lambda one: ":" in one) for name, addresses in found.items()}


def address_of_interface(name: str) -> str:
    """The address of an interface, that of IPv4 if it has one.

    Raises UsageError when there is no such interface, and when it has no address or several, of which one is meant.
    """
    interfaces = own_addresses()
    if name not in interfaces:
        raise UsageError(f"this machine has no interface {name}", param="interface",
                         hint=f"It has {_listed(interfaces)}.")
    addresses = interfaces[name]
    meant = [one for one in addresses if ":" not in one] or addresses
    if not meant:
        raise UsageError(f"the interface {name} has no address", param="interface",
                         hint=f"Name another: this machine has {_listed(interfaces)}.")
    if len(meant) > 1:
        raise UsageError(f"the interface {name} has several addresses, and one is meant: {', '.join(meant)}",
                         param="interface", hint=f"Choose one: `host_ip={meant[0]}`.")
    return meant[0]


def pick_address(interface: str | None, host_ip: str | None, head: str | None, *, alone: bool) -> str:
    """The address of this machine at which the others find it.

    interface, host_ip: what the user says of it, if anything. head: an address of the head (on the head itself its own,
    as the others know it); None: there is none. alone: no other machine takes part.

    Raises UsageError for what this machine does not have, and for an address within this machine where others have to
    find it; see `address_towards` too.
    """
    chosen = _said(interface, host_ip) or (address_towards(head) if head else "127.0.0.1")
    if not alone and ip_address(chosen).is_loopback:
        raise UsageError(f"the other hosts cannot reach this machine at {chosen}, which is itself to each of them",
                         param="interface" if interface else "host_ip",
                         hint="Choose an address on their network with `host_ip`, or its `interface`; this machine "
                              f"has {_listed(own_addresses())}. If it is Ray that knows the head so, start that anew: "
                              "`ray start --head --node-ip-address=ADDRESS`.")
    return chosen


def require_own(address: str) -> str:
    """The address as the system spells it. Raises UsageError unless it is one of this machine."""
    interfaces = own_addresses()
    try:
        wanted = ip_address(address)
    except ValueError:
        raise UsageError(f"{address!r} is no address", param="host_ip",
                         hint=f"This machine has {_listed(interfaces)}.") from None
    if not any(str(wanted) in addresses for addresses in interfaces.values()) and not _within(wanted):
        raise UsageError(f"{address} is no address of this machine", param="host_ip",
                         hint=f"It has {_listed(interfaces)}.")
    return str(wanted)


def _said(interface: str | None, host_ip: str | None) -> str | None:
    """What both options say together."""
    if host_ip is None:
        return None if interface is None else address_of_interface(interface)
    own = require_own(host_ip)
    if interface is not None and own not in (there := own_addresses().get(interface, [])):
        raise UsageError(f"`interface={interface}` and `host_ip={host_ip}` are two addresses, and one is meant",
                         param="host_ip",
                         hint=f"Leave one of them out; {interface} has {', '.join(there) or 'no address'}.")
    return own


def _within(address: IPv4Address | IPv6Address) -> bool:
    """All of 127.0.0.0/8 is this machine, though only 127.0.0.1 is told."""
    return isinstance(address, IPv4Address) and address.is_loopback


def _listed(interfaces: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{name}: {', '.join(addresses) or 'no address'}" for name, addresses in interfaces.items())


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # it has gone meanwhile
        return f"interface {index}"


# ---- netlink ---------------------------------------------------------------------------------------------------------


def _asked() -> Iterator[tuple[int, IPv4Address | IPv6Address]]:
    """Interfaces by number, and an address of each."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as asked:
        body = _ABOUT.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        asked.send(_HEADER.pack(_HEADER.size + len(body), _GET, _ASK | _ALL, 1, 0) + body)
        while True:
            for kind, message in _messages(asked.recv(1 << 16)):
                if kind in (_DONE, _ERROR):
                    return
                if kind == _ADDRESS and (found := _address(message)):
                    yield found


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        size, kind, *_ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size:size]
        data = data[_aligned(size):]


def _address(message: bytes) -> tuple[int, IPv4Address | IPv6Address] | None:
    _, _, _, _, index = _ABOUT.unpack_from(message)
    pieces, rest = dict[int, bytes](), message[_ABOUT.size:]
    while len(rest) >= _PIECE.size:
        size, kind = _PIECE.unpack_from(rest)
        pieces[kind] = rest[_PIECE.size:size]
        rest = rest[_aligned(max(size, _PIECE.size)):]
    packed = pieces.get(_OWN) or pieces.get(_OTHER_END)
    return (index, ip_address(packed)) if packed else None


def _aligned(size: int) -> int:
    return -(-size // 4) * 4

"""Which of its addresses a machine tells the others. The machine that runs these has at least 127.0.0.1."""

from __future__ import annotations

import subprocess

import pytest

from fullpipe.cluster import addresses
from fullpipe.cluster.addresses import address_of_interface, address_towards, own_addresses, pick_address, require_own
from fullpipe.errors import FullpipeError, PipelineError, UsageError

MACHINE = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.2", "fd00::2"], "eth1": ["10.1.0.2", "10.1.0.3", "fd00::3"],
           "eth2": [], "eth3": ["fd00::4"]}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "own_addresses", lambda: MACHINE)


def test_the_system_tells_its_addresses() -> None:
    found = own_addresses()
    assert "127.0.0.1" in found["lo"]
    told = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True, check=False).stdout
    for line in told.splitlines():
        _, name, _, address, *_ = line.split()
        if not address.startswith("fe80"):
            assert address.split("/")[0] in found[name.split("@")[0]]


def test_a_machine_reaches_itself_at_the_address_that_was_asked_for() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    for address in (one for all_of_it in own_addresses().values() for one in all_of_it):
        assert address_towards(address) == address


def test_a_name_that_nobody_knows_is_said() -> None:
    with pytest.raises(UsageError, match="nobody here knows the address of no host: ") as caught:
        address_towards("no host")
    assert "Check the spelling" in str(caught.value.hint)
    with pytest.raises(UsageError, match="nobody here knows"):
        address_towards("x" * 300)


def test_a_host_that_no_way_leads_to_is_said() -> None:
    with pytest.raises(PipelineError, match=r"cannot reach 255.255.255.255: Permission denied|Network is unreachable"):
        address_towards("255.255.255.255")


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(("interface", "address"), [("eth0", "10.0.0.2"), ("eth3", "fd00::4"), ("lo", "127.0.0.1")])
def test_an_interface_stands_for_its_address(interface: str, address: str) -> None:
    assert address_of_interface(interface) == address


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(("interface", "said", "hint"), [
    ("eth9", "no interface eth9", "eth0: 10.0.0.2, fd00::2; eth1: 10.1.0.2, 10.1.0.3, fd00::3; eth2: no address"),
    ("eth2", "the interface eth2 has no address", "Name another"),
    ("eth1", "several addresses, and one is meant: 10.1.0.2, 10.1.0.3", "`host_ip=10.1.0.2`"),
])
def test_an_interface_that_says_no_single_address_is_refused(interface: str, said: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        address_of_interface(interface)
    assert said in caught.value.message and hint in str(caught.value.hint) and caught.value.param == "interface"


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(("interface", "host_ip", "address"), [
    ("eth0", None, "10.0.0.2"), (None, "10.1.0.3", "10.1.0.3"), ("eth1", "10.1.0.3", "10.1.0.3"),
    (None, "FD00:0::2", "fd00::2"), ("eth0", "fd00::2", "fd00::2"),
])
def test_what_the_user_says_is_taken(interface: str | None, host_ip: str | None, address: str) -> None:
    assert pick_address(interface, host_ip, None, alone=False) == address


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(("interface", "host_ip", "said"), [
    ("eth0", "10.1.0.2", "`interface=eth0` and `host_ip=10.1.0.2` are two addresses, and one is meant"),
    ("eth9", "10.1.0.2", "`interface=eth9` and `host_ip=10.1.0.2` are two addresses"),
    (None, "10.9.9.9", "10.9.9.9 is no address of this machine"),
    (None, "0.0.0.0", "0.0.0.0 is no address of this machine"),
    (None, "beta", "'beta' is no address"),
    ("lo", None, "the other hosts cannot reach this machine at 127.0.0.1"),
    (None, "127.0.0.2", "the other hosts cannot reach this machine at 127.0.0.2"),
    (None, "::1", "the other hosts cannot reach this machine at ::1"),
    (None, None, "the other hosts cannot reach this machine at 127.0.0.1"),
])
def test_what_cannot_be_meant_is_refused(interface: str | None, host_ip: str | None, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        pick_address(interface, host_ip, "localhost", alone=False)
    assert said in caught.value.message and caught.value.hint


def test_a_machine_alone_needs_nobody_to_reach_it() -> None:
    assert pick_address(None, None, None, alone=True) == "127.0.0.1"
    assert pick_address("lo", None, None, alone=True) == "127.0.0.1"


def test_the_default_is_the_way_to_the_head() -> None:
    outward = [one for name, held in own_addresses().items() if name != "lo" for one in held]
    for address in outward:
        assert pick_address(None, None, address, alone=False) == address


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
def test_all_loopback_addresses_are_this_machine(address: str) -> None:
    assert require_own(address) == address


def test_every_error_has_a_way_out() -> None:
    for bad in ("999.1.1.1", "", "10.255.255.254"):
        with pytest.raises(FullpipeError) as caught:
            require_own(bad)
        assert caught.value.hint

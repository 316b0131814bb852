"""The hosts file, and what it says when something in it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.cluster import hosts
from fullpipe.cluster.hosts import HostEntry, read_hosts
from fullpipe.errors import UsageError

TWO = '[[host]]\nname = "alpha"\naddress = "10.0.0.1"\n[[host]]\nname = "beta"\naddress = "10.0.0.2"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "hosts.toml"
    path.write_text(text)
    return path


def test_the_example_of_the_docstring_is_a_hosts_file(tmp_path: Path) -> None:
    assert hosts.__doc__ is not None
    example = "\n".join(line[4:] for line in hosts.__doc__.splitlines() if line.startswith("    "))
    alpha, beta = read_hosts(written(tmp_path, example))
    assert alpha == HostEntry(name="alpha", address="10.0.0.1")
    assert beta.model_dump() == {"name": "beta", "address": "10.0.0.2", "interface": "eth1", "host_ip": None,
                                 "port": 5600, "cores": 8, "device": "cuda:0", "memory_mib": 16000}


@pytest.mark.parametrize("ip", ["10.0.0.2", "fd00::2"])
def test_a_host_ip_is_an_address_of_either_kind(tmp_path: Path, ip: str) -> None:
    assert read_hosts(written(tmp_path, TWO + f'host_ip = "{ip}"'))[1].host_ip == ip


@pytest.mark.parametrize(("text", "said", "hint"), [
    ("", "host is missing", "[[host]]"),
    ("[[host]", "is not TOML", "[[host]]"),
    ("host = []", "host: list should have at least 1 item", "[[host]]"),
    (TWO + 'adress = "x"', "host beta: there is no key 'adress'", "Did you mean address?"),
    (TWO + "zzz = 1", "host beta: there is no key 'zzz'", "Known are: name, address, interface"),
    ("hosts = 1", "there is no key 'hosts'", "Did you mean host?"),
    ('[[host]]\nname = "a"', "host a: address is missing", "[[host]]"),
    ('[[host]]\naddress = "a"', "host 1: name is missing", "[[host]]"),
    (TWO + "port = 65536", "host beta: port: input should be less than or equal to 65535 (got 65536)", "0 takes any"),
    (TWO + 'port = "5"', "host beta: port: input should be a valid integer", "0 takes any"),
    (TWO + 'device = "gpu"', "host beta: device", '"cuda:N"'),
    (TWO + 'host_ip = "beta"', "host beta: host_ip: 'beta' does not appear to be an IPv4 or", "`interface`"),
    (TWO + "cores = 0", "host beta: cores", "leave the line out"),
    (TWO.replace("beta", "alpha"), "hosts 1 and 2 have one name, alpha", "a name of its own"),
    (TWO.replace("0.2", "0.1"), "hosts 1 and 2 have one address, 10.0.0.1", "Each machine has one entry"),
    (TWO.replace('"beta"', '"be ta"'), "host be ta: name", "letters"),
])
def test_what_cannot_be_is_said_with_its_host(tmp_path: Path, text: str, said: str, hint: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_hosts(path)
    assert str(path) in caught.value.message and said in caught.value.message
    assert hint in str(caught.value.hint)


def test_a_file_that_is_not_there_is_said_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the hosts file .*nothing.toml: No such file"):
        read_hosts(tmp_path / "nothing.toml")
    with pytest.raises(UsageError, match="Is a directory"):
        read_hosts(tmp_path)


@given(st.binary(max_size=40))
def test_no_bytes_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.toml"
    path.write_bytes(data)
    with pytest.raises(UsageError):
        read_hosts(path)


anything = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
                            st.sampled_from(["name", "address", "port", "x"]), inner, max_size=3), max_leaves=6)


@given(anything)
def test_no_table_raises_anything_else(value: object) -> None:
    with pytest.raises(UsageError):
        hosts._parsed({"host": [value], "more": 1}, Path("some"))

"""Addresses and interfaces, on the loopback interface that every machine has."""

from __future__ import annotations

import socket

import pytest

from dtrain.distributed import network
from dtrain.distributed.network import choose_interface, interface_of, is_literally_local

LOOPBACK = next(name for name in network.interfaces() if name.startswith("lo"))


def test_an_address_is_mapped_to_its_interface() -> None:
    assert interface_of("127.0.0.1") == LOOPBACK
    assert interface_of("127.0.1.1") == LOOPBACK, "all of 127.x is the loopback's"
    assert interface_of("203.0.113.77") is None


def test_the_interface_on_the_route_to_the_master_is_chosen_where_the_user_has_not() -> None:
    env: dict[str, str] = {}
    chosen = {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "ib0"}
    half = {"NCCL_SOCKET_IFNAME": "ib0"}

    for mapping in (env, chosen, half):
        choose_interface(mapping, "127.0.0.1", 1, serves_other_nodes=False)

    assert env == {"GLOO_SOCKET_IFNAME": LOOPBACK, "NCCL_SOCKET_IFNAME": f"={LOOPBACK}"}
    assert chosen == {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "ib0"}
    assert half == {"GLOO_SOCKET_IFNAME": LOOPBACK, "NCCL_SOCKET_IFNAME": "ib0"}


def test_a_master_whose_own_name_means_loopback_takes_the_way_out_for_other_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(network, "resolve", lambda host, port: (socket.AF_INET, "127.0.1.1"))
    monkeypatch.setattr(network, "outward_address", lambda: "10.77.0.1")
    monkeypatch.setattr(network, "interface_of", lambda address: {"10.77.0.1": "eth0"}.get(address, "lo"))
    alone: dict[str, str] = {}
    shared: dict[str, str] = {}

    choose_interface(alone, "node1", 1, serves_other_nodes=False)
    choose_interface(shared, "node1", 1, serves_other_nodes=True)

    assert alone["GLOO_SOCKET_IFNAME"] == "lo"
    assert shared["GLOO_SOCKET_IFNAME"] == "eth0"


def test_a_name_that_does_not_resolve_leaves_the_choice_open() -> None:
    env: dict[str, str] = {}

    choose_interface(env, "no-such-host.invalid", 1, serves_other_nodes=True)

    assert env == {}


def test_only_names_that_mean_this_machine_everywhere_are_local() -> None:
    assert all(map(is_literally_local, ("localhost", "127.0.0.1", "127.0.1.1", "::1")))
    assert not any(map(is_literally_local, ("node1", "10.0.0.1", "localhost.example.org")))

"""The switch of the simulated cluster, with sockets instead of network devices, and its tools. Needs no root."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
ADDRESSES = [socket.inet_aton(f"10.77.0.{k}") for k in (1, 2, 3)]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the simulated cluster needs Linux")


@pytest.fixture
def relay(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(LAUNCH)
    return import_module("simulated.relay")


Make = Callable[..., tuple[Any, list[Any], list[socket.socket]]]


@pytest.fixture
def make(relay: Any) -> Iterator[Make]:
    """Returns a function that creates a switch with three ports, the ports, and the nodes' ends of them."""
    opened: list[socket.socket] = []

    def build(rate_mbit: float | None = None, delay_s: float = 0.0) -> tuple[Any, list[Any], list[socket.socket]]:
        ports, nodes = [], []
        for address in ADDRESSES:
            node, switch_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            for end in (node, switch_end):
                end.setblocking(False)
            alive = socket.socket()
            opened.extend([node, switch_end, alive])
            ports.append((address, relay.Port(socket.inet_ntoa(address), switch_end.fileno(), alive)))
            nodes.append(node)
        switch = relay.Switch(dict(ports), rate_mbit=rate_mbit, delay_s=delay_s)
        return switch, [port for _, port in ports], nodes

    yield build
    for each in opened:
        each.close()


def packet(source: int, target: int, payload: int = 0, *, segment: int = 0) -> bytes:
    """Returns a packet in the format of a TUN device, with IPv4 and TCP headers of 20 bytes each.

    Args:
        segment: the segment size; 0 if the packet is a single segment.
    """
    header = struct.pack("=BBHHHH", 0, 1 if segment else 0, 40, segment, 0, 0)
    ip = bytes([0x45]) + bytes(11) + ADDRESSES[source - 1] + ADDRESSES[target - 1]
    return header + ip + bytes(12) + bytes([0x50]) + bytes(7) + bytes(payload)


def received(node: socket.socket) -> list[int]:
    """Returns the sizes of the packets that have arrived at a node."""
    sizes = []
    while True:
        try:
            sizes.append(len(node.recv(70_000)))
        except BlockingIOError:
            return sizes


def test_the_bytes_of_a_chunk_include_the_headers_of_its_segments(relay: Any) -> None:
    assert relay.wire_bytes(packet(1, 2)) == 40
    assert relay.wire_bytes(packet(1, 2, 1460)) == 1500
    assert relay.wire_bytes(packet(1, 2, 1460, segment=1460)) == 1500
    assert relay.wire_bytes(packet(1, 2, 1461, segment=1460)) == 1461 + 2 * 40
    assert relay.wire_bytes(packet(1, 2, 14600, segment=1460)) == 15000


def test_a_packet_is_delivered_only_to_its_address(make: Make) -> None:
    switch, ports, nodes = make()

    nodes[0].send(packet(1, 3, 100))
    nodes[0].send(packet(1, 3)[:20] + bytes(30))  # to 0.0.0.0
    switch.read_packets(ports[0])

    assert [received(node) for node in nodes] == [[], [], [150]]
    assert [(port.sent, port.received, port.dropped) for port in ports] == [(180, 0, 1), (0, 0, 0), (0, 140, 0)]


class Clock:
    """Replaces the module `time` in the switch."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(relay: Any, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(relay, "time", clock)
    return clock


def test_rate_and_delay_postpone_a_packet(make: Make, clock: Clock) -> None:
    switch, ports, nodes = make(rate_mbit=8, delay_s=0.004)  # a byte takes 1 us

    nodes[0].send(packet(1, 3, 960))
    nodes[0].send(packet(1, 3, 960))
    nodes[1].send(packet(2, 3, 960))
    switch.read_packets(ports[0])
    switch.read_packets(ports[1])

    arrivals = []
    for clock.now in (0.0049, 0.0051, 0.0061, 0.0069, 0.0071):
        switch.deliver_due()
        arrivals.append(len(received(nodes[2])))
    assert arrivals == [0, 1, 1, 0, 1]  # the third left its own port immediately, but waited for that of node 3


def test_a_full_queue_drops_packets(make: Make, clock: Clock) -> None:
    switch, ports, nodes = make(rate_mbit=8)

    for _ in range(55):  # 0.99 ms each; the queue holds 50 ms
        nodes[0].send(packet(1, 2, 950))
        switch.read_packets(ports[0])

    assert ports[0].dropped == 5


def test_a_cut_drops_only_the_packets_in_transit_from_and_to_the_node(make: Make, clock: Clock) -> None:
    switch, ports, nodes = make(delay_s=0.004)
    ways = [(1, 2), (2, 3), (3, 1)]

    def send() -> None:
        for source, target in ways:
            nodes[source - 1].send(packet(source, target))
            switch.read_packets(ports[source - 1])

    send()
    switch.apply({"cut": "10.77.0.2"})
    send()
    clock.now = 1.0
    switch.deliver_due()
    during = [len(received(node)) for node in nodes]
    switch.apply({"heal": "10.77.0.2"})
    send()
    clock.now = 2.0
    switch.deliver_due()

    assert during == [2, 0, 0]
    assert [len(received(node)) for node in nodes] == [1, 1, 1]


# Installation of packages


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(LAUNCH)
    return import_module("simulated.tools")


def test_no_service_starts_while_packages_are_installed(tools: Any, tmp_path: Path) -> None:
    policy = tmp_path / "policy-rc.d"

    with tools.no_service_starts(policy):
        assert subprocess.run([policy, "ssh", "start"], check=False).returncode == 101
    assert not policy.exists()
    policy.write_text(tools.NO_SERVICE)  # left by an installation that was killed
    with tools.no_service_starts(policy):
        pass
    assert not policy.exists()


def test_an_existing_policy_for_services_is_kept(tools: Any, tmp_path: Path) -> None:
    policy = tmp_path / "policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 0\n")

    with tools.no_service_starts(policy):
        assert policy.read_text() == "#!/bin/sh\nexit 0\n"

    assert policy.read_text() == "#!/bin/sh\nexit 0\n"


@pytest.mark.parametrize("installed", [["slurmctld", "slurmd", "srun"], ["srun"], ["slurmctld", "slurmd"], []])
def test_slurm_is_installed_unless_all_programs_exist(installed: list[str], tmp_path: Path) -> None:
    for name in installed:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    script = (LAUNCH / "test").read_text()
    function = script[script.index("has_slurm() {") : script.index("install_slurm() {")]

    ended = subprocess.run(["/bin/bash", "-c", f"{function}\nhas_slurm"], env={"PATH": str(tmp_path)}, check=False)

    assert (ended.returncode == 0) == (len(installed) == 3)

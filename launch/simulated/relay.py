"""The switch between simulated nodes: moves packets between TUN devices, with a rate, a delay, and cuts.

`simulate-cluster up` starts it as `relay.py FOLDER CONTROL_FD TUN_FD:ALIVE_FD...` (inherited sockets and devices, in the
order of the nodes), in its own session. Each node has a full-duplex port: packets leave the sender's port and reach the
receiver's port at the port's rate, with `delay` in between. A queue that would take longer than `queue_s` drops new packets
(drop tail, as in real switches). It sleeps in select().
"""

from __future__ import annotations

import gc
import heapq
import json
import os
import select
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulated.cluster import RECORD
from simulated.linux import VNET_HEADER, name_process

HEADER = VNET_HEADER.size
SOURCE_END, TARGET_END = HEADER + 16, HEADER + 20
"""The ends of the two addresses in an IPv4 header."""

LARGEST = HEADER + 65536
BURST = 32
"""Number of packets that are read from one device before the others get their turn."""

QUEUE_S = 0.050
"""Length of a port's queue. A real sender's network card would block the sender instead, which a TUN device cannot do."""

CLIENT_S = 0.2
"""Time limit of a client of the control socket, during which the switch waits."""


@dataclass(slots=True)
class Port:
    """The port of a node.

    Attributes:
        name: the node's name.
        tun: descriptor of the node's TUN device; None after the node has ended.
        alive: a socket whose other end is held by the node's init, and closes with it.
        is_cut: whether the port drops all packets.
        sent: bytes that the node sent, as on a wire, with the headers of every segment.
        received: bytes that the node received, counted the same way.
        dropped: number of dropped packets.
        out_free: when the port will have sent all packets of its queue (time.monotonic).
        in_free: when the port will have received all packets of its queue (time.monotonic).
    """

    name: str
    tun: int | None
    alive: socket.socket
    is_cut: bool = False
    sent: int = 0
    received: int = 0
    dropped: int = 0
    out_free: float = 0.0
    in_free: float = 0.0


class Switch:
    """All ports, and the packets that are in transit."""

    def __init__(self, ports: dict[bytes, Port], *, rate_mbit: float | None, delay_s: float) -> None:
        """Creates a switch.

        Args:
            ports: by IPv4 address, 4 bytes.
            rate_mbit: rate of each port in each direction; None for no limit.
            delay_s: delay in each direction.
        """
        self._ports = ports
        self._s_per_byte = 8e-6 / rate_mbit if rate_mbit else 0.0
        self._delay_s = delay_s
        self._queue_s = max(QUEUE_S, 2 * delay_s)  # at full rate, TCP has a round trip's worth of packets in transit
        self._is_shaped = bool(rate_mbit or delay_s)
        self._waiting: list[tuple[float, int, Port, bytes]] = []
        self._count = 0

    def serve(self, control: socket.socket) -> None:
        """Runs until the process is killed."""
        while True:
            plugged = [port for port in self._ports.values() if port.tun is not None]
            by_tun = {port.tun: port for port in plugged}
            by_alive = {port.alive.fileno(): port for port in plugged}
            watched = [*by_tun, *by_alive, control.fileno()]
            while all(port.tun is not None for port in plugged):
                ready, _, _ = select.select(watched, [], [], self._next_s())
                for descriptor in ready:
                    if (port := by_tun.get(descriptor)) is not None:
                        self.read_packets(port)
                    elif (port := by_alive.get(descriptor)) is not None:
                        self._unplug(port)
                    else:
                        self._answer(control)
                self.deliver_due()

    def _next_s(self) -> float | None:
        return max(self._waiting[0][0] - time.monotonic(), 0.0) if self._waiting else None

    def read_packets(self, port: Port) -> None:
        """Reads packets that a node sends."""
        for _ in range(BURST):
            if port.tun is None:
                return
            try:
                packet = os.read(port.tun, LARGEST)
            except BlockingIOError:  # no more packets
                return
            except OSError:  # the device was deleted
                self._unplug(port)
                return
            target = self._ports.get(packet[SOURCE_END:TARGET_END])
            size = wire_bytes(packet)
            port.sent += size
            if target is None or port.is_cut or target.is_cut:
                port.dropped += 1
            elif self._is_shaped:
                self._schedule(port, target, packet, size)
            else:
                target.received += size
                _write(target, packet)

    def _schedule(self, port: Port, target: Port, packet: bytes, size: int) -> None:
        now = time.monotonic()
        on_wire = size * self._s_per_byte
        left = max(port.out_free, now) + on_wire
        arrived = max(target.in_free + on_wire, left + self._delay_s)
        if left - now > self._queue_s or arrived - left - self._delay_s > self._queue_s:
            port.dropped += 1
            return
        port.out_free, target.in_free = left, arrived
        self._count += 1  # orders packets with the same arrival time, as packets cannot be compared
        heapq.heappush(self._waiting, (arrived, self._count, target, packet))
        # Counted when it is queued: all queued packets arrive, except after a cut.
        target.received += size

    def deliver_due(self) -> None:
        """Delivers packets whose arrival time has been reached."""
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            _, _, target, packet = heapq.heappop(self._waiting)
            _write(target, packet)

    def _unplug(self, port: Port) -> None:
        """Closes the device of a node that has ended, so that its network namespace ends too."""
        if port.tun is not None:
            os.close(port.tun)
            port.tun = None

    def _answer(self, control: socket.socket) -> None:
        """Answers a request {"cut": NODE}, {"heal": NODE} or {} with every port's state."""
        # A client that disconnects or sends an invalid request must not end the network.
        with suppress(OSError, ValueError):
            client, _ = control.accept()
            with client:
                client.settimeout(CLIENT_S)
                self.apply(json.loads(client.recv(4096)))
                client.sendall(json.dumps(self._state()).encode())

    def apply(self, request: dict[str, Any]) -> None:
        """Cuts or heals a port."""
        for port in self._ports.values():
            if port.name == request.get("heal"):
                port.is_cut = False
            elif port.name == request.get("cut"):
                port.is_cut = True
                # Drops the packets in transit to the node, and those from it.
                address_of_port = next(address for address, each in self._ports.items() if each is port)
                self._waiting = [
                    entry
                    for entry in self._waiting
                    if entry[2] is not port and entry[3][SOURCE_END - 4 : SOURCE_END] != address_of_port
                ]
                heapq.heapify(self._waiting)

    def _state(self) -> dict[str, Any]:
        return {
            port.name: {
                "cut": port.is_cut,
                "sent_bytes": port.sent,
                "received_bytes": port.received,
                "dropped_packets": port.dropped,
            }
            for port in self._ports.values()
        }


def wire_bytes(packet: bytes) -> int:
    """Returns the bytes of a packet from a TUN device on a wire, where each segment has its own headers."""
    size = len(packet) - HEADER
    kind, segment = packet[1], int.from_bytes(packet[4:6], sys.byteorder)
    if not kind or not segment:
        return size
    ip = (packet[HEADER] & 15) * 4
    headers = ip + (packet[HEADER + ip + 12] >> 4) * 4
    return size + (-(-(size - headers) // segment) - 1) * headers


def _write(target: Port, packet: bytes) -> None:
    if target.tun is not None:
        with suppress(OSError):  # the device is down, or its queue is full: the packet is lost, as in a real network
            os.write(target.tun, packet)


def main() -> None:
    """Runs `relay.py FOLDER CONTROL_FD TUN_FD:ALIVE_FD...`, in the order of the nodes."""
    folder, control, *ends = sys.argv[1:]
    config = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
    ports = {}
    for node, end in zip(config["nodes"], ends, strict=True):
        tun, alive = map(int, end.split(":"))
        ports[socket.inet_aton(node["address"])] = Port(node["name"], tun, socket.socket(fileno=alive))
    name_process("dtrain-switch")
    gc.disable()  # there are no reference cycles here, and a collection would delay packets
    with suppress(OSError):  # a real switch is not slowed down by busy nodes
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    switch = Switch(ports, rate_mbit=config["rate_mbit"], delay_s=config["delay_ms"] / 1000)
    switch.serve(socket.socket(fileno=int(control)))


if __name__ == "__main__":
    main()

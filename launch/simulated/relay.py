"""The switch between simulated nodes: packets from one TUN device to another, with a rate, a delay, and cuts.

Started by `simulate-cluster up` as `relay.py FOLDER CONTROL_FD TUN_FD:ALIVE_FD...` (sockets and devices that it inherits,
the nodes in their order), in a session of its own. Each node has a full-duplex port: what a node sends leaves at the
port's rate, what it receives arrives at the port's rate, and `delay` passes in between. A queue that would take longer
than `queue_s` drops what comes (drop tail, as switches do). It sleeps in select().
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
"""Where an IPv4 header's two addresses end."""

LARGEST = HEADER + 65536
BURST = 32
"""Packets taken from one device before the others are looked at again."""

QUEUE_S = 0.050
"""What a port holds before it drops. A real sender's own card does not drop but has it wait, which a TUN device cannot."""

CLIENT_S = 0.2
"""How long a client of the control socket may keep the switch waiting."""


@dataclass(slots=True)
class Port:
    """Where a node is plugged in. sent, received: bytes as on the wire, with the headers of every segment.

    tun: None once the node is gone. alive: a socket whose other end the node's init holds; it ends with it.
    out_free, in_free: when the port will have passed on, each way, what it has been given (time.monotonic).
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
    """All ports, and the packets on their way."""

    def __init__(self, ports: dict[bytes, Port], *, rate_mbit: float | None, delay_s: float) -> None:
        """ports: by IPv4 address, 4 bytes. rate_mbit: None for as fast as it goes. delay_s: each way."""
        self._ports = ports
        self._s_per_byte = 8e-6 / rate_mbit if rate_mbit else 0.0
        self._delay_s = delay_s
        self._queue_s = max(QUEUE_S, 2 * delay_s)  # TCP at full rate has as much on its way as a round trip takes
        self._is_shaped = bool(rate_mbit or delay_s)
        self._waiting: list[tuple[float, int, Port, bytes]] = []
        self._count = 0

    def serve(self, control: socket.socket) -> None:
        """Until the process is killed."""
        while True:
            plugged = [port for port in self._ports.values() if port.tun is not None]
            by_tun = {port.tun: port for port in plugged}
            by_life = {port.alive.fileno(): port for port in plugged}
            watched = [*by_tun, *by_life, control.fileno()]
            while all(port.tun is not None for port in plugged):
                ready, _, _ = select.select(watched, [], [], self._next_s())
                for descriptor in ready:
                    if (port := by_tun.get(descriptor)) is not None:
                        self.take(port)
                    elif (port := by_life.get(descriptor)) is not None:
                        self._unplug(port)
                    else:
                        self._answer(control)
                self.deliver_due()

    def _next_s(self) -> float | None:
        return max(self._waiting[0][0] - time.monotonic(), 0.0) if self._waiting else None

    def take(self, port: Port) -> None:
        """Packets that a node sends."""
        for _ in range(BURST):
            if port.tun is None:
                return
            try:
                packet = os.read(port.tun, LARGEST)
            except BlockingIOError:  # nothing more
                return
            except OSError:  # somebody deleted the device
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
        self._count += 1  # in the order of coming where two arrive at once; packets cannot be compared
        heapq.heappush(self._waiting, (arrived, self._count, target, packet))
        # A packet counts as received when it is taken: `cut` empties the queue, and the rest does arrive.
        target.received += size

    def deliver_due(self) -> None:
        """Packets whose time has come."""
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            _, _, target, packet = heapq.heappop(self._waiting)
            _write(target, packet)

    def _unplug(self, port: Port) -> None:
        """The node is gone: without its device, its network namespace goes as well."""
        if port.tun is not None:
            os.close(port.tun)
            port.tun = None

    def _answer(self, control: socket.socket) -> None:
        """One request: {"cut": NODE}, {"heal": NODE} or {}. The answer has every port's state."""
        with suppress(OSError, ValueError):  # a client that went away or talks nonsense does not end the network
            client, _ = control.accept()
            with client:
                client.settimeout(CLIENT_S)
                self.obey(json.loads(client.recv(4096)))
                client.sendall(json.dumps(self._state()).encode())

    def obey(self, request: dict[str, Any]) -> None:
        """Cuts or heals a port."""
        for port in self._ports.values():
            if port.name == request.get("heal"):
                port.is_cut = False
            elif port.name == request.get("cut"):
                port.is_cut = True
                # What is queued for a dead port is lost; so is what the node had sent that has not arrived.
                gone = next(address for address, each in self._ports.items() if each is port)
                self._waiting = [
                    entry
                    for entry in self._waiting
                    if entry[2] is not port and entry[3][SOURCE_END - 4 : SOURCE_END] != gone
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
    """Bytes that a packet as read from a TUN device takes on the wire: each segment has headers of its own."""
    size = len(packet) - HEADER
    kind, segment = packet[1], int.from_bytes(packet[4:6], sys.byteorder)
    if not kind or not segment:
        return size
    ip = (packet[HEADER] & 15) * 4
    headers = ip + (packet[HEADER + ip + 12] >> 4) * 4
    return size + (-(-(size - headers) // segment) - 1) * headers


def _write(target: Port, packet: bytes) -> None:
    if target.tun is not None:
        with suppress(OSError):  # the device is down, or its queue is full: a packet is lost, as on a wire
            os.write(target.tun, packet)


def main() -> None:
    """`relay.py FOLDER CONTROL_FD TUN_FD:ALIVE_FD...`, in the order of the nodes."""
    folder, control, *ends = sys.argv[1:]
    config = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
    ports = {}
    for node, end in zip(config["nodes"], ends, strict=True):
        tun, alive = map(int, end.split(":"))
        ports[socket.inet_aton(node["address"])] = Port(node["name"], tun, socket.socket(fileno=alive))
    name_process("dtrain-switch")
    gc.disable()  # nothing here is cyclic, and a collection would hold the packets up
    with suppress(OSError):  # a switch does not wait for a busy node's CPU
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    switch = Switch(ports, rate_mbit=config["rate_mbit"], delay_s=config["delay_ms"] / 1000)
    switch.serve(socket.socket(fileno=int(control)))


if __name__ == "__main__":
    main()

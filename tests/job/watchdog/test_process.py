"""The monitor of a rank: its queries to the helper thread, and its connection to the coordinator."""

from __future__ import annotations

import asyncio
import json
import mmap
import socket
import struct
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dtrain.distributed.heartbeat import HEARTBEAT_BYTES, Heartbeat, Phase
from dtrain.job.watchdog.coordinator import CoordinatorEndpoint
from dtrain.job.watchdog.evidence import HelperAnswer, WatchedRank
from dtrain.job.watchdog.process import RankMonitor
from dtrain.job.watchdog.rules import HangSettings, is_hang

SETTINGS = HangSettings(10.0)
NODE1 = CoordinatorEndpoint("node1", 1, "word", "node1", 100)


class Cut:
    """Rank 1's monitor and its connection to the coordinator, which is this test."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, settings: HangSettings = SETTINGS, limit_s: float = 0.05
    ) -> None:
        self.warnings: list[str] = []
        self.settings, self.memory = settings, mmap.mmap(-1, HEARTBEAT_BYTES)
        self.heartbeat = Heartbeat(self.memory)
        monkeypatch.setattr("dtrain.job.watchdog.process.unreachable_after_s", lambda settings: limit_s)
        monkeypatch.setattr(
            "dtrain.job.watchdog.process.log.warning", lambda text, *values: self.warnings.append(text % values)
        )

    async def begin(self) -> None:
        ours, theirs = socket.socketpair()
        channel, self.rank = socket.socketpair()
        self.monitor = RankMonitor(WatchedRank(1, 0, 0, 0, self.memory, None, channel, self.settings, Path()))
        _, self.monitor._rank_writer = await asyncio.open_connection(sock=channel)
        reader, writer = await asyncio.open_connection(sock=theirs)
        self.from_monitor, self.to_monitor = await asyncio.open_connection(sock=ours)
        self.following = asyncio.create_task(self.monitor._follow(reader, writer, NODE1))

    async def stand_in(self) -> Any:
        while self.monitor._local_coordinator is None:
            await asyncio.sleep(0.01)
        return self.monitor._local_coordinator

    async def received(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self.from_monitor.readline())
        return found

    async def end(self) -> None:
        self.to_monitor.close()
        await asyncio.gather(self.following, return_exceptions=True)
        self.monitor._rank_writer.close()
        self.rank.close()


def state(phase: Phase, **more: Any) -> dict[str, Any]:
    return {"state": {"phase": phase, "step": 7, **more}, "owns_run_dir": True}


def test_two_overlapping_queries_get_an_answer_each() -> None:
    async def life() -> list[Any]:
        ours, theirs = socket.socketpair()
        monitor = RankMonitor(WatchedRank(0, 0, 0, 0, None, None, theirs, HangSettings(10.0), Path()))
        reader, monitor._rank_writer = await asyncio.open_connection(sock=theirs)
        listening = asyncio.create_task(monitor._listen_to_rank(reader))
        asking = asyncio.gather(monitor._query(), monitor._query(silence=True))
        await asyncio.sleep(0)
        ours.sendall("".join(json.dumps({"answer": [[{"number": n}], False]}) + "\n" for n in (1, 2)).encode())
        answers = await asking
        listening.cancel()
        monitor._rank_writer.close()
        ours.close()
        return list(answers)

    assert asyncio.run(life()) == [HelperAnswer([{"number": n}], False) for n in (1, 2)]


def test_a_stand_in_watches_the_rank_while_the_coordinator_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = Cut(monkeypatch, limit_s=0.5)

    async def life() -> tuple[bool, bool, Any, Any]:
        await cut.begin()
        alone = await cut.stand_in()
        cut.to_monitor.write(b'{"alive": true}\n')
        while cut.monitor._local_coordinator is not None:
            await asyncio.sleep(0.01)
        cut.monitor._send_up({"state": {}})
        received = await cut.received()
        to_rank = json.loads(cut.rank.recv(100))
        is_back = cut.monitor._coordinator is None
        await cut.end()
        return alone.is_settled, is_back, received, to_rank

    assert asyncio.run(asyncio.wait_for(life(), 10)) == (True, True, {"state": {}}, {"silence": False})
    assert "has not heard from rank 0's monitor at node1 port 1" in cut.warnings[0]
    assert cut.warnings[1:] == [f"Rank 1 on {socket.gethostname()} has reached rank 0's monitor again."]


@pytest.mark.parametrize("is_reset", [False, True])
def test_the_end_of_a_dead_connection_is_no_sign_of_life(monkeypatch: pytest.MonkeyPatch, is_reset: bool) -> None:
    """A node that has lost power answers with a reset when it is up again."""
    cut = Cut(monkeypatch)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        await cut.stand_in()
        if is_reset:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def life() -> tuple[Any, Any, float | None]:
        await cut.begin()
        await cut.end()
        cut.monitor._local_coordinator = cut.monitor._coordinator = None
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        await cut.monitor._join(CoordinatorEndpoint("127.0.0.1", port, "word", "node1", 100))
        server.close()
        assert cut.monitor._coordinator is not None
        return (
            cut.monitor._coordinator,
            cut.monitor._local_coordinator,
            cut.monitor._coordinator._settings.hang_timeout_s,
        )

    coordinator, stand_in, limit = asyncio.run(asyncio.wait_for(life(), 10))

    assert coordinator is stand_in
    assert limit == 10.0
    assert not any("again" in line or "alone" in line for line in cut.warnings), cut.warnings


def test_a_rank_that_waits_with_reason_survives_a_cut_that_is_shorter_than_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = Cut(monkeypatch, HangSettings(300.0))
    found: list[bool] = []

    async def life() -> None:
        await cut.begin()
        alone = await cut.stand_in()
        for phase, waits in ((Phase.CHECKPOINT, True), (Phase.SUMMING, True), (Phase.DATA, False)):
            for silence_s in (0.0, 301.0):
                alone._ranks[0].heard_s -= silence_s
                cut.monitor._send_up(state(phase, idle_s=330.0, in_collective=waits, in_collective_s=300.0))
                found.append(is_hang(alone._reported_states(), cut.settings))
                alone._ranks[0].heard_s += silence_s
        await cut.end()

    asyncio.run(asyncio.wait_for(life(), 10))

    # Rank 0 may be writing a checkpoint. A rank that is idle outside of a collective hangs whatever the network does.
    assert found == [False, True, False, True, True, True]


def test_a_rank_that_is_cut_off_in_a_quick_step_waits_for_rank_0_as_long_as_a_step_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = Cut(monkeypatch, HangSettings(300.0))
    found: list[bool] = []

    async def life() -> None:
        for step in range(3):
            cut.heartbeat.at(Phase.SUMMING, step=step)
        await cut.begin()
        alone = await cut.stand_in()
        cut.monitor._send_up(state(Phase.SUMMING, idle_s=62.0, in_collective=True, steps_timed=2, median_step_s=0.1))
        for silence_s in (59.0, 61.0):
            alone._ranks[0].heard_s = time.monotonic() - silence_s
            found.append(is_hang(alone._reported_states(), cut.settings))
        await cut.end()

    asyncio.run(asyncio.wait_for(life(), 10))

    assert found == [False, True]


def test_a_stand_in_passes_the_states_on_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Cut(monkeypatch)

    async def life() -> Any:
        await cut.begin()
        await cut.stand_in()
        cut.monitor._send_up(state(Phase.SUMMING))
        received = await cut.received()
        await cut.end()
        return received

    assert asyncio.run(asyncio.wait_for(life(), 10)) == state(Phase.SUMMING)


def test_a_silent_coordinator_is_told_about_a_death_too(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Cut(monkeypatch)
    dead = {"died": "Rank 1 died.", "owns_run_dir": False}

    async def life() -> tuple[Any, bool]:
        await cut.begin()
        alone = await cut.stand_in()
        cut.monitor._send_up({"evidence": {}})
        cut.monitor._send_up(dead)
        received, is_ending = await cut.received(), alone._ending is not None
        await cut.end()
        return received, is_ending

    assert asyncio.run(asyncio.wait_for(life(), 10)) == (dead, True)


def test_a_pause_of_the_whole_job_does_not_count_as_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Cut(monkeypatch, limit_s=1000.0)
    clock = {"now": 0.0}
    looks = SimpleNamespace(monotonic=lambda: clock.update(now=clock["now"] + 5000) or clock["now"])

    async def life() -> bool:
        await cut.begin()
        cut.monitor._period_s = 0.01
        monkeypatch.setattr("dtrain.job.watchdog.process.time", looks)
        while clock["now"] < 1e5:
            await asyncio.sleep(0.01)
        is_calm = cut.monitor._local_coordinator is None
        await cut.end()
        return is_calm

    assert asyncio.run(asyncio.wait_for(life(), 10))
    assert cut.warnings == []


def test_rank_0s_monitor_keeps_the_coordinator_that_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> bool:
        ours, theirs = socket.socketpair()
        channel, _ = socket.socketpair()
        monitor = RankMonitor(WatchedRank(0, 0, 0, 0, None, None, channel, HangSettings(10.0), Path()))
        serving = monitor._new_coordinator([0, 1], 10.0)
        reader, writer = await asyncio.open_connection(sock=theirs)
        ours.sendall(b'{"alive": true}\n')
        ours.close()
        await monitor._follow(reader, writer, NODE1)
        return monitor._coordinator is serving and not serving._is_over

    assert asyncio.run(asyncio.wait_for(life(), 10))

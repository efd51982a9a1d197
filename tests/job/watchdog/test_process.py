"""The monitor of a rank asks the helper thread, perhaps twice before it answers once."""

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

from dtrain.distributed.heartbeat import SIZE, Heartbeat, Phase
from dtrain.job.watchdog.evidence import Answer, Ward
from dtrain.job.watchdog.process import Monitor, Place
from dtrain.job.watchdog.rules import Rules, hanging

RULES = Rules(10.0)
NODE1 = Place("node1", 1, "word", "node1", 100)


class Cut:
    """Rank 1's monitor and its line to the hub, whose other end is this test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rules: Rules = RULES, quiet_s: float = 0.05) -> None:
        self.said: list[str] = []
        self.rules, self.memory = rules, mmap.mmap(-1, SIZE)
        self.heartbeat = Heartbeat(self.memory)
        monkeypatch.setattr("dtrain.job.watchdog.process.quiet_of", lambda rules: quiet_s)
        monkeypatch.setattr(
            "dtrain.job.watchdog.process.log.warning", lambda text, *values: self.said.append(text % values)
        )

    async def begin(self) -> None:
        ours, theirs = socket.socketpair()
        channel, self.rank = socket.socketpair()
        self.monitor = Monitor(Ward(1, 0, 0, 0, self.memory, None, channel, self.rules, Path()))
        _, self.monitor._to_rank = await asyncio.open_connection(sock=channel)
        reader, writer = await asyncio.open_connection(sock=theirs)
        self.from_monitor, self.to_monitor = await asyncio.open_connection(sock=ours)
        self.following = asyncio.create_task(self.monitor._follow(reader, writer, NODE1))

    async def stand_in(self) -> Any:
        while self.monitor._stand_in is None:
            await asyncio.sleep(0.01)
        return self.monitor._stand_in

    async def heard(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self.from_monitor.readline())
        return found

    async def end(self) -> None:
        self.to_monitor.close()
        await asyncio.gather(self.following, return_exceptions=True)
        self.monitor._to_rank.close()
        self.rank.close()


def seen(phase: Phase, **more: Any) -> dict[str, Any]:
    return {"seen": {"phase": phase, "step": 7, "owns_folder": True, **more}}


def test_two_questions_that_cross_get_an_answer_each() -> None:
    async def life() -> list[Any]:
        ours, theirs = socket.socketpair()
        monitor = Monitor(Ward(0, 0, 0, 0, None, None, theirs, Rules(10.0), Path()))
        reader, monitor._to_rank = await asyncio.open_connection(sock=theirs)
        listening = asyncio.create_task(monitor._listen(reader))
        asking = asyncio.gather(monitor._ask(), monitor._ask(hush=True))
        await asyncio.sleep(0)
        ours.sendall("".join(json.dumps({"answer": [[{"number": n}], False]}) + "\n" for n in (1, 2)).encode())
        answers = await asking
        listening.cancel()
        monitor._to_rank.close()
        ours.close()
        return list(answers)

    assert asyncio.run(life()) == [Answer([{"number": n}], False) for n in (1, 2)]


def test_a_rank_is_judged_here_while_the_hub_is_silent_and_by_the_hub_again_when_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = Cut(monkeypatch, quiet_s=0.5)

    async def life() -> tuple[bool, bool, Any, Any]:
        await cut.begin()
        alone = await cut.stand_in()
        cut.to_monitor.write(b'{"here": true}\n')
        while cut.monitor._stand_in is not None:
            await asyncio.sleep(0.01)
        cut.monitor._tell_hub({"seen": {}})
        heard = await cut.heard()
        told = json.loads(cut.rank.recv(100))
        is_back = cut.monitor._hub is None
        await cut.end()
        return alone.is_settled, is_back, heard, told

    assert asyncio.run(asyncio.wait_for(life(), 10)) == (True, True, {"seen": {}}, {"hush": False})
    assert "has heard nothing of rank 0's monitor at node1 port 1" in cut.said[0]
    assert cut.said[1:] == [f"Rank 1 on {socket.gethostname()} hears rank 0's monitor again."]


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
        cut.monitor._stand_in = cut.monitor._hub = None
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        await cut.monitor._join(Place("127.0.0.1", port, "word", "node1", 100))
        server.close()
        assert cut.monitor._hub is not None
        return cut.monitor._hub, cut.monitor._stand_in, cut.monitor._hub._rules.hang_timeout_s

    hub, stand_in, limit = asyncio.run(asyncio.wait_for(life(), 10))

    assert hub is stand_in
    assert limit == 10.0
    assert not any("again" in line or "alone" in line for line in cut.said), cut.said


def test_a_rank_that_waits_with_reason_is_not_ended_by_a_short_cut_but_by_one_as_long_as_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = Cut(monkeypatch, Rules(300.0))
    found: list[bool] = []

    async def life() -> None:
        await cut.begin()
        alone = await cut.stand_in()
        for phase, waits in ((Phase.CHECKPOINT, True), (Phase.SUMMING, True), (Phase.DATA, False)):
            for unheard in (0.0, 301.0):
                alone._members[0].heard_s -= unheard
                cut.monitor._tell_hub(seen(phase, silent_s=330.0, waits=waits, waited_s=300.0))
                found.append(hanging(alone._all_seen(), cut.rules))
                alone._members[0].heard_s += unheard
        await cut.end()

    asyncio.run(asyncio.wait_for(life(), 10))

    # Rank 0 may be at work on a checkpoint. Who stands still by itself hangs whatever becomes of the network.
    assert found == [False, True, False, True, True, True]


def test_a_rank_that_is_cut_off_in_a_quick_step_waits_for_rank_0_as_long_as_a_step_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = Cut(monkeypatch, Rules(300.0))
    found: list[bool] = []

    async def life() -> None:
        for step in range(3):
            cut.heartbeat.at(Phase.SUMMING, step=step)
        await cut.begin()
        alone = await cut.stand_in()
        cut.monitor._tell_hub(seen(Phase.SUMMING, silent_s=62.0, waits=True, steps_timed=2, median_s=0.1))
        for unheard in (59.0, 61.0):
            alone._members[0].heard_s = time.monotonic() - unheard
            found.append(hanging(alone._all_seen(), cut.rules))
        await cut.end()

    asyncio.run(asyncio.wait_for(life(), 10))

    assert found == [False, True]


def test_a_hub_that_was_silent_hears_of_a_death_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Cut(monkeypatch)
    dead = {"died": "Rank 1 died.", "owns_folder": False}

    async def life() -> tuple[Any, bool]:
        await cut.begin()
        alone = await cut.stand_in()
        cut.monitor._tell_hub({"evidence": {}})
        cut.monitor._tell_hub(dead)
        heard, is_followed = await cut.heard(), alone._followed is not None
        await cut.end()
        return heard, is_followed

    assert asyncio.run(asyncio.wait_for(life(), 10)) == (dead, True)


def test_a_job_that_was_stopped_as_a_whole_has_not_been_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Cut(monkeypatch, quiet_s=1000.0)
    clock = {"now": 0.0}
    looks = SimpleNamespace(monotonic=lambda: clock.update(now=clock["now"] + 5000) or clock["now"])

    async def life() -> bool:
        await cut.begin()
        cut.monitor._period_s = 0.01
        monkeypatch.setattr("dtrain.job.watchdog.process.time", looks)
        while clock["now"] < 1e5:
            await asyncio.sleep(0.01)
        is_calm = cut.monitor._stand_in is None
        await cut.end()
        return is_calm

    assert asyncio.run(asyncio.wait_for(life(), 10))
    assert cut.said == []


def test_rank_0s_monitor_keeps_the_hub_that_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> bool:
        ours, theirs = socket.socketpair()
        channel, _ = socket.socketpair()
        monitor = Monitor(Ward(0, 0, 0, 0, None, None, channel, Rules(10.0), Path()))
        serving = monitor._new_hub([0, 1], 10.0)
        reader, writer = await asyncio.open_connection(sock=theirs)
        ours.sendall(b'{"here": true}\n')
        ours.close()
        await monitor._follow(reader, writer, NODE1)
        return monitor._hub is serving and not serving._is_over

    assert asyncio.run(asyncio.wait_for(life(), 10))

"""The coordinator's port: connections of anybody but this job's monitors."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import suppress

import pytest

from dtrain.distributed.heartbeat import Phase
from dtrain.job.watchdog.coordinator import MAX_LINE, Coordinator, RankRecord, serve_monitor
from dtrain.job.watchdog.rules import HangSettings, RankState, is_hang, is_unreachable

TOKEN = "0f1e"
STRANGERS = [
    b"",
    b"\n",
    b"GET / HTTP/1.1\r\nHost: node1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n",
    b"[]\n",
    b"null\n",
    b"7\n",
    b'"text"\n',
    b'{"token": null}\n',
    b'{"token": ["0f1e"], "rank": 0}\n',
    b'{"token": "\xc3\xa9"}\n',
    b"[" * 100_000 + b"\n",
    b'{"rank": ' + b"9" * 5000 + b"}\n",
    b"x" * (2 * MAX_LINE),
]


def test_a_stranger_is_turned_away_without_a_trace_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    coordinator = Coordinator([0], HangSettings(10.0), report_end=lambda *_: asyncio.sleep(0))
    hello = {"token": TOKEN, "rank": 0, "host": "node1", "pid": 7}

    async def life() -> dict[int, int]:
        server = await asyncio.start_server(
            lambda reader, writer: serve_monitor(coordinator, reader, writer, token=TOKEN),
            *("127.0.0.1", 0),
            limit=MAX_LINE,
        )
        port = server.sockets[0].getsockname()[1]
        for line in [*STRANGERS, json.dumps(hello).encode() + b"\n"]:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(line)
            writer.write_eof()
            with suppress(ConnectionResetError):  # closed while it was still sending
                assert await reader.read() == b""  # the connection is closed
            writer.close()
        server.close()
        return {rank: record.pid for rank, record in coordinator._ranks.items()}

    with caplog.at_level(logging.DEBUG):
        ranks = asyncio.run(asyncio.wait_for(life(), 20))

    assert ranks == {0: 7}
    assert [record.message for record in caplog.records if record.levelno > logging.DEBUG] == []


def test_a_rank_that_is_lost_before_its_first_report_is_named() -> None:
    settings = HangSettings(10.0)
    coordinator = Coordinator([0, 1], settings, report_end=lambda *_: asyncio.sleep(0))
    waits = RankState(0, Phase.EXCHANGE, step=5, idle_s=11.0, in_collective=True, in_collective_s=11.0)
    coordinator.add_rank(0, RankRecord(lambda _: None, "node1", 7, waits))
    coordinator.add_rank(1, RankRecord(lambda _: None, "node2", 8, heard_s=time.monotonic() - 12.0))

    states = coordinator._reported_states()

    assert is_hang(states, settings)
    assert [state.rank for state in states if is_unreachable(state, settings)] == [1]

"""What a job of up to 1,024 ranks asks of its store, of the monitors' hub and of rank 0, without a model.

    .venv/bin/python tests/benchmarks/large_worlds.py                        # all parts at 64, 256 and 1,024 ranks
    .venv/bin/python tests/benchmarks/large_worlds.py --part hub --ranks 64

A rank is a thread (rendezvous, node work, gathers) or a connection (hub). What they talk to is real: torch's TCPStore in
a process of its own, dtrain's coordinator in a process of its own, and dtrain's collectives over torch's process group
of threads. Everything is on 127.0.0.1 and ends with the script. docs/scale.md explains the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HUB_SECONDS = 10.0
LIMIT_S = 120.0
"""No part takes longer at one size."""


# ---------------------------------------------------------------- servers, each in a process of its own


def serve_store() -> None:
    """Runs torch's store until standard input is closed."""
    from torch.distributed import TCPStore

    from dtrain.distributed.network import listen

    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    timeout = timedelta(seconds=LIMIT_S)
    store = TCPStore("127.0.0.1", port, None, True, timeout, False, master_listen_fd=listener.detach())
    print(store.port, flush=True)
    sys.stdin.read()


def serve_hub(ranks: int) -> None:
    """Runs dtrain's coordinator until standard input is closed, as the monitor of rank 0 does."""
    from dtrain.distributed.network import BACKLOG
    from dtrain.job.watchdog.coordinator import MAX_LINE, Coordinator, serve_monitor
    from dtrain.job.watchdog.rules import HangSettings
    from dtrain.job.watchdog.timers import poll_period_s

    async def run() -> None:
        settings = HangSettings(hang_timeout_s=300.0)

        async def report_end(*_: Any) -> None:
            return

        hub = Coordinator(range(ranks), settings, report_end)
        server = await asyncio.start_server(
            lambda reader, writer: serve_monitor(hub, reader, writer, token="token"),
            "127.0.0.1",
            0,
            limit=MAX_LINE,
            backlog=BACKLOG,
        )
        print(server.sockets[0].getsockname()[1], flush=True)
        watching = asyncio.create_task(hub.watch(poll_period_s(settings)))
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        watching.cancel()

    asyncio.run(run())


class Server:
    """One of the servers above."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def cpu_s(self) -> float:
        """Seconds of CPU time that it has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def server(*arguments: str) -> Iterator[Server]:
    """Yields a server, and ends it."""
    running = Server(*arguments)
    try:
        yield running
    finally:
        running.close()


# ---------------------------------------------------------------- the store


class CountingStore:
    """One rank's store, which counts its calls and the bytes that it reads and writes."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.calls: Counter[str] = Counter()
        self.keys = self.bytes = 0

    def check(self, keys: list[str]) -> bool:
        self.calls["check"] += 1
        self.keys += len(keys)
        return bool(self._store.check(keys))

    def get(self, key: str) -> bytes:
        value: bytes = self._store.get(key)
        self._count("get", value)
        return value

    def set(self, key: str, value: str) -> None:
        self._count("set", value)
        self._store.set(key, value)

    def add(self, key: str, amount: int) -> int:
        self._count("add", "")
        return int(self._store.add(key, amount))

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        value: bytes = self._store.compare_set(key, expected_value, desired_value)
        self._count("compare_set", value)
        return value

    def _count(self, name: str, value: Any) -> None:
        self.calls[name] += 1
        self.keys += 1
        self.bytes += len(value)


def with_store(ranks: int, work: Callable[[int, CountingStore], None]) -> dict[str, Any]:
    """Runs `work` on one thread per rank, each with its own connection to one store."""
    from torch.distributed import TCPStore

    threading.stack_size(256 * 1024)
    with server("--serve-store") as running, ThreadPoolExecutor(ranks) as pool:
        timeout = timedelta(seconds=LIMIT_S)

        def connect(_: int) -> CountingStore:
            return CountingStore(TCPStore("127.0.0.1", running.port, None, False, timeout, False))

        stores = list(pool.map(connect, range(ranks)))
        begin, cpu_s = time.monotonic(), running.cpu_s()
        for done in [pool.submit(work, rank, store) for rank, store in enumerate(stores)]:
            done.result(timeout=LIMIT_S)
        calls = sum((store.calls for store in stores), Counter[str]())
        return {
            "seconds": time.monotonic() - begin,
            "store_cpu_s": running.cpu_s() - cpu_s,
            "calls": sum(calls.values()),
            "calls_per_rank": sum(calls.values()) / ranks,
            "calls_of_rank_0": sum(stores[0].calls.values()),
            "keys": sum(store.keys for store in stores),
            "megabytes": sum(store.bytes for store in stores) / 1e6,
        }


def rendezvous(ranks: int) -> dict[str, Any]:
    """All ranks meet, 8 on each node."""
    from dtrain.distributed import rendezvous as meeting

    deadline = time.monotonic() + LIMIT_S

    def meet(rank: int, store: CountingStore) -> None:
        meeting.join(
            store,
            rank=rank,
            world_size=ranks,
            local_rank=None,
            node=f"node-{rank // 8}",
            deadline=deadline,
            timeout_s=LIMIT_S,
        )

    return with_store(ranks, meet)


def node_work(ranks: int) -> dict[str, Any]:
    """Every rank works for itself, at once, and waits for all: the largest number of units (collectives.every_rank)."""
    from dtrain.distributed.node_first import NodeWork, run_node_work

    def work(rank: int, store: CountingStore) -> None:
        unit = NodeWork(store, "work", rank, ranks, rank, ranks, "rank")
        assert run_node_work(unit, lambda: rank, progress_every_s=30.0) == rank

    return with_store(ranks, work)


# ---------------------------------------------------------------- the hub


def hub(ranks: int) -> dict[str, Any]:
    """Monitors of all ranks report every period, as they do in a run; then each passes on the same signal."""
    with server("--serve-hub", str(ranks)) as running:
        return asyncio.run(_report(ranks, running))


async def _report(ranks: int, running: Server) -> dict[str, Any]:
    from dataclasses import asdict

    from dtrain.distributed.heartbeat import Phase
    from dtrain.job.watchdog.rules import HangSettings, RankState
    from dtrain.job.watchdog.timers import poll_period_s

    period_s = poll_period_s(HangSettings(300.0))
    received: Counter[str] = Counter()
    sent = 0
    begin = time.monotonic()

    async def connect(rank: int) -> asyncio.StreamWriter:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        hello = {"token": "token", "rank": rank, "host": f"node-{rank // 8}", "pid": rank}
        writer.write(json.dumps(hello).encode() + b"\n")
        await writer.drain()

        async def listen() -> None:
            while line := await reader.readline():
                received[next(iter(json.loads(line)))] += 1

        listeners.append(asyncio.create_task(listen()))
        return writer

    listeners: list[asyncio.Task[None]] = []
    writers = list(await asyncio.gather(*map(connect, range(ranks))))
    connected_s = time.monotonic() - begin
    await asyncio.sleep(period_s)
    cpu_s, begin, first = running.cpu_s(), time.monotonic(), sum(received.values())

    async def reports(rank: int, writer: asyncio.StreamWriter) -> int:
        await asyncio.sleep(period_s * rank / ranks)
        count, step = 0, 1000
        while time.monotonic() - begin < HUB_SECONDS:
            state = RankState(rank, Phase.MICRO_BATCH, step=step, idle_s=0.31, median_step_s=0.5134, steps_timed=1000)
            writer.write(json.dumps({"state": asdict(state), "owns_run_dir": rank == 0}).encode() + b"\n")
            count += 1
            step += 4
            await asyncio.sleep(period_s)
        return count

    sent = sum(await asyncio.gather(*(reports(rank, writer) for rank, writer in enumerate(writers))))
    seconds = time.monotonic() - begin
    result = {
        "connected_s": connected_s,
        "received_per_s": sent / seconds,
        "sent_per_s": (sum(received.values()) - first) / seconds,
        "cpu_s_per_s": (running.cpu_s() - cpu_s) / seconds,
    }
    cpu_s = running.cpu_s()
    for writer in writers:
        writer.write(json.dumps({"signal": 15, "reason": None}).encode() + b"\n")
    quiet, before = 0, -1
    deadline = time.monotonic() + LIMIT_S / 2
    while (quiet < 3 or received["signal"] < ranks - 1) and time.monotonic() < deadline:
        quiet, before = (quiet + 1 if received["signal"] == before else 0), received["signal"]
        await asyncio.sleep(0.3)
    result |= {"signal_messages": received["signal"], "signal_cpu_s": running.cpu_s() - cpu_s}
    for writer in writers:
        writer.close()
    await asyncio.gather(*listeners, return_exceptions=True)
    return result


# ---------------------------------------------------------------- gathers


def gathers(ranks: int) -> dict[str, Any]:
    """One evaluation of 1,000 examples per rank, and the comparison of the settings of all ranks, over threads."""
    import torch

    from dtrain.config.load import load_config
    from dtrain.distributed.evaluation_exchange import gather_for_metrics
    from dtrain.distributed.process_info import this_process
    from dtrain.distributed.rank_context import RankContext
    from dtrain.job.rank_checks import compare_configs
    from tests.support.thread_ranks import run_thread_ranks

    rows = 1_000
    config = load_config(ROOT / "configs" / "cola.yaml", [])
    processes = [this_process()] * ranks

    def evaluate(context: RankContext) -> list[int]:
        index = torch.arange(context.rank, rows * ranks, ranks)
        values = {"loss": index.double(), "targets": torch.ones_like(index), "prediction": index % 3}
        held: list[int] = []

        def work(gathered: dict[str, torch.Tensor]) -> None:
            assert torch.equal(gathered["loss"], torch.arange(rows * ranks).double())
            held.append(sum(column.nbytes for column in gathered.values()))

        gather_for_metrics(values, index, context, num_examples=rows * ranks, work=work)
        return held

    begin = time.monotonic()
    held, evaluated = run_thread_ranks(evaluate, ranks)
    middle = time.monotonic()
    _, compared = run_thread_ranks(lambda context: compare_configs(config, context, processes), ranks)
    return {
        "seconds": middle - begin,
        "values_megabytes": sum(map(sum, held)) / 1e6,
        "received_by_rank_0_megabytes": evaluated[0] / 1e6,
        "received_by_rank_1_megabytes": evaluated[1] / 1e6,
        "configs_seconds": time.monotonic() - middle,
        "configs_received_by_rank_1_megabytes": compared[1] / 1e6,
    }


PARTS = {"rendezvous": rendezvous, "node_work": node_work, "hub": hub, "gathers": gathers}


def main() -> int:
    from dtrain.config.option_parser import OptionParser

    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--serve-store", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve-hub", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_store:
        serve_store()
    elif arguments.serve_hub is not None:
        serve_hub(arguments.serve_hub)
    else:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        for part in arguments.part or PARTS:
            for ranks in arguments.ranks:
                figures = PARTS[part](ranks)
                print(part, ranks, json.dumps({key: round(value, 3) for key, value in figures.items()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.support.script import run_script

    run_script(main)

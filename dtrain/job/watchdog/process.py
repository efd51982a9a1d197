"""The monitor of one rank: a small process, forked from it, that sees it die, stop or hang, and can end it.

`run` never returns. The monitor reads the rank's heartbeat and /proc, talks to the rank's helper thread over a socket
pair and to the coordinator over a connection. The monitor of rank 0 also runs the coordinator. It uses neither CUDA nor
torch.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import json
import os
import resource
import secrets
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from dtrain.console import log
from dtrain.distributed import linux_process, network
from dtrain.distributed.heartbeat import IDLE_RULES, IdleRule, Phase, read_heartbeat
from dtrain.distributed.oom_kills import count_oom_kills
from dtrain.errors import TopologyError
from dtrain.job.launcher_error import write_launcher_error
from dtrain.job.watchdog import exit_report, stacks
from dtrain.job.watchdog.coordinator import (
    MAX_LINE,
    Coordinator,
    CoordinatorEndpoint,
    RankRecord,
    send_message,
    serve_monitor,
    unreachable_after_s,
)
from dtrain.job.watchdog.evidence import ANSWER_S, HelperAnswer, MonitorMessage, WatchedRank, collect_evidence
from dtrain.job.watchdog.report import RankEvidence
from dtrain.job.watchdog.rules import RankState, idle_limit_s, needs_query
from dtrain.job.watchdog.timers import IdleTimers, poll_period_s

KILL_AFTER_S = 0.7
"""A rank that was told to end is killed if it has not ended by then."""

LINGER_S = 0.1
"""How long a monitor outlives its rank, so that its messages get through. Launchers wait for its standard output."""

COORDINATOR_LINGER_S = 10.0
"""How long the coordinator outlives its rank at most after a failure, until the other ranks have left or been ended."""

MAX_ENDING_S = 20.0
"""How long a rank may take to report its error and end."""

ALONE_FACTOR = 10.0
"""Multiplies train.hang_timeout, outside of timed steps, for a rank whose monitor has lost the others."""

ALONE_WARNING_S = 5.0
"""Time without the coordinator after which a monitor warns."""

CONNECT_S = 10.0

MAX_PAUSE_PERIODS = 3
"""A pause of the whole job counts as this many periods of silence of the coordinator at most."""


def run(rank: WatchedRank) -> None:
    """Runs the monitor in the forked process and ends it with os._exit."""
    code = 1
    try:
        faulthandler.disable()  # its file is for errors of the rank
        linux_process.name_process(b"dtrain-monitor")
        gc.disable()  # a collection would copy every page that is shared with the rank
        ignored = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, stacks.STACK_SIGNAL, signal.SIGPIPE)
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)  # it ends with its rank, not before
        with Path(os.devnull).open("rb") as empty:
            os.dup2(empty.fileno(), 0)
        asyncio._set_running_loop(None)  # of a notebook, in which the rank may have forked this process
        # Not asyncio.run, which cancels the remaining tasks and prints that.
        asyncio.new_event_loop().run_until_complete(RankMonitor(rank).run())
        code = 0
    except Exception as error:  # noqa: BLE001 - this is the outermost handler
        log.warning("the monitor of rank %d ended: %s: %s", rank.rank, type(error).__name__, error)
    finally:
        os._exit(code)  # log lines are flushed already, and flushing again could block forever


class RankMonitor:
    """Watches one rank. Everything runs in one event loop."""

    def __init__(self, rank: WatchedRank) -> None:
        self._rank = rank
        self._period_s = poll_period_s(rank.settings)
        self._timers = IdleTimers()
        self._send_up: Callable[[MonitorMessage], None] = lambda _message: None
        self._rank_writer: asyncio.StreamWriter
        self._queries: deque[asyncio.Future[HelperAnswer]] = deque()
        self._done = asyncio.Event()
        self._oom_kills_at_start = count_oom_kills()
        self._is_over = self._is_released = self._is_reported = self._watches_all = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._coordinator: Coordinator | None = None
        self._local_coordinator: Coordinator | None = None
        self._pidfd: int | None = None
        self._workers: list[int] = []

    async def run(self) -> None:
        """Runs until the rank is dead or releases its monitor."""
        self._done = asyncio.Event()
        loop = asyncio.get_running_loop()
        with suppress(OSError):  # an old kernel: then _poll notices the death
            self._pidfd = os.pidfd_open(self._rank.pid)
            loop.add_reader(self._pidfd, self._handle_death)
        rank_reader, self._rank_writer = await asyncio.open_connection(sock=self._rank.channel, limit=MAX_LINE)
        self._start(self._listen_to_rank(rank_reader))
        self._start(self._poll())
        await self._done.wait()
        if self._is_released and self._is_settled:
            return
        if self._is_released:
            send_message(self._rank_writer, {"staying": True})  # the rank may end; this process ends the others
        deadline = time.monotonic() + COORDINATOR_LINGER_S
        while not self._is_settled and time.monotonic() < deadline:
            await asyncio.sleep(LINGER_S)
        await asyncio.sleep(LINGER_S)

    @property
    def _is_settled(self) -> bool:
        return self._coordinator is None or self._coordinator.is_settled

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop holds only weak references to tasks
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, OSError):  # a broken connection is handled elsewhere
            log.warning("the monitor of rank %d: %s: %s", self._rank.rank, type(error).__name__, error)

    # ------------------------------------------------------------ the rank

    async def _listen_to_rank(self, reader: asyncio.StreamReader) -> None:
        """Handles messages of the rank until it leaves. Ignores the end of the stream: _handle_death sees a death."""
        while line := await reader.readline():
            message = json.loads(line)
            match message:
                case {"start_coordinator": request}:
                    await self._start_coordinator(request)
                case {"join": endpoint}:
                    self._start(self._join(CoordinatorEndpoint(*endpoint)))
                case {"answer": values}:
                    query = self._queries.popleft()  # answers arrive in the order of the queries
                    if not query.done():
                        query.set_result(HelperAnswer(*values))
                case {"failed": _} | {"signal": _}:
                    self._is_reported |= "failed" in message
                    self._send_up(message)
                case {"leaving": _}:
                    self._is_released = True
                    self._send_up(message)
                    await asyncio.sleep(0)  # lets the connection write
                    self._done.set()

    def _handle_death(self) -> None:
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
        rank = self._rank
        if not (self._is_released or self._is_over or self._is_reported):
            owns_run_dir = read_heartbeat(rank.memory).owns_run_dir
            counts = self._oom_kills_at_start, count_oom_kills()
            text = exit_report.death_message(rank.rank, rank.pid, rank.stacks, rank.thread, oom_kills=counts)
            write_launcher_error(rank.launcher_error_file, text)
            self._send_up({"died": text, "owns_run_dir": owns_run_dir})
        # A data worker that waits for work notices that its rank is dead, but one that is stuck does not.
        for worker in self._workers:
            if stacks.handles_stack_signal(worker):
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
        self._done.set()

    async def _query(self, **options: bool) -> HelperAnswer | None:
        """Asks the helper thread; returns None if it does not get the interpreter lock in time."""
        answer: asyncio.Future[HelperAnswer] = asyncio.get_running_loop().create_future()
        self._queries.append(answer)
        send_message(self._rank_writer, {"query": True, **options})
        try:
            return await asyncio.wait_for(answer, ANSWER_S)
        except (TimeoutError, asyncio.TimeoutError):
            return None

    async def _poll(self) -> None:
        """Reports the rank's state to the coordinator periodically."""
        rank, settings = self._rank, self._rank.settings
        while True:
            await asyncio.sleep(self._period_s)
            if os.getppid() != rank.pid:
                self._handle_death()
            if self._done.is_set():  # the pid may belong to another process now
                return
            reading, process_state = read_heartbeat(rank.memory), stacks.process_state(rank.pid)
            self._workers = stacks.find_workers(rank.pid)
            self._timers.poll(reading, process_state, now=time.monotonic(), period_s=self._period_s)
            state = self._timers.state(rank.rank, reading)
            if needs_query(state, settings) and (answer := await self._query()) is not None:
                limit_s = idle_limit_s(state, settings) or 0.0
                self._timers.add_answer(answer.collectives, is_debugged=answer.is_debugged, limit_s=limit_s)
                state = self._timers.state(rank.rank, reading)
            if reading.phase == Phase.ENDING and state.idle_s > MAX_ENDING_S:
                os.kill(rank.pid, signal.SIGKILL)
            self._send_up({"state": asdict(state), "owns_run_dir": reading.owns_run_dir})

    async def _end_rank(self, code: int) -> None:
        """Ends the rank through its helper thread, with this exit code, or else with SIGKILL."""
        self._is_over = True
        self._workers = stacks.find_workers(self._rank.pid)
        send_message(self._rank_writer, {"exit": code})
        deadline = time.monotonic() + KILL_AFTER_S
        while not self._done.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        with suppress(ProcessLookupError):
            os.kill(self._rank.pid, signal.SIGKILL)

    # ------------------------------------------------------------ the coordinator

    async def _start_coordinator(self, request: MonitorMessage | None) -> None:
        """Starts the coordinator of all ranks; for None, one for this rank alone, without a socket."""
        self._watches_all = True
        ranks = range(request["world_size"]) if request is not None else [self._rank.rank]
        coordinator = self._new_coordinator(ranks, self._rank.settings.hang_timeout_s)
        if request is None:
            self._attach(coordinator)
            return
        token = secrets.token_hex(16)
        max_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))  # a connection for each rank
        address = request["address"]
        try:
            if address == "127.0.0.1":
                listener = network.listen("127.0.0.1", 0)
            else:
                serves_others = not network.is_literally_local(address)
                listener = network.listen_as_master(address, 0, serves_other_nodes=serves_others)
        except (TopologyError, OSError) as error:
            send_message(self._rank_writer, {"coordinator": None, "error": str(error)})
            return
        await asyncio.start_server(
            lambda reader, writer: serve_monitor(coordinator, reader, writer, token=token),
            sock=listener,
            limit=MAX_LINE,
            backlog=network.BACKLOG,
        )
        port = listener.getsockname()[1]
        endpoint = CoordinatorEndpoint(address, port, token, socket.gethostname(), self._rank.pid)
        send_message(self._rank_writer, {"coordinator": endpoint})

    def _new_coordinator(self, ranks: Iterable[int], hang_timeout_s: float | None) -> Coordinator:
        settings = replace(self._rank.settings, hang_timeout_s=hang_timeout_s)
        self._coordinator = Coordinator(ranks, settings, self._report_end)
        self._start(self._coordinator.watch(self._period_s))
        return self._coordinator

    def _attach(self, coordinator: Coordinator) -> None:
        """Connects this monitor to a coordinator in this process."""
        rank = self._rank.rank
        coordinator.add_rank(rank, RankRecord(self._obey, socket.gethostname(), self._rank.pid))
        self._send_up = lambda message: coordinator.receive(rank, message)

    async def _join(self, endpoint: CoordinatorEndpoint) -> None:
        """Connects to the coordinator and obeys it. Falls back to local monitoring if it is unreachable."""
        reason = "its connection was closed"
        try:
            reader, writer = await asyncio.wait_for(
                asyncio.open_connection(endpoint.address, endpoint.port, limit=MAX_LINE), CONNECT_S
            )
            hello = {"rank": self._rank.rank, "host": socket.gethostname(), "pid": self._rank.pid}
            send_message(writer, {"token": endpoint.token, **hello})
            await self._follow(reader, writer, endpoint)
        except (OSError, ValueError, TimeoutError, asyncio.TimeoutError) as error:
            reason = str(error) or f"no answer within {CONNECT_S:g} s"
        if self._is_over or self._done.is_set() or self._local_coordinator is not None:
            return  # a connection that was silent before and is closed now changes nothing
        # It is unknown now whether the others still work, so a rank that waits for them gets much more time.
        limit = self._rank.settings.hang_timeout_s
        self._attach(self._new_coordinator([self._rank.rank], limit and limit * ALONE_FACTOR))
        await asyncio.sleep(ALONE_WARNING_S)  # if the host of rank 0 is down, the job ends soon and needs no warning
        if not (self._is_over or self._done.is_set()):
            log.warning(
                "Rank %d is watched alone: rank 0's monitor at %s is out of reach (%s). "
                "A hang that it shares with other ranks ends it after %g times train.hang_timeout at the latest.",
                self._rank.rank,
                endpoint,
                reason,
                ALONE_FACTOR,
            )

    async def _follow(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, endpoint: CoordinatorEndpoint
    ) -> None:
        """Obeys the coordinator until the connection is closed. While the coordinator is silent, this process watches the rank.

        The coordinator sends a line every few seconds. If it does not, its node or the network is down, and the others'
        monitors see the same from their side. So a rank that waits for others waits no longer than its limit.
        """
        to_coordinator = self._send_up = partial(send_message, writer)
        limit_s, silence_s = unreachable_after_s(self._rank.settings), 0.0
        line = asyncio.ensure_future(reader.readline())
        while True:
            begin = time.monotonic()
            received, _ = await asyncio.wait({line}, timeout=min(limit_s, self._period_s))
            if not received:
                silence_s += min(time.monotonic() - begin, MAX_PAUSE_PERIODS * self._period_s)
                if silence_s >= limit_s:
                    self._start_local_coordinator(to_coordinator, endpoint, silence_s)
                continue
            if not (
                text := line.result()
            ):  # the stream has ended, which, like an error, does not show a working coordinator
                return
            if self._local_coordinator is not None:
                self._local_coordinator.stop_deciding()
                self._coordinator = self._local_coordinator = None
                self._send_up = to_coordinator
                send_message(self._rank_writer, {"silence": False})
                log.warning("Rank %d on %s has reached rank 0's monitor again.", self._rank.rank, socket.gethostname())
            silence_s = 0.0
            self._obey(json.loads(text))
            line = asyncio.ensure_future(reader.readline())

    def _start_local_coordinator(
        self, to_coordinator: Callable[[MonitorMessage], None], endpoint: CoordinatorEndpoint, silence_s: float
    ) -> None:
        """Starts a coordinator for this rank alone, until the other one is heard again; messages still go to both.

        It counts rank 0 as unreachable: in a step if this rank is in one, else at work without a limit. The other
        coordinator counts this rank as unreachable after the same time.
        """
        if self._coordinator is not None or self._is_over or self._done.is_set():
            return
        local_coordinator = self._local_coordinator = self._new_coordinator(
            [self._rank.rank], self._rank.settings.hang_timeout_s
        )
        heard_s = time.monotonic() - silence_s
        reading = read_heartbeat(self._rank.memory)
        in_step = IDLE_RULES[reading.phase] is IdleRule.STEP
        state = IdleTimers().state(0, reading) if in_step else RankState(0, Phase.STARTING)
        rank0 = RankRecord(lambda _: None, endpoint.host, endpoint.pid, state, heard_s=heard_s, is_disconnected=True)
        local_coordinator.add_rank(0, rank0)
        self._attach(local_coordinator)
        to_local_coordinator = self._send_up

        def send_to_both(message: MonitorMessage) -> None:
            to_local_coordinator(message)
            if "evidence" not in message:  # only the coordinator that has asked for it needs it
                to_coordinator(message)

        self._send_up = send_to_both
        log.warning(
            "Rank %d on %s has not heard from rank 0's monitor at %s for %.0f s. Check its node and the network.",
            self._rank.rank,
            socket.gethostname(),
            endpoint,
            silence_s,
        )

    def _obey(self, message: MonitorMessage) -> None:
        """Executes a message of the coordinator."""
        match message:
            case {"send_evidence": _}:
                silence = partial(send_message, self._rank_writer, {"silence": True})
                self._start(collect_evidence(self._rank, self._query, silence, lambda message: self._send_up(message)))
            case {"silence": _} | {"failure": _} | {"signal": _}:
                send_message(self._rank_writer, message)
            case {"end": code}:
                self._start(self._end_rank(code))
            case {"finished": _}:
                self._is_over = True

    async def _report_end(self, end: MonitorMessage, ranks: Sequence[RankEvidence]) -> None:
        self._is_reported = True
        write_launcher_error(self._rank.launcher_error_file, end["message"])
        await exit_report.report_end(end, ranks, self._rank.run_dir, covers_all_ranks=self._watches_all)

"""The monitor of one rank: a small process forked from it, which sees it die, stop, or hang, and can end it.

It never returns from `run`. It reads the rank's heartbeat and /proc, talks with the rank's helper thread over a socket
pair and with the hub over a connection, and runs the hub itself beside rank 0. It touches neither CUDA nor torch.
"""

from __future__ import annotations

import asyncio
import ctypes
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
from typing import Any, NamedTuple

from dtrain.console import log
from dtrain.distributed import network
from dtrain.distributed.heartbeat import RULES, Phase, Rule, read
from dtrain.errors import TopologyError
from dtrain.job.watchdog import exit_report, stacks
from dtrain.job.watchdog.coordinator import LONGEST_LINE, Hub, Member, Message, quiet_of, send, serve
from dtrain.job.watchdog.evidence import ANSWER_S, Answer, Ward, give_evidence
from dtrain.job.watchdog.report import Evidence
from dtrain.job.watchdog.rules import Seen, is_asked, limit_of
from dtrain.job.watchdog.timers import Silence, period_of

KILL_AFTER_S = 0.7
"""A rank that is told to end and has not done so by itself is killed."""

LINGER_S = 0.1
"""How long a monitor outlives its rank, so that what it says gets through. Launchers wait for its standard output."""

HUB_LINGER_S = 10.0
"""At most how long the hub outlives its rank, where that or another has failed: until the others have left or been ended."""

ENDING_S = 20.0
"""How long a rank may take over its own last words."""

ALONE = 10.0
"""How many times train.hang_timeout a rank gets whose monitor has lost the others, outside of the steps that it times."""

ALONE_S = 5.0
"""How long it goes on alone before that is said."""

PR_SET_NAME = 15

TO_THE_HUB_S = 10.0

PAUSE = 3
"""After a pause of the whole job no more than so many periods of the hub's silence are counted."""


class Place(NamedTuple):
    """Where all monitors meet. token: a word that only this job knows. host, pid: of rank 0, beside which the hub is."""

    address: str
    port: int
    token: str
    host: str
    pid: int

    def __str__(self) -> str:
        return f"{self.address} port {self.port}"


def run(ward: Ward) -> None:
    """The whole life of the monitor, in the forked process; leaves it by os._exit."""
    code = 1
    try:
        faulthandler.disable()  # its file is for the rank's last words
        _name_process(b"dtrain-monitor")
        gc.disable()  # a collection would copy every page that is shared with the rank
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, stacks.SIGNAL, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)  # it ends with its rank, not before
        with Path(os.devnull).open("rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        asyncio._set_running_loop(None)  # a notebook's, in which the rank was when we were forked
        # Not asyncio.run, which ends by cancelling what is left and prints that.
        asyncio.new_event_loop().run_until_complete(Monitor(ward).live())
        code = 0
    except Exception as error:  # noqa: BLE001 - nobody is above us
        log.warning("the monitor of rank %d ended: %s: %s", ward.rank, type(error).__name__, error)
    finally:
        os._exit(code)  # what was said is written out already; to make sure could take for ever


class Monitor:
    """One rank's. All of it runs in one event loop."""

    def __init__(self, ward: Ward) -> None:
        self._ward = ward
        self._period_s = period_of(ward.rules)
        self._silence = Silence()
        self._tell_hub: Callable[[Message], None] = lambda _message: None
        self._to_rank: asyncio.StreamWriter
        self._asked: deque[asyncio.Future[Answer]] = deque()
        self._done = asyncio.Event()
        self._over = self._released = self._said = self._judges_all = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._hub: Hub | None = None
        self._stand_in: Hub | None = None
        self._handle: int | None = None
        self._workers: list[int] = []

    async def live(self) -> None:
        """Until the rank has gone, or lets us go."""
        self._done = asyncio.Event()
        loop = asyncio.get_running_loop()
        with suppress(OSError):  # an old kernel: then _look finds it
            self._handle = os.pidfd_open(self._ward.pid)
            loop.add_reader(self._handle, self._rank_died)
        from_rank, self._to_rank = await asyncio.open_connection(sock=self._ward.channel, limit=LONGEST_LINE)
        self._start(self._listen(from_rank))
        self._start(self._look())
        await self._done.wait()
        if self._released and self._is_settled:
            return
        if self._released:
            send(self._to_rank, {"staying": True})  # the rank may go: the others are seen to
        deadline = time.monotonic() + HUB_LINGER_S
        while not self._is_settled and time.monotonic() < deadline:
            await asyncio.sleep(LINGER_S)
        await asyncio.sleep(LINGER_S)

    @property
    def _is_settled(self) -> bool:
        return self._hub is None or self._hub.is_settled

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, OSError):  # a connection that breaks is seen elsewhere
            log.warning("the monitor of rank %d: %s: %s", self._ward.rank, type(error).__name__, error)

    # ------------------------------------------------------------ the rank

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """What the rank says, until it says goodbye. The end of the stream is no news: its death is seen elsewhere."""
        while line := await reader.readline():
            message = json.loads(line)
            match message:
                case {"serve": where}:
                    await self._serve(where)
                case {"join": where}:
                    self._start(self._join(Place(*where)))
                case {"answer": found}:
                    asked = self._asked.popleft()  # answers come in the order of the questions
                    if not asked.done():
                        asked.set_result(Answer(*found))
                case {"failed": _}:
                    self._said = True
                    self._tell_hub(message)
                case {"bye": _}:
                    self._released = True
                    self._tell_hub(message)
                    await asyncio.sleep(0)  # lets the connection write
                    self._done.set()

    def _rank_died(self) -> None:
        if self._handle is not None:
            asyncio.get_running_loop().remove_reader(self._handle)
        if not (self._released or self._over or self._said):
            owns_folder = read(self._ward.memory).owns_folder
            words = exit_report.words_of_death(self._ward.rank, self._ward.pid, self._ward.stacks, self._ward.thread)
            self._tell_hub({"died": words, "owns_folder": owns_folder})
        # One that waits for work finds out by itself that its rank is gone, one that is stuck does not.
        for worker in self._workers:
            if stacks.is_worker(worker):
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
        self._done.set()

    async def _ask(self, **more: bool) -> Answer | None:
        """What the helper thread knows; None where it does not get the interpreter lock."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        send(self._to_rank, {"ask": True, **more})
        try:
            return await asyncio.wait_for(answer, ANSWER_S)
        except (TimeoutError, asyncio.TimeoutError):
            return None

    async def _look(self) -> None:
        """Reports to the hub again and again."""
        while True:
            await asyncio.sleep(self._period_s)
            if os.getppid() != self._ward.pid:
                self._rank_died()
            if self._done.is_set():  # it is not ours any more
                return
            pulse, state = read(self._ward.memory), stacks.state_of(self._ward.pid)
            self._workers = stacks.workers_of(self._ward.pid)
            self._silence.observe(pulse, state, now=time.monotonic(), period_s=self._period_s)
            seen = self._silence.seen(self._ward.rank, pulse)
            if is_asked(seen, self._ward.rules) and (answer := await self._ask()) is not None:
                limit_s = limit_of(seen, self._ward.rules) or 0.0
                self._silence.answered(answer.collectives, is_debugged=answer.is_debugged, limit_s=limit_s)
                seen = self._silence.seen(self._ward.rank, pulse)
            if pulse.phase == Phase.ENDING and seen.silent_s > ENDING_S:
                os.kill(self._ward.pid, signal.SIGKILL)
            values = {**asdict(seen), "owns_folder": pulse.owns_folder}
            del values["rank"]
            self._tell_hub({"seen": values})

    async def _end_rank(self, code: int) -> None:
        """By its own helper thread, with the code; by SIGKILL where that cannot be heard."""
        self._over = True
        self._workers = stacks.workers_of(self._ward.pid)
        send(self._to_rank, {"exit": code})
        deadline = time.monotonic() + KILL_AFTER_S
        while not self._done.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        with suppress(ProcessLookupError):
            os.kill(self._ward.pid, signal.SIGKILL)

    # ------------------------------------------------------------ the hub

    async def _serve(self, where: Message | None) -> None:
        """Opens the hub. `where` None: for this rank alone, without a socket."""
        self._judges_all = True
        ranks = range(where["world_size"]) if where is not None else [self._ward.rank]
        hub = self._new_hub(ranks, self._ward.rules.hang_timeout_s)
        if where is None:
            self._attach(hub)
            return
        token = secrets.token_hex(16)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection for each rank
        try:
            if where["address"] == "127.0.0.1":
                listener = network.listen("127.0.0.1", 0)
            else:
                others = not network.is_literally_local(where["address"])
                listener = network.listen_as_master(where["address"], 0, serves_other_nodes=others)
        except (TopologyError, OSError) as error:
            send(self._to_rank, {"serving": None, "why": str(error)})
            return
        await asyncio.start_server(
            lambda reader, writer: serve(hub, reader, writer, token=token), sock=listener, limit=LONGEST_LINE
        )
        place = Place(where["address"], listener.getsockname()[1], token, socket.gethostname(), self._ward.pid)
        send(self._to_rank, {"serving": place})

    def _new_hub(self, ranks: Iterable[int], hang_timeout_s: float | None) -> Hub:
        self._hub = Hub(ranks, replace(self._ward.rules, hang_timeout_s=hang_timeout_s), self._speak)
        self._start(self._hub.judge(self._period_s))
        return self._hub

    def _attach(self, hub: Hub) -> None:
        """To a hub in this process."""
        rank = self._ward.rank
        hub.join(rank, Member(self._obey, socket.gethostname(), self._ward.pid))
        self._tell_hub = lambda message: hub.receive(rank, message)

    async def _join(self, where: Place) -> None:
        """Connects to the hub and obeys it; goes on alone when it has gone without a word, or is not to be had."""
        why = "its connection has ended"
        try:
            reader, writer = await asyncio.wait_for(
                asyncio.open_connection(where.address, where.port, limit=LONGEST_LINE), TO_THE_HUB_S
            )
            hello = {"rank": self._ward.rank, "host": socket.gethostname(), "pid": self._ward.pid}
            send(writer, {"token": where.token, **hello})
            await self._follow(reader, writer, where)
        except (OSError, ValueError, TimeoutError, asyncio.TimeoutError) as error:
            why = str(error) or f"it does not answer within {TO_THE_HUB_S:g} s"
        if self._over or self._done.is_set() or self._stand_in is not None:
            return  # a connection that was dead, and has ended now, tells nothing new
        # Whether the others still work is not known any more, so that a rank that waits is given much longer.
        limit = self._ward.rules.hang_timeout_s
        self._attach(self._new_hub([self._ward.rank], limit and limit * ALONE))
        await asyncio.sleep(ALONE_S)  # with its host the job ends, and there is no need to say more
        if not (self._over or self._done.is_set()):
            log.warning(
                "Rank %d is watched alone: rank 0's monitor at %s is out of reach (%s). "
                "A hang that it shares with others ends it after %g times train.hang_timeout at the latest.",
                self._ward.rank,
                where,
                why,
                ALONE,
            )

    async def _follow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, where: Place) -> None:
        """Obeys the hub until the connection ends. While it is silent, the rank is judged here.

        It speaks every few seconds, so that its node or the network is gone when it does not; the others' monitors see
        the same from their side. A rank that waits for them then waits no longer than it may.
        """
        to_hub = self._tell_hub = partial(send, writer)
        quiet_s, silent_s, line = quiet_of(self._ward.rules), 0.0, asyncio.ensure_future(reader.readline())
        while True:
            begin = time.monotonic()
            heard, _ = await asyncio.wait({line}, timeout=min(quiet_s, self._period_s))
            if not heard:
                silent_s += min(time.monotonic() - begin, PAUSE * self._period_s)
                if silent_s >= quiet_s:
                    self._judge_here(to_hub, where, silent_s)
                continue
            if not (text := line.result()):  # nor is an error a sign of life: it leaves here
                return
            if self._stand_in is not None:
                self._stand_in.stand_down()
                self._hub = self._stand_in = None
                self._tell_hub = to_hub
                send(self._to_rank, {"hush": False})
                log.warning("Rank %d on %s hears rank 0's monitor again.", self._ward.rank, socket.gethostname())
            silent_s = 0.0
            self._obey(json.loads(text))
            line = asyncio.ensure_future(reader.readline())

    def _judge_here(self, to_hub: Callable[[Message], None], where: Place, silent_s: float) -> None:
        """A hub for this rank alone, until the other one is heard again, which is told what it may still hear.

        Rank 0 is a member of which nothing is heard, taken to be in a step where this rank is, else at long work; the
        other hub takes this rank for lost after the same time.
        """
        if self._hub is not None or self._over or self._done.is_set():
            return
        stand_in = self._stand_in = self._new_hub([self._ward.rank], self._ward.rules.hang_timeout_s)
        since = time.monotonic() - silent_s
        pulse = read(self._ward.memory)
        there = Silence().seen(0, pulse) if RULES[pulse.phase] is Rule.STEP else Seen(0, Phase.STARTING)
        away = Member(lambda _: None, where.host, where.pid, there, heard_s=since, is_lost=True)
        stand_in.join(0, away)
        self._attach(stand_in)
        to_stand_in = self._tell_hub

        def tell_both(message: Message) -> None:
            to_stand_in(message)
            if "evidence" not in message:  # which only the one that has asked wants
                to_hub(message)

        self._tell_hub = tell_both
        log.warning(
            "Rank %d on %s has heard nothing of rank 0's monitor at %s for %.0f s: is the network up, and its node?",
            self._ward.rank,
            socket.gethostname(),
            where,
            silent_s,
        )

    def _obey(self, message: Message) -> None:
        """What the hub says."""
        match message:
            case {"testify": _}:
                hush = partial(send, self._to_rank, {"hush": True})
                self._start(give_evidence(self._ward, self._ask, hush, lambda message: self._tell_hub(message)))
            case {"hush": _} | {"news": _}:
                send(self._to_rank, message)
            case {"end": code}:
                self._start(self._end_rank(code))
            case {"over": _}:
                self._over = True

    async def _speak(self, end: Message, ranks: Sequence[Evidence]) -> None:
        self._said = True
        await exit_report.speak(end, ranks, self._ward.run_dir, of_all=self._judges_all)


def _name_process(name: bytes) -> None:
    """As ps and top show it; its command line is the rank's."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name, 0, 0, 0)

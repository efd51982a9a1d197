"""Collects what a monitor can find out about its rank when the job hangs: its stacks, data workers and collectives."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.job.watchdog import stacks
from dtrain.job.watchdog.rules import HangSettings

ANSWER_S = 1.0
"""How long the helper thread may take to answer. It needs the interpreter lock."""

MAX_TEXT = 100_000

MonitorMessage = dict[str, Any]
"""One line of JSON between a rank, its monitor and the coordinator."""


@dataclass(frozen=True)
class WatchedRank:
    """The rank that a monitor watches, and what the two share.

    Attributes:
        rank: its number.
        pid: its process id.
        thread: threading.get_ident() of its main thread.
        native_thread: threading.get_native_id() of its main thread.
        memory: its heartbeat.
        stacks: file that faulthandler writes to; None if another handler has the signal.
        channel: the monitor's end of the socket pair.
        settings: the settings that define a hang.
        run_dir: the run's folder.
        launcher_error_file: file that torchrun reports if the rank fails; None for no such file.
    """

    rank: int
    pid: int
    thread: int
    native_thread: int
    memory: Any
    stacks: int | None
    channel: Any
    settings: HangSettings
    run_dir: Path
    launcher_error_file: Path | None = None


class HelperAnswer(NamedTuple):
    """The answer of a rank's helper thread.

    Attributes:
        collectives: see flight_recorder.last_collectives.
        is_debugged: whether a debugger holds the rank.
    """

    collectives: list[MonitorMessage]
    is_debugged: bool


async def collect_evidence(
    rank: WatchedRank,
    query: Callable[..., Awaitable[HelperAnswer | None]],
    silence: Callable[[], None],
    send: Callable[[MonitorMessage], None],
) -> None:
    """Sends evidence about the rank, then again with its data workers, which may be many or slow to answer.

    The rank prints nothing from now on, unless the decision to end it is withdrawn.

    Args:
        query: requests the answer of the helper thread.
        silence: tells the helper thread to stop the main thread from printing.
        send: sends a message to the coordinator.
    """
    state, file = stacks.process_state(rank.pid), rank.stacks
    start = os.fstat(file).st_size if file is not None else 0
    answer = None if state == "T" else await query(silence=True)  # also writes the stacks
    text = stacks.read_from(file, start) if file is not None else ""
    if answer is None:
        # Asking a stopped rank, or one in a C call, for its stack makes it continue. Wait until all others were asked.
        silence()
        await asyncio.sleep(ANSWER_S)
    # The signal wakes a sleeping rank, and the helper thread may then write a later stack: use the first one.
    is_woken = file is not None and not text
    if file is not None and is_woken:
        text = await stacks.request_stack(rank.pid, rank.native_thread, file)
    evidence = {
        "host": socket.gethostname(),
        "pid": rank.pid,
        "state": state,
        "stack": stacks.parse_stack(text, rank.thread, first=is_woken),
        "collectives": answer.collectives if answer is not None else [],
        "text": text[:MAX_TEXT],
    }
    send({"evidence": evidence})
    workers = await stacks.request_worker_stacks(rank.pid, file) if file is not None else []
    evidence["workers"] = [stacks.parse_stack(each, rank.thread) for each in workers]
    evidence["text"] = "\n".join([text, *workers])[:MAX_TEXT]
    send({"evidence": evidence})

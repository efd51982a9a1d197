"""What the monitor of a rank says of it when the job hangs: its place, its data workers', and what it waits in."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from dtrain.job.watchdog import stacks
from dtrain.job.watchdog.rules import Rules

ANSWER_S = 1.0
"""How long the helper thread may take; it needs the interpreter lock."""

LONGEST_TEXT = 100_000

Message = dict[str, Any]


@dataclass(frozen=True)
class Ward:
    """The rank that is watched, and what is shared with it.

    thread, native_thread: threading.get_ident() and get_native_id() of the one that works. memory: its heartbeat.
    stacks: file that faulthandler writes to; None where another handler has the signal. channel: this end of the
    socket pair. run_dir: the run's folder.
    """

    rank: int
    pid: int
    thread: int
    native_thread: int
    memory: Any
    stacks: int | None
    channel: Any
    rules: Rules
    run_dir: Any


class Answer(NamedTuple):
    """Of the helper thread. collectives: see flight.last_collectives. is_debugged: whether a debugger has the rank."""

    collectives: list[Message]
    is_debugged: bool


async def give_evidence(
    ward: Ward,
    ask: Callable[..., Awaitable[Answer | None]],
    hush: Callable[[], None],
    tell: Callable[[Message], None],
) -> None:
    """Tells what can be seen of the rank, then once more with its data workers, which may be slow to answer, or many.

    The rank prints no more from here on, unless its end is called off.

    Args:
        ask, hush: of the helper thread: what it knows; that the main thread falls silent. tell: to the hub.
    """
    state, file = stacks.state_of(ward.pid), ward.stacks
    start = os.fstat(file).st_size if file is not None else 0
    answer = None if state == "T" else await ask(hush=True)  # writes the stacks, too
    text = stacks.written(file, start) if file is not None else ""
    if answer is None:
        # To ask a stopped rank for its stack, or one in a C call, sets it going: not before the others are asked.
        hush()
        await asyncio.sleep(ANSWER_S)
    # A signal wakes what slept, so that the rank goes on and the helper thread answers late, with another place.
    is_woken = file is not None and not text
    if file is not None and is_woken:
        text = await stacks.ask_for_stack(ward.pid, ward.native_thread, file)
    evidence = {
        "host": socket.gethostname(),
        "pid": ward.pid,
        "state": state,
        "stack": stacks.frames_of(text, ward.thread, first=is_woken),
        "collectives": answer.collectives if answer is not None else [],
        "text": text[:LONGEST_TEXT],
    }
    tell({"evidence": evidence})
    workers = await stacks.ask_workers(ward.pid, file) if file is not None else []
    evidence["workers"] = [stacks.frames_of(each, ward.thread) for each in workers]
    evidence["text"] = "\n".join([text, *workers])[:LONGEST_TEXT]
    tell({"evidence": evidence})

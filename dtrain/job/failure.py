"""How a rank ends when something went wrong: what it writes down, what it prints, and what it leaves to others to say.

Ranks tell each other why they end through the job's store, never in a collective: one may be the only one that fails.
The first cause is the job's: it goes into exit.json. What all ranks find alike is printed by rank 0 alone.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.heartbeat import Heartbeat, Phase
from dtrain.distributed.process_info import fields_of, this_process
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.rendezvous import Board
from dtrain.distributed.signals import ignore_further
from dtrain.distributed.topology import Topology
from dtrain.errors import DtrainError, TopologyError
from dtrain.runs.folder import write_exit
from dtrain.runs.lock import is_held_by_another_job

if TYPE_CHECKING:
    from dtrain.job.watchdog.client import Watch

T = TypeVar("T")

WAIT_S = 2.0
"""How long a rank waits for what rank 0 says, and rank 0 for the others to read it."""

SEEN_S = 0.2
"""How long after its sockets a killed process may still stand in /proc. mpirun kills the rest after 0.5 s."""

NEWS_S = 0.5
"""How long the monitors may take to tell of a rank that has died."""

TOLD_S = 0.1
"""The same where a launcher tells this rank to end: mpirun kills it 0.25 s later."""

PREEMPTED = 75
"""Exit code of an end that all ranks have agreed upon."""

STORE_S = 3.0
"""How long the store may take in all: its host may be gone without a word."""


class Peer(NamedTuple):
    """A rank's process. pid_namespace: processes can be looked up in the same one only; 0 where there is no /proc."""

    host: str
    pid_namespace: int
    pid: int


@dataclass(frozen=True)
class Job:
    """All ranks together, once they have met. board: None for one process. watch: this rank's, by its monitor."""

    context: RankContext
    board: Board | None
    peers: Sequence[Peer]
    watch: Watch


@dataclass(frozen=True)
class End:
    """Why a rank ended, as exit.json has it. rank, host: where it happened."""

    code: int
    cause: str
    rank: int
    host: str
    message: str


def own_peer() -> Peer:
    """This process."""
    own = this_process()
    return Peer(own.host, own.pid_namespace, own.pid)


def write_down(end: End, config: Config, heartbeat: Heartbeat) -> None:
    """Writes exit.json where the run's folder is there and no other job works in it; the first writer wins."""
    if config.run_dir.is_dir() and not is_held_by_another_job(config.run_dir, heartbeat.lock):
        write_exit(config.run_dir / "exit.json", **asdict(end))


def tell_launcher(end: End, topology: Topology) -> None:
    """Writes an end where launch/*.sh looks for it when the run has no exit.json; the first rank of a node wins."""
    file = topology.exit_file
    if file is not None and file.parent.is_dir():
        write_exit(file, **asdict(end))


def done(topology: Topology) -> End:
    """The good end."""
    return End(0, "done", topology.rank, socket.gethostname(), "done")


def end_of(error: BaseException, topology: Topology) -> End:
    """What an error of this rank is for exit.json."""
    is_ours = isinstance(error, DtrainError | KeyboardInterrupt)
    message = str(error) if is_ours and str(error) else f"{type(error).__name__}: {error}"
    code = error.exit_code if isinstance(error, DtrainError) else 1
    return End(code, type(error).__name__, topology.rank, socket.gethostname(), message)


def report(
    error: BaseException, config: Config, job: Job, *, is_noted: bool, launcher_lives: Callable[[], bool]
) -> int:
    """Writes down and prints why this rank ends; gives the exit code.

    Args:
        is_noted: whether the end goes into exit.json.
        launcher_lives: where it does not, watch.py ends this process and says so.
    """
    ignore_further()  # a launcher that sees one rank end tells the others to end, too
    topology = job.context.topology
    job.watch.stay_quiet()
    job.context.heartbeat.at(Phase.ENDING)
    follows = _follows(error, job)
    if follows and not launcher_lives():
        threading.Event().wait(WAIT_S)
    own, first = _settle(error, config, job, follows=follows, is_noted=is_noted)
    if follows:
        _say(f"{_words_of(first, own)} Rank {topology.rank} ends as well.", job, error, follows=True)
        return first.code
    _say(_told(error, own), job, error, follows=False, title=_title(error, topology))
    return own.code


def hand_over(error: BaseException, config: Config, job: Job) -> TopologyError | None:
    """Writes down why a run that Python code has started ends; the code itself is to hear and say it.

    Returns:
        What to raise instead: who is gone, where the error says no more than that somebody is.
    """
    ignore_further()  # until fit gives the signals back
    job.context.heartbeat.at(Phase.ENDING)
    follows = _follows(error, job)
    own, first = _settle(error, config, job, follows=follows, is_noted=True)
    return None if not follows or isinstance(error, KeyboardInterrupt) else TopologyError(_words_of(first, own))


def report_alone(error: BaseException, config: Config, context: RankContext, *, is_noted: bool) -> int:
    """What `report` does where the ranks have not met, or have parted: each knows its own side only."""
    ignore_further()
    topology = context.topology
    end = end_of(error, topology)
    tell_launcher(end, topology)
    if is_noted:
        write_down(end, config, context.heartbeat)
    if topology.is_main if isinstance(error, KeyboardInterrupt) else not getattr(error, "is_said_elsewhere", False):
        log.error("%s", _title(error, topology) + _told(error, end))
    return end.code


def of_lost_peer(error: BaseException, topology: Topology, job: Job | None) -> TopologyError:
    """What to raise for an error that says no more than that another rank is gone; without a job the ranks have just met."""
    ignore_further()
    end = _end_of_follower(error, job) if job is not None else _end_of_lost(error, topology.rank, socket.gethostname())
    return TopologyError(end.message)


def _follows(error: BaseException, job: Job) -> bool:
    """Whether this rank ends since another one has."""
    from dtrain.distributed.collectives import is_lost_peer

    return job.context.world_size > 1 and (is_lost_peer(error) or _is_told_for_another(error, job))


def _settle(error: BaseException, config: Config, job: Job, *, follows: bool, is_noted: bool) -> tuple[End, End]:
    """Tells the others, unless this rank follows them, and writes down; gives this rank's end and the job's first."""
    own = _end_of_follower(error, job) if follows else end_of(error, job.context.topology)
    if not follows and own.code != PREEMPTED:
        job.watch.failing(_first_line(own), own.code, by_signal=isinstance(error, KeyboardInterrupt))
    first = _in_time(lambda: _first_cause(own, job.board), own)
    tell_launcher(first, job.context.topology)
    if is_noted and getattr(error, "is_noted", True):
        write_down(first, config, job.context.heartbeat)
    return own, first


def _words_of(first: End, own: End) -> str:
    """Of a rank that follows."""
    return f"Rank {first.rank} on {first.host} ended: {_first_line(first)}" if first != own else own.message


def _told(error: BaseException, own: End) -> str:
    """The message of an error that has one for the user, else the traceback."""
    is_ours = isinstance(error, DtrainError | KeyboardInterrupt)
    return own.message if is_ours else "".join(traceback.format_exception(error)).rstrip()


def _title(error: BaseException, topology: Topology) -> str:
    """Where a traceback comes from, on a line above it."""
    if isinstance(error, DtrainError | KeyboardInterrupt) or topology.world_size == 1:
        return ""
    return f"Rank {topology.rank} on {socket.gethostname()} failed:\n"


def _is_told_for_another(error: BaseException, job: Job) -> bool:
    """Whether a launcher stops this rank since another one has ended; it may be quicker than the broken connection."""
    if not isinstance(error, KeyboardInterrupt):
        return False
    news = job.watch.news(TOLD_S)
    return news is not None and not news.by_signal


def _say(words: str, job: Job, error: BaseException, *, follows: bool, title: str = "") -> None:
    """Prints on rank 0, and where that says something else.

    Args:
        title: stands above the words, and differs where they may be the same.
    """
    # Then a rank that waits in a collective ends with the first that leaves; to wait for each other would take longer.
    is_hurried = isinstance(error, KeyboardInterrupt) and not follows
    if job.context.is_main:
        log.error("%s%s", title, words)
        _in_time(lambda: _tell(words, job, wait_s=0.0 if is_hurried else WAIT_S), None)
    elif not is_hurried:
        is_said = isinstance(error, DtrainError) and error.is_said_elsewhere
        heard = _in_time(lambda: _listen(job.board, wait_s=0.0 if is_said else WAIT_S), None)
        if not (is_said or heard == words or (follows and heard is not None)):
            log.error("%s%s", title, words)


def _tell(words: str, job: Job, *, wait_s: float) -> None:
    """Rank 0's words, and time for the others to read them: the store ends with rank 0."""
    board, deadline = job.board, time.monotonic() + wait_s
    if board is None:
        return
    board.compare_set("end/words", "", words)
    while board.add("end/heard", 0) < len(job.peers) - 1 - len(_gone(job)) and time.monotonic() < deadline:
        time.sleep(0.02)


def _listen(board: Board | None, *, wait_s: float) -> str | None:
    """What rank 0 prints, if it ends too."""
    if board is None:
        return None
    deadline = time.monotonic() + wait_s
    while not board.check(["end/words"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    heard = board.get("end/words").decode() if board.check(["end/words"]) else None
    board.add("end/heard", 1)
    return heard


def _first_cause(own: End, board: Board | None) -> End:
    if board is None:
        return own
    return End(**json.loads(board.compare_set("end/cause", "", json.dumps(asdict(own)))))


def _end_of_follower(error: BaseException, job: Job) -> End:
    """Why a connection was lost, if no rank has said why it ended: who is gone, as the monitors or /proc tell."""
    news = job.watch.news(NEWS_S)
    if news is not None:
        return End(news.code, TopologyError.__name__, news.rank, news.host, news.message)
    deadline = time.monotonic() + SEEN_S
    while not (gone := _gone(job)) and time.monotonic() < deadline:
        time.sleep(0.02)
    if not gone:
        return _end_of_lost(error, job.context.rank, job.peers[job.context.rank].host)
    names = ", ".join(f"rank {rank} (process {job.peers[rank].pid} on {job.peers[rank].host})" for rank in gone[:8])
    message = f"{names[:1].upper()}{names[1:]} died without a word: killed from outside, or for want of memory?"
    return End(TopologyError.exit_code, TopologyError.__name__, gone[0], job.peers[gone[0]].host, message)


def _end_of_lost(error: BaseException, rank: int, host: str) -> End:
    """The end of that rank, which cannot see whom it has lost."""
    address = re.search(r"\[([0-9a-fA-F.:]+)\]:\d+", str(error))
    message = (
        f"Rank {rank} on {host} lost its connection to another rank{f' at {address[1]}' if address else ''}: that rank "
        "has died, or its node or the network has."
    )
    return End(TopologyError.exit_code, TopologyError.__name__, rank, host, message)


def _first_line(end: End) -> str:
    return (end.message.splitlines() or [end.cause])[0]


def _gone(job: Job) -> list[int]:
    own = own_peer()
    return [rank for rank, peer in enumerate(job.peers) if _is_gone(peer, own)]


def _is_gone(peer: Peer, own: Peer) -> bool:
    """Whether that process has ended; one on another machine cannot be seen and counts as there."""
    if peer.pid_namespace == 0 or peer[:2] != own[:2]:
        return False
    fields = fields_of(peer.pid)
    return fields is None or fields[0] in "ZX"


def _in_time(work: Callable[[], T], otherwise: T) -> T:
    """What `work` with the store gives, or `otherwise`: without its host it fails, or waits for long."""
    result = [otherwise]

    def try_it() -> None:
        try:
            result[0] = work()
        except RuntimeError:  # the store ended with rank 0
            return

    worker = threading.Thread(target=try_it, daemon=True)
    worker.start()
    worker.join(STORE_S)
    return result[0]

"""Allows only one writer per run folder: run.lock names its owner, and a heartbeat shows that the owner is alive.

The file is created atomically, so exactly one of two simultaneous starts succeeds. The owner updates its modification time
every `HEARTBEAT_PERIOD_S`. Clocks are never compared: a start that cannot see the owner's process measures with its own
monotonic clock how long the file does not change.

A lock that has an owner is removed or replaced only by who has created its successor file, whose name is a hash of that
lock. Creating a name is atomic on network file systems too, so there is one such process, also on hosts that do not see
each other's kernel locks. A process that is killed in between leaves the successor file: it names the new owner, and has a
successor of its own.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dtrain.config import bounded_json
from dtrain.console import log
from dtrain.distributed.process_info import ProcessIdentity, is_alive, this_process
from dtrain.errors import ConfigError, TopologyError

LOCK = "run.lock"
"""Name of the lock file in the run folder."""

HEARTBEAT_PERIOD_S = 5.0
"""Seconds between two heartbeats."""

MAX_MISSED_HEARTBEATS = 12
"""After this many periods without a heartbeat, the owner is considered dead. The number is high because the owner's thread
may wait long for the interpreter's lock or the file server. Only a start that cannot see the owner's process waits for
this."""

ON_LOSS_TIMEOUT_S = 2.0
"""Time limit in seconds for a job to report that it has lost its folder."""

MAX_ATTEMPTS = 5
"""How often a start tries again after another one was faster to replace a stale lock. Then it gives up."""

MAX_SUCCESSORS = 64
"""How many processes may have been killed one after another while each took over the lock of the one before."""
IN_USE, CHANGED = "", "changed"
"""Results of `_stale_reason` for a lock that must not be replaced."""


@dataclass(frozen=True)
class LockOwner:
    """The owner that run.lock names.

    Attributes:
        process: the process that holds the lock.
        command: its command, e.g. train.
        since: when the job began, in UTC.
        id: unique id of this lock.
    """

    process: ProcessIdentity
    command: str
    since: str
    id: str

    def __str__(self) -> str:
        return f"process {self.process.pid} on {self.process.host} ({self.command}, since {self.since})"

    def as_text(self) -> str:
        """Returns the content of the lock file."""
        record = {**self.process._asdict(), "command": self.command, "since": self.since, "id": self.id}
        return json.dumps(record, indent=2) + "\n"


@dataclass(frozen=True)
class LockState:
    """A lock file at one moment: run.lock, or the successor of another one.

    Attributes:
        name: file name.
        text: its content.
        owner: None if the content is invalid.
        time_ns: its modification time.
    """

    name: str
    text: str
    owner: LockOwner | None
    time_ns: int

    @property
    def successor(self) -> str:
        """Name of the file that only one process can create: it may replace or remove this lock."""
        return f".{LOCK}.next-{hashlib.sha256(f'{self.name} {self.text}'.encode()).hexdigest()[:16]}"

    @property
    def holder(self) -> str:
        """Description of the owner for messages."""
        return f"a job that its {LOCK} does not name" if self.owner is None else str(self.owner)


def _ignore_loss(_message: str) -> None:
    pass


@contextmanager
def locked(
    folder: Path,
    *,
    command: str,
    period_s: float = HEARTBEAT_PERIOD_S,
    on_loss: Callable[[str], None] = _ignore_loss,
    lost_hosts: Sequence[str] = (),
) -> Iterator[LockOwner]:
    """Locks the folder for this process against other starts, and creates the folder if needed.

    A folder that was created for the lock and is still empty at the end is removed.

    Args:
        folder: the run folder, which may not exist yet.
        command: the command that needs the folder, for messages to others.
        lost_hosts: names of hosts whose processes count as dead if they cannot be seen: this job has lost them. One that
            lives nevertheless notices at its next heartbeat that the lock is gone, and ends.
        on_loss: called in a helper thread with the reason why this process ends, if another job takes the folder over.

    Raises:
        ConfigError: another job holds the lock.
        OSError: the lock cannot be written.
    """
    is_new = not folder.exists()
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    owner = LockOwner(this_process(), command, since, uuid.uuid4().hex)
    done = threading.Event()
    try:
        _acquire(folder, owner, period_s, lost_hosts)
        heartbeat_args = (folder, owner, done, period_s, on_loss)
        threading.Thread(target=_heartbeat, args=heartbeat_args, name="run-lock", daemon=True).start()
        yield owner
    finally:
        done.set()
        _release(folder, owner)
        if is_new:
            with suppress(OSError):  # not empty, as expected after a run
                folder.rmdir()


def move_lock(moved: Path, folder: Path) -> None:
    """Moves the lock into the new folder after the old folder, which contains the lock, was renamed.

    Raises:
        ConfigError: another job locked the new folder first.
    """
    if not (moved / LOCK).exists():
        return
    try:
        _link_new(moved / LOCK, folder / LOCK)
    except FileExistsError:
        current = read_lock(folder)
        holder = current.holder if current is not None else "another job"
        raise ConfigError(f"{folder} was just taken by {holder}. Choose another run.name") from None
    (moved / LOCK).unlink()


def is_held_by_another_job(folder: Path, lock_id: str) -> bool:
    """Returns whether another job works in the folder. If its process cannot be seen, its lock is sufficient.

    Args:
        lock_id: the id of this job's lock; empty if it has none yet.
    """
    try:
        current = read_lock(folder)
    except OSError:  # the file server is unreachable: assume that a lock that we had is still ours
        return not lock_id
    if current is None or (current.owner is not None and current.owner.id == lock_id):
        return False
    if current.owner is None:
        return True
    return current.owner.process != this_process() and is_alive(current.owner.process) is not False


def read_lock(folder: Path, name: str = LOCK) -> LockState | None:
    """Returns the current lock; None without one.

    Args:
        name: file name, for the successor of a lock.
    """
    for attempt in range(MAX_ATTEMPTS):
        try:
            # Opening the file, instead of only calling stat, makes a network file system ask its server.
            with (folder / name).open(encoding="utf-8", errors="replace") as file:
                text, status = file.read(), os.fstat(file.fileno())
            return LockState(name, text, _parse_owner(text), status.st_mtime_ns)
        except FileNotFoundError:
            return None
        except OSError as error:
            # Another host has replaced the file since it was opened.
            if error.errno != errno.ESTALE or attempt == MAX_ATTEMPTS - 1:
                raise
    return None


def _read_chain(folder: Path) -> list[LockState]:
    """Returns the current lock and the successors that killed processes have left; the last one counts."""
    chain: list[LockState] = []
    state = read_lock(folder)
    while state is not None and len(chain) < MAX_SUCCESSORS:
        chain.append(state)
        state = read_lock(folder, state.successor)
    return chain


def _parse_owner(text: str) -> LockOwner | None:
    try:
        record = bounded_json.loads(text)
        process = ProcessIdentity(
            host=str(record["host"]),
            boot=str(record["boot"]),
            pid_namespace=int(record["pid_namespace"]),
            pid=int(record["pid"]),
            started=str(record["started"]),
        )
        return LockOwner(process, str(record["command"]), str(record["since"]), str(record["id"]))
    except (ValueError, KeyError, TypeError):
        return None


def _acquire(folder: Path, owner: LockOwner, period_s: float, lost_hosts: Sequence[str]) -> None:
    draft = folder / f".{LOCK}.{owner.id}.tmp"
    try:
        _write_in_folder(draft, owner.as_text())
        current = None
        for _ in range(MAX_ATTEMPTS):
            with suppress(FileExistsError):
                _link_new(draft, folder / LOCK)
                return
            chain = _read_chain(folder)
            if not chain:  # its owner has just released it
                continue
            current = chain[-1]
            if current.owner == owner:  # a network file system created the link but reported an error
                return
            reason = _stale_reason(folder, chain, period_s, lost_hosts)
            if reason == IN_USE:
                break
            if reason != CHANGED and _replace(folder, chain, draft, owner):
                log.info("%s: took over the lock of %s, %s", folder, current.holder, reason)
                return
        raise ConfigError(
            f"{folder} is in use by {current.holder if current is not None else 'another job'}. Wait until that job ends, "
            "or stop it; or choose another run.name"
        )
    finally:
        with suppress(OSError):
            draft.unlink()


def _write_in_folder(file: Path, text: str) -> None:
    """Writes a file in a folder that is created if needed, also if another start that failed removes its empty folder."""
    for attempt in range(MAX_ATTEMPTS):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            file.write_text(text, encoding="utf-8")
            return
        except FileNotFoundError:
            if attempt == MAX_ATTEMPTS - 1:
                raise


def _stale_reason(folder: Path, chain: list[LockState], period_s: float, lost_hosts: Sequence[str]) -> str:
    """Returns why the lock is stale; `IN_USE` if it is not, `CHANGED` if it was replaced in the meantime."""
    lock = chain[-1]
    is_owner_alive = is_alive(lock.owner.process) if lock.owner is not None else None
    if is_owner_alive is not None:
        return IN_USE if is_owner_alive else "whose process is gone"
    if lock.owner is not None and lock.owner.process.host in lost_hosts:
        return "whose host this job has lost"
    wait_s = MAX_MISSED_HEARTBEATS * period_s
    log.info(
        "%s holds the lock of %s, but its process is not visible here: waiting %.3g s for a heartbeat",
        *(lock.holder, folder, wait_s),
    )
    waited_s, before = 0.0, time.monotonic()
    while waited_s < wait_s:
        time.sleep(period_s / 10)
        now = _read_chain(folder)
        if [each.text for each in now] != [each.text for each in chain]:
            return CHANGED
        if now[-1].time_ns != lock.time_ns:
            return IN_USE
        # While the file server does not answer, or this process is stopped, the owner may be waiting as well.
        waited_s += min(time.monotonic() - before, period_s)
        before = time.monotonic()
    return f"which had no heartbeat for {wait_s:.3g} s"


def _link_new(source: Path, target: Path) -> None:
    """Creates a hard link to a complete file, if the name does not exist yet.

    Raises:
        FileExistsError: the name exists.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: not atomic, but still only the first writer succeeds
        text, file = source.read_text(encoding="utf-8"), target.open("x", encoding="utf-8")
        try:
            with file:
                file.write(text)
        except OSError:  # the disk is full: an empty lock would name nobody
            target.unlink(missing_ok=True)
            raise


def _replace(folder: Path, chain: list[LockState], draft: Path, owner: LockOwner) -> bool:
    """Replaces the stale lock by `draft`. Returns False if another start was faster.

    Args:
        chain: the stale lock, as `_read_chain` returned it.
        owner: the one that `draft` names.
    """
    successor = folder / chain[-1].successor
    try:
        _link_new(draft, successor)
    except FileExistsError:
        current = read_lock(folder, successor.name)
        if current is None or current.owner != owner:  # else a network file system created the link
            return False
    obsolete = [successor]
    try:
        # The successor of a lock that was replaced in the meantime is worth nothing.
        if [each.text for each in _read_chain(folder)[:-1]] != [each.text for each in chain]:
            return False
        _rename_over(draft, folder / LOCK, owner)
        obsolete += [folder / each.name for each in chain[1:]]
    finally:
        for file in obsolete:
            file.unlink(missing_ok=True)
    return True


def _rename_over(draft: Path, lock: Path, owner: LockOwner) -> None:
    try:
        draft.replace(lock)
    except OSError:
        current = read_lock(lock.parent)
        if current is None or current.owner != owner:  # else a network file system renamed it and reported an error
            raise


def _release(folder: Path, owner: LockOwner) -> None:
    if os.getpid() != owner.process.pid:  # a forked child that unwinds its parent's stack
        return
    with suppress(OSError):
        current = read_lock(folder)
        if current is None or current.owner != owner:
            return
        successor = folder / current.successor
        # A link needs no room on a full disk. If the name exists, another job considers this one dead.
        _link_new(folder / LOCK, successor)
        try:
            if (current := read_lock(folder)) is not None and current.owner == owner:
                (folder / LOCK).unlink()
        finally:
            successor.unlink()


def _heartbeat(
    folder: Path, owner: LockOwner, done: threading.Event, period_s: float, on_loss: Callable[[str], None]
) -> None:
    while not done.wait(period_s):
        try:
            current = read_lock(folder)
            # The user has deleted the lock, or the file server is briefly unreachable.
            if current is None or current.owner is None:
                continue
            if current.owner != owner and not done.is_set():
                _exit_after_loss(folder, current.owner, on_loss)
            os.utime(folder / LOCK)
            if (folder / LOCK).stat().st_mtime_ns == current.time_ns:  # the clock was set back, or stands still
                os.utime(folder / LOCK, ns=(current.time_ns + 10**9, current.time_ns + 10**9))
        except OSError:
            continue


def _exit_after_loss(folder: Path, owner: LockOwner, on_loss: Callable[[str], None]) -> None:
    """Ends this process. It was stalled for so long that it was considered dead, and another job has the folder now."""
    message = f"{folder} was taken over by {owner} while this job was stalled. It ends: only one of them may write."
    log.error("%s", message)
    reporting = threading.Thread(target=on_loss, args=(message,), daemon=True)
    reporting.start()
    reporting.join(ON_LOSS_TIMEOUT_S)
    os._exit(TopologyError.exit_code)

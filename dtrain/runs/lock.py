"""One writer for a run folder: run.lock says who has it, and its heartbeat that they still live.

The file is there whole or not at all, so that of two starts at once exactly one wins. Its owner touches it every
`PERIOD_S`; nobody compares clocks of two hosts: who cannot see the owner's process watches the file by a clock of his own.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dtrain.console import log
from dtrain.distributed.process_info import ProcessIdentity, is_alive, this_process
from dtrain.errors import ConfigError, TopologyError

LOCK = "run.lock"
"""Its name in the run folder."""

PERIOD_S = 5.0
"""Seconds between two beats of the heart."""

MISSED = 12
"""So many periods without a heartbeat, and the owner is taken for dead. Its thread may wait long for the interpreter's lock, or
for the file server; only a start that cannot see the owner's process waits for this."""

LAST_WORDS_S = 2.0
"""How long a job may take to say that it has lost its folder."""

ROUNDS = 5
"""How often a start looks again when another one was faster with a stale lock; then that one has it."""


IN_USE, CHANGED = "", "changed"
"""What `_why_stale` says of a lock that is none of its business."""


@dataclass(frozen=True)
class Owner:
    """What run.lock says. since: when the job began, in UTC. id: of this lock, unlike any other's."""

    process: ProcessIdentity
    command: str
    since: str
    id: str

    def __str__(self) -> str:
        return f"process {self.process.pid} on {self.process.host} ({self.command}, since {self.since})"

    def as_text(self) -> str:
        """The file's content."""
        record = {**self.process._asdict(), "command": self.command, "since": self.since, "id": self.id}
        return json.dumps(record, indent=2) + "\n"


@dataclass(frozen=True)
class Heartbeat:
    """The file at one moment. owner: None where the content makes no sense. time_ns: when it was last touched."""

    text: str
    owner: Owner | None
    time_ns: int

    @property
    def who(self) -> str:
        """For a message."""
        return f"a job that its {LOCK} does not name" if self.owner is None else str(self.owner)


def _tell_nobody(_words: str) -> None:
    pass


@contextmanager
def locked(
    folder: Path, *, command: str, period_s: float = PERIOD_S, on_loss: Callable[[str], None] = _tell_nobody
) -> Iterator[Owner]:
    """Holds the folder for this process, which no other start may use then; makes the folder if need be.

    A folder that was made for the lock and holds nothing in the end is removed with it.

    Args:
        folder: the run folder, or where it will be.
        command: what wants it, for the message that others get.
        on_loss: is told, from a helper thread, why this process ends if another job takes the folder over.

    Raises:
        ConfigError: another job has it.
        OSError: the lock cannot be written.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    own = Owner(this_process(), command, since, uuid.uuid4().hex)
    done = threading.Event()
    try:
        _acquire(folder, own, period_s)
        heart = (folder, own, done, period_s, on_loss)
        threading.Thread(target=_heartbeat, args=heart, name="run-lock", daemon=True).start()
        yield own
    finally:
        done.set()
        _release(folder, own)
        if is_new:
            with suppress(OSError):  # it holds something now, as it should
                folder.rmdir()


def follow(moved: Path, folder: Path) -> None:
    """Brings the lock along, when the folder that it lies in was moved away and a new one has its place.

    Raises:
        ConfigError: another job was faster in the new one.
    """
    if not (moved / LOCK).exists():
        return
    try:
        _put(moved / LOCK, folder / LOCK)
    except FileExistsError:
        found = look(folder)
        who = found.who if found is not None else "another job"
        raise ConfigError(f"{folder} was taken in this moment by {who}. Choose another run.name") from None
    (moved / LOCK).unlink()


def is_anothers(folder: Path, own: str) -> bool:
    """Whether a job works in the folder that is not this one; where its process is out of sight, its lock is enough.

    Args:
        own: the id of this job's lock; empty before it has one.
    """
    try:
        found = look(folder)
    except OSError:  # the file server is away: it is ours if it has ever been
        return not own
    if found is None or (found.owner is not None and found.owner.id == own):
        return False
    if found.owner is None:
        return True
    return found.owner.process != this_process() and is_alive(found.owner.process) is not False


def look(folder: Path) -> Heartbeat | None:
    """The lock that lies there now; None where there is none."""
    try:
        # Opened, not only looked up: that makes a network file system ask its server.
        with (folder / LOCK).open(encoding="utf-8", errors="replace") as file:
            text, status = file.read(), os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return Heartbeat(text, _owner_of(text), status.st_mtime_ns)


def _owner_of(text: str) -> Owner | None:
    try:
        record = json.loads(text)
        process = ProcessIdentity(
            host=str(record["host"]),
            boot=str(record["boot"]),
            pid_namespace=int(record["pid_namespace"]),
            pid=int(record["pid"]),
            started=str(record["started"]),
        )
        return Owner(process, str(record["command"]), str(record["since"]), str(record["id"]))
    except (ValueError, KeyError, TypeError):
        return None


def _acquire(folder: Path, own: Owner, period_s: float) -> None:
    draft = folder / f".{LOCK}.{own.id}.tmp"
    try:
        draft.write_text(own.as_text(), encoding="utf-8")
        found = None
        for _ in range(ROUNDS):
            with suppress(FileExistsError):
                _put(draft, folder / LOCK)
                return
            found = look(folder)
            if found is None:  # its owner has just ended
                continue
            if found.owner == own:  # a network file system that did what it was asked, and said it had not
                return
            why = _why_stale(folder, found, period_s)
            if why == IN_USE:
                break
            if why != CHANGED and _replace(folder / LOCK, found, draft):
                log.info("%s: took the lock of %s, %s", folder, found.who, why)
                return
        raise ConfigError(
            f"{folder} is in use by {found.who if found is not None else 'another job'}. Wait until that job ends, or "
            "stop it; or choose another run.name"
        )
    finally:
        with suppress(OSError):
            draft.unlink()


def _why_stale(folder: Path, found: Heartbeat, period_s: float) -> str:
    """Why nobody holds this lock any more; `IN_USE` where somebody does, `CHANGED` where another one is there by now."""
    lives = is_alive(found.owner.process) if found.owner is not None else None
    if lives is not None:
        return IN_USE if lives else "whose process is gone"
    wait_s = MISSED * period_s
    log.info("%s has the lock of %s, out of sight here: looking for %.3g s whether it lives", folder, found.who, wait_s)
    until = time.monotonic() + wait_s
    while time.monotonic() < until:
        time.sleep(period_s / 10)
        now = look(folder)
        if now is None or now.text != found.text:
            return CHANGED
        if now.time_ns != found.time_ns:
            return IN_USE
    return f"which gave no sign of life for {wait_s:.3g} s"


def _put(source: Path, target: Path) -> None:
    """Gives a whole file a second name, unless there is one of that name.

    Raises:
        FileExistsError: there is.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: not whole at once, but still the first only
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))


def _replace(lock: Path, stale: Heartbeat, draft: Path) -> bool:
    """Puts `draft` in the place of that stale lock; False where another start was faster.

    Of those who want to, one at a time holds the kernel's lock of the stale file, and looks whether it still lies there.
    """
    try:
        file = lock.open("r+", encoding="utf-8")
    except FileNotFoundError:
        return False
    with file:
        with suppress(OSError):  # a file system without such locks: two may replace it, and the heartbeat finds out
            fcntl.flock(file, fcntl.LOCK_EX)
        now = look(lock.parent)
        if now is None or now.text != stale.text:
            return False
        draft.replace(lock)
    return True


def _release(folder: Path, own: Owner) -> None:
    if os.getpid() != own.process.pid:  # a forked child that unwinds its parent's frames
        return
    with suppress(OSError):
        found = look(folder)
        if found is not None and found.owner == own:
            (folder / LOCK).unlink()


def _heartbeat(
    folder: Path, own: Owner, done: threading.Event, period_s: float, on_loss: Callable[[str], None]
) -> None:
    while not done.wait(period_s):
        try:
            found = look(folder)
            # Gone: the user has removed it by hand, or the file server is away for a moment.
            if found is None or found.owner is None:
                continue
            if found.owner != own and not done.is_set():
                _leave(folder, found.owner, on_loss)
            os.utime(folder / LOCK)
        except OSError:
            continue


def _leave(folder: Path, owner: Owner, on_loss: Callable[[str], None]) -> None:
    """Ends this process: it was taken for dead, having stood still for long, and the folder is another job's now."""
    words = f"{folder} was taken over by {owner} while this job stood still. It ends: only one of them may write."
    log.error("%s", words)
    telling = threading.Thread(target=on_loss, args=(words,), daemon=True)
    telling.start()
    telling.join(LAST_WORDS_S)
    os._exit(TopologyError.exit_code)

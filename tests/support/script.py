"""How a script that starts jobs ends: with all of them, also when a signal ends it before they have.

A launcher puts its ranks into sessions of their own, so a signal to the script's process group does not reach them, and
`subprocess.run` kills the launcher alone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from dtrain.distributed import linux_process

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LIMIT_S = 10.0


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and exits with its code; with 128 + the signal's number if one ends it.

    Whatever ends it early, `with` and `finally` run first, and then all processes below this one are killed.
    """
    linux_process.adopt_orphans()  # a rank whose launcher is killed stays below this process
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)
    try:
        code = main()
    except BaseException:
        end_descendants()
        raise
    sys.exit(code)


def end_descendants() -> None:
    """Kills all processes below this one, and waits until they have ended."""
    deadline = time.monotonic() + LIMIT_S
    while (left := _descendants()) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _exit(number: int, _frame: object) -> NoReturn:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # nothing interrupts the end
    sys.exit(128 + number)


def _descendants() -> list[int]:
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        for listing in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            with suppress(OSError):  # it has just ended
                waiting += (children := [int(pid) for pid in listing.read_text().split()])
                found += [pid for pid in children if _is_alive(pid)]
    return found


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

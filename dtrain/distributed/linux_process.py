"""What Linux's prctl(2) sets for this process. Elsewhere nothing is set.

cluster/remote_supervisor.py has its own two lines of this: it uses the standard library only.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36


def send_on_parent_death(number: signal.Signals = signal.SIGKILL) -> None:
    """Makes the kernel send a signal to this process when its parent ends from now on. Children do not inherit this."""
    _prctl(PR_SET_PDEATHSIG, int(number))


def name_process(name: bytes) -> None:
    """Sets the name that ps and top show, 15 bytes at most. The command line stays."""
    _prctl(PR_SET_NAME, ctypes.c_char_p(name))


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent ends."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: Any) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)

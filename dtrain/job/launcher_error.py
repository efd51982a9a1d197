"""Gives torchrun the reason why a rank ends, so that torchrun's own report, which is the last on the screen, names it.

torchrun prints its traceback and a summary below everything that dtrain has printed. The summary has the content of the file
that torchrun names to each rank in TORCHELASTIC_ERROR_FILE (torch.distributed.elastic.multiprocessing.errors).
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

HEAD_START_S = 1
"""torchrun takes the failure with the earliest whole second for the cause. It gives the current one to ranks without a file."""


def write_launcher_error(file: Path | None, message: str) -> None:
    """Writes the file, unless this rank has already written it. Never raises: the process is ending for another reason.

    Args:
        file: the launcher's file for this rank; None for no such file.
        message: the cause, for the user.
    """
    if file is None or file.exists():
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()) - HEAD_START_S)}
    draft = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        # torchrun ends with a traceback of its own if the file is incomplete.
        draft.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")
        draft.replace(file)

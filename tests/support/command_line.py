"""The command line inside a test's own process, which saves the seconds of its imports."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from dataclasses import dataclass

from dtrain.main import main


@dataclass(frozen=True)
class Ended:
    """A command's exit code and what it printed."""

    code: int
    text: str

    @property
    def last(self) -> str:
        return self.text.rstrip().splitlines()[-1]


def dtrain(*arguments: str) -> Ended:
    """The command line in this process. A run sets variables for its libraries, which are taken back."""
    before, printed = dict(os.environ), io.StringIO()
    try:
        with redirect_stdout(printed):
            code = main(arguments)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return Ended(code, printed.getvalue())

"""What the command line says to every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.suite.spec import Contestant, Spec
from tests.benchmarks.suite.workloads import Workload, write


@dataclass(frozen=True)
class Options:
    """Of the command line.

    Attributes:
        scratch: folder for models, data and runs, removed at the end.
        quick: only what is counted, on a model that costs nothing.
        only: kinds of contestants to run; empty: all.
        pairs: rounds of interleaved blocks; None: the row's own number.
        core: first core to bind to.
        full: the sizes of the published table where the row's usual ones are smaller.
        data, model: of the user, for the row that needs real data; None: not given.
        rows: of the user's data that count; None: all.
    """

    scratch: Path
    quick: bool = False
    only: Sequence[str] = ()
    pairs: int | None = None
    core: int = 0
    full: bool = False
    data: Path | None = None
    model: Path | None = None
    rows: int | None = None

    def chosen(self, contestants: Sequence[Contestant]) -> list[Contestant]:
        """Returns the contestants to run. dtrain's own variants go with dtrain."""
        return [one for one in contestants if not self.only or one.kind in self.only]

    def rounds(self, usual: int) -> int:
        return self.pairs or usual

    def spec(self, row: str, contestant: Contestant, workload: Workload, *, steps: int) -> Spec:
        """Returns a contestant's spec, after the workload was written. Folders are named by row and contestant."""
        folder = write(workload, self.scratch / f"workload-{abs(hash(workload)):x}")
        short = "".join(letter if letter.isalnum() else "-" for letter in contestant.name.lower())[:24].strip("-")
        return Spec(contestant, workload, folder, self.scratch / row / short, steps, core=self.core)

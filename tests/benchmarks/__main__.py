"""dtrain and its peers side by side.

    python -m tests.benchmarks NAME...              measures the rows, writes results/NAME.md and .json
    python -m tests.benchmarks --quick [NAME...]    only what is equal in every run: tokens, losses, collectives, imports

Ends with 1 if a check of a deterministic figure fails, or if dtrain itself could not be measured. See README.md.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.config.option_parser import OptionParser
from tests.benchmarks.suite import machine, table
from tests.benchmarks.suite.options import Options
from tests.benchmarks.suite.result import RowResult
from tests.benchmarks.suite.rows import ROWS

RESULTS = Path(__file__).parent / "results"
KINDS = ("dtrain", "raw", "hf", "accelerate", "lightning")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    names = arguments.names or (list(ROWS) if arguments.quick or arguments.all else [])
    if not names:
        print("Rows: " + ", ".join(ROWS) + ". Name one or more, or give --all.")
        return 2
    about = describe(arguments.raw)
    if not arguments.quick and about["warning"]:
        print(f"Warning: {about['warning']}", file=sys.stderr, flush=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        options = Options(
            Path(scratch),
            quick=arguments.quick,
            only=arguments.only,
            pairs=arguments.pairs,
            core=arguments.core,
            full=arguments.full,
            data=arguments.data,
            model=arguments.model,
            rows=arguments.rows,
        )
        for name in names:
            began = time.monotonic()
            result = ROWS[name](options)
            result.seconds = time.monotonic() - began
            results.append(result)
            print("\n".join(table.row_as_markdown(result)), flush=True)
    if not arguments.quick:
        name = names[0] if len(names) == 1 else "table"
        written = table.write(results, about, arguments.output, name=name)
        print("Written: " + ", ".join(map(str, written)))
    return exit_code(results)


def exit_code(results: Sequence[RowResult]) -> int:
    """Returns 1 if a check fails or dtrain, the first contestant of a row, has failed."""
    failed = any(not holds for result in results for holds in result.checks.values())
    broken = any(lane.status.startswith("failed") for result in results for lane in result.lanes[:1])
    return int(failed or broken)


def describe(raw: Sequence[str]) -> dict[str, Any]:
    """Returns what the results depend on."""
    return {
        # The table is for others to read: they have other folders.
        "command": "python -m tests.benchmarks " + shlex.join(Path(word).name if "/" in word else word for word in raw),
        "commit": machine.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": machine.versions(),
        "machine": machine.describe(),
        "warning": machine.load_warning(),
    }


def row_name(text: str) -> str:
    """Returns the name of a row.

    Raises:
        ArgumentTypeError: there is no such row.
    """
    if text in ROWS:
        return text
    near = difflib.get_close_matches(text, ROWS, n=1, cutoff=0.0)
    raise argparse.ArgumentTypeError(f"{text} is not a row. Did you mean {near[0]}? The rows: {', '.join(ROWS)}.")


def contestants(text: str) -> tuple[str, ...]:
    """Returns the kinds of contestants in a list with commas.

    Raises:
        ArgumentTypeError: there is no such contestant.
    """
    for name in (names := tuple(text.lower().split(","))):
        if name not in KINDS:
            near = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.0)
            raise argparse.ArgumentTypeError(
                f"{name} is not a contestant. Did you mean {near[0]}? All: {', '.join(KINDS)}."
            )
    return names


def at_least_one(text: str) -> int:
    """Returns a number of 1 or more.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 1 or more.")
    return int(text)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", type=row_name, metavar="NAME", help="rows: " + ", ".join(ROWS))
    parser.add_argument("--all", action="store_true", help="every row (about half an hour)")
    parser.add_argument("--quick", action="store_true", help="check the deterministic figures on tiny models")
    parser.add_argument(
        "--full", action="store_true", help="the sizes of the published table where the usual ones are smaller"
    )
    parser.add_argument("--only", metavar="LIST", type=contestants, default=(), help="contestants: " + ",".join(KINDS))
    parser.add_argument(
        "--pairs", type=at_least_one, help="rounds of interleaved blocks; default: 7 for short rows, 3 for long ones"
    )
    parser.add_argument("--core", type=int, default=0, help="first core to bind to (default 0)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the tables; default: tests/benchmarks/results"
    )
    parser.add_argument("--data", type=Path, help="minilm_cola: a folder in CoLA's format")
    parser.add_argument("--model", type=Path, help="minilm_cola: a model folder; default: MiniLM's shape, new weights")
    parser.add_argument("--rows", type=at_least_one, help="minilm_cola: only the first rows of each file")
    arguments = parser.parse_args(argv)
    arguments.raw = list(argv)
    return arguments


if __name__ == "__main__":
    from tests.support.script import run_script

    run_script(main)

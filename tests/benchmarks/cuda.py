"""Everything that is measured on a GPU, with one call and in less than eight minutes:

    python -m tests.benchmarks.cuda --output tests/benchmarks/results

Each part runs in a process of its own, with a time limit. One that fails is named in the table, and the others go on. It
writes cuda.md and cuda.json. Models have random weights and texts are made up: nothing is downloaded.

    python -m tests.benchmarks.cuda --device cpu --tiny --output /tmp/results

shows, without a GPU, that the parts run; its figures mean nothing. Ends with 1 if a part failed to run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dtrain.config.option_parser import OptionParser
from tests.benchmarks import cuda_parts
from tests.benchmarks.cuda_parts import PARTS, Setup
from tests.benchmarks.suite import machine, table
from tests.benchmarks.suite.race import ContestantError, Lane, Process
from tests.benchmarks.suite.result import RowResult

RESULTS = Path(__file__).parent / "results"
LIMITS_S = {
    "bert": 120.0,
    "launch_bound": 90.0,
    "llama": 120.0,
    "syncs": 60.0,
    "nccl": 40.0,
    "gpu_tests": 150.0,
    "llama_compiled": 120.0,
}
"""Seconds that a part may take at most; all of them together take TOTAL_S at most."""

TOTAL_S = 460.0
SHORTEST_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = parse(words)
    if arguments.part is not None:
        cuda_parts.run(arguments.part, Setup(arguments.device, arguments.tiny, arguments.scratch))
        return 0
    if arguments.device == "cuda" and (fault := missing_device()) is not None:
        print(f"{fault} Add --device cpu --tiny to see whether the parts run.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="cuda-") as scratch:
        results = run_parts(arguments.parts, Setup(arguments.device, arguments.tiny, Path(scratch)), arguments.limit)
    name = "cuda_dry_run" if arguments.tiny or arguments.device == "cpu" else "cuda"
    for path in write(results, describe(words, arguments.device), arguments.output, name=name):
        print(f"Written: {path}")
    return int(any(not lane.ran for result in results for lane in result.lanes))


def missing_device() -> str | None:
    """Returns that there is no CUDA device; None if there is one."""
    import torch

    return None if torch.cuda.is_available() else "torch finds no CUDA device."


def run_parts(names: Sequence[str], setup: Setup, limit: float) -> list[RowResult]:
    """Runs the parts one after the other, and prints each row. Together they take at most `limit` seconds."""
    deadline = time.monotonic() + limit
    results = []
    for name in names:
        result = run_part(name, setup, min(LIMITS_S[name], deadline - time.monotonic()))
        results.append(result)
        print("\n".join(table.row_as_markdown(result)), flush=True)
    return results


def run_part(name: str, setup: Setup, limit: float) -> RowResult:
    """Returns the row of a part; if it fails, or no time is left for it, a row that says so."""
    if limit < SHORTEST_S:
        return _failed(name, f"not run: less than {SHORTEST_S:.0f} s of the time limit were left")
    words = ["--part", name, "--device", setup.device, "--scratch", str(setup.scratch), *["--tiny"] * setup.tiny]
    command = [sys.executable, "-m", "tests.benchmarks.cuda", *words]
    environment = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0") if setup.on_gpu else ""}
    if setup.on_gpu:
        environment["OMP_NUM_THREADS"] = str(min(8, len(os.sched_getaffinity(0))))
    began = time.monotonic()
    try:
        with Process(command, setup.scratch / f"log-{name}", environment) as process:
            process.wait(limit)
        return cuda_parts.read(name, setup)
    except (ContestantError, OSError, ValueError, subprocess.SubprocessError) as error:
        result = _failed(name, f"failed: {error}")
        result.seconds = time.monotonic() - began
        return result


def _failed(name: str, status: str) -> RowResult:
    return RowResult(name, (PARTS[name].__doc__ or "").splitlines()[0], "", [Lane(name, status=status)])


def describe(words: Sequence[str], device: str) -> dict[str, Any]:
    """Returns what the results depend on."""
    return {
        "command": "python -m tests.benchmarks.cuda "
        + shlex.join(Path(word).name if "/" in word else word for word in words),
        "commit": machine.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": machine.versions(),
        "machine": machine.describe(),
        "device": device_name() if device == "cuda" else "no GPU: a dry run, whose figures mean nothing",
    }


def device_name() -> str:
    """Returns name, driver and power limit of the GPU; only its name if nvidia-smi does not answer."""
    import torch

    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return f"{done.stdout.splitlines()[0]}, CUDA {torch.version.cuda}"
    except (OSError, subprocess.SubprocessError, IndexError):
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def write(results: Sequence[RowResult], about: dict[str, Any], folder: Path, *, name: str) -> tuple[Path, Path]:
    """Writes NAME.md and NAME.json into the folder; returns both."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    lines = [
        "# dtrain on a GPU",
        "",
        f"`{about['command']}`",
        "",
        f"Commit {about['commit']}, {about['date']}. {about['device']}. {about['machine']['processor']}, "
        f"{about['machine']['cores']} cores. {versions}.",
        "",
        "Blocks of all contestants interleave. Times are medians; a ratio is contestant / dtrain, so above 1 dtrain is ahead.",
        "",
    ]
    for result in results:
        lines += table.row_as_markdown(result)
    markdown, data = folder / f"{name}.md", folder / f"{name}.json"
    markdown.write_text(table.without_folders("\n".join(lines).rstrip() + "\n"), encoding="utf-8")
    content = {"about": about, "rows": [asdict(result) for result in results]}
    data.write_text(table.without_folders(json.dumps(content, indent=1, default=str) + "\n"), encoding="utf-8")
    return markdown, data


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="python -m tests.benchmarks.cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run; default: " + ", ".join(PARTS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a dry run")
    parser.add_argument("--limit", type=float, default=TOTAL_S, help=f"seconds for all parts (default {TOTAL_S:.0f})")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)  # runs it in this process
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        parser.error(f"{unknown[0]} is not a part. The parts: {', '.join(PARTS)}.")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu needs --tiny: the full sizes would take hours on a CPU.")
    arguments.parts = arguments.parts or list(PARTS)
    return arguments


if __name__ == "__main__":
    from tests.support.script import run_script

    run_script(main)

"""Every test and benchmark that needs a GPU, with one call and in less than nine minutes:

    python -m tests.benchmarks.gpu --output tests/benchmarks/results
    python -m tests.benchmarks.gpu --list                                  # what that runs, and for how long at most

Each part runs in a process of its own, with a time limit. One that fails is named in the results, and the others go on. After
each part it writes gpu.json, and gpu.md for people: if it is killed, what was finished is there. What must be right comes
first, speed after it. Models have random weights and texts are made up: nothing is downloaded.

    python -m tests.benchmarks.gpu --device cpu --tiny --output /tmp/results

shows, without a GPU, that the parts run; its figures mean nothing. Ends with 1 if a part failed to run, with 2 without a GPU.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dtrain.config.option_parser import OptionParser
from tests.benchmarks import gpu_parts
from tests.benchmarks.gpu_parts import PARTS, Setup
from tests.benchmarks.suite import machine, table
from tests.benchmarks.suite.race import ContestantError, Lane, Process
from tests.benchmarks.suite.result import RowResult

RESULTS = Path(__file__).parent / "results"
LIMITS_S = {
    "nccl": 40.0,
    "gpu_tests": 150.0,
    "same_answer": 80.0,
    "bitwise": 80.0,
    "syncs": 60.0,
    "bert": 120.0,
    "launch_bound": 90.0,
    "llama": 120.0,
    "llama_compiled": 120.0,
}
"""Seconds that a part may take at most; all of them together take TOTAL_S at most."""

TOTAL_S = 500.0
"""With the start of this script, and the end of a part that is stopped, this is below nine minutes."""

SHORTEST_S = 10.0
ON_ALL_GPUS = ("gpu_tests", "same_answer", "bitwise")
"""Parts that use more than one GPU if there are more."""

PART_COMMAND = (sys.executable, "-m", "tests.benchmarks.gpu")
"""Starts a part: `--part NAME` and what it needs follow."""


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = parse(words)
    if arguments.part is not None:
        gpu_parts.run(arguments.part, Setup(arguments.device, arguments.tiny, arguments.scratch))
        return 0
    if arguments.list:
        print("\n".join(list_parts(arguments.parts, arguments.limit)))
        return 0
    if arguments.device == "cuda" and (fault := missing_device()) is not None:
        print(f"{fault} Nothing was run or written; --device cpu --tiny shows whether the parts run.", file=sys.stderr)
        return 2
    name = "gpu_dry_run" if arguments.tiny or arguments.device == "cpu" else "gpu"
    about = describe(words, arguments.device)

    def keep(results: Sequence[RowResult]) -> None:
        left = arguments.parts[len(results) :]
        write(results, {**about, "is_complete": not left, "parts_left": left}, arguments.output, name=name)

    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        setup = Setup(arguments.device, arguments.tiny, Path(scratch))
        results = run_parts(arguments.parts, setup, arguments.limit, keep)
    print(f"Written: {arguments.output / name}.json and .md")
    return int(any(not lane.ran for result in results for lane in result.lanes))


def list_parts(names: Sequence[str], limit: float) -> list[str]:
    """Returns a line for each part, in the order in which they run, and one for all."""
    width = max(map(len, names))
    lines = [
        f"{name:{width}} {LIMITS_S[name]:4.0f} s at most  {(PARTS[name].__doc__ or '').splitlines()[0]}"
        for name in names
    ]
    return [*lines, f"{'all':{width}} {min(limit, sum(LIMITS_S[name] for name in names)):4.0f} s at most"]


def missing_device() -> str | None:
    """Returns that there is no CUDA device; None if there is one."""
    import torch

    return None if torch.cuda.is_available() else "torch finds no CUDA device."


def all_devices() -> str:
    """Returns the numbers of all GPUs that this process sees."""
    import torch

    return ",".join(map(str, range(max(1, torch.cuda.device_count()))))


def run_parts(
    names: Sequence[str], setup: Setup, limit: float, keep: Callable[[Sequence[RowResult]], None]
) -> list[RowResult]:
    """Runs the parts one after the other, and prints each row. Together they take at most `limit` seconds.

    Args:
        keep: gets all results so far, after each part.
    """
    deadline = time.monotonic() + limit
    results: list[RowResult] = []
    for name in names:
        results.append(run_part(name, setup, min(LIMITS_S[name], deadline - time.monotonic())))
        keep(results)
        print("\n".join(table.row_as_markdown(results[-1])), flush=True)
    return results


def run_part(name: str, setup: Setup, limit: float) -> RowResult:
    """Returns the row of a part; if it fails, or no time is left for it, a row that says so."""
    if limit < SHORTEST_S:
        return _failed(name, f"not run: less than {SHORTEST_S:.0f} s of the time limit were left")
    words = ["--part", name, "--device", setup.device, "--scratch", str(setup.scratch), *["--tiny"] * setup.tiny]
    command = [*PART_COMMAND, *words]
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    if setup.on_gpu:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or all_devices()
        environment["CUDA_VISIBLE_DEVICES"] = visible if name in ON_ALL_GPUS else visible.split(",")[0]
        environment["OMP_NUM_THREADS"] = str(min(8, len(os.sched_getaffinity(0))))
    began = time.monotonic()
    try:
        with Process(command, setup.scratch / f"log-{name}", environment) as process:
            process.wait(limit)
        return gpu_parts.read(name, setup)
    except (ContestantError, OSError, ValueError, subprocess.SubprocessError) as error:
        result = _failed(name, f"failed: {error}")
        result.seconds = time.monotonic() - began
        return result


def _failed(name: str, status: str) -> RowResult:
    return RowResult(name, (PARTS[name].__doc__ or "").splitlines()[0], "", [Lane(name, status=status)])


def describe(words: Sequence[str], device: str) -> dict[str, Any]:
    """Returns what the results depend on."""
    return {
        "command": "python -m tests.benchmarks.gpu "
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


def write(results: Sequence[RowResult], about: dict[str, Any], folder: Path, *, name: str) -> None:
    """Writes NAME.json and NAME.md into the folder, whole or not at all."""
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
    if about["parts_left"]:
        lines += [f"Not run: {', '.join(about['parts_left'])}.", ""]
    for result in results:
        lines += table.row_as_markdown(result)
    content = {"about": about, "rows": [asdict(result) for result in results]}
    data = json.dumps(content, indent=1, default=str) + "\n"
    for suffix, text in ((".json", data), (".md", "\n".join(lines).rstrip() + "\n")):
        unfinished = folder / f".{name}{suffix}"
        unfinished.write_text(table.without_folders(text), encoding="utf-8")
        unfinished.replace(folder / f"{name}{suffix}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="python -m tests.benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run; default: " + ", ".join(PARTS))
    parser.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
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

"""One SHA-256 at any number of ranks: long runs with engine.bitwise, and one that is killed and goes on at another number.

    python tests/benchmarks/bitwise.py                            # 1,000 steps on 1, 2, 3, 4 and 8 ranks; 10 minutes on 2 cores
    python tests/benchmarks/bitwise.py --steps 100 --ranks 1 2    # a short form
    python tests/benchmarks/bitwise.py --plain                    # the same without engine.bitwise: the hashes differ

A small BERT with dropout takes steps of 13 examples in 7 micro-batches, and of 8 in 4 at the end of an epoch, with AdamW and
clipping, one thread per rank. The last run starts on 3 ranks, all its processes are killed by SIGKILL in the middle, and it
goes on with 2 ranks from its newest checkpoint. For each run a line has the SHA-256 of all weights, of all moments, and of
the loss and gradient norm of every step. Exit code 1 if any two differ.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dtrain.config.option_parser import OptionParser  # noqa: E402
from tests.benchmarks import same_bits  # noqa: E402

FIELDS = ("step", "loss", "grad_norm", "learning_rate", "examples", "targets")
LIMIT_S = 900.0
"""How long a run may take."""


def settings(data: Path, *, steps: int, is_bitwise: bool) -> dict[str, object]:
    """The settings of every run."""
    return {
        **same_bits.bert("classification", data),
        "data.path": data / "reviews",
        "engine.bitwise": is_bitwise,
        "optim.learning_rate": 1e-3,
        "optim.weight_decay": 0.1,
        "optim.max_grad_norm": 0.1,
        "train.max_steps": steps,
        "train.global_batch_size": same_bits.GLOBAL_BATCH,
        "train.micro_batch_size": 2,
        "train.eval_every": "never",
        "checkpoint.every": max(1, steps // 10),
    }


def start(values: dict[str, object], folder: Path, *, ranks: int, log: Path) -> subprocess.Popen[bytes]:
    """Starts a run; its output goes to `log`."""
    environment = {**same_bits.environment(ROOT, folder.parent), "OMP_NUM_THREADS": "1"}
    command = same_bits.command_of(same_bits.Run(values, ranks), folder, seed=7)
    with log.open("ab") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for the end of a run; ends the script if it failed."""
    try:
        code = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        kill(process)
        code = -1
    if code != 0:
        sys.exit(f"exit code {code}\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}")


def kill(process: subprocess.Popen[bytes]) -> int:
    """Sends SIGKILL to a launcher and all processes below it; returns their number."""
    family = [process.pid]
    for pid in family:  # grows meanwhile
        family += [child for child, parent in parents().items() if parent == pid and child not in family]
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(10)
    return len(family)


def parents() -> dict[int, int]:
    """The parent of each process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # ended meanwhile
                continue
    return found


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """Waits until a run has logged a step."""
    deadline = time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        if any(int(event.get("step", 0)) >= step for event in same_bits.events(folder)):
            return
        time.sleep(0.05)
    sys.exit(f"step {step} was not reached")


def hashes(folder: Path, steps: int) -> dict[str, str]:
    """The hashes of a finished run."""
    train: dict[int, Any] = {
        int(event["step"]): [event[name] for name in FIELDS]
        for event in same_bits.events(folder)  # numbers are their exact text
        if event["event"] == "train"
    }
    assert sorted(train) == list(range(1, steps + 1)), "a step is missing"
    checkpoint = folder / "checkpoints" / f"step-{steps:06d}"
    files = sorted(checkpoint.glob("*.safetensors"))
    weights = [file for file in files if file.name.startswith("model")]
    moments = [file for file in files if not file.name.startswith("model")]
    assert weights, f"no weights in {checkpoint}"
    assert moments, f"no moments in {checkpoint}"
    numbers = [train[step] for step in sorted(train)]
    return {
        "weights": digest(b"".join(file.read_bytes() for file in weights)),
        "moments": digest(b"".join(file.read_bytes() for file in moments)),
        "losses and norms": digest(repr(numbers).encode()),
    }


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> int:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4, 8])
    parser.add_argument("--plain", action="store_true", help="without engine.bitwise, to see the hashes differ")
    arguments = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="bitwise-") as place:
        data, runs = Path(place) / "data", Path(place) / "runs"
        same_bits.write_data(data)
        runs.mkdir()
        values = settings(data, steps=arguments.steps, is_bitwise=not arguments.plain)

        def show(name: str, folder: Path, begin: float) -> None:
            found[name] = hashes(folder, arguments.steps)
            parts = "  ".join(f"{part} {value}" for part, value in found[name].items())
            print(f"{name:34} {time.monotonic() - begin:5.0f} s  {parts}", flush=True)

        for ranks in arguments.ranks:
            begin, folder, log = time.monotonic(), runs / f"ranks-{ranks}", runs / f"ranks-{ranks}.log"
            finish(start(values, folder, ranks=ranks, log=log), log)
            show(f"{ranks} rank(s)", folder, begin)
        begin, folder, log = time.monotonic(), runs / "killed", runs / "killed.log"
        first = start(values, folder, ranks=3, log=log)
        wait_for_step(folder, arguments.steps // 2 + 1, first)
        killed = kill(first)
        finish(start(values, folder, ranks=2, log=log), log)
        show(f"3 ranks, {killed} processes killed, then 2", folder, begin)
    different = len({tuple(value.values()) for value in found.values()}) > 1
    print(
        "the hashes differ" if different else f"{len(found)} runs, one hash each for weights, moments, losses and norms"
    )
    return int(different)


if __name__ == "__main__":
    from tests.support.script import run_script

    run_script(main)

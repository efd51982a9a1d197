"""Random kills of random ranks in one run of a small model, which torchrun starts again each time.

    .venv/bin/python tests/benchmarks/kills.py --kills 200

At the end the weights and moments have to be, bit for bit, those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dtrain.checkpoint.format import list_checkpoints  # noqa: E402
from dtrain.config.option_parser import OptionParser  # noqa: E402
from tests.support import jobs  # noqa: E402


def tensors(folder: Path, name: str, steps: int) -> dict[str, bytes]:
    path = folder / name / "checkpoints" / f"step-{steps:06d}"
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def kill_one(job: jobs.Job, checkpoints: Path, rng: random.Random) -> int:
    """Kills a rank somewhere in the steps after the next checkpoint, in mid-save as likely as not; gives how many."""
    before = max(list_checkpoints(checkpoints), default=0)
    jobs.until(lambda: max(list_checkpoints(checkpoints), default=0) > before or job.process.poll() is not None)
    time.sleep(rng.uniform(0, 0.2))
    ranks = job.ranks()
    if len(ranks) != 2:
        return 0
    os.kill(rng.choice(ranks), signal.SIGKILL)
    jobs.until(lambda: not set(ranks) & set(job.ranks()))
    return 1


def main() -> int:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, begin = random.Random(arguments.seed), time.monotonic()
    steps = 25 * arguments.kills + 200
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "runs"
        more = {"train__max_steps": steps, "train__log_every": 1, "checkpoint__every": 5}
        undisturbed = jobs.settings(folder, "steady", **{**more, "checkpoint__every": steps})
        with jobs.started([*jobs.torchrun(), *undisturbed]) as job:
            assert job.end(seconds=1800) == 0, job.text
        start = jobs.torchrun(
            2, "--standalone", "--max-restarts", str(arguments.kills + 5), "--monitor-interval", "0.1"
        )
        done = 0
        with jobs.started([*start, *jobs.settings(folder, "run", **more)]) as job:
            while done < arguments.kills and job.process.poll() is None:
                done += kill_one(job, folder / "run" / "checkpoints", rng)
            code = job.end(seconds=600)
        same = tensors(folder, "run", steps) == tensors(folder, "steady", steps)
        lives = len(jobs.read_events(folder / "run", "resume"))
    seconds, verdict = time.monotonic() - begin, "the same bits" if same else "OTHER BITS"
    print(f"{done} kills, {lives} resumes, {steps} steps, {seconds:.0f} s: exit {code}, {verdict}")
    return 0 if same and code == 0 and done == arguments.kills else 1


if __name__ == "__main__":
    from tests.support.script import run_script

    run_script(main)

"""Three tables about jobs on a simulated cluster: every way to start one, what goes wrong with each way, and restarts.

    .venv/bin/python tests/benchmarks/clusters.py ways --data data/CoLA --model path/to/model
    .venv/bin/python tests/benchmarks/clusters.py faults
    .venv/bin/python tests/benchmarks/clusters.py restarts --rounds 3

`ways`: 50 steps of configs/cola.yaml on one process, on 3 nodes of 1 rank and on 2 nodes of 2; the largest relative
difference of a loss, and the wall time. `faults`: how long until no rank and until nothing at all was left on any node, the
exit code of what was typed, and the last line that its user saw; `--by torchrun deepspeed` only for these ways to start it.
`restarts`: seconds from a fault to the next new step, with a spare host and without, beside torchrun's elastic job, and how far the
losses of all steps are from those of one process without a fault.
Needs root on Linux and launch/simulate-cluster's packages.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dtrain.config.option_parser import OptionParser  # noqa: E402
from tests.support import jobs  # noqa: E402
from tests.support.cluster_jobs import (  # noqa: E402
    BEFORE_IT_STARTS,
    HANG_TIMEOUT_S,
    LITERAL,
    SCRIPTS,
    WHILE_IT_RUNS,
    ClusterJob,
    cut,
    kill_last_launcher,
    kill_node,
    kill_rank,
    started,
)
from tests.support.simulated import SimulatedCluster, simulated_cluster  # noqa: E402

LAUNCHERS = (*SCRIPTS, *LITERAL)
LIMIT_S = 90.0


def ways(data: Path, model: Path, steps: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "runs"
        folder.mkdir()
        common = [
            "--config",
            str(ROOT / "configs" / "cola.yaml"),
            f"data.path={data}",
            f"model.name_or_path={model}",
            f"train.max_steps={steps}",
            "train.log_every=1",
            "train.eval_every=never",
            f"run.output_dir={folder}",
        ]
        alone = _timed("one process", [*jobs.python(), *common, "run.name=alone"], folder / "alone", None)
        for slots in ([1, 1, 1], [2, 2]):
            with simulated_cluster(len(slots), slots=slots) as cluster:
                for way in (*SCRIPTS, *LITERAL):
                    name = f"{way.replace('/', '-')}-{len(slots)}"
                    begin = time.monotonic()
                    with started(way, cluster, [*common, f"run.name={name}"]) as job:
                        code, _ = job.end(600)
                    shape = f"{len(slots)} nodes x {slots[0]}, {way}"
                    _show(shape, code, time.monotonic() - begin, folder / name, alone)


def _timed(what: str, command: list[str], run: Path, alone: list[float] | None) -> list[float]:
    begin = time.monotonic()
    job = jobs.run(command)
    _show(what, job.process.returncode, time.monotonic() - begin, run, alone)
    return _losses(run)


def _losses(run: Path) -> list[float]:
    return [event["loss"] for event in jobs.read_events(run)]


def _show(what: str, code: int, took_s: float, run: Path, alone: list[float] | None) -> None:
    found = _losses(run) if code == 0 else []
    apart = max((abs(a - b) / b for a, b in zip(found, alone or found, strict=True)), default=float("nan"))
    print(f"{what:36} exit {code}  {len(found)} losses, apart {apart:.1e}  {took_s:.0f} s", flush=True)


def faults(launchers: Sequence[str]) -> None:
    print(
        "| fault | started by | ranks ended after, s | all ended after, s | exit code | last line |\n|---|---|---|---|---|---|"
    )
    for fault in [*WHILE_IT_RUNS, *BEFORE_IT_STARTS]:
        for way in launchers:
            with tempfile.TemporaryDirectory() as place:
                print(f"| {fault} | `{way}` | {_struck(fault, way, Path(place))} |", flush=True)


def _struck(fault: str, way: str, folder: Path) -> str:
    runs = folder / "runs"
    runs.mkdir()
    endless = {key.replace(".", "__"): value for key, value in jobs.ENDLESS.items()}
    settings = jobs.settings(runs, "run", train__hang_timeout=HANG_TIMEOUT_S, run__startup_timeout_s=60, **endless)
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(simulated_cluster(2, private=[runs]))
        planted = BEFORE_IT_STARTS.get(fault)
        if planted is not None:
            planted.plant(cluster, folder)
        options = planted.options if planted is not None and way in SCRIPTS else ()
        begin = time.monotonic()
        job = stack.enter_context(started(way, cluster, settings, *options))
        if fault in WHILE_IT_RUNS:
            job.wait_for(" 5/1000000")
            begin = time.monotonic()
            WHILE_IT_RUNS[fault].strike(cluster, job)
        ranks_s = "-"
        if fault in WHILE_IT_RUNS and jobs.until(lambda: not job.ranks(), LIMIT_S):
            ranks_s = f"{time.monotonic() - begin:.1f}"
        try:
            code, _ = job.end(LIMIT_S - (time.monotonic() - begin))
        except AssertionError:
            line = job.last_of_dtrain() or ("the job trains" if " 5/1000000" in job.first.text else "nothing of dtrain")
            return f"{ranks_s} | not within {LIMIT_S:.0f} | - | {line[:160]}"
        line = job.last_line() if way in SCRIPTS else job.last_of_dtrain() or (job.first.err or [""])[-1]
        return f"{ranks_s} | {time.monotonic() - begin:.1f} | {code} | {line[:160]}"


SPARE = ("launch/dtrain.sh", 1, ("--max-restarts", "1"))
SMALLER = ("launch/dtrain.sh", 0, ("--max-restarts", "1"))
ELASTIC = ("launch/torchrun.sh", 0, ("--nnodes", "1:2", "--max-restarts", "3"))
RESTARTS = {
    "SIGKILL of a rank, dtrain.sh, same hosts": (kill_rank, *SMALLER),
    "SIGKILL of the launcher on node2, dtrain.sh, spare host": (kill_last_launcher, *SPARE),
    "SIGKILL of the launcher on node2, dtrain.sh, smaller": (kill_last_launcher, *SMALLER),
    "node2 without power, dtrain.sh, spare host": (kill_node, *SPARE),
    "node2 without power, dtrain.sh, smaller": (kill_node, *SMALLER),
    "node2 cut off, dtrain.sh, spare host": (cut, *SPARE),
    "SIGKILL of a rank, torchrun.sh, same hosts": (kill_rank, *ELASTIC),
    "node2 without power, torchrun.sh, smaller": (kill_node, *ELASTIC),
}
RESTART_STEPS = 2000


def restarts(rounds: int) -> None:
    """Prints the table of restarts. Every round starts a job of its own for each row."""
    print("| fault, how the job goes on | median s | samples | ranks after | losses apart |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "runs"
        folder.mkdir()
        settings = {
            "train__max_steps": RESTART_STEPS,
            "train__epochs": "null",
            "train__log_every": 1,
            "checkpoint__every": 20,
        }
        job = jobs.run([*jobs.python(), *jobs.settings(folder, "alone", **settings)])
        assert job.process.returncode == 0, job.text
        alone = jobs.read_events(folder / "alone")
        for name, (strike, way, spares, options) in RESTARTS.items():
            found = [_restarted(strike, way, spares, options, folder, settings) for _ in range(rounds)]
            seconds = [each[0] for each in found]
            apart = max(_apart(events, alone) for _, events, _ in found)
            ranks = ", ".join(str(each) for each in sorted({each[2] for each in found}))
            samples = ", ".join(f"{each:.2f}" for each in seconds)
            print(f"| {name} | {statistics.median(seconds):.2f} | {samples} | {ranks} | {apart:.1e} |", flush=True)


def _restarted(
    strike: Callable[[SimulatedCluster, ClusterJob], None],
    way: str,
    spares: int,
    options: Sequence[str],
    folder: Path,
    settings: dict[str, object],
) -> tuple[float, list[dict[str, Any]], int]:
    """Returns seconds from the fault to the next new step, the events of the run, and its ranks at the end."""
    run = folder / "struck"
    shutil.rmtree(run, ignore_errors=True)
    with simulated_cluster(2 + spares) as cluster:
        hosts = cluster.hostfile.read_text()
        cluster.hostfile.write_text(hosts.replace("node3 slots=1", "node3 slots=1 spare"))
        with started(way, cluster, jobs.settings(folder, "struck", **settings), *options) as job:
            job.wait_for(f" 100/{RESTART_STEPS}")
            strike(cluster, job)
            begin = time.monotonic()
            assert jobs.until(lambda: "resumes from the checkpoint" in job.first.text, LIMIT_S), job.first.text
            resumed = time.monotonic()
            code, _ = job.end(LIMIT_S)
        assert code == 0, job.first.text
    events = jobs.read_events(run)
    old = max(event["step"] for event in events if event["monotonic_s"] < resumed)
    new = next(event for event in events if event["monotonic_s"] > resumed and event["step"] > old)
    return new["monotonic_s"] - begin, events, jobs.summary_of(run)["world_size"]


def _apart(events: Sequence[dict[str, Any]], alone: Sequence[dict[str, Any]]) -> float:
    """Returns the largest relative difference of a loss, over all steps and all times that they were done."""
    expected = {event["step"]: event["loss"] for event in alone}
    assert {event["step"] for event in events} == set(expected)
    return max(abs(event["loss"] - expected[event["step"]]) / expected[event["step"]] for event in events)


def main() -> int:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["ways", "faults", "restarts"])
    parser.add_argument("--data", type=Path, help="a folder with CoLA's train.tsv and dev.tsv")
    parser.add_argument("--model", type=Path, help="a BERT-family model folder")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--by", nargs="+", choices=LAUNCHERS, default=LAUNCHERS, help="of the faults")
    parser.add_argument("--rounds", type=int, default=3, help="jobs for each row of the restarts")
    given = parser.parse_args()
    if given.table == "faults":
        faults(given.by)
    elif given.table == "restarts":
        restarts(given.rounds)
    elif given.data is None or given.model is None:
        parser.error("ways needs --data and --model")
    else:
        ways(given.data.resolve(), given.model.resolve(), given.steps)
    return 0


if __name__ == "__main__":
    from tests.support.script import run_script

    run_script(main)

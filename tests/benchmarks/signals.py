"""Signals at random moments of a run with long evaluations and generation, under every launcher.

    .venv/bin/python tests/benchmarks/signals.py --signals 20

Each start of a small translation run gets one signal, as a user would send it, at a random moment of the time that a whole
run takes: in its start, in a step, an evaluation, a generation, an export. The job has to end within 5 s, exit.json with
code 75, and the same command goes on until the run is done; then a new one begins, until all signals are sent. Each run
has to end with the bits of one that nobody disturbed: weights, moments, losses, metrics, predictions and exported model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dtrain.config.option_parser import OptionParser  # noqa: E402
from tests.support import jobs, tiny, tiny_seq2seq  # noqa: E402

STEPS = 6
LIMIT_S = 5.0
USER_1 = 1 << (signal.SIGUSR1 - 1)

Sender = Callable[[jobs.Job], None]


def to_launcher(number: signal.Signals) -> Sender:
    return lambda job: os.kill(job.process.pid, number)


def to_terminal(number: signal.Signals) -> Sender:
    """To the foreground process group: Ctrl-C, or a closed terminal."""
    return lambda job: os.killpg(job.process.pid, number)


LAUNCHERS: dict[str, tuple[Callable[[], list[str]], int, dict[str, Sender]]] = {
    "python": (
        jobs.python,
        1,
        {
            "Ctrl-C": to_terminal(signal.SIGINT),
            "SIGTERM": to_launcher(signal.SIGTERM),
            "SIGHUP": to_terminal(signal.SIGHUP),
        },
    ),
    "torchrun": (
        jobs.torchrun,
        2,
        {
            "Ctrl-C": to_terminal(signal.SIGINT),
            "SIGTERM": to_launcher(signal.SIGTERM),
            "SIGHUP": to_terminal(signal.SIGHUP),
        },
    ),
    "deepspeed": (
        jobs.deepspeed,
        2,
        {"Ctrl-C": to_terminal(signal.SIGINT), "SIGTERM": to_launcher(signal.SIGTERM)},
    ),
    # Its ranks are killed 0.25 s after any other signal.
    "mpirun": (jobs.mpirun, 2, {"SIGUSR1": to_launcher(signal.SIGUSR1)}),
}


@dataclass
class Tally:
    """What was seen under one launcher.

    Attributes:
        sent: signals by kind.
        phases: how many of them arrived in what.
        seconds: from each signal to the end of the last process.
        codes: the code in exit.json.
        faults: what was not as promised.
        runs: complete runs that were compared.
    """

    sent: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    codes: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    runs: int = 0


def settings(folder: Path, name: str, rows: int) -> list[str]:
    made = folder.parent / "made"
    if not made.exists():
        made.mkdir(parents=True)
        tiny_seq2seq.write_tsv(made / "train.tsv", 48, seed=1)
        tiny_seq2seq.write_tsv(made / "validation.tsv", rows, seed=2)
        tiny.tokenizer().save_pretrained(made / "model")
        tiny_seq2seq.t5(dropout=0.1).save_pretrained(made / "model")
    values = {
        "run.output_dir": folder,
        "run.name": name,
        "task.name": "seq2seq",
        "task.max_target_length": 12,
        "model.name_or_path": made / "model",
        "data.path": made,
        "data.cache_dir": folder.parent / "cache",
        "data.max_length": 16,
        "evaluation.generate": True,
        "evaluation.micro_batch_size": 8,
        "evaluation.num_beams": 2,
        "evaluation.best": "{metric: bleu, mode: max}",
        "optim.learning_rate": 1e-3,
        "train.max_steps": STEPS,
        "train.global_batch_size": 16,
        "train.micro_batch_size": 4,
        "train.log_every": 1,
        "train.eval_every": 2,
        "tracking.tensorboard": False,
    }
    return [f"{key}={value}" for key, value in values.items()]


def result(run: Path) -> dict[str, Any]:
    """What a run leaves, without times; of a step that was evaluated twice, the last result."""
    timed = ("time_s", "monotonic_s", "seconds", "examples_per_second")
    events: dict[str, Any] = {}
    for kind in ("train", "eval"):
        for event in jobs.read_events(run, kind):
            events[f"{kind} {event['step']}"] = {key: value for key, value in event.items() if key not in timed}
    files = [run / "predictions" / "validation.jsonl", run / "model" / "model.safetensors"]
    files += sorted((run / "checkpoints").glob(f"step-{STEPS:06d}/*.safetensors"))
    summary = jobs.summary_of(run)
    return {
        "events": events,
        "files": {file.name + file.parent.name: file.read_bytes() for file in files},
        "summary": [summary[key] for key in ("eval", "step", "best_step", "updates")],
    }


def handles_signals(pid: int) -> bool:
    """Whether dtrain has set its signal handlers; before, Python's own end the interpreter's start."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line for line in text.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & USER_1)


def wait_for_ranks(job: jobs.Job, ranks: int) -> None:
    def has_begun() -> bool:
        found = job.ranks()
        return job.has_ended() or (len(found) == ranks and all(map(handles_signals, found)))

    assert jobs.until(has_begun), job.text


def phase_of(run: Path, lines_before: int) -> str:
    """What the run seems to be doing, from what this start has written."""
    events = [json.loads(line) for line in _lines(run / "metrics.jsonl")[lines_before:]]
    if not events:
        return "start"
    last = [event for event in events if event["event"] in ("train", "eval", "export")][-1:]
    if not last:
        return "step 1 or evaluation that was due"
    if last[0]["event"] == "train":
        return "evaluation" if last[0]["step"] % 2 == 0 else "step"
    return "end" if last[0]["step"] == STEPS else "step or export"


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def interrupt(
    command: Sequence[str], run: Path, ranks: int, moment_s: float, send: Sender, kind: str, tally: Tally
) -> bool:
    """One start with one signal; whether the run is over."""
    lines_before = len(_lines(run / "metrics.jsonl"))
    (run / "exit.json").unlink(missing_ok=True)  # of the start before
    with jobs.started(command) as job:
        wait_for_ranks(job, ranks)
        begin = time.monotonic()
        jobs.until(job.has_ended, moment_s)
        if job.has_ended():
            code = job.end()
            if code != 0:
                tally.faults.append(f"ended with {code} before the signal: {job.text[-2000:]}")
            return True
        phase = phase_of(run, lines_before)
        sent_s = time.monotonic()
        send(job)
        gone = job.gone_within(60.0)
        seconds = time.monotonic() - sent_s
        code = job.end()
    where = f"{kind} in {phase}, {moment_s:.1f} s after the start"
    recorded = jobs.exit_of(run)["code"] if (run / "exit.json").exists() else -1
    if recorded == -1 and (code == 75 or "nothing is lost" in job.text):  # there was no run folder yet
        recorded = 75
    if recorded == 0:  # it was at its very end
        tally.phases["after the end"] += 1
        return True
    tally.sent[kind] += 1
    tally.phases[phase] += 1
    tally.seconds.append(seconds)
    tally.codes[recorded] += 1
    if recorded != 75 or not gone or seconds > LIMIT_S:
        tally.faults.append(f"{where}: launcher {code}, exit.json {recorded}, {seconds:.1f} s: {job.text[-3000:]}")
        print(tally.faults[-1], flush=True)
    print(f"  {where}: launcher {code}, exit.json {recorded}, {seconds:.1f} s", flush=True)
    assert begin <= sent_s
    return False


def try_launcher(name: str, folder: Path, *, signals: int, rows: int, rng: random.Random) -> Tally:
    start, ranks, senders = LAUNCHERS[name]
    tally, runs = Tally(), folder / name / "runs"

    def command(run: str) -> list[str]:
        return [*start(), *settings(runs, run, rows)]

    whole = jobs.run(command("warm"))  # fills the cache of prepared data
    begin = time.monotonic()
    whole = jobs.run(command("steady"))
    whole_s = time.monotonic() - begin
    assert whole.process.returncode == 0, whole.text
    expected = result(runs / "steady")
    print(f"{name}: a whole run takes {whole_s:.1f} s", flush=True)
    while sum(tally.sent.values()) < signals:
        run = f"run-{tally.runs}"
        while True:
            kind = rng.choice(sorted(senders))
            moment_s = rng.uniform(0, whole_s) if sum(tally.sent.values()) < signals else 600.0
            if interrupt(command(run), runs / run, ranks, moment_s, senders[kind], kind, tally):
                break
        tally.runs += 1
        print(f"  {run} is done", flush=True)
        if result(runs / run) != expected:
            found = result(runs / run)
            other = [part for part in expected if found[part] != expected[part]]
            tally.faults.append(f"{run} has other {', '.join(other)} than the undisturbed run")
    return tally


def main() -> int:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=20, help="per launcher")
    parser.add_argument("--rows", type=int, default=600, help="rows of each evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("launchers", nargs="*", help=f"default: {' '.join(LAUNCHERS)}")
    arguments = parser.parse_args()
    tallies = {}
    for name in arguments.launchers or LAUNCHERS:
        with tempfile.TemporaryDirectory() as place:
            rng = random.Random(f"{arguments.seed} {name}")
            tallies[name] = try_launcher(name, Path(place), signals=arguments.signals, rows=arguments.rows, rng=rng)
    print(
        f"{'launcher':<10} {'signals':<40} {'75':>4} {'median s':>9} {'most s':>7} {'runs':>5} {'faults':>7}  arrived in"
    )
    for name, tally in tallies.items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.sent.items()))
        phases = ", ".join(f"{count} {phase}" for phase, count in tally.phases.most_common())
        ordered = sorted(tally.seconds)
        print(
            f"{name:<10} {kinds:<40} {tally.codes[75]:>4} {ordered[len(ordered) // 2]:>9.1f} {ordered[-1]:>7.1f} "
            f"{tally.runs:>5} {len(tally.faults):>7}  {phases}"
        )
    for name, tally in tallies.items():
        for fault in tally.faults:
            print(f"{name}: {fault}")
    return 1 if any(tally.faults for tally in tallies.values()) else 0


if __name__ == "__main__":
    from tests.support.script import run_script

    run_script(main)

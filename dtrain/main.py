"""dtrain's command line: order of construction, exit codes.

    python dtrain/main.py --config configs/cola.yaml
    torchrun --nproc-per-node 2 dtrain/main.py --config configs/cola.yaml train.max_steps=100

Nothing heavy is imported before a command really runs: `--help` and a config error answer without torch.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __name__ == "__main__":
    # Run by path, Python puts dtrain/ itself first on its search path; the checkout belongs there instead.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dtrain import console
from dtrain.commands.arguments import parse
from dtrain.config.load import load_config, to_yaml
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.mpi_bootstrap import finalize_mpi
from dtrain.distributed.process_info import age_s, began
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.signals import interruptible
from dtrain.distributed.topology import SINGLE, Topology
from dtrain.errors import CheckpointError, ConfigError, DataError, DtrainError, Interrupted
from dtrain.job.failure import done, end_of, hand_over, report, report_alone, tell_launcher, write_down
from dtrain.job.launcher_watch import end_with_launcher

if TYPE_CHECKING:
    from torch import nn

    from dtrain.tasks.protocol import Task
    from dtrain.training.monitors.protocol import Monitor
    from dtrain.training.summary import Result

ALIKE_S = 1.0
"""Head start for rank 0 with an error that every rank finds: a launcher that sees another end first ends rank 0 too."""

WITHOUT_RUN_FOLDER = ("generate", "export", "download")
"""Commands that leave nothing below run.output_dir."""

HOPELESS = (ConfigError.exit_code, DataError.exit_code, CheckpointError.exit_code)
"""Ends that another start of the same command does not mend."""

GRACE_S = 8.0
"""How long a rank may take to stop when it is told to; all ranks are gone 10 s after Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; every rank gives the exit code of the job's end as it saw it."""
    topology = SINGLE
    console.configure_logging(rank=0, world_size=1)
    try:
        topology = Topology.from_env(os.environ)
        console.configure_logging(rank=topology.rank, world_size=topology.world_size)
        arguments = parse(sys.argv[1:] if argv is None else argv)
        if arguments.command == "goodput":
            return _goodput(arguments, topology)
        if arguments.command == "doctor":
            return _doctor(arguments, topology)
        config = load_config(arguments.config, arguments.overrides, command=arguments.command)
    except DtrainError as error:
        return _report_alike(error, topology)
    if arguments.print_config:
        if topology.is_main:
            sys.stdout.write(to_yaml(config))
        return 0
    return _run(arguments.command, config, topology, dry_run=arguments.dry_run)


def _goodput(arguments: argparse.Namespace, topology: Topology) -> int:
    """The one command that reads files alone: no model, no ranks, no torch."""
    from dtrain.commands.goodput import run_goodput

    if arguments.run is not None and (arguments.overrides or arguments.config):
        raise ConfigError(
            "goodput takes a run's folder, or the --config and settings that it was trained with, not both."
        )
    run = arguments.run or load_config(arguments.config, arguments.overrides).run_dir
    if topology.is_main:
        run_goodput(run, as_json=arguments.json)
    return 0


def _doctor(arguments: argparse.Namespace, topology: Topology) -> int:
    """Starts its own ranks where it needs some, and no torch here."""
    from dtrain.commands.doctor import DoctorOptions, run_doctor

    if topology.world_size > 1:
        raise ConfigError(
            f"doctor is one process that goes to all hosts itself, and this is {topology.describe()}. Start it without."
        )
    config = load_config(arguments.config, arguments.overrides)
    options = DoctorOptions(
        arguments.hostfile,
        arguments.include or "",
        arguments.exclude or "",
        output_dir=Path(config.run.output_dir),
        replicas=config.checkpoint.replicas,
        as_json=arguments.json,
    )
    try:
        return run_doctor(options, os.environ)
    except KeyboardInterrupt:
        log.error("Interrupted. Nothing of the doctor is left on the hosts.")
        return Interrupted.exit_code


def fit(
    config: Config, *, model: nn.Module | None = None, task: Task | None = None, monitors: Sequence[Monitor] = ()
) -> Result:
    """Collective. Trains as the command line does, from Python: see dtrain.fit."""
    begin = time.monotonic()
    topology = Topology.from_env(os.environ)
    context = RankContext(topology)
    console.configure_logging(rank=topology.rank, world_size=topology.world_size)

    def note(cause: str) -> None:
        write_down(end_of(Interrupted(cause), topology), config, context.heartbeat)

    with interruptible(grace_s=GRACE_S, before_exit=note):
        end_with_launcher(topology, note)
        from dtrain.job.session import session

        try:
            with session(config, topology, os.environ) as job:
                from dtrain.commands.train import run_train

                context = job.context  # for note, too: its heartbeat knows whose the folder is
                try:
                    result = run_train(config, context, model=model, task=task, monitors=monitors, began=begin)
                except BaseException as error:
                    lost = hand_over(error, config, job)
                    if lost is not None:
                        raise lost from error
                    raise
        except BaseException as error:  # of before or after the run, too; what is written already stays
            if getattr(error, "is_recorded", True):
                write_down(end_of(error, topology), config, context.heartbeat)
            raise
    if topology.is_main:
        write_down(done(topology), config, context.heartbeat)
    return result


class _Ended(Exception):
    """A command failed and has been reported; leaves the process group without another collective."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _run(command: str, config: Config, topology: Topology, *, dry_run: bool) -> int:
    """Runs the command. What may end it from outside is watched from the start: imports alone take seconds."""

    context = RankContext(topology)
    # One text is answered on the spot, as those commands do; a talk may be, too.
    on_the_spot = (command == "predict" and config.predict.text is not None) or (
        command == "chat" and not config.talk.makes_run_folder
    )
    is_noted = not (dry_run or on_the_spot or command in WITHOUT_RUN_FOLDER)
    if is_noted and (before := _hopeless(config, topology, os.environ)) is not None:
        if topology.is_main:
            log.error("%s", before["message"])
        return int(before["code"])

    def note(cause: str) -> None:
        if is_noted:
            write_down(end_of(Interrupted(cause), topology), config, context.heartbeat)

    def note_and_say(cause: str) -> None:
        note(cause)
        if topology.is_main:
            log.error("%s", cause)

    with interruptible(grace_s=GRACE_S, before_exit=note_and_say):
        try:
            launcher_lives = end_with_launcher(topology, note)
            from dtrain.job.session import session

            with session(config, topology, os.environ, command=command) as job:
                context = job.context  # for note, too: its heartbeat knows whose the folder is
                try:
                    _command(command, config, context, dry_run=dry_run)
                except BaseException as error:
                    code = report(error, config, job, is_noted=is_noted, launcher_lives=launcher_lives)
                    raise _Ended(code) from error
        except _Ended as ended:
            return ended.code
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - nobody is above us
            return report_alone(error, config, context, is_noted=is_noted)
    if topology.is_main and is_noted:
        write_down(done(topology), config, context.heartbeat)
    return 0


def _hopeless(config: Config, topology: Topology, env: Mapping[str, str]) -> dict[str, Any] | None:
    """How this job's last start ended, where torchrun starts ranks again that would only find the same: exit.json of then."""
    if topology.launcher != "torchrun" or env.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    file, launcher_s = config.run_dir / "exit.json", age_s(os.getppid())
    try:
        is_of_this_job = launcher_s is not None and time.time() - file.stat().st_mtime < launcher_s
        ended: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return ended if is_of_this_job and ended.get("code") in HOPELESS else None


def _report_alike(error: DtrainError, topology: Topology) -> int:
    """An error that every rank finds by itself, from the same arguments: said once per node, for files may differ."""
    tell_launcher(end_of(error, topology), topology)
    if topology.is_node_main:
        log.error("%s", error)
    if not topology.is_main:
        time.sleep(ALIKE_S)
    return error.exit_code


def _command(command: str, config: Config, context: RankContext, *, dry_run: bool) -> None:
    match command:
        case "train":
            from dtrain.commands.train import run_dry, run_train

            run_dry(config, context) if dry_run else run_train(config, context, began=began())
        case "evaluate":
            from dtrain.commands.evaluate import run_evaluate

            run_evaluate(config, context)
        case "predict":
            from dtrain.commands.predict import run_predict

            run_predict(config, context)
        case "generate":
            from dtrain.commands.generate import run_generate

            run_generate(config, context)
        case "inspect":
            from dtrain.commands.inspect_model import run_inspect

            run_inspect(config, context)
        case "download":
            from dtrain.commands.download import run_download

            run_download(config, context)
        case "export":
            from dtrain.commands.export import run_export

            run_export(config, context)
        case "chat":
            from dtrain.commands.chat import run_chat

            run_chat(config, context)


def console_script() -> None:
    """Entry point of the `dtrain` command and of running this file."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch.distributed" in sys.modules:
        # Interpreter shutdown with a gloo group that ever existed aborts now and then (SIGABRT in 3 of 24 runs measured).
        finalize_mpi()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    console_script()

"""dtrain's command line: runs one command and returns its exit code.

    python dtrain/main.py --config configs/cola.yaml
    torchrun --nproc-per-node 2 dtrain/main.py --config configs/cola.yaml train.max_steps=100

Heavy libraries are imported only when a command runs: `--help` and config errors need no torch.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __name__ == "__main__":
    # When this file is run by path, Python puts dtrain/ first on its search path. The checkout belongs there instead.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dtrain import console
from dtrain.commands.arguments import parse
from dtrain.config import bounded_json
from dtrain.config.load import load_config, to_yaml
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.launcher_env import DTRAIN
from dtrain.distributed.mpi_bootstrap import finalize_mpi
from dtrain.distributed.process_info import process_start
from dtrain.distributed.process_limit import check_process_limit
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.signals import interrupted_without_save, interruptible
from dtrain.distributed.topology import SINGLE, Topology
from dtrain.errors import NON_RETRYABLE_CODES, ConfigError, DtrainError, Interrupted, TopologyError
from dtrain.job.failure import (
    error_record,
    interrupted_early,
    record_failure,
    report_failure,
    report_failure_alone,
    success_record,
    write_exit_file,
    write_exit_json,
)
from dtrain.job.imports import without_collections
from dtrain.job.launcher_watch import exit_with_launcher
from dtrain.runs.launch_record import is_by_same_agents

if TYPE_CHECKING:
    from torch import nn

    from dtrain.tasks.protocol import Task
    from dtrain.training.monitors.protocol import Monitor
    from dtrain.training.summary import Result

RANK0_HEAD_START_S = 1.0
"""How much later other ranks end after an error that all have: a launcher that sees one end also ends rank 0."""

WITHOUT_RUN_DIR = ("generate", "export", "download")
"""Commands that write nothing below run.output_dir."""

GRACE_S = 3.0
"""How long a rank may take to stop after a signal. All ranks are gone 5 s after Ctrl-C, unless there is more to save."""

REPEAT_ALONE_S = 1.0
"""A second signal after this time quits if there is no launcher, which could have sent the first one again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code of the job, as this rank saw its end."""
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
        return _report_common_error(error, topology)
    if arguments.print_config:
        if topology.is_main:
            sys.stdout.write(to_yaml(config))
        return 0
    run = partial(_run, arguments.command, config, dry_run=arguments.dry_run)
    if arguments.ranks is not None and topology.launcher != DTRAIN:
        return _launch_ranks(arguments, config, run)
    return run(topology)


def _launch_ranks(arguments: argparse.Namespace, config: Config, run: Callable[[Topology], int]) -> int:
    """Starts the ranks of --ranks, and runs the command on them. The config has been checked, so all ranks share it."""
    topology = Topology.from_env(os.environ)
    if topology.launcher != "none" or sys.platform != "linux":
        problem = "needs Linux" if sys.platform != "linux" else f"starts ranks, but this is {topology.describe()}"
        log.error("--ranks %d %s. Remove the option, and start the ranks with torchrun.", arguments.ranks, problem)
        return ConfigError.exit_code

    def run_rank() -> int:
        topology = Topology.from_env(os.environ)
        console.configure_logging(rank=topology.rank, world_size=topology.world_size)
        return run(topology)

    from dtrain.job.preload import preload
    from dtrain.job.rank_launcher import RankLaunch, run_ranks

    exit_file = config.run_dir / "exit.json" if _has_exit_json(arguments.command, config, arguments.dry_run) else None
    try:
        check_process_limit(os.environ, local_world_size=arguments.ranks)
        launch = RankLaunch(
            arguments.ranks,
            arguments.max_restarts or 0,
            exit_file,
            partial(preload, os.environ),
            run_rank,
        )
        return run_ranks(launch, os.environ)
    except (TopologyError, Interrupted) as error:
        log.error("%s", error)
        return error.exit_code


def _goodput(arguments: argparse.Namespace, topology: Topology) -> int:
    """Runs goodput, which only reads files: no model, no ranks, no torch."""
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
    """Runs the doctor, which starts its own ranks if it needs some. This process needs no torch."""
    from dtrain.commands.doctor import DoctorOptions, run_doctor

    if topology.world_size > 1:
        raise ConfigError(
            f"doctor is one process that connects to all hosts, and this is {topology.describe()}. "
            "Start it without a launcher."
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
    """Collective. Trains from Python as the command line does: see dtrain.fit."""
    begin = time.monotonic()
    topology = Topology.from_env(os.environ)
    context, is_torch_loaded = RankContext(topology), "torch" in sys.modules
    console.configure_logging(rank=topology.rank, world_size=topology.world_size)

    def record_cause(cause: BaseException) -> None:
        write_exit_json(error_record(cause, topology), config, context.heartbeat)

    with interruptible(grace_s=GRACE_S, before_exit=record_cause, interrupted=partial(interrupted_early, topology)):
        exit_with_launcher(topology, record_cause)
        from dtrain.job.session import session

        try:
            with session(config, topology, os.environ) as job:
                with without_collections(keep=not is_torch_loaded):
                    from dtrain.commands.train import run_train

                context = job.context  # record_cause needs its heartbeat, which has the id of the lock
                try:
                    result = run_train(config, context, model=model, task=task, monitors=monitors, began=begin)
                except BaseException as error:
                    lost_peer = record_failure(error, config, job)
                    if lost_peer is not None:
                        raise lost_peer from error
                    raise
        except BaseException as error:  # also from before or after the run; an existing exit.json is not replaced
            if getattr(error, "is_recorded", True):
                write_exit_json(error_record(error, topology), config, context.heartbeat)
            raise
    if topology.is_main:
        write_exit_json(success_record(topology), config, context.heartbeat)
    return result


class _ReportedFailure(Exception):
    """A command failed and the error has been reported. Leaves the process group without another collective."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _has_exit_json(command: str, config: Config, dry_run: bool) -> bool:
    # These have no run folder: one text to predict, and a chat unless a setting says otherwise.
    answers_directly = (command == "predict" and config.predict.text is not None) or (
        command == "chat" and not config.talk.makes_run_folder
    )
    return not (dry_run or answers_directly or command in WITHOUT_RUN_DIR)


def _run(command: str, config: Config, topology: Topology, *, dry_run: bool) -> int:
    """Runs the command. Signals and the launcher are watched from the start, since imports take seconds."""
    context, has_exit_json = RankContext(topology), _has_exit_json(command, config, dry_run)
    if has_exit_json and (previous := _non_retryable_failure(config, topology, os.environ)) is not None:
        if topology.is_main:
            log.error("%s", previous["message"])
        return int(previous["code"])

    try:
        check_process_limit(os.environ, local_world_size=topology.local_world_size)
    except TopologyError as error:
        return report_failure_alone(error, config, context, has_exit_json=has_exit_json)
    if config.note is not None and topology.is_main:
        sys.stderr.write(f"{console.printable(config.note)}\n")  # standard output is for the answer

    def record_cause(cause: BaseException) -> None:
        if has_exit_json:
            write_exit_json(error_record(cause, topology), config, context.heartbeat)

    def report_cause(cause: BaseException) -> None:
        record_cause(cause)
        if topology.is_main:
            log.error("%s", cause)

    is_training = command == "train" and not dry_run
    with interruptible(
        grace_s=GRACE_S,
        before_exit=report_cause,
        interrupted=partial(interrupted_early, topology) if is_training else interrupted_without_save,
        repeat_after_s=REPEAT_ALONE_S if topology.launcher == "none" else None,
    ):
        try:
            is_launcher_alive = exit_with_launcher(topology, record_cause)
            from dtrain.job.session import session

            with session(config, topology, os.environ, command=command) as job:
                context = job.context  # record_cause needs its heartbeat, which has the id of the lock
                try:
                    _run_command(command, config, context, dry_run=dry_run)
                except BaseException as error:
                    code = report_failure(
                        error, config, job, has_exit_json=has_exit_json, is_launcher_alive=is_launcher_alive
                    )
                    raise _ReportedFailure(code) from error
        except _ReportedFailure as failure:
            return failure.code
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - this is the outermost handler
            return report_failure_alone(error, config, context, has_exit_json=has_exit_json)
    if topology.is_main and has_exit_json:
        write_exit_json(success_record(topology), config, context.heartbeat)
    return 0


def _non_retryable_failure(config: Config, topology: Topology, env: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns exit.json of this job's last start, if torchrun restarts ranks that would meet the same error again."""
    if topology.launcher != "torchrun" or env.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    try:
        previous: dict[str, Any] = bounded_json.loads((config.run_dir / "exit.json").read_text(encoding="utf-8"))
        is_non_retryable = previous["code"] in NON_RETRYABLE_CODES and is_by_same_agents(previous, config.run_dir)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return previous if is_non_retryable else None


def _report_common_error(error: DtrainError, topology: Topology) -> int:
    """Reports an error that every rank has, from the same arguments: once per node, because files may differ."""
    write_exit_file(error_record(error, topology), topology)
    if topology.is_node_main:
        log.error("%s", error)
    if not topology.is_main:
        time.sleep(RANK0_HEAD_START_S)
    return error.exit_code


def _run_command(command: str, config: Config, context: RankContext, *, dry_run: bool) -> None:
    with without_collections(keep=True):
        run = _import_command(command, context.topology, dry_run=dry_run)
    run(config, context)


def _import_command(command: str, topology: Topology, *, dry_run: bool) -> Callable[[Config, RankContext], object]:
    """Returns the function that runs a command."""
    match command:
        case "train":
            from dtrain.commands.train import run_dry, run_train

            return run_dry if dry_run else partial(run_train, began=_start_of(topology))
        case "evaluate":
            from dtrain.commands.evaluate import run_evaluate

            return run_evaluate
        case "predict":
            from dtrain.commands.predict import run_predict

            return run_predict
        case "generate":
            from dtrain.commands.generate import run_generate

            return run_generate
        case "inspect":
            from dtrain.commands.inspect_model import run_inspect

            return run_inspect
        case "download":
            from dtrain.commands.download import run_download

            return run_download
        case "export":
            from dtrain.commands.export import run_export

            return run_export
    from dtrain.commands.chat import run_chat

    return run_chat


def _start_of(topology: Topology) -> float:
    """Returns when this start began: the imports of forked ranks, in their launcher, are part of their first start."""
    is_first_fork = topology.launcher == DTRAIN and not any(topology.launches.values())
    return process_start(os.getppid() if is_first_fork else None)


def console_script() -> None:
    """Entry point of the `dtrain` command and of this file."""
    console.protect_streams()
    try:
        code = main()
    finally:  # also when argparse has printed its help
        console.flush_streams()
    if "torch.distributed" in sys.modules:
        # Interpreter shutdown after a gloo group existed sometimes aborts (SIGABRT in 3 of 24 measured runs).
        finalize_mpi()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    console_script()

"""dtrain's command line: arguments, order of construction, exit codes.

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
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dtrain import console
from dtrain.commands.farewell import done, end_of, hand_over, report, report_alone, write_down
from dtrain.config import load_config, to_yaml
from dtrain.console import log
from dtrain.dialect import quoted
from dtrain.errors import CheckpointError, ConfigError, DataError, DtrainError, Interrupted
from dtrain.interrupts import interruptible
from dtrain.processes import age_s, began
from dtrain.schema import Config
from dtrain.topology import SINGLE, Topology, finalize_mpi
from dtrain.watch import end_with_launcher

if TYPE_CHECKING:
    from torch import nn

    from dtrain.commands.results import Result
    from dtrain.monitors.protocol import Monitor
    from dtrain.tasks.protocol import Task

ALIKE_S = 1.0
"""Head start for rank 0 with an error that every rank finds: a launcher that sees another end first ends rank 0 too."""

COMMANDS = {
    "train": "fine-tune a model (the default)",
    "evaluate": "measure model.name_or_path on every split but train, exactly",
    "predict": "what model.name_or_path answers: on test splits, on predict.file or to predict.text",
    "generate": "continue a text with a causal language model",
    "inspect": "write hidden states and attentions of a text or of examples",
    "download": "fetch a model or data set of the hub, for nodes without a network",
    "export": "write a run's model to a folder of its own, with a model card",
    "chat": "talk with a chat model, or answer a file of dialogues",
    "goodput": "where the wall time of a run went: goodput runs/cola",
}

EPILOG = """
settings are section.key=value, for example

    dtrain/main.py --config configs/cola.yaml train.max_steps=100 optim.learning_rate=1e-4
    dtrain/main.py --print-config            every setting and its value
    dtrain/main.py --dry-run ...             what would happen: ranks, steps, memory, frozen parts

With no arguments a small character GPT learns from Python's own documentation (configs/quickstart.yaml). Start it under
torchrun, deepspeed, mpirun or srun and the same command runs on many ranks.

exit codes: 0 done, 2 config or usage, 3 data, 4 cluster, 5 loss not finite, 6 checkpoint, 75 pre-empted, 1 anything else
"""


WITHOUT_RUN_FOLDER = ("generate", "export", "download")
"""Commands that leave nothing below run.output_dir."""

HOPELESS = (ConfigError.exit_code, DataError.exit_code, CheckpointError.exit_code)
"""Ends that another start of the same command does not mend."""

GRACE_S = 8.0
"""How long a rank may take to stop when it is told to; all ranks are gone 10 s after Ctrl-C."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}. See dtrain/main.py --help.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments as given; `command` and `overrides` apart.

    Raises:
        ConfigError: an unknown command or option.
    """
    parser = _Parser(
        prog="dtrain/main.py",
        description="Fine-tunes Hugging Face models with the same answer on one process and on many ranks.",
        epilog="commands:\n" + "\n".join(f"  {name:10s} {text}" for name, text in COMMANDS.items()) + "\n" + EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words", nargs="*", metavar="command | section.key=value", help="what to do, and settings over the file's"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings; default: the quickstart")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--dry-run", action="store_true", help="print the plan without training")
    parser.add_argument("--json", action="store_true", help="goodput: one JSON object instead of a table")
    parser.add_argument("--text", metavar="TEXT", help="predict: short for predict.text=TEXT")
    parser.add_argument("--merge", action="store_true", help="export: short for export.merge=true")
    # DeepSpeed's launcher inserts it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    found = parser.parse_intermixed_args(list(argv))
    words: list[str] = found.words
    found.command = words.pop(0) if words and "=" not in words[0] else "train"
    found.run = Path(words.pop(0)) if found.command == "goodput" and words and "=" not in words[0] else None
    found.overrides = [*words, *_spelt_out(found)]
    if found.json and found.command != "goodput":
        raise ConfigError(f"--json is of the goodput command; {found.command} has no such output. Leave it out.")
    if found.dry_run and found.command != "train":
        raise ConfigError(f"--dry-run shows the plan of a training run; {found.command} has none. Leave it out.")
    if found.command not in COMMANDS:
        near = difflib.get_close_matches(found.command, COMMANDS, 1)
        raise ConfigError(
            f"{found.command} is not a command. Did you mean {near[0]}?"
            if near
            else f"{found.command} is not a command: expected one of {', '.join(COMMANDS)}, or section.key=value."
        )
    return found


def _spelt_out(found: argparse.Namespace) -> list[str]:
    """Short options as the settings that they stand for.

    Raises:
        ConfigError: one that belongs to another command.
    """
    short = {
        "--text": ("predict", None if found.text is None else f"predict.text={quoted(found.text)}"),
        "--merge": ("export", "export.merge=true" if found.merge else None),
    }
    for option, (command, setting) in short.items():
        if setting is not None and found.command != command:
            raise ConfigError(f"{option} belongs to the command {command}, not to {found.command}.")
    return [setting for _, setting in short.values() if setting is not None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; every rank gives the exit code of the job's end as it saw it."""
    topology = SINGLE
    console.set_up(rank=0, world_size=1)
    try:
        topology = Topology.from_env(os.environ)
        console.set_up(rank=topology.rank, world_size=topology.world_size)
        arguments = parse(sys.argv[1:] if argv is None else argv)
        if arguments.command == "goodput":
            return _goodput(arguments, topology)
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


def fit(
    config: Config, *, model: nn.Module | None = None, task: Task | None = None, monitors: Sequence[Monitor] = ()
) -> Result:
    """Collective. Trains as the command line does, from Python: see dtrain.fit."""
    begin = time.monotonic()
    topology = Topology.from_env(os.environ)
    console.set_up(rank=topology.rank, world_size=topology.world_size)

    def note(cause: str) -> None:
        write_down(end_of(Interrupted(cause), topology), config, topology.beat)

    with interruptible(grace_s=GRACE_S, before_exit=note):
        end_with_launcher(topology, note)
        from dtrain.commands.watched import session

        try:
            with session(config, topology, os.environ) as job:
                from dtrain.commands.train import run_train

                topology = job.topology  # for note, too: its heartbeat knows whose the folder is
                try:
                    result = run_train(config, topology, model=model, task=task, monitors=monitors, began=begin)
                except BaseException as error:
                    lost = hand_over(error, config, job)
                    if lost is not None:
                        raise lost from error
                    raise
        except BaseException as error:  # of before or after the run, too; what is written already stays
            if getattr(error, "is_noted", True):
                write_down(end_of(error, topology), config, topology.beat)
            raise
    if topology.is_main:
        write_down(done(topology), config, topology.beat)
    return result


class _Ended(Exception):
    """A command failed and has been reported; leaves the process group without another collective."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _run(command: str, config: Config, topology: Topology, *, dry_run: bool) -> int:
    """Runs the command. What may end it from outside is watched from the start: imports alone take seconds."""

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
            write_down(end_of(Interrupted(cause), topology), config, topology.beat)

    def note_and_say(cause: str) -> None:
        note(cause)
        if topology.is_main:
            log.error("%s", cause)

    with interruptible(grace_s=GRACE_S, before_exit=note_and_say):
        try:
            launcher_lives = end_with_launcher(topology, note)
            from dtrain.commands.watched import session

            with session(config, topology, os.environ, command=command) as job:
                topology = job.topology  # for note, too: its heartbeat knows whose the folder is
                try:
                    _command(command, config, topology, dry_run=dry_run)
                except BaseException as error:
                    code = report(error, config, job, is_noted=is_noted, launcher_lives=launcher_lives)
                    raise _Ended(code) from error
        except _Ended as ended:
            return ended.code
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - nobody is above us
            return report_alone(error, config, topology, is_noted=is_noted)
    if topology.is_main and is_noted:
        write_down(done(topology), config, topology.beat)
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
    if topology.is_node_main:
        log.error("%s", error)
    if not topology.is_main:
        time.sleep(ALIKE_S)
    return error.exit_code


def _command(command: str, config: Config, topology: Topology, *, dry_run: bool) -> None:
    match command:
        case "train":
            from dtrain.commands.train import run_dry, run_train

            run_dry(config, topology) if dry_run else run_train(config, topology, began=began())
        case "evaluate":
            from dtrain.commands.evaluate import run_evaluate

            run_evaluate(config, topology)
        case "predict":
            from dtrain.commands.predict import run_predict

            run_predict(config, topology)
        case "generate":
            from dtrain.commands.generate import run_generate

            run_generate(config, topology)
        case "inspect":
            from dtrain.commands.inspect_command import run_inspect

            run_inspect(config, topology)
        case "download":
            from dtrain.commands.download import run_download

            run_download(config, topology)
        case "export":
            from dtrain.commands.export_command import run_export

            run_export(config, topology)
        case "chat":
            from dtrain.commands.chat import run_chat

            run_chat(config, topology)


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

"""Parses dtrain's command line: commands, options, and settings, which load.py reads."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dtrain import __version__
from dtrain.commands.operands import expand_operands, is_setting
from dtrain.config.foreign_names import refusal_of_arguments
from dtrain.config.option_parser import OptionParser, unknown_option
from dtrain.config.yaml_dialect import quote
from dtrain.errors import ConfigError

COMMANDS = {
    "train": "fine-tune a model (the default)",
    "evaluate": "measure a model on every split except train, without approximation",
    "predict": "write the answers of a model: to test splits, predict.file or one text",
    "generate": "continue a text with a causal language model",
    "inspect": "write hidden states and attentions of a text or of examples",
    "download": "download a model or data set from the hub, for nodes without internet access",
    "export": "copy a run's model to a separate folder, with a model card",
    "chat": "chat with a model, or answer a file of dialogues",
    "doctor": "check this machine, or all hosts of --hostfile, before a job: ssh, versions, ports, network speed",
    "goodput": "show how the wall time of a run was spent: goodput runs/cola",
}

WITHOUT_RANKS = ("download", "chat", "doctor", "goodput")
"""Commands that run in one process."""

EPILOG = """
what a command works on:

    dtrain/main.py evaluate RUN              also: inspect RUN TEXT, generate RUN [PROMPT], chat RUN
    dtrain/main.py predict RUN [TEXT]        RUN: a run's folder, model or checkpoint, or the name of a model on the hub;
    dtrain/main.py export RUN FOLDER         task, data and lengths are those of the run

settings are section.key=value, for example

    dtrain/main.py --config configs/cola.yaml train.max_steps=100 optim.learning_rate=1e-4
    dtrain/main.py --print-config            every setting and its value
    dtrain/main.py --dry-run ...             what would happen: ranks, steps, memory, frozen parts

Without arguments, a small character GPT is trained on Python's own documentation (configs/quickstart.yaml). With
--ranks N, and under torchrun, deepspeed, mpirun or srun, the same command runs on many ranks.

exit codes: 0 done, 2 config or usage, 3 data, 4 cluster, 5 loss not finite, 6 checkpoint, 75 preempted, 1 any other error
"""


class Parser(OptionParser):
    """Raises a ConfigError for a wrong command line, where argparse would exit the process."""

    def error(self, message: str) -> NoReturn:
        """
        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message}. See {self.prog} --help.")


def parse(
    argv: Sequence[str], *, program: str = "dtrain/main.py", launcher_options: Sequence[str] = ()
) -> argparse.Namespace:
    """Returns the parsed options, with the command in `command` and the settings in `overrides`.

    Args:
        argv: the arguments after the program's name.
        program: the program that the user called, for error messages.
        launcher_options: further options of that program, suggested for a mistyped one.

    Raises:
        ConfigError: an unknown command or option, or an option of another command.
    """
    parser = Parser(
        prog=program,
        description="Fine-tunes Hugging Face models, with the same results on one process and on many ranks.",
        epilog="commands:\n" + "\n".join(f"  {name:10s} {text}" for name, text in COMMANDS.items()) + "\n" + EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="command [run] [text] | section.key=value",
        help="a command, what it works on, and settings that override the file",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings; default: the quickstart")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--dry-run", action="store_true", help="print the plan without training")
    parser.add_argument("--ranks", type=int, metavar="N", help="run on N ranks of this machine: no launcher is needed")
    parser.add_argument(
        "--max-restarts", type=int, metavar="N", help="with --ranks: start again up to N times after a failure"
    )
    parser.add_argument("--json", action="store_true", help="goodput, doctor: one JSON object instead of a table")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="doctor: file of the hosts to check")
    parser.add_argument("--include", metavar="HOST[:SLOT,..][@..]", help="doctor: only these hosts of the file")
    parser.add_argument("--exclude", metavar="HOST[:SLOT,..][@..]", help="doctor: all hosts except these")
    parser.add_argument(
        "--version", action="version", version=f"dtrain {__version__}", help="print the version and stop"
    )
    parser.add_argument("--text", metavar="TEXT", help="predict: short for predict.text=TEXT")
    parser.add_argument("--merge", action="store_true", help="export: short for export.merge=true")
    # DeepSpeed's launcher adds this option. dtrain reads the same value from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    known = [*parser.long_options(), *launcher_options]
    refusal = refusal_of_arguments(argv, own_options=[*known, "--local_rank", "--local-rank"], commands=list(COMMANDS))
    if refusal is not None:
        raise ConfigError(refusal)
    arguments, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        raise ConfigError(f"{_unknown_option(unknown[0], known)} See {program} --help.")
    words: list[str] = arguments.words
    arguments.command = command = words.pop(0) if words and not is_setting(words[0]) else "train"
    arguments.run = Path(words.pop(0)) if command == "goodput" and words and not is_setting(words[0]) else None
    arguments.overrides = [*expand_operands(command, words), *_expand_short_options(arguments)]
    _refuse_options_of_other_commands(arguments)
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, 1)
        raise ConfigError(
            f"{command} is not a command. Did you mean {nearest[0]}?"
            if nearest
            else f"{command} is not a command: expected one of {', '.join(COMMANDS)}, or section.key=value."
        )
    return arguments


def _unknown_option(word: str, known: Sequence[str]) -> str:
    option, _, value = word.partition("=")
    if "." in option:
        return f"{option} is not an option. Settings have no dashes: {option.lstrip('-')}={value or 'VALUE'}."
    return unknown_option(word, known)


def _expand_short_options(arguments: argparse.Namespace) -> list[str]:
    """Returns the settings that short options stand for.

    Raises:
        ConfigError: an option of another command.
    """
    short = {
        "--text": ("predict", None if arguments.text is None else f"predict.text={quote(arguments.text)}"),
        "--merge": ("export", "export.merge=true" if arguments.merge else None),
    }
    for option, (command, setting) in short.items():
        if setting is not None and arguments.command != command:
            raise ConfigError(f"{option} works only with {command}, not with {arguments.command}. Remove it.")
    return [setting for _, setting in short.values() if setting is not None]


def _refuse_options_of_other_commands(arguments: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: an option that the command does not have.
    """
    command = arguments.command
    if arguments.json and command not in ("goodput", "doctor"):
        raise ConfigError(f"--json works only with goodput and doctor, not with {command}. Remove it.")
    for option in ("hostfile", "include", "exclude"):
        if getattr(arguments, option) is not None and command != "doctor":
            raise ConfigError(
                f"--{option} works only with doctor; {command} gets its hosts from its launcher: launch/torchrun.sh."
            )
    if arguments.ranks is None and arguments.max_restarts is not None:
        raise ConfigError("--max-restarts works only with --ranks N. Add it, or use the launcher's own option.")
    if arguments.ranks is not None and command in WITHOUT_RANKS:
        raise ConfigError(f"{command} runs in one process, so --ranks does not work with it. Remove it.")
    if arguments.ranks is not None and arguments.ranks < 1:
        raise ConfigError(f"--ranks {arguments.ranks} is not a number of ranks: it must be at least 1.")
    if arguments.max_restarts is not None and arguments.max_restarts < 0:
        raise ConfigError(
            f"--max-restarts {arguments.max_restarts} is not a number of restarts: it must be at least 0."
        )
    if arguments.dry_run and command != "train":
        raise ConfigError(f"--dry-run shows the plan of a training run, and {command} has no plan. Remove it.")

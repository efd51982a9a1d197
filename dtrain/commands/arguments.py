"""What may be written on dtrain's command line: commands, options, settings. They are taken apart here, and read elsewhere."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dtrain.config.yaml_dialect import quoted
from dtrain.errors import ConfigError

COMMANDS = {
    "train": "fine-tune a model (the default)",
    "evaluate": "measure model.name_or_path on every split but train, exactly",
    "predict": "what model.name_or_path answers: on test splits, on predict.file or to predict.text",
    "generate": "continue a text with a causal language model",
    "inspect": "write hidden states and attentions of a text or of examples",
    "download": "fetch a model or data set of the hub, for nodes without a network",
    "export": "write a run's model to a folder of its own, with a model card",
    "chat": "talk with a chat model, or answer a file of dialogues",
    "doctor": "look at this machine, or at all hosts of --hostfile, before a job does: ssh, versions, ports, rates",
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


class Parser(argparse.ArgumentParser):
    """Says what is wrong as an error of dtrain's, rather than by leaving the process."""

    def error(self, message: str) -> NoReturn:
        """
        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message}. See {self.prog} --help.")


def parse(
    argv: Sequence[str], *, program: str = "dtrain/main.py", launcher_options: Sequence[str] = ()
) -> argparse.Namespace:
    """Arguments as given; `command` and `overrides` apart.

    Args:
        program, launcher_options: for errors; what was called, and the options that it knows beside these.

    Raises:
        ConfigError: an unknown command or option.
    """
    parser = Parser(
        prog=program,
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
    parser.add_argument("--json", action="store_true", help="goodput, doctor: one JSON object instead of a table")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="doctor: the hosts to look at")
    parser.add_argument("--include", metavar="HOST[:SLOT,..][@..]", help="doctor: only these hosts of the file")
    parser.add_argument("--exclude", metavar="HOST[:SLOT,..][@..]", help="doctor: all but these")
    parser.add_argument("--text", metavar="TEXT", help="predict: short for predict.text=TEXT")
    parser.add_argument("--merge", action="store_true", help="export: short for export.merge=true")
    # DeepSpeed's launcher inserts it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    found, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        raise ConfigError(
            f"{_not_an_option(unknown[0], [*options_of(parser), *launcher_options])} See {program} --help."
        )
    words: list[str] = found.words
    found.command = words.pop(0) if words and "=" not in words[0] else "train"
    found.run = Path(words.pop(0)) if found.command == "goodput" and words and "=" not in words[0] else None
    found.overrides = [*words, *_spelt_out(found)]
    if found.json and found.command not in ("goodput", "doctor"):
        raise ConfigError(
            f"--json is of the commands goodput and doctor; {found.command} has no such output. Leave it out."
        )
    for option in ("hostfile", "include", "exclude"):
        if getattr(found, option) is not None and found.command != "doctor":
            raise ConfigError(
                f"--{option} is of the doctor command; {found.command} takes its hosts from its launcher: launch/torchrun.sh."
            )
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


def _not_an_option(word: str, known: Sequence[str]) -> str:
    option, _, value = word.partition("=")
    if "." in option:
        return f"{option} is not an option. Settings have no dashes: {option.lstrip('-')}={value or 'VALUE'}."
    near = difflib.get_close_matches(option, known, 1)
    return f"{option} is not an option.{f' Did you mean {near[0]}?' if near else ''}"


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """The long options that its help shows."""
    return re.findall(r"--[a-z_-]+", parser.format_usage())


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

"""The parser of command lines that all of dtrain's programs use: an option has one name, and a wrong one is told the nearest."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any


class OptionParser(argparse.ArgumentParser):
    """Refuses an abbreviated option, which argparse takes for the whole one: `--rank 2` for `--ranks 2`.

    The parsers of its subcommands are of this class as well.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "allow_abbrev": False})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses a whole command line; calls `error` for an unknown option, with the nearest one."""
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(unknown_option(unknown[0], self.long_options()))
        return arguments

    def long_options(self) -> list[str]:
        """Returns the long options in the help, those of subcommands included."""
        own = re.findall(r"--[a-z_-]+", self.format_usage())
        of_commands = [
            option
            for action in self._actions
            if isinstance(action, argparse._SubParsersAction)
            for parser in action.choices.values()
            if isinstance(parser, OptionParser)
            for option in parser.long_options()
        ]
        return list(dict.fromkeys([*own, *of_commands]))


def unknown_option(word: str, known: Sequence[str]) -> str:
    """Returns what is wrong with a word that is not an option, and the nearest option."""
    option = word.partition("=")[0]
    if not option.startswith("-"):
        return f"unexpected argument: {word}"
    # An option that begins with the word is nearer than one that merely looks like it.
    longer = [name for name in known if name.startswith(option)] if len(option) > len("--") else []
    nearest = longer[:1] or difflib.get_close_matches(option, known, 1)
    return f"{option} is not an option.{f' Did you mean {nearest[0]}?' if nearest else ''}"

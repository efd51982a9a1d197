"""Answers names of other trainers with what to write here: options of the command line, and keys of a config.

They are not accepted, so that a config has one name for each thing. other_trainers.py has the names.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.config.error_messages import KeyPath, dotted_name, value_at
from dtrain.config.other_trainers import FLAGS, Translation, canonical, is_bool, translate
from dtrain.config.yaml_dialect import show


def refusal_of_arguments(argv: Sequence[str], *, own_options: Sequence[str], commands: Sequence[str]) -> str | None:
    """Returns the message for a command line with options of other trainers; None if it has none.

    Args:
        argv: the arguments after the program's name.
        own_options: options of this program, with dashes.
        commands: words that are commands.
    """
    given = _foreign_arguments(argv, own_options=own_options, commands=commands)
    is_option = [word for word, (_, is_setting) in given.items() if not is_setting]
    if not is_option:
        return None  # load.py answers `name=value`
    by_name = {word.lstrip("-"): value for word, (value, _) in given.items()}
    lines: list[str] = []
    notes: set[str] = set()
    together: dict[str, Any] = {}
    for word, (value, _) in given.items():
        translation = translate(word.lstrip("-"), by_name)
        assert translation is not None, word
        together |= translation.settings
        if translation.note in notes and translation.settings:  # the note on batches, for each part of them
            translation = translation._replace(note="")
        notes.add(translation.note)
        written = word if value is None else f"{word} {value}"
        lines.append(f"command line: {written} is not an option here. {_advice(translation, on_command_line=True)}")
    if len(lines) > 1 and together:
        lines.append(f"Together: {_as_arguments(together)}")
        has_task = "--config" in together or any(word.startswith(("--config", "task")) for word in argv)
        if not has_task and any(name.startswith(("model.name", "data.")) for name in together):
            lines.append("Set task.name=... as well, or begin with a file: --config configs/....yaml.")
    return "\n".join(lines)


def _foreign_arguments(
    argv: Sequence[str], *, own_options: Sequence[str], commands: Sequence[str]
) -> dict[str, tuple[str | None, bool]]:
    """Returns the names of other trainers in a command line: word -> its value, and whether it was `name=value`."""
    # Without dashes, a word is a name only where no command could take it as a text or a path.
    takes_bare_names = not any(word in commands and word != "train" for word in argv)
    found: dict[str, tuple[str | None, bool]] = {}
    skip = False
    for index, argument in enumerate(argv):
        word, equals, value = argument.partition("=")
        has_dashes = word.startswith("-")
        if skip or word in own_options:
            skip = not skip and not equals and index + 1 < len(argv) and not argv[index + 1].startswith("-")
            continue
        if not (has_dashes or equals or takes_bare_names) or translate(word.lstrip("-"), {}) is None:
            continue
        following = argv[index + 1] if index + 1 < len(argv) else None
        if not equals and _is_value(following, of=word, commands=commands):
            value, skip = str(following), True
        found[word] = (value if equals or skip else None, bool(equals) and not has_dashes)
    return found


def _is_value(word: str | None, *, of: str, commands: Sequence[str]) -> bool:
    if word is None or word.startswith("--") or word in commands or "." in word.partition("=")[0] * ("=" in word):
        return False
    return canonical(of.lstrip("-")) not in FLAGS or is_bool(word) or "/" in word


def explain_key(key: KeyPath, values: Mapping[str, Any], *, on_command_line: bool) -> str | None:
    """Returns the message for a key of another trainer in a config, or for `key=value`; None for any other key.

    Args:
        key: of the value.
        values: all settings as nested plain values.
        on_command_line: whether the value is from there; else from a file.
    """
    siblings = value_at(values, key[:-1])
    given = {**values, **(siblings if isinstance(siblings, Mapping) else {})}
    translation = translate(
        str(key[-1]), {name: value for name, value in given.items() if not isinstance(value, Mapping)}
    )
    if translation is None or dotted_name(key) in translation.settings:  # for example an option of another task
        return None
    return f"{dotted_name(key)} is not a setting here. {_advice(translation, on_command_line=on_command_line)}"


def _advice(translation: Translation, *, on_command_line: bool) -> str:
    settings, note = translation
    if not settings:
        return f"Remove it: {note}."
    written = _as_arguments(settings) if on_command_line else _as_lines(settings)
    return f"Write {written}{f' ({note})' if note else ''}."


def _as_arguments(settings: Mapping[str, Any]) -> str:
    """Returns the settings as they can be pasted into a shell."""
    return " ".join(
        f"{name} {shlex.quote(str(value))}"
        if name.startswith("--")
        else shlex.quote(f"{name}={value if isinstance(value, str) else show(value)}")
        for name, value in settings.items()
    )


def _as_lines(settings: Mapping[str, Any]) -> str:
    """Returns the settings as lines of a config file: `'epochs: 3' under 'train:'`."""
    if "--config" in settings:
        return f"on the command line {_as_arguments(settings)}"
    sections: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, *inner, last = name.split(".")
        target = sections.setdefault(section, {})
        for part in inner:
            target = target.setdefault(part, {})
        target[last] = value
    parts = []
    for section, names in sections.items():
        lines = " and ".join(f"'{name}: {show(value)}'" for name, value in names.items())
        parts.append(f"{lines} under '{section}:'")
    return " and ".join(parts)

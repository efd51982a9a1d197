"""Reads YAML files and `section.key=value` into nested plain values, with the location of each, before validation."""

from __future__ import annotations

import difflib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dtrain.config.error_messages import (
    COMMAND_LINE,
    KeyPath,
    annotation_at,
    child_annotation,
    dotted_name,
    takes_mapping_only,
    takes_text_only,
)
from dtrain.config.schema import Config
from dtrain.config.yaml_dialect import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_DIGITS,
    NUMBERS,
    SCALARS,
    TAG,
    LimitError,
    Loader,
    show,
)
from dtrain.errors import ConfigError

EMPTY_TEXTS = (("predict", "text"), ("predict", "text_pair"), ("inspect", "text"))
"""Settings for which nothing after the = is an empty text, and not null."""


@dataclass
class RawSettings:
    """The settings as read so far, before validation."""

    values: dict[str, Any] = field(default_factory=dict)
    """Nested plain values."""
    locations: dict[KeyPath, str] = field(default_factory=dict)
    """Where each key was set: `cola.yaml, line 3` or `command line`."""
    problems: list[str] = field(default_factory=list)
    """Error messages, one line each."""


def read_file(path: Path, settings: RawSettings) -> dict[str, Any]:
    """Returns the mapping in a YAML file. Adds the location of each key, and problems, to `settings`.

    Raises:
        ConfigError: the file cannot be read, or is not YAML.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        nearest = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.y*ml")], 1)
        hint = f" Did you mean {path.parent / nearest[0]}?" if nearest else ""
        raise ConfigError(f"the config file {path} cannot be read: {error.strerror}.{hint}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path} has more than {MAX_BYTES:,} bytes, the limit for a config file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: byte {error.start} is not UTF-8: save the file as UTF-8") from None
    return parse(text, settings, file=str(path))


def parse(text: str, settings: RawSettings, *, file: str) -> dict[str, Any]:
    """Returns the mapping in a file's text. Raises the first syntax error, since nothing can be checked after it."""
    try:
        node = yaml.compose(text, Loader=Loader)
        values = {} if node is None else _read(node, (), Config, settings, file=file)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        if isinstance(error, LimitError):
            raise ConfigError(f"{file}{line}: {error.problem}.") from None
        tab = " Indent with spaces, not tabs." if "\\t" in str(error.problem) else ""
        raise ConfigError(f"{file}{line}: this is not valid YAML: {error.problem}.{tab}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: this is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected sections (task:, model:, data:, ...), found {show(values)}")
    return values


def _read(node: yaml.Node, key: KeyPath, annotation: Any, settings: RawSettings, *, file: str | None) -> Any:
    """Returns a node as plain values. The setting's type decides how a scalar is read: `name: 001` is the text 001.

    Adds the location of each key and each duplicate key to `settings`. `file` is None on the command line.
    """
    location = _location(node, file)
    if isinstance(node, yaml.MappingNode) and node.tag == f"{TAG}map":
        mapping: dict[str, Any] = {}
        for name, child in node.value:
            child_key = (*key, name.value if isinstance(name, yaml.ScalarNode) else "?")
            last = child_key[-1]
            if last in mapping:
                settings.problems.append(
                    f"{_location(name, file)}: {dotted_name(child_key)} is set twice (first: "
                    f"{settings.locations[child_key]}). Keep one."
                )
                continue
            settings.locations[child_key] = _location(name, file)
            mapping[str(last)] = _read(child, child_key, child_annotation(annotation, last), settings, file=file)
        return mapping
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{TAG}seq":
        items = enumerate(node.value)
        return [_read(item, (*key, i), child_annotation(annotation, i), settings, file=file) for i, item in items]
    is_null = node.tag == f"{TAG}null"
    if is_null and takes_mapping_only(annotation):
        return {}  # A section whose lines are all commented out.
    if isinstance(node, yaml.ScalarNode) and takes_text_only(annotation) and not is_null:
        return node.value
    if node.tag in NUMBERS and len(node.value) > MAX_DIGITS:
        settings.problems.append(
            f"{location}: {dotted_name(key)} is a number of {len(node.value):,} characters, where at most {MAX_DIGITS} are "
            "read."
        )
        return None
    if node.tag in SCALARS:
        with suppress(ValueError):  # For example `!!int abc`.
            return SCALARS[node.tag](node.value)
    settings.problems.append(
        f"{location}: {dotted_name(key)} has the YAML tag {node.tag}, which is not supported here. Remove it."
    )
    return None


def _location(node: yaml.Node, file: str | None) -> str:
    return f"{file}, line {node.start_mark.line + 1}" if file else COMMAND_LINE


def read_override(text: str, settings: RawSettings) -> tuple[KeyPath, Any] | None:
    """Returns `section.key=value` as key and value. If it is malformed, adds the problem and returns None."""
    dotted, equals, raw = text.partition("=")
    key = tuple(dotted.split("."))
    if not equals or not all(key):
        is_file = text.endswith((".yaml", ".yml"))
        fix = f"for a config file write --config {text}" if is_file else "write section.key=value, e.g. train.epochs=1"
        settings.problems.append(f"{COMMAND_LINE}: {text!r} is not a setting: {fix}.")
        return None
    if len(key) > MAX_DEPTH:
        settings.problems.append(f"{COMMAND_LINE}: {text:.60}... is nested more than {MAX_DEPTH} levels deep.")
        return None
    annotation = annotation_at(Config, key)
    value_settings = RawSettings()
    try:
        node = yaml.compose(raw, Loader=Loader)
        value = None if node is None else _read(node, key, annotation, value_settings, file=None)
    except yaml.YAMLError as error:
        node, value = None, raw
        if not takes_text_only(annotation):
            problem = getattr(error, "problem", None) or str(error).splitlines()[0]
            kind = "" if isinstance(error, LimitError) else "the value is not valid YAML: "
            settings.problems.append(f"{COMMAND_LINE}: {_shortened(text)}: {kind}{problem}.")
            return None
    is_plain = not isinstance(node, yaml.ScalarNode) or node.style is None
    is_empty_text = not raw and key in EMPTY_TEXTS
    if takes_text_only(annotation) and is_plain and (value is not None or (node is None and raw) or is_empty_text):
        value = raw  # Text keeps a #, a colon or a bracket that YAML would interpret.
    settings.problems += value_settings.problems
    return key, value


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


def apply(key: KeyPath, value: Any, settings: RawSettings) -> None:
    """Sets one override. The command line becomes the location of this key and of everything below it."""
    *above, last = key
    target = settings.values
    for depth, part in enumerate(above, 1):
        if target.get(str(part)) is None:
            target[str(part)] = {}
        target = target[str(part)]
        if not isinstance(target, dict):
            parent = dotted_name(key[:depth])
            settings.problems.append(
                f"{COMMAND_LINE}: {dotted_name(key)} cannot be set, because {parent} is {show(target)}. "
                f"Set {parent} as one value."
            )
            return
    target[str(last)] = value
    settings.locations = {k: location for k, location in settings.locations.items() if k[: len(key)] != key}
    settings.locations[key] = COMMAND_LINE

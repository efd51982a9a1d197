"""Reads the settings of a run from a YAML file and `section.key=value` overrides. Reports all errors in one message.

schema.py declares the settings, error_messages.py builds the messages, and yaml_dialect.py defines the YAML.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dtrain.config.error_messages import (
    ABSENT,
    Difference,
    KeyPath,
    annotation_at,
    child_annotation,
    dotted_name,
    error_lines,
    models_in,
    takes_mapping_only,
    takes_text_only,
    unknown_setting,
    value_at,
)
from dtrain.config.fields import OnResume
from dtrain.config.model import BUILT_TOKENIZERS
from dtrain.config.quickstart import QUICKSTART, quickstart_without_replaced
from dtrain.config.schema import Config
from dtrain.config.trained_model import (
    SOURCE,
    ModelOrigin,
    describe,
    find_run,
    model_folder,
    take_settings,
    unknown_task,
)
from dtrain.config.yaml_dialect import SCALARS, TAG, Loader, dump, show
from dtrain.errors import ConfigError

_COMMAND_LINE = "command line"

EMPTY_TEXTS = (("predict", "text"), ("predict", "text_pair"), ("inspect", "text"))
"""Settings for which nothing after the = is an empty text, and not null."""

WITHOUT_TRAINED_MODEL = ("train", "download")
"""Commands that need no trained model."""


@dataclass
class _RawSettings:
    """The settings as read so far, before validation."""

    values: dict[str, Any] = field(default_factory=dict)
    """Nested plain values."""
    locations: dict[KeyPath, str] = field(default_factory=dict)
    """Where each key was set: `cola.yaml, line 3` or `command line`."""
    problems: list[str] = field(default_factory=list)
    """Error messages, one line each."""


def load_config(path: Path | None, overrides: Sequence[str], *, command: str = "train") -> Config:
    """Reads the settings of one run.

    Args:
        path: a YAML file. None starts from the settings of the run that trained model.name_or_path, for commands that use
            a trained model; else from the quickstart, without the parts that the overrides replace.
        overrides: `section.key=value` with a YAML value. A later one wins over an earlier one and over the file.
        command: names the default run folder of commands other than train (`cola-evaluate`).

    Raises:
        ConfigError: one line per problem, with its location and the fix.
    """
    settings, default_name = _RawSettings(), path.stem if path else None
    if path is not None:
        settings.values = _read_file(path, settings)
    pairs = [pair for text in overrides if (pair := _read_override(text, settings)) is not None]
    run, file = None, path
    if path is None and command not in WITHOUT_TRAINED_MODEL:
        run = _find_run(pairs, settings, command)
    if run is not None:
        settings.values = _settings_of_run(run, pairs, settings, command=command)
        default_name, file = run.name, run.config_file
    elif path is None:
        settings.values = quickstart_without_replaced(pairs)
    for key, value in pairs:
        _apply(key, value, settings)
    _name_run(settings, default_name=default_name, command=command)

    def locate(key: KeyPath) -> str:
        prefixes = [key[:n] for n in range(len(key), 0, -1)]
        above = [settings.locations[prefix] for prefix in prefixes if prefix in settings.locations]
        below = [location for other, location in settings.locations.items() if other[: len(key)] == key]
        return [*above, *below, str(file) if file else _COMMAND_LINE][0]

    problems = settings.problems
    try:
        # The user's modules are never searched in the folder of a model.
        config = Config.model_validate(settings.values).in_folder(path.parent if path else Path())
        problems += _check_allowed_changes(config, locate)
    except ValidationError as error:
        problems += error_lines(error, Config, settings.values, locate=locate, show=show)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    if command in WITHOUT_TRAINED_MODEL:
        return config
    config = _for_trained_model(config, command)
    return config if run is None else config.with_note(describe(run, config, dict(pairs)))


def _find_run(pairs: Sequence[tuple[KeyPath, Any]], settings: _RawSettings, command: str) -> ModelOrigin | None:
    """Returns the run that trained the model of the overrides; None if there is none, or the command needs no task.

    If nothing shows the task, adds that problem.
    """
    values = dict(pairs)
    name = values.get(("model", "name_or_path"))
    if not isinstance(name, str) or command == "export":
        return None
    run = find_run(model_folder(name))
    reads_rows = command in ("evaluate", "predict") or ("inspect", "split") in values
    if run is None and reads_rows and values.keys().isdisjoint({("task", "name"), ("task",)}):
        settings.problems.append(unknown_task(name, command))
    return run


def _settings_of_run(
    run: ModelOrigin, pairs: Sequence[tuple[KeyPath, Any]], settings: _RawSettings, *, command: str
) -> dict[str, Any]:
    """Returns what a command takes from the config.yaml of the run that trained its model."""
    values, chosen = _read_file(run.config_file, settings), dict(pairs)
    taken = take_settings(values, run, chosen, command=command)
    task = chosen.get(("task", "name"))
    if task is not None and isinstance(taken.get("task"), dict) and taken["task"].get("name") != task:
        del taken["task"]  # its options belong to another task
    if any(("data", name) in chosen for name in ("name", "path", "splits")) and isinstance(taken.get("data"), dict):
        taken["data"] = {name: value for name, value in taken["data"].items() if name not in SOURCE}
    # The run's folder may have been moved since, so use its current place.
    place = {"output_dir": str(run.folder.parent)}
    seed = taken.get("run") or {}
    return {**taken, "run": {**seed, **place} if isinstance(seed, dict) else seed}


def _for_trained_model(config: Config, command: str) -> Config:
    """Returns the settings of a training run, changed for a command that only uses the trained model.

    Raises:
        ConfigError: no model is named.
    """
    model = config.model
    if model.name_or_path is None:
        raise ConfigError(
            f"{command} uses a trained model: name its run, as in {command} runs/quickstart, or set model.name_or_path."
        )
    changes: dict[str, Any] = {"name_or_path": model_folder(model.name_or_path)}
    if model.from_scratch:
        changes |= {"from_scratch": False, "config": {}}
    if model.tokenizer in BUILT_TOKENIZERS:  # Training built it from its text and saved it in the model's folder.
        changes["tokenizer"] = None
    return config.model_copy(update={"model": model.model_copy(update=changes)})


def _check_allowed_changes(config: Config, locate: Callable[[KeyPath], str]) -> list[str]:
    """Returns a message for each name in checkpoint.allow_changes that is not a setting.

    Checks two levels only: a deeper key may exist in the older config alone.
    """
    values, key = config.model_dump(mode="json"), ("checkpoint", "allow_changes")
    allowed = config.checkpoint.allow_changes
    unknown = [name for name in allowed if value_at(values, tuple(name.split(".")[:2])) is ABSENT]
    return [f"{locate(key)}: checkpoint.allow_changes: {unknown_setting(name, Config, values)}" for name in unknown]


def to_yaml(config: Config) -> str:
    """Returns all settings as YAML in the order of the schema. `load_config` reads an equal config from it."""
    return dump(config.model_dump(mode="json"))


def differences(old_yaml_text: str | None, config: Config) -> list[Difference]:
    """Returns the settings that differ from an earlier run's config.yaml.

    Empty without such a file (None), and with `run.overwrite`, which moves the earlier run away.

    Raises:
        ConfigError: the text is not a config.
    """
    if old_yaml_text is None or config.run.overwrite:
        return []
    try:
        old: Any = _parse(old_yaml_text, _RawSettings(), file=str(config.run_dir / "config.yaml"))
    except ConfigError as error:
        raise ConfigError(f"{error} Set run.overwrite=true to move this run away and start a new one.") from None
    # Validation fills in settings newer than the file. A file that only another version accepts stays as it is.
    with suppress(ValidationError):
        old = Config.model_validate(old).model_dump(mode="json")
    return list(_compare(old, config.model_dump(mode="json"), ()))


def _compare(old: Any, new: Any, key: KeyPath) -> Iterator[Difference]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*new, *old]):
            yield from _compare(old.get(name, ABSENT), new.get(name, ABSENT), (*key, name))
    elif old != new:
        yield Difference(dotted_name(key), show(old), show(new), _on_resume(key))


def _on_resume(key: KeyPath) -> OnResume:
    """Returns the resume rule of the setting at `key`, or of the nearest setting above it."""
    rule: Any = "refuse"
    for depth, part in enumerate(key):
        for model in models_in(annotation_at(Config, key[:depth])):
            extra = model.model_fields[str(part)].json_schema_extra if part in model.model_fields else None
            rule = extra["resume"] if isinstance(extra, dict) else rule
    nearest: OnResume = rule
    return nearest


def _name_run(settings: _RawSettings, *, default_name: str | None, command: str) -> None:
    """Names an unnamed run after `default_name`, else after the task or the quickstart, and any after the command."""
    run = settings.values.setdefault("run", {})
    if not isinstance(run, dict):
        return
    if (name := run.get("name")) is not None:
        # A name in a file is that of the training run. Another command gets its own folder.
        is_in_file = _COMMAND_LINE not in (settings.locations.get(("run",)), settings.locations.get(("run", "name")))
        if command != "train" and is_in_file and isinstance(name, str) and not name.endswith(f"-{command}"):
            run["name"] = f"{name}-{command}"
        return
    if default_name is None:
        task = settings.values.get("task")
        is_set = not settings.locations.keys().isdisjoint({("task",), ("task", "name")})
        default_name = str(task.get("name")) if isinstance(task, dict) and is_set else str(QUICKSTART["run"]["name"])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", default_name).strip(".-_") or "run"
    run["name"] = name if command == "train" else f"{name}-{command}"


def _read_file(path: Path, settings: _RawSettings) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        nearest = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.y*ml")], 1)
        hint = f" Did you mean {path.parent / nearest[0]}?" if nearest else ""
        raise ConfigError(f"the config file {path} cannot be read: {error.strerror}.{hint}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: byte {error.start} is not UTF-8: save the file as UTF-8") from None
    return _parse(text, settings, file=str(path))


def _parse(text: str, settings: _RawSettings, *, file: str) -> dict[str, Any]:
    """Returns the mapping in a file's text. Raises the first syntax error, since nothing can be checked after it."""
    try:
        node = yaml.compose(text, Loader=Loader)
        values = {} if node is None else _read(node, (), Config, settings, file=file)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        tab = " Indent with spaces, not tabs." if "\\t" in str(error.problem) else ""
        raise ConfigError(f"{file}{line}: this is not valid YAML: {error.problem}.{tab}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: this is not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{file}: an alias (*name) contains itself") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected sections (task:, model:, data:, ...), found {show(values)}")
    return values


def _read(node: yaml.Node, key: KeyPath, annotation: Any, settings: _RawSettings, *, file: str | None) -> Any:
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
    if node.tag in SCALARS:
        with suppress(ValueError):  # For example `!!int abc`.
            return SCALARS[node.tag](node.value)
    settings.problems.append(
        f"{location}: {dotted_name(key)} has the YAML tag {node.tag}, which is not supported here. Remove it."
    )
    return None


def _location(node: yaml.Node, file: str | None) -> str:
    return f"{file}, line {node.start_mark.line + 1}" if file else _COMMAND_LINE


def _read_override(text: str, settings: _RawSettings) -> tuple[KeyPath, Any] | None:
    """Returns `section.key=value` as key and value. If it is malformed, adds the problem and returns None."""
    dotted, equals, raw = text.partition("=")
    key = tuple(dotted.split("."))
    if not equals or not all(key):
        is_file = text.endswith((".yaml", ".yml"))
        fix = f"for a config file write --config {text}" if is_file else "write section.key=value, e.g. train.epochs=1"
        settings.problems.append(f"{_COMMAND_LINE}: {text!r} is not a setting: {fix}.")
        return None
    annotation = annotation_at(Config, key)
    value_settings = _RawSettings()
    try:
        node = yaml.compose(raw, Loader=Loader)
        value = None if node is None else _read(node, key, annotation, value_settings, file=None)
    except yaml.YAMLError as error:
        node, value = None, raw
        if not takes_text_only(annotation):
            problem = getattr(error, "problem", None) or str(error).splitlines()[0]
            settings.problems.append(f"{_COMMAND_LINE}: {text}: the value is not valid YAML: {problem}.")
            return None
    is_plain = not isinstance(node, yaml.ScalarNode) or node.style is None
    is_empty_text = not raw and key in EMPTY_TEXTS
    if takes_text_only(annotation) and is_plain and (value is not None or (node is None and raw) or is_empty_text):
        value = raw  # Text keeps a #, a colon or a bracket that YAML would interpret.
    settings.problems += value_settings.problems
    return key, value


def _apply(key: KeyPath, value: Any, settings: _RawSettings) -> None:
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
                f"{_COMMAND_LINE}: {dotted_name(key)} cannot be set, because {parent} is {show(target)}. "
                f"Set {parent} as one value."
            )
            return
    target[str(last)] = value
    settings.locations = {k: location for k, location in settings.locations.items() if k[: len(key)] != key}
    settings.locations[key] = _COMMAND_LINE

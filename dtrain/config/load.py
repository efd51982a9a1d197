"""Typed settings from a YAML file and `section.key=value` overrides, with every error at once, each with its place.

What settings there are is said in schema.py, what an error says in wording.py, what YAML is here in dialect.py.
"""

from __future__ import annotations

import copy
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
    Key,
    at,
    complaints,
    inside,
    models_in,
    name_of,
    not_a_setting,
    takes_mapping_only,
    takes_text_only,
    value_at,
)
from dtrain.config.fields import OnResume
from dtrain.config.model import BUILT_TOKENIZERS
from dtrain.config.quickstart import QUICKSTART
from dtrain.config.schema import Config
from dtrain.config.yaml_dialect import SCALARS, TAG, Loader, dump, show
from dtrain.errors import ConfigError

_COMMAND_LINE = "command line"


@dataclass
class _Settings:
    """What was read so far: nested plain values, where each key stands, and what is wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def load_config(path: Path | None, overrides: Sequence[str], *, command: str = "train") -> Config:
    """Reads the settings of one run; without a file, those of the quickstart.

    Args:
        path: a YAML file; None for the quickstart, of which an override drops what it makes meaningless, and for
            predict the settings of the run that made model.name_or_path.
        overrides: `section.key=value`, the value in YAML; later ones win, and all win over the file.
        command: names the run's default folder for commands other than train (`cola-evaluate`).

    Raises:
        ConfigError: one line for each thing that is wrong, with its place and the fix.
    """
    settings, stem = _Settings(), path.stem if path else None
    if path is not None:
        settings.values = _read_file(path, settings)
    given = [pair for text in overrides if (pair := _read_override(text, settings)) is not None]
    if path is None and command == "predict" and (path := _config_of_model(given)) is not None:
        settings.values, stem = _read_file(path, settings), path.parent.name
        settings.values["run"] = {"output_dir": str(path.parent.parent)}  # beside the run, wherever that lies now
    elif path is None:
        settings.values = _quickstart_under(given)
    for key, value in given:
        _apply(key, value, settings)
    _name_run(settings, stem=stem, command=command)

    def place(key: Key) -> str:
        around = [settings.places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in settings.places]
        below = [place for other, place in settings.places.items() if other[: len(key)] == key]
        return [*around, *below, str(path) if path else _COMMAND_LINE][0]

    problems = settings.problems
    try:
        config = Config.model_validate(settings.values).in_folder(path.parent if path else Path())
        problems += _unknown_changes(config, place)
    except ValidationError as error:
        problems += complaints(error, Config, settings.values, place=place, show=show)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return config if command in ("train", "download") else _with_the_model_as_it_is(config, command)


def _config_of_model(given: Sequence[tuple[Key, Any]]) -> Path | None:
    """The config.yaml of the run whose model is named; None where the task is named instead, or no model.

    Raises:
        ConfigError: the task cannot be known.
    """
    values = dict(given)
    name = values.get(("model", "name_or_path"))
    if not isinstance(name, str):
        return None
    folder = Path(name).expanduser().absolute()
    inside = folder / "config.yaml"  # a checkpoint has its settings with it, a model beside it
    file = inside if inside.is_file() else folder.parent / "config.yaml"
    if not file.is_file() and values.keys().isdisjoint({("task", "name"), ("task",)}):
        raise ConfigError(
            f"predict does not know what model.name_or_path={name} was trained for: it is not the model folder of a "
            f"run ({file} is not there). Say task.name=..., or give the settings with --config."
        )
    return file if file.is_file() else None


def _with_the_model_as_it_is(config: Config, command: str) -> Config:
    """The settings of a training run, for a command that only uses its model: nothing new is made of it.

    Raises:
        ConfigError: no model is named.
    """
    model = config.model
    if model.name_or_path is None:
        raise ConfigError(f"{command} uses a trained model: set model.name_or_path, e.g. to runs/quickstart/model.")
    changes: dict[str, Any] = {"from_scratch": False, "config": {}} if model.from_scratch else {}
    if model.tokenizer in BUILT_TOKENIZERS:  # from the training text then, saved in the model's folder since
        changes["tokenizer"] = None
    return config.model_copy(update={"model": model.model_copy(update=changes)})


def _unknown_changes(config: Config, place: Callable[[Key], str]) -> list[str]:
    """Names in checkpoint.allow_changes that are no settings; what lies deeper may be in the older config only."""
    values, key = config.model_dump(mode="json"), ("checkpoint", "allow_changes")
    allowed = config.checkpoint.allow_changes
    unknown = [name for name in allowed if value_at(values, tuple(name.split(".")[:2])) is ABSENT]
    return [f"{place(key)}: checkpoint.allow_changes: {not_a_setting(name, Config, values)}" for name in unknown]


def to_yaml(config: Config) -> str:
    """All settings as YAML in the order of the schema; `load_config` reads an equal config from it."""
    return dump(config.model_dump(mode="json"))


def differences(old_yaml_text: str | None, config: Config) -> list[Difference]:
    """What `config` changes against the config.yaml of an earlier run.

    Nothing, where there is no such file (None), or where `run.overwrite` makes it the past.

    Raises:
        ConfigError: the text is no config at all.
    """
    if old_yaml_text is None or config.run.overwrite:
        return []
    try:
        old: Any = _parse(old_yaml_text, _Settings(), file=str(config.run_dir / "config.yaml"))
    except ConfigError as error:
        raise ConfigError(f"{error} Set run.overwrite=true to move this run away and start anew.") from None
    # A setting newer than the file gets its default; a file that only another version can read stays as it is.
    with suppress(ValidationError):
        old = Config.model_validate(old).model_dump(mode="json")
    return list(_compare(old, config.model_dump(mode="json"), ()))


def _compare(old: Any, new: Any, key: Key) -> Iterator[Difference]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*new, *old]):
            yield from _compare(old.get(name, ABSENT), new.get(name, ABSENT), (*key, name))
    elif old != new:
        yield Difference(name_of(key), show(old), show(new), _on_resume(key))


def _on_resume(key: Key) -> OnResume:
    """What the setting at `key`, or the nearest one around it, lets a resumed run do."""
    rule: Any = "refuse"
    for depth, part in enumerate(key):
        for model in models_in(at(Config, key[:depth])):
            extra = model.model_fields[str(part)].json_schema_extra if part in model.model_fields else None
            rule = extra["resume"] if isinstance(extra, dict) else rule
    chosen: OnResume = rule
    return chosen


def _quickstart_under(given: Sequence[tuple[Key, Any]]) -> dict[str, Any]:
    """The quickstart, less the parts that were made for what an override replaces."""

    def names(section: str, *settings: str) -> bool:
        return any(
            key[0] == section and (len(key) == 1 or key[1] in settings) for key, value in given if value is not None
        )

    if names("task", "name"):
        return {}
    base = copy.deepcopy(QUICKSTART)
    del base["run"]  # its name is a default, not the user's choice: see _name_run
    new_model, new_data = names("model", "name_or_path"), names("data", "name", "path")
    if new_model:
        # Learning rate and decay suit a small new model, and would undo what a pretrained one has learned.
        for section in ("model", "optim", "schedule"):
            del base[section]
    if new_data:
        # A validation part is cut off any single file; the block length is bound to the model's positions.
        kept = ("validation_fraction",) if new_model else ("validation_fraction", "max_length")
        base["data"] = {name: base["data"][name] for name in kept}
    return base


def _name_run(settings: _Settings, *, stem: str | None, command: str) -> None:
    """Names the run where the user did not: `stem`, else `quickstart` or the task, and the command."""
    run = settings.values.setdefault("run", {})
    if not isinstance(run, dict) or run.get("name") is not None:
        return
    if stem is None:
        task, is_named = (
            settings.values.get("task"),
            not settings.places.keys().isdisjoint({("task",), ("task", "name")}),
        )
        stem = str(task.get("name")) if isinstance(task, dict) and is_named else str(QUICKSTART["run"]["name"])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-_") or "run"
    run["name"] = name if command == "train" else f"{name}-{command}"


def _read_file(path: Path, settings: _Settings) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        near = difflib.get_close_matches(path.name, [found.name for found in path.parent.glob("*.y*ml")], 1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"the config file {path} cannot be read: {error.strerror}.{hint}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: byte {error.start} is not UTF-8: save the file as UTF-8") from None
    return _parse(text, settings, file=str(path))


def _parse(text: str, settings: _Settings, *, file: str) -> dict[str, Any]:
    """The mapping in a file's text. Syntax errors end it here: there is nothing to check further."""
    try:
        node = yaml.compose(text, Loader=Loader)
        values = {} if node is None else _read(node, (), Config, settings, file=file)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        tab = " Indent with blanks, not tabs." if "\\t" in str(error.problem) else ""
        raise ConfigError(f"{file}{line}: this is not YAML: {error.problem}.{tab}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: this is not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{file}: an alias (*name) contains itself") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected sections (task:, model:, data:, ...), found {show(values)}")
    return values


def _read(node: yaml.Node, key: Key, annotation: Any, settings: _Settings, *, file: str | None) -> Any:
    """A node as plain values, each scalar read as what its setting takes: `name: 001` is the text 001.

    Notes on the way where each key stands and which ones come twice. `file` is None on the command line.
    """
    place = _place(node, file)
    if isinstance(node, yaml.MappingNode) and node.tag == f"{TAG}map":
        mapping: dict[str, Any] = {}
        for name, inner in node.value:
            below = (*key, name.value if isinstance(name, yaml.ScalarNode) else "?")
            if below[-1] in mapping:
                settings.problems.append(
                    f"{_place(name, file)}: {name_of(below)} is set twice (first: {settings.places[below]}). Keep one."
                )
                continue
            settings.places[below] = _place(name, file)
            mapping[str(below[-1])] = _read(inner, below, inside(annotation, below[-1]), settings, file=file)
        return mapping
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{TAG}seq":
        items = enumerate(node.value)
        return [_read(item, (*key, i), inside(annotation, i), settings, file=file) for i, item in items]
    is_null = node.tag == f"{TAG}null"
    if is_null and takes_mapping_only(annotation):
        return {}  # a section whose every line is commented out
    if isinstance(node, yaml.ScalarNode) and takes_text_only(annotation) and not is_null:
        return node.value
    if node.tag in SCALARS:
        with suppress(ValueError):  # !!int abc
            return SCALARS[node.tag](node.value)
    settings.problems.append(f"{place}: {name_of(key)} has the tag {node.tag}, which a config file has no use for.")
    return None


def _place(node: yaml.Node, file: str | None) -> str:
    return f"{file}, line {node.start_mark.line + 1}" if file else _COMMAND_LINE


def _read_override(text: str, settings: _Settings) -> tuple[Key, Any] | None:
    """`section.key=value` as key and value; None, with the problem noted, where it is not one."""
    dotted, equals, raw = text.partition("=")
    key = tuple(dotted.split("."))
    if not equals or not all(key):
        is_file = text.endswith((".yaml", ".yml"))
        cure = f"for a config file write --config {text}" if is_file else "write section.key=value, e.g. train.epochs=1"
        settings.problems.append(f"{_COMMAND_LINE}: {text!r} sets nothing: {cure}.")
        return None
    annotation = at(Config, key)
    reading = _Settings()
    try:
        node = yaml.compose(raw, Loader=Loader)
        value = None if node is None else _read(node, key, annotation, reading, file=None)
    except yaml.YAMLError as error:
        node, value = None, raw
        if not takes_text_only(annotation):
            problem = getattr(error, "problem", None) or str(error).splitlines()[0]
            settings.problems.append(f"{_COMMAND_LINE}: {text}: the value is not YAML: {problem}.")
            return None
    is_plain = not isinstance(node, yaml.ScalarNode) or node.style is None
    if takes_text_only(annotation) and is_plain and (value is not None or (node is None and raw)):
        value = raw  # not what YAML would make of a #, a colon or a bracket in it
    settings.problems += reading.problems
    return key, value


def _apply(key: Key, value: Any, settings: _Settings) -> None:
    """Sets one override, and makes the command line the place of everything below it."""
    *above, last = key
    target = settings.values
    for depth, part in enumerate(above, 1):
        if target.get(str(part)) is None:
            target[str(part)] = {}
        target = target[str(part)]
        if not isinstance(target, dict):
            settings.problems.append(
                f"{_COMMAND_LINE}: {name_of(key)} cannot be set: {name_of(key[:depth])} is {show(target)}. "
                f"Give {name_of(key[:depth])} as a whole."
            )
            return
    target[str(last)] = value
    settings.places = {k: place for k, place in settings.places.items() if k[: len(key)] != key}
    settings.places[key] = _COMMAND_LINE

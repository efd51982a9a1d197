"""Reads the settings of a run from a YAML file and `section.key=value` overrides. Reports all errors in one message.

schema.py declares the settings, raw_settings.py reads their text, and error_messages.py builds the messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dtrain.config.error_messages import (
    ABSENT,
    COMMAND_LINE,
    Difference,
    KeyPath,
    annotation_at,
    dotted_name,
    error_lines,
    models_in,
    unknown_setting,
    value_at,
)
from dtrain.config.fields import OnResume
from dtrain.config.foreign_names import explain_key
from dtrain.config.model import BUILT_TOKENIZERS
from dtrain.config.quickstart import QUICKSTART, quickstart_without_replaced
from dtrain.config.raw_settings import RawSettings, apply, parse, read_file, read_override
from dtrain.config.schema import Config
from dtrain.config.trained_model import (
    SOURCE,
    ModelOrigin,
    describe,
    find_run,
    model_folder,
    shown_path,
    take_settings,
    unknown_task,
)
from dtrain.config.yaml_dialect import dump, show
from dtrain.errors import ConfigError

BEFORE = {("train", "sort_by_length"): False}
"""What versions did that did not have a setting yet, where its default would change the numbers of a run."""

WITHOUT_TRAINED_MODEL = ("train", "download")
"""Commands that need no trained model."""


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
    settings, default_name = RawSettings(), path.stem if path else None
    if path is not None:
        settings.values = read_file(path, settings)
    pairs = [pair for text in overrides if (pair := read_override(text, settings)) is not None]
    run, file = None, path
    if path is None and command not in WITHOUT_TRAINED_MODEL:
        run = _find_run(pairs, settings, command)
    if run is not None:
        settings.values = _settings_of_run(run, pairs, settings, command=command)
        default_name, file = run.name, run.config_file
    elif path is None:
        settings.values = quickstart_without_replaced(pairs)
    for key, value in pairs:
        apply(key, value, settings)
    _name_run(settings, default_name=default_name, command=command)

    def locate(key: KeyPath) -> str:
        prefixes = [key[:n] for n in range(len(key), 0, -1)]
        above = [settings.locations[prefix] for prefix in prefixes if prefix in settings.locations]
        below = [location for other, location in settings.locations.items() if other[: len(key)] == key]
        return [*above, *below, str(file) if file else COMMAND_LINE][0]

    def explain(key: KeyPath) -> str | None:
        return explain_key(key, settings.values, on_command_line=locate(key) == COMMAND_LINE)

    problems = settings.problems
    try:
        # The user's modules are never searched in the folder of a model.
        config = Config.model_validate(settings.values).in_folder(path.parent if path else Path())
        problems += _check_allowed_changes(config, locate)
    except ValidationError as error:
        problems += error_lines(error, Config, settings.values, locate=locate, show=show, explain=explain)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    if command in WITHOUT_TRAINED_MODEL:
        return config
    config = _for_trained_model(config, command)
    return config if run is None else config.with_note(describe(run, config, dict(pairs), command=command))


def _find_run(pairs: Sequence[tuple[KeyPath, Any]], settings: RawSettings, command: str) -> ModelOrigin | None:
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
    run: ModelOrigin, pairs: Sequence[tuple[KeyPath, Any]], settings: RawSettings, *, command: str
) -> dict[str, Any]:
    """Returns what a command takes from the config.yaml of the run that trained its model."""
    values, chosen = read_file(run.config_file, settings), dict(pairs)
    taken = take_settings(values, run, chosen, command=command)
    task = chosen.get(("task", "name"))
    if task is not None and isinstance(taken.get("task"), dict) and taken["task"].get("name") != task:
        del taken["task"]  # its options belong to another task
    if any(("data", name) in chosen for name in ("name", "path", "splits")) and isinstance(taken.get("data"), dict):
        taken["data"] = {name: value for name, value in taken["data"].items() if name not in SOURCE}
    # The run's folder may have been moved since, so use its current place.
    place = {"output_dir": shown_path(run.folder.parent)}
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
        old: Any = parse(old_yaml_text, RawSettings(), file=str(config.run_dir / "config.yaml"))
    except ConfigError as error:
        raise ConfigError(f"{error} Set run.overwrite=true to move this run away and start a new one.") from None
    # Validation fills in settings newer than the file. A file that only another version accepts stays as it is.
    old = _with_earlier_behavior(old)
    with suppress(ValidationError):
        old = Config.model_validate(old).model_dump(mode="json")
    return list(_compare(old, config.model_dump(mode="json"), ()))


def as_begun(old_yaml_text: str | None, config: Config) -> Config:
    """Returns the config for going on with a run: with what dtrain did before it had a setting, if the run began so.

    A setting that this start names itself stays as it is, and counts as a change.

    Args:
        old_yaml_text: the run's config.yaml; None without one.
    """
    if old_yaml_text is None:
        return config
    try:
        old: Any = parse(old_yaml_text, RawSettings(), file="config.yaml")
    except ConfigError:  # `differences` reports it
        return config
    old = _with_earlier_behavior(old)
    for (section, name), value in BEFORE.items():
        part = getattr(config, section)
        if name not in part.model_fields_set and value_at(old, (section, name)) == value:
            config = config.model_copy(update={section: part.model_copy(update={name: value})})
            # What this start did not name itself stays unnamed.
            getattr(config, section).model_fields_set.discard(name)
    return config


def _with_earlier_behavior(old: Any) -> Any:
    """Returns the values of a config.yaml, with what dtrain did before it had a setting that the file lacks."""
    for (section, name), value in BEFORE.items():
        part = old.get(section) if isinstance(old, Mapping) else None
        if isinstance(part, Mapping) and name not in part:
            old = {**old, section: {**part, name: value}}
    return old


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


def _name_run(settings: RawSettings, *, default_name: str | None, command: str) -> None:
    """Names an unnamed run after `default_name`, else after the task or the quickstart, and any after the command."""
    run = settings.values.setdefault("run", {})
    if not isinstance(run, dict):
        return
    if (name := run.get("name")) is not None:
        # A name in a file is that of the training run. Another command gets its own folder.
        is_in_file = COMMAND_LINE not in (settings.locations.get(("run",)), settings.locations.get(("run", "name")))
        if command != "train" and is_in_file and isinstance(name, str) and not name.endswith(f"-{command}"):
            run["name"] = f"{name}-{command}"
        return
    if default_name is None:
        task = settings.values.get("task")
        is_set = not settings.locations.keys().isdisjoint({("task",), ("task", "name")})
        default_name = str(task.get("name")) if isinstance(task, dict) and is_set else str(QUICKSTART["run"]["name"])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", default_name).strip(".-_") or "run"
    run["name"] = name if command == "train" else f"{name}-{command}"

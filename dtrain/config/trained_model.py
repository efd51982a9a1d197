"""Finds the run that trained a model, and takes the settings from its config.yaml that the model needs.

The folder of a model may come from a stranger. So its config.yaml says what was learned and from which columns, but not
what to execute or where to write: that counts only on the command line or in a file that the user names with --config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dtrain.config import bounded_json
from dtrain.config.error_messages import ABSENT, KeyPath, dotted_name, value_at
from dtrain.config.near_folder import did_you_mean
from dtrain.config.yaml_dialect import show
from dtrain.errors import ConfigError

TAKEN: Mapping[str, tuple[str, ...]] = {
    "run": ("seed",),
    "task": ("*",),
    "model": ("attn_implementation", "batch_norm"),
    "data": (
        *("name", "path", "config", "splits", "validation_fraction", "split", "split_seed", "columns", "delimiter"),
        *("encoding", "header", "max_length", "limit", "max_bad_rows"),
    ),
    "engine": ("precision",),
    "evaluation": (
        *("micro_batch_size", "micro_batch_tokens", "best", "metrics", "generate", "num_beams", "max_new_tokens"),
    ),
    "generate": ("*",),
    "talk": ("system",),
}
"""What is taken, by section. None of it executes code or writes a file. The model's folder has the rest."""

SOURCE = ("name", "path", "config", "splits", "validation_fraction", "split", "limit")
"""Settings of the data section that belong together: the user's own source replaces all of them."""

OF_ROWS = ("data", "evaluation")
"""Sections that say which rows are read, and how they are judged."""

WITH_ROWS = ("evaluate", "predict", "inspect")
"""Commands that read rows of a data set, or a text as if it were such a row. The others only write one."""

LIMITS: Mapping[KeyPath, int] = {
    ("generate", "max_new_tokens"): 100_000,
    ("evaluation", "max_new_tokens"): 100_000,
    ("evaluation", "num_beams"): 1000,
    ("evaluation", "micro_batch_size"): 100_000,
    ("evaluation", "micro_batch_tokens"): 10_000_000,
    ("task", "max_target_length"): 1_000_000,
    ("task", "image_size"): 10_000,
    ("task", "n_best"): 10_000,
    ("task", "max_answer_length"): 1_000_000,
    ("data", "max_length"): 10_000_000,
}
"""Settings that cost time or memory, and the largest value that is taken from a file that the user did not write."""

CODE: Mapping[KeyPath, str] = {
    ("model", "trust_remote_code"): "runs Python code that comes with the model",
    ("model", "factory"): "runs your Python code",
    ("model", "attn_implementation"): "downloads and runs compiled code",
    ("evaluation", "factory"): "runs your Python code",
}
"""Settings that execute code, and what they do."""

WITH_METRICS = ("evaluate",)
"""Commands that call evaluation.factory of a trained model's settings."""


@dataclass(frozen=True)
class ModelOrigin:
    """Where a model comes from: the run that trained it, as its folder shows.

    Attributes:
        config_file: the config.yaml of the run, or the one in a checkpoint.
        folder: the run's folder, where it is now.
        name: the run's name; with the step, for a checkpoint.
    """

    config_file: Path
    folder: Path
    name: str


def model_folder(name: str) -> str:
    """Returns the model's folder for a run's folder; any other name or folder unchanged.

    Raises:
        ConfigError: the run has no model yet, or the folder is that of its checkpoints.
    """
    folder = Path(name).expanduser()
    if _is_model(folder) or not folder.is_dir():
        return name
    if _is_model(folder / "model"):
        return str(Path(name) / "model")
    checkpoints = sorted((folder if folder.name == "checkpoints" else folder / "checkpoints").glob("step-*"))
    if not checkpoints:
        return name
    raise ConfigError(
        f"{name} contains checkpoints, but no model: set model.name_or_path to one of them, e.g. {checkpoints[-1]}, or resume "
        "the run until it writes its model."
    )


def find_run(model: str) -> ModelOrigin | None:
    """Returns the run that trained a model; None if `model` is neither a run's model/ nor one of its checkpoints."""
    folder = Path(model).expanduser().absolute()
    if (folder / "config.yaml").is_file():
        run = folder.parents[1] if folder.parent.name == "checkpoints" else folder
        return ModelOrigin(folder / "config.yaml", run, folder.name if run == folder else f"{run.name}-{folder.name}")
    if folder.name == "model" and (folder.parent / "config.yaml").is_file():
        return ModelOrigin(folder.parent / "config.yaml", folder.parent, folder.parent.name)
    return None


def take_settings(values: Mapping[str, Any], run: ModelOrigin, chosen: Mapping[KeyPath, Any], *, command: str) -> Any:
    """Returns the settings of a run's config.yaml that a command may take from it, as nested plain values.

    Args:
        values: the content of that file.
        chosen: the user's own settings.

    Raises:
        ConfigError: the file asks to execute code, or for more than LIMITS, and the user has not decided about that setting.
    """
    _refuse_code(values, run, chosen, command=command)
    _refuse_costly(values, run, chosen)
    return {
        section: {name: value for name, value in content.items() if {name, "*"} & set(TAKEN[section])}
        if isinstance(content, Mapping)
        else content  # not a section: validation says so
        for section, content in values.items()
        if section in TAKEN
    }


def describe(run: ModelOrigin, config: BaseModel, chosen: Mapping[KeyPath, Any], *, command: str) -> str:
    """Returns one line that lists the settings taken from a run, except defaults, what the user has chosen, and what the
    command does not use.
    """
    texts = []
    values = config.model_dump(mode="json")
    for section, names in TAKEN.items():
        if command not in WITH_ROWS and section in OF_ROWS:
            continue
        part = getattr(config, section)
        for name, field in type(part).model_fields.items():
            is_taken = {name, "*"} & set(names) and not {(section,), (section, name)} & chosen.keys()
            if is_taken and getattr(part, name) != field.get_default(call_default_factory=True):
                texts.append(f"{section}.{name}={show(values[section][name])}")
    return f"Settings from {shown_path(run.config_file)}: {' '.join(texts)}"


def unknown_task(model: str, command: str) -> str:
    """Returns the message for a model whose folder does not show its task."""
    try:
        content = bounded_json.loads((Path(model).expanduser() / "config.json").read_text(encoding="utf-8"))
        classes = ", ".join(map(str, content["architectures"]))[:100]
        hint = f" Its config.json names {classes}."
    except (OSError, ValueError, KeyError, TypeError):
        hint = ""
    if not Path(model).expanduser().exists():
        hint = did_you_mean(model) or " There is no such folder here."
    return (
        f"{command} does not know the task of {model}: it is neither a run's folder nor a run's model or checkpoint.{hint} "
        "Set task.name=... and the data, or pass the settings with --config."
    )


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()


def _refuse_code(values: Mapping[str, Any], run: ModelOrigin, chosen: Mapping[KeyPath, Any], *, command: str) -> None:
    for key, effect in CODE.items():
        section, name = key
        value = value_at(values, key)
        is_used = section != "evaluation" or command in WITH_METRICS
        has_code = "/" in str(value) if name == "attn_implementation" else value not in (ABSENT, None, False)
        if not has_code or not is_used or _is_decided(key, chosen):
            continue
        place = values[str(section)].get(f"{name}_folder")
        setting = f"{section}.{name}={show(value)}" + (f" {section}.{name}_folder={show(place)}" if place else "")
        none = "false" if value is True else "null"
        raise ConfigError(
            f"{shown_path(run.config_file)} sets {section}.{name}={show(value)}, which {effect}. A file that comes with a model "
            f"may not do that. If you trust this code, add {setting} to the command; to go without it, add {section}.{name}={none}."
        )


def _refuse_costly(values: Mapping[str, Any], run: ModelOrigin, chosen: Mapping[KeyPath, Any]) -> None:
    for key, limit in LIMITS.items():
        value, name = value_at(values, key), dotted_name(key)
        if type(value) is int and value > limit and not _is_decided(key, chosen):
            raise ConfigError(
                f"{shown_path(run.config_file)} sets {name}={value!r:.20}, which could take all the memory or never end. "
                f"From a file that comes with a model, at most {limit} is taken. Add your own value to the command, e.g. "
                f"{name}={limit}"
            )


def _is_decided(key: KeyPath, chosen: Mapping[KeyPath, Any]) -> bool:
    """Returns whether the user has set that setting, or its whole section."""
    return key in chosen or key[:1] in chosen


def shown_path(file: Path) -> str:
    """Returns a path, relative to the working folder if it is inside it."""
    return str(file.relative_to(Path.cwd())) if file.is_relative_to(Path.cwd()) else str(file)

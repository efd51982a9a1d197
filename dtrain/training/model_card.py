"""The model card: README.md in the model's folder, which says what the model was trained on and how, for the hub.

It does not mention this machine: only the last part of a path is kept.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from dtrain.config import bounded_json, schema
from dtrain.config.schema import Config
from dtrain.data import glue
from dtrain.data.resolve_source import PYTHON_DOCS
from dtrain.data.split_readers import hub_name
from dtrain.models.adapters import CONFIG_FILE as ADAPTERS
from dtrain.runs.folder import write_text_atomic
from dtrain.tasks.build import task_info

CARD = "README.md"

OMITTED = ("run.output_dir", "run.overwrite", "run.startup_timeout_s", "data.cache_dir", "checkpoint.", "tracking.")
"""Prefixes of settings that do not describe the model."""

OTHER_COMMANDS = ("generate", "talk", "export", "inspect", "download")
"""Sections of commands that do not train."""

TOKEN = re.compile(r"hf_\w{8,}")
"""An access token of the hub."""


def write_card(folder: Path, config: Config, summary: Mapping[str, Any], *, task: str) -> None:
    """Writes the card of a finished training run into the model's folder.

    Args:
        config: Config of the training run.
        summary: Its summary.json.
        task: Name of the task. It is not the config's if the task came from Python.

    Raises:
        DtrainError: the file cannot be written.
    """
    write_text_atomic(folder / CARD, trained_card(config, summary, task=task, folder=folder))


def trained_card(config: Config, summary: Mapping[str, Any], *, task: str, folder: Path) -> str:
    """Returns the card of a training run.

    Args:
        folder: The model's folder, for its config.json and, with adapters, adapter_config.json.
    """
    name, model, adapters = (
        str(config.run.name or task),
        _read_json(folder / "config.json"),
        _read_json(folder / ADAPTERS),
    )
    parts = [
        _front_matter(config, summary, task=task, library=_library(model, adapters), name=name),
        f"# {name}\n\n{_describe_model(config, model)}, fine-tuned by dtrain for `{task}`.",
        _usage(model, adapters),
        "## Results\n\n" + (_table(("metric", "value"), summary["eval"]) if summary["eval"] else "Not evaluated."),
        f"## Data\n\n{_describe_data(config)}\n\n" + _table(("split", "rows"), summary.get("rows", {})),
        "## Training\n\n```\n" + command_line(config) + "\n```\n\n" + _describe_run(summary),
        _table(("setting", "value"), dict(_hyperparameters(config))),
        "## Versions\n\n" + _table(("package", "version"), summary["versions"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def bare_card(name: str, folder: Path) -> str:
    """Returns the card of a model without a known training run."""
    model, adapters = _read_json(folder / "config.json"), _read_json(folder / ADAPTERS)
    data = ModelCardData(library_name=_library(model, adapters), tags=["dtrain"])
    head = f"---\n{data.to_yaml()}\n---"
    return "\n\n".join(part for part in (head, f"# {name}", _usage(model, adapters)) if part) + "\n"


def command_line(config: Config) -> str:
    """Returns the training command with every setting that differs from its default."""
    changed = _changed_settings(config.model_dump(mode="json"), _defaults(config))
    words = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in changed
        if not key.startswith(OMITTED) and key.split(".")[0] not in OTHER_COMMANDS
    ]
    return shlex.join(["dtrain", "train", *words])


def _defaults(config: Config) -> dict[str, dict[str, Any]]:
    """Returns the default of each setting by section, without settings that have no default."""
    sections = {name: getattr(config, name) for name in Config.model_fields}
    bare = {name: type(section).model_construct() for name, section in sections.items()}
    defaults = {name: section.model_dump(mode="json", warnings=False) for name, section in bare.items()}
    return {**defaults, "train": schema.Train().model_dump(mode="json")}


def redact_paths(value: Any) -> Any:
    """Returns the value without paths of this machine and without access tokens of the hub."""
    if isinstance(value, Mapping):
        return {key: redact_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~", "..")) or "://" in value:
        value = Path(value).name or "..."
    return TOKEN.sub("hf_...", value)


def _changed_settings(
    values: Mapping[str, Any], defaults: Mapping[str, Any], above: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yields `section.key` and value of each setting that differs from its default."""
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping) and not above:
            yield from _changed_settings(value, default, f"{key}.")
        elif value != default:
            yield above + key, redact_paths(value)


def _front_matter(config: Config, summary: Mapping[str, Any], *, task: str, library: str | None, name: str) -> str:
    """Returns YAML between two lines of dashes. huggingface_hub makes and checks it."""
    pipeline, dataset = _pipeline(config, task), _hub_data(config)
    # The hub compares results on one split, so that results on a part of it or on another split are left out.
    is_complete = (config.data.limit, config.data.validation_fraction, config.data.splits) == (None, None, {})
    metrics = {key: float(value) for key, value in summary["eval"].items() if _is_finite(value)}
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type=dataset[0],
            dataset_name=str(config.data.name),
            dataset_config=dataset[1],
            dataset_split="validation",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in metrics.items()
        if pipeline is not None and dataset is not None and is_complete
    ]
    data = ModelCardData(
        base_model=_base_model(config),
        base_model_relation="adapter" if library == "peft" and _base_model(config) is not None else None,
        datasets=[dataset[0]] if dataset is not None else None,
        library_name=library,
        metrics=[metric for metric in metrics if metric != "loss"] or None,
        pipeline_tag=pipeline,
        tags=["dtrain", task.replace("_", "-")],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _describe_model(config: Config, model: Mapping[str, Any]) -> str:
    kind = model.get("model_type", "own")
    if config.model.name_or_path is None:
        return f"A new {kind} model"
    name = f"`{redact_paths(config.model.name_or_path)}`"
    return f"A new {kind} model with the architecture of {name}" if config.model.from_scratch else name


def _base_model(config: Config) -> str | None:
    """Returns the hub's name of the model that was fine-tuned. None for a folder and for new weights."""
    name = config.model.name_or_path
    if name is None or config.model.from_scratch or Path(name).exists():
        return None
    return name if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name) else None


def _hub_data(config: Config) -> tuple[str, str | None] | None:
    """Returns the hub's name and configuration of the data. None for the user's files."""
    data = config.data
    if data.name is None or data.name == PYTHON_DOCS or (data.path is not None and data.name not in glue.NAMES):
        return None
    return hub_name(data)


def _describe_data(config: Config) -> str:
    data = config.data
    if data.name == PYTHON_DOCS:
        return "The language reference that is part of every Python installation."
    named = [f"`{part}`" for part in (data.name, data.config, data.path and data.path.name) if part]
    return ", ".join(redact_paths(named)) if named else "Passed from Python."


def _pipeline(config: Config, task: str) -> str | None:
    """Returns the hub's name of the task. None for a task from Python, of which only the name is known."""
    return task_info(config.task).pipeline_tag if task == config.task.name else None


def _library(model: Mapping[str, Any], adapters: Mapping[str, Any]) -> str | None:
    if adapters:
        return "peft"
    return "transformers" if "model_type" in model else None


def _usage(model: Mapping[str, Any], adapters: Mapping[str, Any]) -> str:
    """Returns code that loads the folder.

    Args:
        model: The folder's config.json.
        adapters: Its adapter_config.json, if it holds only adapters.
    """
    names = model.get("architectures") or []
    if not names or "model_type" not in model:
        return ""
    is_for_images = "ForImageClassification" in names[0]
    input_class, variable = ("AutoImageProcessor", "processor") if is_for_images else ("AutoTokenizer", "tokenizer")
    imports, lines = [input_class, names[0]], [f'model = {names[0]}.from_pretrained("FOLDER")']
    if adapters:
        imports.append("AutoConfig")
        base = redact_paths(str(adapters.get("base_model_name_or_path")))
        # The base model may have a head of another size: the folder has the trained one.
        mismatch = ", ignore_mismatched_sizes=True" if adapters.get("modules_to_save") else ""
        lines = [
            'config = AutoConfig.from_pretrained("FOLDER")',
            f'base = {names[0]}.from_pretrained("{base}", config=config{mismatch})',
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        ]
    code = [
        *(["from peft import PeftModel"] if adapters else []),
        f"from transformers import {', '.join(sorted(imports))}",
        "",
        *lines,
        f'{variable} = {input_class}.from_pretrained("FOLDER")',
    ]
    note = (
        "The folder holds only LoRA adapters for the base model. `dtrain export ... export.merge=true` merges both into\n"
        "one model.\n\n"
    )
    return (note if adapters else "") + "\n".join(["```python", *code, "```"])


def _describe_run(summary: Mapping[str, Any]) -> str:
    world = summary["world_size"]
    ranks = "one process" if world == 1 else f"{world} processes, started by {summary['launcher']}"
    return f"Ran on {ranks}, engine {summary['engine']}: {summary['step']} steps over {summary['examples']} examples."


def _hyperparameters(config: Config) -> Iterator[tuple[str, Any]]:
    dumped = config.model_dump(mode="json")
    yield "seed", config.run.seed
    yield "max_length", config.max_length
    yield "precision", config.engine.precision
    for section in ("task", "optim", "schedule", "train", "freeze"):
        for key, value in redact_paths(dumped[section]).items():
            if value not in (None, [], {}) and key not in ("eval_every", "log_every", "log_gradients"):
                yield f"{section}.{key}", value if isinstance(value, str) else json.dumps(value)


def _table(heads: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {heads[0]} | {heads[1]} |", "|---|---|"]
    lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join(lines) if rows else ""


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, or an empty one if there is none."""
    try:
        content = bounded_json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

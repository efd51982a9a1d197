"""The model card, README.md beside the weights: what the model was trained on and how, in the form that the hub reads.

Nothing of one machine is in it: a path is cut to its last part.
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

from dtrain.config import schema
from dtrain.config.schema import Config
from dtrain.config.task import Seq2Seq
from dtrain.data import glue
from dtrain.data.resolve_source import PYTHON_DOCS
from dtrain.data.split_readers import hub_name
from dtrain.models.adapters import CONFIG_FILE as ADAPTERS
from dtrain.runs.folder import write_text_atomic

CARD = "README.md"

PIPELINES = {
    "classification": "text-classification",
    "regression": "text-classification",
    "multiple_choice": "multiple-choice",
    "causal_lm": "text-generation",
    "chat": "text-generation",
    "masked_lm": "fill-mask",
    "question_answering": "question-answering",
    "token_classification": "token-classification",
    "image_classification": "image-classification",
}
"""What the hub calls a task, where it has one name for it (seq2seq: see `_pipeline`)."""

NOT_TOLD = ("run.output_dir", "run.overwrite", "run.startup_timeout_s", "data.cache_dir", "checkpoint.", "tracking.")
"""Settings that say nothing about the model."""

NOT_OF_TRAINING = ("generate", "talk", "export", "inspect", "download")

TOKEN = re.compile(r"hf_\w{8,}")


def write_card(folder: Path, config: Config, summary: Mapping[str, Any], *, task: str) -> None:
    """Writes the card of a finished training run into the model's folder.

    Args:
        config: of the training run.
        summary: its summary.json.
        task: its name; not the config's, where the task came from Python.

    Raises:
        DtrainError: the file cannot be written.
    """
    write_text_atomic(folder / CARD, trained_card(config, summary, task=task, folder=folder))


def trained_card(config: Config, summary: Mapping[str, Any], *, task: str, folder: Path) -> str:
    """The card of a training run. folder: of the model, for its config.json and, of adapters, adapter_config.json."""
    name, model, adapters = str(config.run.name or task), _json_of(folder / "config.json"), _json_of(folder / ADAPTERS)
    parts = [
        _front_matter(config, summary, task=task, library=_library(model, adapters), name=name),
        f"# {name}\n\n{_origin(config, model)}, fine-tuned by dtrain for `{task}`.",
        _usage(model, adapters),
        "## Results\n\n" + (_table(("metric", "value"), summary["eval"]) if summary["eval"] else "Not evaluated."),
        f"## Data\n\n{_data(config)}\n\n" + _table(("split", "rows"), summary.get("rows", {})),
        "## Training\n\n```\n" + command_line(config) + "\n```\n\n" + _circumstances(summary),
        _table(("setting", "value"), dict(_hyper_parameters(config))),
        "## Versions\n\n" + _table(("package", "version"), summary["versions"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def bare_card(name: str, folder: Path) -> str:
    """The card of a model of which no training run is known."""
    model, adapters = _json_of(folder / "config.json"), _json_of(folder / ADAPTERS)
    data = ModelCardData(library_name=_library(model, adapters), tags=["dtrain"])
    head = f"---\n{data.to_yaml()}\n---"
    return "\n\n".join(part for part in (head, f"# {name}", _usage(model, adapters)) if part) + "\n"


def command_line(config: Config) -> str:
    """The training command with every setting that is not the default's."""
    changed = _changes(config.model_dump(mode="json"), _defaults(config))
    words = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in changed
        if not key.startswith(NOT_TOLD) and key.split(".")[0] not in NOT_OF_TRAINING
    ]
    return shlex.join(["dtrain", "train", *words])


def _defaults(config: Config) -> dict[str, dict[str, Any]]:
    """What each setting is where nobody sets it; a setting without a default is left out."""
    sections = {name: getattr(config, name) for name in Config.model_fields}
    bare = {name: type(section).model_construct() for name, section in sections.items()}
    found = {name: section.model_dump(mode="json", warnings=False) for name, section in bare.items()}
    return {**found, "train": schema.Train().model_dump(mode="json")}


def without_places(value: Any) -> Any:
    """Text that is a path of this machine, or holds a token of the hub, becomes one that tells neither."""
    if isinstance(value, Mapping):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~", "..")) or "://" in value:
        value = Path(value).name or "..."
    return TOKEN.sub("hf_...", value)


def _changes(values: Mapping[str, Any], defaults: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """`section.key` and value of each setting that is not its default."""
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping) and not above:
            yield from _changes(value, default, f"{key}.")
        elif value != default:
            yield above + key, without_places(value)


def _front_matter(config: Config, summary: Mapping[str, Any], *, task: str, library: str | None, name: str) -> str:
    """YAML between two lines of dashes, from huggingface_hub, which checks it."""
    pipeline, dataset = _pipeline(config, task), _hub_data(config)
    # The hub compares results on one split; a part of it, or another under its name, is not to be compared.
    is_whole = (config.data.limit, config.data.validation_fraction, config.data.splits) == (None, None, {})
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
        if pipeline is not None and dataset is not None and is_whole
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


def _origin(config: Config, model: Mapping[str, Any]) -> str:
    kind = model.get("model_type", "own")
    if config.model.name_or_path is None:
        return f"A new {kind} model"
    what = f"`{without_places(config.model.name_or_path)}`"
    return f"A new {kind} model made like {what}" if config.model.from_scratch else what


def _base_model(config: Config) -> str | None:
    """The name on the hub of the model that this one began as; None for a folder and for new weights."""
    name = config.model.name_or_path
    if name is None or config.model.from_scratch or Path(name).exists():
        return None
    return name if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name) else None


def _hub_data(config: Config) -> tuple[str, str | None] | None:
    """Name and configuration on the hub of the data; None for files of the user's own."""
    data = config.data
    if data.name is None or data.name == PYTHON_DOCS or (data.path is not None and data.name not in glue.NAMES):
        return None
    return hub_name(data)


def _data(config: Config) -> str:
    data = config.data
    if data.name == PYTHON_DOCS:
        return "The language reference that every Python installation carries."
    named = [f"`{part}`" for part in (data.name, data.config, data.path and data.path.name) if part]
    return ", ".join(without_places(named)) if named else "Given from Python."


def _pipeline(config: Config, task: str) -> str | None:
    """What the hub calls the task. It tells translation and summarization apart, as the metric does."""
    if isinstance(config.task, Seq2Seq) and task == config.task.name:
        return config.task.metric
    return PIPELINES.get(task)


def _library(model: Mapping[str, Any], adapters: Mapping[str, Any]) -> str | None:
    if adapters:
        return "peft"
    return "transformers" if "model_type" in model else None


def _usage(model: Mapping[str, Any], adapters: Mapping[str, Any]) -> str:
    """How the folder is loaded. adapters: their config, where it holds nothing else."""
    names = model.get("architectures") or []
    if not names or "model_type" not in model:
        return ""
    beside = "AutoImageProcessor" if "ForImageClassification" in names[0] else "AutoTokenizer"
    called = "processor" if beside == "AutoImageProcessor" else "tokenizer"
    imports, lines = [beside, names[0]], [f'model = {names[0]}.from_pretrained("FOLDER")']
    if adapters:
        imports.append("AutoConfig")
        base = without_places(str(adapters.get("base_model_name_or_path")))
        # A head of another size in the base model is no fault: the folder brings the one that was trained.
        other = ", ignore_mismatched_sizes=True" if adapters.get("modules_to_save") else ""
        lines = [
            'config = AutoConfig.from_pretrained("FOLDER")',
            f'base = {names[0]}.from_pretrained("{base}", config=config{other})',
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        ]
    code = [
        *(["from peft import PeftModel"] if adapters else []),
        f"from transformers import {', '.join(sorted(imports))}",
        "",
        *lines,
        f'{called} = {beside}.from_pretrained("FOLDER")',
    ]
    told = (
        "The folder holds LoRA adapters alone, which go on their base model; `dtrain export ... export.merge=true` makes\n"
        "one model of both.\n\n"
    )
    return (told if adapters else "") + "\n".join(["```python", *code, "```"])


def _circumstances(summary: Mapping[str, Any]) -> str:
    world = summary["world_size"]
    ranks = "one process" if world == 1 else f"{world} processes, started by {summary['launcher']}"
    return f"Ran on {ranks}, engine {summary['engine']}: {summary['step']} steps over {summary['examples']} examples."


def _hyper_parameters(config: Config) -> Iterator[tuple[str, Any]]:
    dumped = config.model_dump(mode="json")
    yield "seed", config.run.seed
    yield "max_length", config.max_length
    yield "precision", config.engine.precision
    for section in ("task", "optim", "schedule", "train", "freeze"):
        for key, value in without_places(dumped[section]).items():
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


def _json_of(file: Path) -> dict[str, Any]:
    """The object in a JSON file; nothing where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

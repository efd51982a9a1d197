"""Writes a model as a Hugging Face folder that from_pretrained loads, tokenizer included."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dtrain.config.model import BUILT_TOKENIZERS
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.collectives import on_main
from dtrain.engine.protocol import Engine
from dtrain.errors import CheckpointError, ConfigError, DtrainError
from dtrain.models import adapters, user_module
from dtrain.models.custom_head import HeadedModel
from dtrain.models.saved_tokenizer import find_difference, save_tokenizer
from dtrain.runs.folder import replace_folder, write_json_atomic
from dtrain.tasks.protocol import Task
from dtrain.training.stopping import NO_STOP, StopCondition

SAMPLE = 200
"""Training examples whose texts are compared before training."""


def export_model(engine: Engine, tokenizer: Any, target: Path, stop: StopCondition = NO_STOP) -> None:
    """Collective. Gathers the weights to rank 0, which writes a temporary folder and renames it to `target`.

    Args:
        stop: a signal breaks the export off, which leaves `target` as it was.

    Raises:
        RunStopped: on every rank, after a signal.
    """
    stop.leave_together(engine.context)
    weights = {name: value for name, value in engine.named_weights() if value is not None}
    temporary = target.with_name(f".tmp-{target.name}")

    def save_draft() -> None:
        difference = save(engine.module, weights, tokenizer, temporary)
        if difference is not None:  # `check_reload` refuses this at the start, so something changed since
            log.warning("%s: do not use its tokenizer: it %s", target, difference)

    def write() -> None:
        try:
            if stop.attempt(save_draft):
                replace_folder(temporary, target)
            else:
                shutil.rmtree(temporary, ignore_errors=True)
        except (OSError, SafetensorError, DtrainError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"The model cannot be written to {target}: {error}. Is the disk full? Make room and run the same command "
                "again: with checkpoint.every it trains nothing again, and only writes the model"
            ) from error

    on_main(write, engine.context)
    stop.leave_together(engine.context)


def save_without_weights(module: nn.Module, task: Task, folder: Path) -> None:
    """Saves a model's config and tokenizer, without weights. Does nothing for a module with adapters.

    Args:
        folder: existing and empty.
    """
    if hasattr(module, adapters.CONFIG_ATTRIBUTE):
        return
    with tempfile.TemporaryDirectory(dir=folder) as place:
        temporary = Path(place) / "model"
        save(module, {}, processor_or_tokenizer(task), temporary, config_only=True)
        for file in temporary.iterdir():
            if file.suffix != ".safetensors":
                file.rename(folder / file.name)


def check_reload(module: nn.Module, task: Task, config: Config) -> None:
    """Checks before training that the model's folder will give its users the tokenizer that the model is trained with.

    Raises:
        ConfigError: it reloads as another one.
    """
    tokenizer = task.tokenizer
    if not isinstance(processor_or_tokenizer(task), PreTrainedTokenizerBase):
        return
    remote, texts = config.model.trust_remote_code, _some_texts(task)
    with tempfile.TemporaryDirectory(prefix="dtrain-") as place:
        folder = Path(place) / "model"
        _save_config(module, folder)
        difference = save_tokenizer(tokenizer, folder, texts)
        if difference is None and remote:
            difference = find_difference(tokenizer, folder, texts, trust_remote_code=True)
    if difference is None:
        return
    kind = getattr(getattr(module, "config", None), "model_type", type(module).__name__)
    name = config.model.tokenizer or config.model.name_or_path
    fix = "Set model.tokenizer=train-bpe" if config.model.from_scratch else "Leave model.tokenizer out"
    if config.model.tokenizer in BUILT_TOKENIZERS:
        fix += ", or choose another architecture: model.config.model_type=qwen3 or llama, for example"
    raise ConfigError(
        f"The tokenizer {name} cannot be saved with a {kind} model: in the folder of such a model, the saved tokenizer "
        f"{difference}. {fix}."
    )


def _save_config(module: nn.Module, folder: Path) -> None:
    """Writes what a model's folder has besides weights and tokenizer.

    The save_pretrained of a model imports DeepSpeed, where it is installed, in 0.1 s: a model of transformers has its own
    parts written instead.
    """
    is_special = hasattr(module, adapters.CONFIG_ATTRIBUTE) or getattr(module, "hf_quantizer", None) is not None
    if is_special or not isinstance(module, PreTrainedModel) or module.is_remote_code():
        save(module, {}, None, folder, config_only=True)
        return
    module.config.save_pretrained(str(folder))
    if module.can_generate():
        module.generation_config.save_pretrained(str(folder))


def _some_texts(task: Task) -> list[str]:
    """Returns the texts of the first training examples, if their columns have the usual names."""
    split = task.splits.get("train")
    rows: Any = split[list(range(min(SAMPLE, len(split))))] if split is not None and len(split) else {}
    columns = [rows[name] for name in ("input_ids", "labels") if isinstance(rows, Mapping) and name in rows]
    lists = chain.from_iterable(_token_lists(column) for column in columns)
    return [task.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in lists]


def _token_lists(values: Sequence[Any]) -> Iterator[list[int]]:
    """Yields the innermost lists of tokens, without positions that are ignored. Multiple choice has a list per choice."""
    if not len(values) or isinstance(values[0], str | float):
        return
    if isinstance(values[0], int):
        yield [token for token in values if token >= 0]
        return
    for inner in values:
        if hasattr(inner, "__len__"):
            yield from _token_lists(inner)


def processor_or_tokenizer(task: Task) -> Any:
    """Returns the tokenizer or image processor, which is saved with the weights."""
    return getattr(task, "processor", None) or task.tokenizer


def save(
    module: nn.Module, weights: dict[str, torch.Tensor], tokenizer: Any, folder: Path, *, config_only: bool = False
) -> str | None:
    """Writes config, weights and tokenizer into a new folder.

    Args:
        module: any; for one that is not from transformers, only its weights and the name of its class are saved.
        weights: each parameter once; shared ones get their other names here.
        config_only: the weights that are written are not meaningful.

    Returns:
        How the tokenizer differs from the one that AutoTokenizer loads from the folder; None if it does not.
    """
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted export
    first_name = {id(parameter): name for name, parameter in module.named_parameters()}
    state: dict[str, torch.Tensor] = {}
    if not config_only:
        state = {name: weights[first_name[id(p)]] for name, p in module.named_parameters(remove_duplicate=False)}
        buffers = {name: value for name, value in module.state_dict().items() if name not in state}
        state.update({name: value.detach().cpu() for name, value in buffers.items()})
    record = getattr(module, user_module.CONFIG_ATTRIBUTE, {})
    if hasattr(module, adapters.CONFIG_ATTRIBUTE):
        adapters.save(module, state, folder)
    elif isinstance(module, PreTrainedModel | HeadedModel):
        for key, value in record.items():
            setattr(module.config, key, value)
        module.save_pretrained(str(folder), state_dict=state)
    else:
        folder.mkdir(parents=True)
        whole = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
        save_file(whole, folder / "model.safetensors")
        write_json_atomic(folder / "config.json", {"architectures": [type(module).__name__], **record})
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return save_tokenizer(tokenizer, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    return None

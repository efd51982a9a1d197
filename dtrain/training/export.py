"""Writes a model as a Hugging Face folder that from_pretrained loads, tokenizer included."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from dtrain.distributed.collectives import on_main
from dtrain.engine.protocol import Engine
from dtrain.errors import CheckpointError, DtrainError
from dtrain.models import adapters, user_module
from dtrain.models.custom_head import HeadedModel
from dtrain.runs.folder import replace_folder, write_json_atomic
from dtrain.tasks.protocol import Task


def export_model(engine: Engine, tokenizer: Any, target: Path) -> None:
    """Collective. Gathers the weights to rank 0, which writes a temporary folder and renames it to `target`."""
    weights = {name: value for name, value in engine.named_weights() if value is not None}

    def write() -> None:
        temporary = target.with_name(f".tmp-{target.name}")
        try:
            save(engine.module, weights, tokenizer, temporary)
            replace_folder(temporary, target)
        except (OSError, SafetensorError, DtrainError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"The model cannot be written to {target}: {error}. Is the disk full?") from error

    on_main(write, engine.context)


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


def processor_or_tokenizer(task: Task) -> Any:
    """Returns the tokenizer or image processor, which is saved with the weights."""
    return getattr(task, "processor", None) or task.tokenizer


def save(
    module: nn.Module, weights: dict[str, torch.Tensor], tokenizer: Any, folder: Path, *, config_only: bool = False
) -> None:
    """Writes config, weights and tokenizer into a new folder.

    Args:
        module: any; for one that is not from transformers, only its weights and the name of its class are saved.
        weights: each parameter once; shared ones get their other names here.
        config_only: the weights that are written are not meaningful.
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
        save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors")
        write_json_atomic(folder / "config.json", {"architectures": [type(module).__name__], **record})
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))

"""Loads a model without its head, to inspect hidden states and attentions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from dtrain.config import schema
from dtrain.errors import ConfigError
from dtrain.models import adapters, merging
from dtrain.models.architecture import check_name_or_path, read_config
from dtrain.models.custom_head import HeadedModel
from dtrain.models.foreign_files import check_sizes
from dtrain.models.hub_errors import LOADING_ERRORS, explain, quiet


def load_base(model: schema.Model) -> nn.Module:
    """Returns the model without its head, fp32, on the host, in eval mode; for an encoder-decoder, the encoder.

    Uses "eager" attention, the only implementation that returns the attentions.

    Raises:
        ConfigError: the name or folder cannot be loaded, or has no weights for such a model.
        DataError: the hub does not answer.
        CheckpointError: files are damaged.
    """
    name = model.name_or_path
    if name is not None and (Path(name) / adapters.CONFIG_FILE).is_file():
        module = merging.load_with_adapters(Path(name), base=model.lora_base)
        merging.merge(module)
        return _without_head(module.backbone if isinstance(module, HeadedModel) else module)
    local_only = check_name_or_path(model)
    config = read_config(model, local_only)
    assert name is not None
    check_sizes(AutoModel, name, config, setting="model.name_or_path")
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            loaded, info = AutoModel.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                trust_remote_code=model.trust_remote_code,
                local_files_only=local_only,
                output_loading_info=True,
                attn_implementation="eager",
            )
    except LOADING_ERRORS as error:
        raise explain(error, name=name, setting="model.name_or_path") from error
    # Not every file has a pooler, and nothing that is inspected depends on it.
    missing = [key for key in sorted(info["missing_keys"]) if "pooler" not in key]
    if missing:
        raise ConfigError(
            f"model.name_or_path={name}: {', '.join(missing[:3])} is not in its weights, so its output would be random."
        )
    return _without_head(loaded)


def _without_head(loaded: Any) -> nn.Module:
    loaded.set_attn_implementation("eager")
    base = loaded.base_model
    module: nn.Module = (base.get_encoder() if base.config.is_encoder_decoder else base).eval()
    return module

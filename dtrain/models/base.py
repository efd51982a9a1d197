"""A model without a head, for looking inside: hidden states and attentions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from dtrain.config import schema
from dtrain.errors import ConfigError
from dtrain.models import adapters
from dtrain.models.architecture import locate, read_config
from dtrain.models.hub_errors import LOADING_ERRORS, explain, quiet


def load_base(model: schema.Model) -> nn.Module:
    """The body of the model that the config names, fp32, on the host, in eval mode; of an encoder-decoder, the encoder.

    Its attention is computed step by step ("eager"), the only implementation that gives the attentions.

    Raises:
        ConfigError: a name or folder that cannot be loaded, or that has no weights of such a body.
        DataError: the hub does not answer.
        CheckpointError: damaged files.
    """
    name = model.name_or_path
    if name is not None and (Path(name) / adapters.CONFIG).is_file():
        return _body(adapters.merged(Path(name)))
    local_only = locate(model)
    config = read_config(model, local_only)
    assert name is not None
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
    # A pooler is not in every file, and nothing that is looked at comes from it.
    missing = [key for key in sorted(info["missing_keys"]) if "pooler" not in key]
    if missing:
        raise ConfigError(
            f"model.name_or_path={name}: {', '.join(missing[:3])} is not in its weights, so that what it computes would "
            "be random."
        )
    return _body(loaded)


def _body(loaded: Any) -> nn.Module:
    loaded.set_attn_implementation("eager")
    bare = loaded.base_model
    module: nn.Module = (bare.get_encoder() if bare.config.is_encoder_decoder else bare).eval()
    return module

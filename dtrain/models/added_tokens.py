"""Adds the tokens of model.add_tokens and model.pad_token to a tokenizer, and rows for them to a model's embeddings.

A new row is the mean of the old ones, so that a new token is at first as likely as the average one, and the same on every rank.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dtrain.config import schema
from dtrain.console import log
from dtrain.errors import ConfigError
from dtrain.models.compatibility import learned_positions


def add_tokens(tokenizer: PreTrainedTokenizerBase, model: schema.Model) -> None:
    """Adds the tokens of the settings that the tokenizer does not have, and sets its pad token."""
    known = tokenizer.get_vocab()
    wanted = [*model.add_tokens, *([] if model.pad_token is None else [model.pad_token])]
    new = [token for token in dict.fromkeys(wanted) if token not in known]
    tokenizer.add_tokens([token for token in new if token != model.pad_token])
    if model.pad_token is not None:
        tokenizer.add_special_tokens({"pad_token": model.pad_token})
    if new:
        log.info("Added to the tokenizer: %s", ", ".join(new))


def fit_config(config: PretrainedConfig, model: schema.Model, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets the pad token and a vocabulary size that includes added tokens in the config of a new model."""
    if model.pad_token is not None:
        set_pad_token(config, tokenizer.pad_token_id)
    if model.add_tokens or model.pad_token is not None:
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, max(tokenizer.get_vocab().values()) + 1)


def set_pad_token(config: PretrainedConfig, token: int | None) -> None:
    """Sets the pad token in a config, and in the part of it that describes the text model."""
    for part in (config, config.get_text_config()):
        part.pad_token_id = token


@torch.no_grad()
def fit_embeddings(
    loaded: Any, model: schema.Model, tokenizer: PreTrainedTokenizerBase, new: Collection[int], *, old_pad: int | None
) -> list[str]:
    """Adds rows to the embeddings of a loaded model, gives new tokens the mean of the old rows, and sets the pad token.

    Args:
        loaded: a model of transformers, before adapters.
        new: numbers of the tokens that the model has not been trained with.
        old_pad: the model's own pad token.

    Returns:
        Names of the modules that hold the new tokens and so must train with adapters, too.

    Raises:
        ConfigError: the model numbers positions by its own pad token.
    """
    pad = old_pad
    if model.pad_token is not None:
        pad = tokenizer.pad_token_id
        # The config gets it only now: a pad token without a row in the embedding cannot be loaded.
        set_pad_token(loaded.config, pad)
        if getattr(loaded, "generation_config", None) is not None:
            loaded.generation_config.pad_token_id = pad
    if old_pad not in (None, pad) and any(table.padding_idx is not None for table in learned_positions(loaded)):
        raise ConfigError(
            f"model.pad_token={model.pad_token}: a {loaded.config.model_type} model numbers the positions of a text from "
            f"its own pad token ({old_pad}) on, so that it cannot have another one. Leave model.pad_token out."
        )
    trained = [token for token in new if token != pad]
    rows = len(loaded.get_input_embeddings().weight)
    inside = [token for token in new if token < rows]  # rows that were only there to round the size up
    for tensor in _vocabulary_tensors(loaded):
        kept = [row for row in range(rows) if row not in new]
        tensor[inside] = tensor[kept].mean(dim=0).to(tensor.dtype)
    size = max(tokenizer.get_vocab().values()) + 1
    if size > rows:
        resize(loaded, size)
    if not trained:
        return []
    layers = {id(part) for part in (loaded.get_input_embeddings(), loaded.get_output_embeddings()) if part is not None}
    return [name for name, part in loaded.named_modules() if id(part) in layers]


@torch.no_grad()
def resize(loaded: Any, size: int) -> None:
    """Adds rows to the input and output embeddings; each is the mean of the old rows."""
    rows = len(loaded.get_input_embeddings().weight)
    loaded.resize_token_embeddings(size, mean_resizing=False)
    if size <= rows:
        return
    for tensor in _vocabulary_tensors(loaded):
        tensor[rows:] = tensor[:rows].mean(dim=0)
    log.info("The embeddings have %d rows instead of %d; the new ones are the mean of the old", size, rows)


def _vocabulary_tensors(loaded: Any) -> list[torch.Tensor]:
    """Returns the weights, and the output layer's bias, that have a row for each token; a tied one once."""
    found: dict[int, torch.Tensor] = {}
    for layer in (loaded.get_input_embeddings(), loaded.get_output_embeddings()):
        for tensor in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
            if isinstance(tensor, torch.Tensor):
                found[id(tensor)] = tensor.data
    return list(found.values())

"""Checks before training that a model fits its tokenizer, the examples' length and the images' size."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dtrain.errors import ConfigError


def check_fit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_length: int, needs_padding: bool
) -> None:
    """Raises ConfigError for what would fail in the first batch, or silently use the wrong embedding.

    Args:
        model: the unsharded model, as load_model returns it.
        tokenizer: the one that encodes the examples.
        max_length: tokens of the longest example, special tokens included.
        needs_padding: whether batches hold examples of different lengths.

    Raises:
        ConfigError: a token without a row in the embedding, no pad token, or more tokens than positions.
    """
    _check_vocabulary(model, tokenizer)
    if needs_padding:
        _check_pad_token(model, tokenizer)
    positions = longest_input(model)
    if positions is not None and max_length > positions:
        fix = f"Set data.max_length={positions} or less"
        if not learned_positions(model):  # computed positions have no weights
            fix += f", or model.config.max_position_embeddings={max_length} to go beyond what it was trained on"
        raise ConfigError(
            f"data.max_length={max_length}, but {_describe(model)} has positions for only {positions} tokens. {fix}."
        )


@torch.no_grad()
def check_images(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Runs the model on a blank image to check that it accepts images of this size.

    Args:
        shape: channels, height, width of the task's images.

    Raises:
        ConfigError: the model rejects them. The message includes the model's own error.
    """
    was_training = model.training
    model.eval()  # so that running statistics do not change
    try:
        model(pixel_values=torch.zeros(1, *shape))
    except (ValueError, RuntimeError) as error:
        edge = getattr(getattr(model, "config", None), "image_size", None)
        fix = f"Set task.image_size={edge}." if isinstance(edge, int) else "Set task.image_size to the model's size."
        raise ConfigError(
            f"The images are {shape[1]} x {shape[2]} with {shape[0]} channel(s), which the model does not accept: "
            f"{' '.join(str(error).split())[:300]} {fix}"
        ) from error
    model.train(was_training)


def longest_input(model: PreTrainedModel) -> int | None:
    """Returns how many tokens the model has positions for; None if there is no limit (relative positions)."""
    bound = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(bound, int) or bound <= 0:
        return None
    for embedding in learned_positions(model):
        if embedding.padding_idx is not None and embedding.num_embeddings == bound:
            # RoBERTa and similar models number their positions from padding_idx + 1 on.
            return bound - embedding.padding_idx - 1
    return bound


def learned_positions(model: nn.Module) -> list[nn.Embedding]:
    """Returns the embeddings with one row per absolute position, found by the names that transformers uses."""
    tables = ("position_embeddings", "embed_positions", "wpe", "position_embed", "positions_embed")
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.removesuffix(".base_layer").rpartition(".")[2] in tables
    ]


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # CANINE hashes characters: it has a row for every number
        return
    largest = max(tokenizer.get_vocab().values(), default=-1)
    rows = embeddings.weight.shape[0]  # not every embedding is an nn.Embedding (I-BERT)
    if largest >= rows:
        raise ConfigError(
            f"The tokenizer has tokens up to number {largest}, but the embedding of {_describe(model)} has {rows} rows. "
            "Use the tokenizer that the model was trained with (leave model.tokenizer out), or, from scratch, leave "
            f"model.config.vocab_size out or set it to {largest + 1} or more."
        )


def _check_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None:
        token = tokenizer.eos_token or "<pad>"
        raise ConfigError(
            "The tokenizer has no pad token, but examples of different lengths have to be padded. Set it: "
            f"'model.pad_token={token}'"
        )
    model_pad = getattr(model.config, "pad_token_id", None)
    if model_pad is not None and model_pad != tokenizer.pad_token_id:
        # Some models use this id to find the end of a text, or its positions.
        raise ConfigError(
            f"The tokenizer pads with token {tokenizer.pad_token_id}, but {_describe(model)} uses token {model_pad} for "
            "padding. Use the tokenizer that the model was trained with, or set "
            f"model.config.pad_token_id={tokenizer.pad_token_id}."
        )


def _describe(model: PreTrainedModel) -> str:
    name = getattr(model.config, "name_or_path", "")
    return f"the {model.config.model_type} model" + (f" {name}" if name else "")

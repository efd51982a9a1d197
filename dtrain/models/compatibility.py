"""Whether a model and a tokenizer fit each other and the length of the examples, asked before training."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dtrain.errors import ConfigError


def check_fit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_length: int, needs_padding: bool
) -> None:
    """Refuses what would fail in the first batch, or worse, go through with the wrong embedding.

    Args:
        model: as load_model returns it, whole on this process.
        tokenizer: the one that made, or will make, the examples.
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
        cure = f"Set data.max_length={positions} or less"
        if not learned_positions(model):  # computed ones cost no weights
            cure += f", or model.config={{max_position_embeddings: {max_length}}} to go beyond what it was trained on"
        raise ConfigError(
            f"data.max_length={max_length}, but {_called(model)} has positions for {positions} tokens only. {cure}."
        )


@torch.no_grad()
def check_images(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Refuses images of a size that the model is not made for, by showing it a blank one.

    Args:
        shape: channels, height, width of what the model will be given.

    Raises:
        ConfigError: with what the model says to it.
    """
    was_training = model.training
    model.eval()  # running statistics stay
    try:
        model(pixel_values=torch.zeros(1, *shape))
    except (ValueError, RuntimeError) as error:
        edge = getattr(getattr(model, "config", None), "image_size", None)
        cure = (
            f"Set task.image_size={edge}." if isinstance(edge, int) else "Set task.image_size to what it is made for."
        )
        raise ConfigError(
            f"Images are made {shape[1]} x {shape[2]} with {shape[0]} channel(s), which the model does not take: "
            f"{' '.join(str(error).split())[:300]} {cure}"
        ) from error
    model.train(was_training)


def longest_input(model: PreTrainedModel) -> int | None:
    """Tokens that the model has positions for; None where it knows no bound (relative positions)."""
    bound = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(bound, int) or bound <= 0:
        return None
    for embedding in learned_positions(model):
        if embedding.padding_idx is not None and embedding.num_embeddings == bound:
            # RoBERTa and its kin number their positions from padding_idx + 1 on.
            return bound - embedding.padding_idx - 1
    return bound


def learned_positions(model: nn.Module) -> list[nn.Embedding]:
    """Tables with a row per absolute position, by the names that transformers gives them."""
    tables = ("position_embeddings", "embed_positions", "wpe", "position_embed", "positions_embed")
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in tables
    ]


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    largest = max(tokenizer.get_vocab().values(), default=-1)
    rows = model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ConfigError(
            f"The tokenizer has tokens up to number {largest}, but the embedding of {_called(model)} has {rows} rows. "
            "Use the tokenizer that the model was trained with (leave model.tokenizer out), or, from scratch, leave "
            f"model.config.vocab_size out or set it to {largest + 1} or more."
        )


def _check_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None:
        token = tokenizer.eos_token
        how = f"tokenizer.pad_token = {token!r}" if token else "tokenizer.add_special_tokens({'pad_token': '<pad>'})"
        raise ConfigError(
            "The tokenizer has no pad token, and examples of different lengths have to be padded. Save one that has "
            "it, and set model.tokenizer to its folder: "
            f"tokenizer = AutoTokenizer.from_pretrained({tokenizer.name_or_path!r}); {how}; "
            "tokenizer.save_pretrained('FOLDER')"
        )
    own = getattr(model.config, "pad_token_id", None)
    if own is not None and own != tokenizer.pad_token_id:
        # Some models find the end of a text, or its positions, by this number.
        raise ConfigError(
            f"The tokenizer pads with token {tokenizer.pad_token_id}, but {_called(model)} takes token {own} for "
            "padding. Use the tokenizer that the model was trained with, or set "
            f"model.config={{pad_token_id: {tokenizer.pad_token_id}}}."
        )


def _called(model: PreTrainedModel) -> str:
    name = getattr(model.config, "name_or_path", "")
    return f"the {model.config.model_type} model" + (f" {name}" if name else "")

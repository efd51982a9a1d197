"""Words for what a model raises in its first forward pass: what its config lacks, and how to set it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dtrain.errors import ConfigError

FORWARD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a forward pass may raise for a config that does not fit itself or the data."""

SIZES = ("dim", "size", "head", "embd", "layer", "channel", "group", "len", "window", "stride", "position", "rank")
"""Parts of the names of settings that have to fit each other."""


def reads_padding_by_config(module: nn.Module, *, max_length: int) -> bool:
    """Returns whether the config already says that a row's answer depends on the length of its batch.

    BigBird's sparse attention needs a number of tokens. At the first batch with fewer, the model changes to full
    attention for good, so that the answer for a long row would depend on the batches before it. CANINE joins groups of
    characters, the last of them with padding, which new weights show too little for a trial.
    """
    config: Any = getattr(module, "config", None)
    if getattr(config, "model_type", None) == "canine":
        return True
    if getattr(config, "attention_type", None) != "block_sparse":
        return False
    return bool(max_length > (5 + 2 * config.num_random_blocks) * config.block_size)


def rotates_by_length(config: Any) -> bool:
    """Returns whether a model's rotary positions depend on the length of a batch, or on the longest one before it."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, Mapping)}
    return bool(kinds & {"dynamic", "longrope"})


def explain_forward(error: BaseException, module: nn.Module, tokenizer: Any, ids: torch.Tensor | None) -> ConfigError:
    """Returns what to tell the user about an error of a model's forward pass.

    Args:
        tokenizer: the one that made the tokens; None if they are not a text's.
        ids: the tokens of the example, of any shape; None for a model of images.
    """
    config: Any = module.config
    missing = _missing_pad_token(config, tokenizer, error=str(error)) or _too_many_rotated(config)
    if missing is None and tokenizer is not None and ids is not None:
        missing = _missing_decoder_token(config, tokenizer, ids)
    if missing is not None:
        return ConfigError(f"A {config.model_type} model {missing}")
    reason = " ".join(str(error).split())[:200]
    found = f"This {config.model_type} model cannot compute the first example ({type(error).__name__}: {reason})."
    if isinstance(error, RuntimeError | ArithmeticError):  # as torch raises them
        return ConfigError(
            f"{found} Its sizes have to fit each other: {_sizes(config)}. Change them with model.config.NAME=VALUE, or use "
            "a pretrained model."
        )
    return ConfigError(
        f"{found} It gets token ids and a mask, and nothing else. If a setting is missing, set it with "
        "model.config.NAME=VALUE; otherwise use another model, such as BERT."
    )


def _missing_pad_token(config: Any, tokenizer: Any, *, error: str) -> str | None:
    """Returns that the config lacks a pad token, and how to set it; None otherwise."""
    if getattr(config.get_text_config(), "pad_token_id", None) is not None or not ("None" in error or "pad" in error):
        return None
    tokens = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "unk", "eos"))
    token = next((number for number in tokens if number is not None), 0)
    return (
        "numbers positions, or finds the end of a text, by the pad token, and its config has none: set "
        f"model.config.pad_token_id={token}."
    )


def _missing_decoder_token(config: Any, tokenizer: Any, ids: torch.Tensor) -> str | None:
    """Returns which token of its decoder the config lacks, and how to set it; None if it lacks none."""
    if not getattr(config, "is_encoder_decoder", False):
        return None
    end = getattr(config, "eos_token_id", None)
    pad, last = getattr(config, "pad_token_id", None), int(ids.flatten()[-1])
    if end is None or not (ids == end).any():
        found = f"its config has none (eos_token_id: {end})" if end is None else f"token {end} ends no text here"
        if last in tokenizer.all_special_ids:
            return f"reads its answer at the end token, but {found}: set model.config.eos_token_id={last}."
        return (
            f"reads its answer at the end token, but {found}, and the tokenizer adds none. Use a tokenizer that adds an end "
            "token, such as T5's or BART's, or a model without a decoder."
        )
    if getattr(config, "decoder_start_token_id", None) is None:
        return (
            "needs a token with which its decoder starts, and its config has none: set "
            f"model.config.decoder_start_token_id={end if pad is None else pad}."
        )
    return None


def _too_many_rotated(config: Any) -> str | None:
    """Returns that more values of a head are rotated than it has (GPT-J, CodeGen), and how to set it; None otherwise."""
    rotated, width, heads = (
        getattr(config, name, None) for name in ("rotary_dim", "hidden_size", "num_attention_heads")
    )
    if not (isinstance(rotated, int) and isinstance(width, int) and heads) or rotated <= width // heads:
        return None
    return (
        f"rotates rotary_dim={rotated} values of each attention head, and a head has only {width // heads} (hidden size "
        f"{width}, {heads} heads): set model.config.rotary_dim={width // heads // 2 * 2}."
    )


def _sizes(config: Any) -> str:
    values = config.get_text_config().to_dict()
    names = [name for name in values if any(part in name for part in SIZES) and type(values[name]) is int]
    return ", ".join(f"{name}={values[name]}" for name in names if not name.endswith("_token_id"))

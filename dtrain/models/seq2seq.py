"""Helpers for encoder-decoder models: the end of the targets, languages, the decoder's first token."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dtrain.config import schema
from dtrain.errors import ConfigError
from dtrain.models.architecture import check_name_or_path, read_config

REPEATED_TOKEN_KEYS = ("decoder_start_token_id", "forced_eos_token_id")
"""Entries of a model's config that repeat its pad or end token."""

STARTS_WITH_END_TOKEN = ("mbart", "plbart")
"""Model types whose decoder starts with the end token. Others without a start token of their own start with pad."""


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the token that ends a target: </s>, or [SEP] of a BERT vocabulary."""
    end: int | None = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return end


def check_targets_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that targets end with an end token, without which a model cannot learn to stop.

    Raises:
        ConfigError: the tokenizer adds no end token.
    """
    end = end_token_id(tokenizer)
    if end is None or end not in tokenizer(text_target="a")["input_ids"]:
        token = tokenizer.eos_token or tokenizer.sep_token
        raise ConfigError(
            "The tokenizer adds no end token to a target "
            + (f"(its end token is {token})" if token else "(it has no end token)")
            + ", so a model could not learn where to stop. Use a tokenizer that does, such as T5's or BART's, or a BERT "
            "vocabulary file (model.tokenizer=vocab.txt), whose targets end with [SEP]."
        )


def set_languages(tokenizer: Any, source: str | None, target: str | None) -> int | None:
    """Sets the source and target language of a multilingual tokenizer.

    Returns:
        The token of the target language; None for a tokenizer without languages.

    Raises:
        ConfigError: an unknown language code, languages for a tokenizer without languages, or missing languages.
    """
    has_languages = hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "tgt_lang")
    if not has_languages:
        if source is not None:
            raise ConfigError(
                f"task.source_lang={source}: this tokenizer has no language codes. Leave task.source_lang and "
                "task.target_lang out; for T5, name the languages in task.prefix."
            )
        return None
    source, target = source or tokenizer.src_lang, target or tokenizer.tgt_lang
    if source is None or target is None:
        raise ConfigError(
            "This tokenizer is multilingual: set the languages to translate from and into with task.source_lang and "
            f"task.target_lang, e.g. {', '.join(_codes(tokenizer)[:4])}."
        )
    language = [_language_token(tokenizer, code, setting) for code, setting in ((source, "source"), (target, "target"))]
    tokenizer.src_lang, tokenizer.tgt_lang = source, target
    return language[1]


def _language_token(tokenizer: Any, code: str, setting: str) -> int:
    token = tokenizer.get_lang_token(code) if code in getattr(tokenizer, "lang_code_to_token", {}) else code
    number: int | None = tokenizer.convert_tokens_to_ids(token)
    if number is None or number == tokenizer.unk_token_id:
        codes = _codes(tokenizer)
        near = difflib.get_close_matches(code, codes, n=3, cutoff=0.4) or codes[:8]
        raise ConfigError(
            f"task.{setting}_lang={code} is not a language of this tokenizer. Similar: {', '.join(near)}."
        )
    return number


def _codes(tokenizer: Any) -> list[str]:
    by_code = getattr(tokenizer, "lang_code_to_token", None)
    return list(by_code or [token for token in tokenizer.all_special_tokens if not token.startswith(("<", "["))])


def language_generation_options(tokenizer: PreTrainedTokenizerBase, language: int | None) -> dict[str, int]:
    """Returns the options that make `generate` use the target language in the same way as the tokenizer's targets.

    A language token before the text (NLLB, mBART-50, M2M100) is forced as the first token. One after the end token
    (mBART-25) is the decoder's start token.
    """
    if language is None:
        return {}
    ids = tokenizer(text_target="a")["input_ids"]
    return {"forced_bos_token_id" if ids[0] == language else "decoder_start_token_id": language}


def decoder_inputs(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """Returns the labels shifted right by one position, as the model's family does it. Not a collective.

    Args:
        model: the model, or an engine's wrapper around it.
        labels: (batch, length) int64, padded with -100.

    Returns:
        (batch, length) int64, padded with the model's pad token.
    """
    bare: Any = getattr(model, "module", model)  # DDP and DeepSpeed wrap the model, and DDP hides its methods
    shift = getattr(bare, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        inputs: torch.Tensor = shift(labels=labels.clone())  # FSMT's writes its pad token into them, as further targets
        return inputs
    shifted = labels.roll(1, dims=1)  # M2M100 and BlenderBot use this rule, but have no such method
    shifted[:, 0] = bare.config.decoder_start_token_id
    return shifted.masked_fill(shifted == -100, bare.config.pad_token_id)


def max_decoder_positions(model: schema.Model) -> int | None:
    """Returns how many tokens the decoder has positions for; None if there is no limit or no model is named."""
    if model.name_or_path is None and not model.from_scratch:
        return None
    bound = getattr(read_config(model, check_name_or_path(model)), "max_position_embeddings", None)
    return bound if isinstance(bound, int) and bound > 0 else None


def fit_decoder(
    config: PretrainedConfig, model: schema.Model, tokenizer: PreTrainedTokenizerBase, *, default_pad_id: int | None
) -> None:
    """Sets the decoder's special tokens in the config of a new model with a tokenizer of another family.

    A new config has token numbers of its family's vocabulary. Entries that repeat the family's pad token get the
    tokenizer's pad token, other entries its end token. A missing start token is set by the family's rule.

    Args:
        config: changed in place. Its pad, begin and end tokens are already those of the tokenizer.
        default_pad_id: the pad token that the config had before.
    """
    if model.name_or_path is not None and model.tokenizer in (None, model.name_or_path):
        return
    pad, end = tokenizer.pad_token_id, end_token_id(tokenizer)
    if "eos_token_id" not in model.config:
        config.eos_token_id = end
    for key in REPEATED_TOKEN_KEYS:
        value = getattr(config, key, None)
        if key not in model.config and value is not None:
            setattr(config, key, pad if value == default_pad_id else end)
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = end if config.model_type in STARTS_WITH_END_TOKEN else pad

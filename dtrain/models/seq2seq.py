"""What an encoder-decoder needs beyond its weights: how its targets end, its languages, the decoder's first token."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dtrain.config import schema
from dtrain.errors import ConfigError
from dtrain.models.architecture import locate, read_config

REPEATED = ("decoder_start_token_id", "forced_eos_token_id")
"""Entries of a model's config that repeat the number of its pad or end token."""

STARTS_WITH_THE_END = ("mbart", "plbart")
"""Families whose decoder begins with what the target ends with; others without a start of their own begin with pad."""


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What a target ends with: </s>, or [SEP] of a BERT vocabulary."""
    end: int | None = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return end


def check_targets_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """A target without an end teaches no model to stop.

    Raises:
        ConfigError: the tokenizer adds none.
    """
    end = end_token_id(tokenizer)
    if end is None or end not in tokenizer(text_target="a")["input_ids"]:
        token = tokenizer.eos_token or tokenizer.sep_token
        raise ConfigError(
            "The tokenizer puts no token behind a target "
            + (f"(its end token is {token})" if token else "(it has no end token)")
            + ", so that a model could not learn where to stop. Use a tokenizer that does, such as T5's or BART's, or "
            "a BERT vocabulary file (model.tokenizer=vocab.txt), whose targets end with [SEP]."
        )


def set_languages(tokenizer: Any, source: str | None, target: str | None) -> int | None:
    """Tells a multilingual tokenizer its two languages.

    Returns:
        The token of the target language; None for a tokenizer without languages.

    Raises:
        ConfigError: a code that it does not know, languages for a tokenizer that has none, or none for one that has.
    """
    has_languages = hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "tgt_lang")
    if not has_languages:
        if source is not None:
            raise ConfigError(
                f"task.source_lang={source}: this tokenizer has no language codes. Leave task.source_lang and "
                "task.target_lang out; T5 is told its languages by task.prefix."
            )
        return None
    source, target = source or tokenizer.src_lang, target or tokenizer.tgt_lang
    if source is None or target is None:
        raise ConfigError(
            "This tokenizer is multilingual: say from which language into which with task.source_lang and "
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
        raise ConfigError(f"task.{setting}_lang={code} is not a language of this tokenizer. Near: {', '.join(near)}.")
    return number


def _codes(tokenizer: Any) -> list[str]:
    by_code = getattr(tokenizer, "lang_code_to_token", None)
    return list(by_code or [token for token in tokenizer.all_special_tokens if not token.startswith(("<", "["))])


def generation_of_language(tokenizer: PreTrainedTokenizerBase, language: int | None) -> dict[str, int]:
    """What `generate` must be told so that the target language comes out, as the tokenizer builds its targets.

    A language in front of the text (NLLB, mBART-50, M2M100) is forced as the first token; one behind the end token
    (mBART-25) is what the decoder starts with.
    """
    if language is None:
        return {}
    ids = tokenizer(text_target="a")["input_ids"]
    return {"forced_bos_token_id" if ids[0] == language else "decoder_start_token_id": language}


def decoder_inputs(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """Labels one place to the right, as the model's family does it, without a collective.

    Args:
        model: the model, or an engine's wrapper around it.
        labels: (batch, length) int64, padded with -100.

    Returns:
        (batch, length) int64, padded with the model's pad token.
    """
    bare: Any = getattr(model, "module", model)  # DDP and DeepSpeed keep the model there, and DDP hides its methods
    own = getattr(bare, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        made: torch.Tensor = own(labels=labels)
        return made
    shifted = labels.roll(1, dims=1)  # M2M100 and BlenderBot have the rule, but no such method
    shifted[:, 0] = bare.config.decoder_start_token_id
    return shifted.masked_fill(shifted == -100, bare.config.pad_token_id)


def decoder_positions(model: schema.Model) -> int | None:
    """How many tokens the decoder has positions for; None where nothing bounds them, or no model is named."""
    if model.name_or_path is None and not model.from_scratch:
        return None
    bound = getattr(read_config(model, locate(model)), "max_position_embeddings", None)
    return bound if isinstance(bound, int) and bound > 0 else None


def fit_decoder(
    config: PretrainedConfig, model: schema.Model, tokenizer: PreTrainedTokenizerBase, *, born_pad: int | None
) -> None:
    """The decoder's special tokens of a new model whose vocabulary is not its family's own.

    A config is born with numbers of its family's vocabulary: what repeats its pad token there becomes the tokenizer's
    pad token, the rest its end token. A decoder without a start begins as its family's does.

    Args:
        config: changed in place, after its pad, begin and end tokens became the tokenizer's.
        born_pad: its pad token before that.
    """
    if model.name_or_path is not None and model.tokenizer in (None, model.name_or_path):
        return
    pad, end = tokenizer.pad_token_id, end_token_id(tokenizer)
    if "eos_token_id" not in model.config:
        config.eos_token_id = end
    for key in REPEATED:
        value = getattr(config, key, None)
        if key not in model.config and value is not None:
            setattr(config, key, pad if value == born_pad else end)
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = end if config.model_type in STARTS_WITH_THE_END else pad

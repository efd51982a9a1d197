"""Models and tokenizers that do not fit each other are refused before training, with the fix."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from dtrain.errors import ConfigError
from dtrain.models.compatibility import check_fit, longest_input
from dtrain.models.tokenizer import build_char_tokenizer
from tests.support import tiny


def gpt(**changes: Any) -> GPT2LMHeadModel:
    sizes = {"vocab_size": 4, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, **changes}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, **sizes))


def test_a_model_with_its_own_tokenizer_fits() -> None:
    check_fit(tiny.bert(), tiny.tokenizer(), max_length=64, needs_padding=True)
    check_fit(gpt(), build_char_tokenizer(["abc"]), max_length=16, needs_padding=False)


def test_a_token_without_a_row_in_the_embedding_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"up to number 4.* has 4 rows.*model.tokenizer.*vocab_size.*5"):
        check_fit(gpt(), build_char_tokenizer(["abcd"]), max_length=16, needs_padding=False)


def test_a_missing_pad_token_is_refused_where_batches_are_padded() -> None:
    with pytest.raises(ConfigError, match=r"no pad token.*'model.pad_token="):
        check_fit(gpt(), build_char_tokenizer(["abc"]), max_length=16, needs_padding=True)


def test_another_pad_token_than_the_models_is_refused_where_batches_are_padded() -> None:
    model = gpt(pad_token_id=3)
    tokenizer = build_char_tokenizer(["ab"], pad=True)

    check_fit(model, tokenizer, max_length=16, needs_padding=False)
    with pytest.raises(ConfigError, match=r"pads with token 1, but .* token 3.*model.config\.pad_token_id=1"):
        check_fit(model, tokenizer, max_length=16, needs_padding=True)


def test_more_tokens_than_learned_positions_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"data.max_length=65, but .* for only 64 tokens. Set data.max_length=64 or less\.$"
    ):
        check_fit(tiny.bert(), tiny.tokenizer(), max_length=65, needs_padding=True)


def test_computed_positions_may_be_extended_in_the_config() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4, max_position_embeddings=32, **sizes))

    with pytest.raises(ConfigError, match=r"max_position_embeddings=33"):
        check_fit(model, build_char_tokenizer(["abc"]), max_length=33, needs_padding=False)


def test_roberta_reserves_positions_for_padding() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = RobertaForSequenceClassification(
        RobertaConfig(vocab_size=9, max_position_embeddings=34, pad_token_id=1, **sizes)
    )

    assert longest_input(model) == 32


def test_relative_positions_have_no_limit() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))

    assert longest_input(model) is None

"""Encoder-decoders: languages of real multilingual tokenizers, decoder inputs by family, special tokens of a new model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.config import schema
from dtrain.errors import ConfigError
from dtrain.models.load import load_model
from dtrain.models.seq2seq import (
    check_targets_end,
    decoder_inputs,
    end_token_id,
    language_generation_options,
    max_decoder_positions,
    set_languages,
)
from tests.support import tiny
from tests.support.heads import HEADS
from tests.support.tiny_seq2seq import END, PAD

PIECES = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", "a"]


def multilingual(kind: str) -> Any:
    """Returns a real tokenizer of this family with two text pieces and all its languages."""
    import transformers

    if kind == "NllbTokenizer":
        return transformers.NllbTokenizer(vocab={piece: number for number, piece in enumerate(PIECES)}, merges=[])
    return getattr(transformers, kind)(vocab=[(piece, 0.0) for piece in PIECES])


@pytest.mark.parametrize(
    ("kind", "codes", "where", "generation"),
    [
        ("MBartTokenizer", ("en_XX", "ro_RO"), -1, "decoder_start_token_id"),
        ("MBart50Tokenizer", ("en_XX", "ro_RO"), 0, "forced_bos_token_id"),
        ("NllbTokenizer", ("eng_Latn", "ron_Latn"), 0, "forced_bos_token_id"),
    ],
)
def test_language_tokens_are_placed_by_family_and_generation_starts_with_the_target_language(
    kind: str, codes: tuple[str, str], where: int, generation: str
) -> None:
    tokenizer = multilingual(kind)

    language = set_languages(tokenizer, *codes)

    source, target = (tokenizer.convert_tokens_to_ids(code) for code in codes)
    assert language == target != source
    assert tokenizer("a")["input_ids"][where] == source
    assert tokenizer(text_target="a")["input_ids"][where] == target
    assert language_generation_options(tokenizer, language) == {generation: target}
    check_targets_end(tokenizer)
    assert set_languages(tokenizer, None, None) == target  # a tokenizer that was saved with its languages


def test_a_multilingual_tokenizer_requires_languages() -> None:
    with pytest.raises(
        ConfigError, match=r"multilingual: set the languages .* task.source_lang and task.target_lang, e.g. ar_AR"
    ):
        set_languages(multilingual("MBartTokenizer"), None, None)


@pytest.mark.parametrize(
    ("codes", "says"),
    [
        (("en", "ro_RO"), "task.source_lang=en is not a language of this tokenizer. Similar: .*en_XX"),
        (("en_XX", "ro_XX"), "task.target_lang=ro_XX is not a language of this tokenizer. Similar: .*_"),
    ],
)
def test_an_unknown_language_is_refused_with_similar_ones(codes: tuple[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        set_languages(multilingual("MBartTokenizer"), *codes)


def test_languages_for_a_tokenizer_without_any_are_refused() -> None:
    assert set_languages(tiny.tokenizer(), None, None) is None
    assert language_generation_options(tiny.tokenizer(), None) == {}
    with pytest.raises(ConfigError, match=r"task.source_lang=en_XX: this tokenizer has no language codes.*task.prefix"):
        set_languages(tiny.tokenizer(), "en_XX", "ro_RO")


def test_targets_of_a_bert_vocabulary_end_with_sep() -> None:
    check_targets_end(tiny.tokenizer())

    assert end_token_id(tiny.tokenizer()) == END


def test_a_tokenizer_without_an_end_token_for_targets_is_refused() -> None:
    from dtrain.models.tokenizer import build_char_tokenizer

    with pytest.raises(ConfigError, match=r"no end token to a target \(it has no end token\)"):
        check_targets_end(build_char_tokenizer(["ab"], pad=True))


# Decoder inputs

LABELS = torch.tensor([[7, 8, END], [9, END, -100]])


class WithMethod(nn.Module):
    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return labels + 1


class WithoutMethod(nn.Module):
    config = SimpleNamespace(decoder_start_token_id=2, pad_token_id=0)


def test_decoder_inputs_are_the_shifted_labels_by_the_models_own_rule() -> None:
    assert decoder_inputs(WithMethod(), LABELS).tolist() == (LABELS + 1).tolist()
    assert decoder_inputs(WithoutMethod(), LABELS).tolist() == [[2, 7, 8], [2, 9, END]]
    assert LABELS.tolist() == [[7, 8, END], [9, END, -100]]


def test_decoder_inputs_are_found_through_an_engines_wrapper() -> None:
    for bare in (WithMethod(), WithoutMethod()):
        wrapper = nn.Module()
        wrapper.module = bare

        assert torch.equal(decoder_inputs(wrapper, LABELS), decoder_inputs(bare, LABELS))


# New models

SIZES: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 8, "num_layers": 1},
    "bart": {
        **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 8 for side in ("encoder", "decoder")},
        "d_model": 8,
        "max_position_embeddings": 16,
    },
}
SIZES["marian"] = SIZES["mbart"] = SIZES["bart"]


def new_model(kind: str, **config: Any) -> tuple[schema.Model, Any]:
    settings = schema.Model(from_scratch=True, config={"model_type": kind, **SIZES[kind], **config})
    return settings, load_model(settings, head=HEADS["seq2seq_lm"], head_config={}, tokenizer=tiny.tokenizer(), seed=0)


@pytest.mark.parametrize(
    ("kind", "start", "row"),
    [
        ("t5", PAD, [PAD, 2, 7]),
        ("bart", END, [END, 2, 7]),
        ("marian", PAD, [PAD, 2, 7]),
        ("mbart", END, [END, 2, 7]),
    ],
)
def test_a_new_models_special_tokens_are_those_of_the_tokenizer_also_in_generation(
    kind: str, start: int, row: list[int]
) -> None:
    _, model = new_model(kind)

    config = model.config
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (PAD, END, start)
    assert getattr(config, "forced_eos_token_id", None) in (None, END)
    assert decoder_inputs(model, torch.tensor([[2, 7, END]])).tolist() == [row]
    made = model.generate(input_ids=torch.tensor([[2, 7, END]]), max_new_tokens=2, max_length=None, do_sample=False)
    assert made[0, 0] == row[0]


def test_special_tokens_of_model_config_are_kept() -> None:
    _, model = new_model("bart", decoder_start_token_id=2, eos_token_id=4)

    assert (model.config.decoder_start_token_id, model.config.eos_token_id) == (2, 4)


def test_the_decoders_positions_are_known_if_they_are_limited() -> None:
    assert max_decoder_positions(new_model("bart")[0]) == 16
    assert max_decoder_positions(new_model("t5")[0]) is None
    assert max_decoder_positions(schema.Model()) is None

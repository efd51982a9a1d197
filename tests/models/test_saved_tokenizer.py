"""A tokenizer reloads from the model's folder as the same one, for every model type and kind of tokenizer, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GPT2TokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5TokenizerFast,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from dtrain.config import schema
from dtrain.config.load import load_config
from dtrain.errors import ConfigError
from dtrain.models.saved_tokenizer import PROBES, find_difference, save_tokenizer
from dtrain.models.tokenizer import build_char_tokenizer, load_tokenizer, train_bpe_tokenizer
from dtrain.tasks.causal_lm import CausalLmTask
from dtrain.training.export import check_reload
from tests.support import tiny

TEXTS = ["The cat's dog saw 12345 big   birds.\n\n\tIt is fine, no?\r\n", *PROBES, "the dog sees a big bird " * 5]

OWN_CLASS = {"qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "siglip2", "hyperclovax_vision_v2"}
"""Model types whose folder transformers always loads with its own class (5.23)."""


def unigram() -> Any:
    backend = Tokenizer(models.Unigram())
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def gpt2() -> Any:
    learned = json.loads(train_bpe_tokenizer(TEXTS, vocab_size=300).backend_tokenizer.to_str())["model"]
    return GPT2TokenizerFast(vocab=learned["vocab"], merges=[tuple(merge) for merge in learned["merges"]])


def t5() -> Any:
    learned = json.loads(unigram().backend_tokenizer.to_str())["model"]
    return T5TokenizerFast(vocab=[tuple(entry) for entry in learned["vocab"]], extra_ids=0)


KINDS = {
    "char": lambda: build_char_tokenizer(TEXTS),
    "char with pad": lambda: build_char_tokenizer(TEXTS, pad=True),
    "train-bpe": lambda: train_bpe_tokenizer(TEXTS, vocab_size=300),
    "train-bpe with pad": lambda: train_bpe_tokenizer(TEXTS, vocab_size=300, pad=True),
    "bert": tiny.tokenizer,
    "gpt2": gpt2,
    "unigram": unigram,
    "t5": t5,
}


def all_ids(tokenizer: Any) -> list[Any]:
    """Returns the tokens and types of texts, of pairs and of every single token, independently of what is tested."""
    words = sorted(tokenizer.get_vocab())
    pairs = tokenizer(TEXTS, list(reversed(TEXTS)))
    types = [row if any(row) else [] for row in pairs.get("token_type_ids", [[]] * len(TEXTS))]
    return [pairs["input_ids"], types, tokenizer(words, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_reloads_as_the_same_one_for_every_model_type_or_the_difference_is_named(
    kind: str, tmp_path: Path
) -> None:
    tokenizer = KINDS[kind]()
    expected = all_ids(tokenizer)
    differs = set()
    # The types of one registered class are loaded alike, so one of them stands for all.
    registered = {TOKENIZER_MAPPING_NAMES[name]: name for name in sorted(TOKENIZER_MAPPING_NAMES)}
    for model_type in sorted({*registered.values(), *OWN_CLASS}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))

        if save_tokenizer(tokenizer, tmp_path) is None:
            assert all_ids(AutoTokenizer.from_pretrained(tmp_path)) == expected, model_type
        else:
            differs.add(model_type)

    assert differs <= OWN_CLASS


def test_another_text_or_special_token_is_found_although_the_class_is_the_same(tmp_path: Path) -> None:
    tokenizer = build_char_tokenizer(["abc"], pad=True)
    build_char_tokenizer(["abd"], pad=True).save_pretrained(tmp_path / "text")
    build_char_tokenizer(["abc"]).save_pretrained(tmp_path / "pad")

    assert "instead of the tokens" in str(find_difference(tokenizer, tmp_path / "text"))
    assert "pad token is None instead of 1" in str(find_difference(tokenizer, tmp_path / "pad"))
    assert "cannot be loaded" in str(find_difference(tokenizer, tmp_path / "nowhere"))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_5", "hyperclovax_vision_v2"])
@pytest.mark.parametrize("pad", [False, True])
def test_train_bpe_uses_the_class_that_the_model_type_forces(model_type: str, pad: bool, tmp_path: Path) -> None:
    model = schema.Model(
        from_scratch=True, config={"model_type": model_type}, tokenizer="train-bpe", tokenizer_vocab_size=320
    )
    tokenizer = load_tokenizer(model, training_texts=lambda: TEXTS, needs_padding=pad)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))

    assert save_tokenizer(tokenizer, tmp_path) is None

    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert all_ids(reloaded) == all_ids(tokenizer)
    assert tokenizer.unk_token_id is None, "the end token is not counted as unknown"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1 if pad else None)
    text = "It's  fine: 1234\n\n\ttab \u65e5\u672c"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def char_task() -> CausalLmTask:
    tokenizer = build_char_tokenizer(["ab c"])
    rows = Dataset.from_dict({"input_ids": [tokenizer("ab ca")["input_ids"]]})
    return CausalLmTask({"train": rows}, tokenizer, max_length=4, is_char=True)


SIZES: dict[str, Any] = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}


def test_a_run_whose_folder_would_have_another_tokenizer_is_refused_before_training() -> None:
    task = char_task()
    config = load_config(None, ["model.tokenizer=char", "model.from_scratch=true", "model.config={model_type: qwen2}"])

    check_reload(LlamaForCausalLM(LlamaConfig(**SIZES)), task, config)
    with pytest.raises(ConfigError, match=r"char cannot be saved with a qwen2 model: .* Set model.tokenizer=train-bpe"):
        check_reload(Qwen2ForCausalLM(Qwen2Config(**SIZES)), task, config)


def test_the_check_before_training_loads_the_saved_tokenizer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[set[str]] = []
    real = AutoTokenizer.from_pretrained

    def load(folder: Path, **options: Any) -> Any:
        loaded.append({file.name for file in folder.iterdir()})
        return real(folder, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)

    check_reload(LlamaForCausalLM(LlamaConfig(**SIZES)), char_task(), load_config(None, ["model.tokenizer=char"]))

    assert len(loaded) == 1
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= loaded[0]


@pytest.mark.parametrize("is_repaired", [True, False])
def test_what_is_saved_does_not_depend_on_the_texts_that_are_compared(
    is_repaired: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(_tokenizer: Any, folder: Path, texts: Any = (), **_: Any) -> str | None:
        is_first = "model_input_names" not in json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return "differs" if texts or (is_repaired and is_first) else None

    monkeypatch.setattr("dtrain.models.saved_tokenizer.find_difference", differs)
    for name, texts in (("without", ()), ("with", ("a text",))):
        assert save_tokenizer(build_char_tokenizer(["ab c"]), tmp_path / name, texts) == ("differs" if texts else None)

    files = [(tmp_path / name / "tokenizer_config.json").read_text(encoding="utf-8") for name in ("without", "with")]
    assert files[0] == files[1]

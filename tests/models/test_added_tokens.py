"""Added tokens: in the tokenizer, in the embeddings, saved with adapters, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.config import schema
from dtrain.errors import ConfigError
from dtrain.models.compatibility import check_fit
from dtrain.models.load import load_model
from dtrain.models.tokenizer import load_tokenizer
from dtrain.training.export import save
from tests.support import tiny
from tests.support.heads import HEADS
from tests.support.multirank import run_ranks
from tests.support.whole_runs import commands

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VOCABULARY = len(tiny.tokenizer())
ADDED = ("<name>", "<date>")

KINDS = {
    "gpt2": ({"n_embd": 16, "n_layer": 1, "n_head": 2}, "causal_lm"),
    "llama": ({**SIZES, "tie_word_embeddings": False}, "causal_lm"),
    "bert": (SIZES, "masked_lm"),
    "roberta": (SIZES, "masked_lm"),
    "modernbert": (SIZES, "sequence_classification"),
    "t5": ({"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}, "seq2seq_lm"),
}


def write(folder: Path, kind: str, rows: int = VOCABULARY) -> str:
    """Writes a new model of this kind, with a tokenizer, and returns its folder."""
    sizes, task = KINDS[kind]
    extra = {"decoder_start_token_id": 0} if kind == "t5" else {}
    config = {"model_type": kind, "vocab_size": rows, "pad_token_id": 0, **sizes, **extra}
    made = load(task, config=config, from_scratch=True)
    made.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def load(task: str, **model: Any) -> Any:
    settings = schema.Model(**model)
    tokenizer = tiny.tokenizer() if settings.from_scratch else load_tokenizer(settings, training_texts=list)
    loaded = load_model(settings, head=HEADS[task], head_config={"num_labels": 3}, tokenizer=tokenizer, seed=0).eval()
    check_fit(loaded, tokenizer, max_length=8, needs_padding=True)
    return loaded


@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_are_the_mean_of_the_old_ones_which_stay(kind: str, tmp_path: Path) -> None:
    folder, task = write(tmp_path, kind), KINDS[kind][1]

    plain, grown = load(task, name_or_path=folder), load(task, name_or_path=folder, add_tokens=ADDED)

    assert grown.config.vocab_size == VOCABULARY + 2
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(plain, get)(), getattr(grown, get)()
        for name in ("weight", "bias") if old is not None else ():
            if getattr(old, name, None) is not None:
                before, after = getattr(old, name), getattr(new, name)
                assert torch.equal(after[:VOCABULARY], before)
                assert torch.equal(after[VOCABULARY:], before.mean(dim=0).expand_as(after[VOCABULARY:]))
    assert load_tokenizer(schema.Model(name_or_path=folder, add_tokens=ADDED), training_texts=list)(
        "the <name> <date> dog", add_special_tokens=False
    )["input_ids"][1:3] == [VOCABULARY, VOCABULARY + 1]


def test_rows_beyond_the_vocabulary_that_become_tokens_are_the_mean_too(tmp_path: Path) -> None:
    folder = write(tmp_path, "gpt2", rows=VOCABULARY + 7)

    plain, grown = load("causal_lm", name_or_path=folder), load("causal_lm", name_or_path=folder, add_tokens=ADDED)

    old, new = plain.get_input_embeddings().weight, grown.get_input_embeddings().weight
    others = [row for row in range(VOCABULARY + 7) if row not in (VOCABULARY, VOCABULARY + 1)]
    assert torch.equal(new[others], old[others])
    assert torch.equal(new[VOCABULARY], old[others].mean(dim=0))


def test_trained_tokens_are_not_reset_when_the_setting_is_given_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "base", "bert")
    grown = load("masked_lm", name_or_path=folder, add_tokens=ADDED)
    with torch.no_grad():
        grown.get_input_embeddings().weight[VOCABULARY:] = 5.0
    settings = schema.Model(name_or_path=folder, add_tokens=ADDED)
    weights = {name: value.detach() for name, value in grown.named_parameters()}
    save(grown, weights, load_tokenizer(settings, training_texts=list), tmp_path / "model")

    for tokens in ((), ADDED):
        again = load("masked_lm", name_or_path=str(tmp_path / "model"), add_tokens=tokens)
        assert torch.equal(again.get_input_embeddings().weight[VOCABULARY:], torch.full((2, 16), 5.0))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("token", "number"), [("cat", None), ("<pad>", VOCABULARY)])
def test_a_pad_token_is_taken_or_added(kind: str, token: str, number: int | None, tmp_path: Path) -> None:
    folder = write(tmp_path, kind)
    tokenizer = load_tokenizer(schema.Model(name_or_path=folder, pad_token=token), training_texts=list)
    number = tiny.tokenizer().convert_tokens_to_ids(token) if number is None else number

    loaded = load("sequence_classification", name_or_path=folder, pad_token=token)

    assert (tokenizer.pad_token_id, loaded.config.pad_token_id) == (number, number)


def test_a_model_that_numbers_positions_by_its_pad_token_keeps_it(tmp_path: Path) -> None:
    folder = write(tmp_path, "roberta")

    with pytest.raises(ConfigError, match=r"model.pad_token=<pad>: a roberta model numbers the positions"):
        load("masked_lm", name_or_path=folder, pad_token="<pad>")


@pytest.mark.ranks
def test_adapters_save_and_train_the_embeddings_of_added_tokens(tmp_path: Path) -> None:
    from dtrain.models import merging

    folder = write(tmp_path / "base", "llama")
    lora = schema.Lora(r=2, targets=("q_proj",))
    module = load("causal_lm", name_or_path=folder, add_tokens=ADDED, pad_token="<pad>", lora=lora)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.arange(parameter.numel()).reshape(parameter.shape) / 1000)
    settings = schema.Model(name_or_path=folder, add_tokens=ADDED, pad_token="<pad>")
    weights = {name: value.detach() for name, value in module.named_parameters()}
    save(module, weights, load_tokenizer(settings, training_texts=list), tmp_path / "adapters")
    ids = torch.tensor([[2, VOCABULARY, 7, VOCABULARY + 1]])

    again = load("causal_lm", name_or_path=str(tmp_path / "adapters"))
    merging.merge_folder(tmp_path / "adapters", tmp_path / "merged")
    load_tokenizer(settings, training_texts=list).save_pretrained(tmp_path / "merged")
    merged = load("causal_lm", name_or_path=str(tmp_path / "merged"))

    with torch.no_grad():
        expected = module(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, expected)
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-5)
    assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} >= {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }


@pytest.mark.ranks
def test_a_sharded_engine_resumes_and_evaluates_like_one_process(tmp_path: Path) -> None:
    tiny.write_cola(tmp_path / "cola", train=24, dev=11)
    tiny.write_model(tmp_path / "bert", layers=1, dropout=0.0)

    def settings(name: str, **more: str) -> list[str]:
        given = {
            "run.name": name,
            "run.output_dir": str(tmp_path / "runs"),
            "task.name": "classification",
            "model.name_or_path": str(tmp_path / "bert"),
            "model.add_tokens": "[the cat, sees]",
            "data.name": "cola",
            "data.path": str(tmp_path / "cola"),
            "data.cache_dir": str(tmp_path / "cache"),
            "data.max_length": "32",
            "train.global_batch_size": "8",
            "train.micro_batch_size": "4",
            "train.log_every": "1",
            "optim.learning_rate": "0.01",
            "checkpoint.every": "3",
            "schedule.name": "constant",
            "tracking.tensorboard": "false",
            **more,
        }
        return [f"{key}={value}" for key, value in given.items()]

    engine = {"engine.zero_stage": "3"}
    whole = run_ranks(commands, 1, [("train", settings("whole", **{"train.epochs": "2"}))])[0][0]
    _, resumed = run_ranks(
        commands,
        2,
        [
            ("train", settings("parts", **{"train.epochs": "1"}, **engine)),
            ("train", settings("parts", **{"train.epochs": "2"}, **engine)),
        ],
    )[0]
    saved = {"model.name_or_path": str(tmp_path / "runs" / "parts" / "model"), "model.add_tokens": "[]"}
    again = run_ranks(commands, 1, [("evaluate", settings("again", **saved))])[0][0]

    assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert again["metrics"]["loss"] == pytest.approx(resumed["metrics"]["loss"], rel=1e-6)

"""The trial before training: one answer per row in every batch, and words for a model that cannot compute the data."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from dtrain.config import schema
from dtrain.config.task import CausalLm, Classification, MaskedLm, MultiLabel, QuestionAnswering, Seq2Seq
from dtrain.console import log
from dtrain.data.seeding import DataPosition
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError
from dtrain.models.load import load_model
from dtrain.models.seq2seq import decoder_inputs
from dtrain.tasks.causal_lm import CausalLmTask
from dtrain.tasks.classification import ClassificationTask
from dtrain.tasks.masked_lm import MaskedLmTask
from dtrain.tasks.multi_label import MultiLabelTask
from dtrain.tasks.multiple_choice import MultipleChoiceTask
from dtrain.tasks.protocol import Padding
from dtrain.tasks.question_answering import QuestionAnsweringTask
from dtrain.tasks.regression import RegressionTask
from dtrain.tasks.seq2seq import Seq2SeqTask
from dtrain.tasks.token_classification import TokenClassificationTask
from dtrain.tasks.trial import try_model
from tests.support import tiny
from tests.support.tiny import Table

LONGEST = 24
CLS, SEP = 2, 3

WIDE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
    "initializer_range": 0.5,
}
SEQ2SEQ = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 40,
    "init_std": 0.5,
}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40, "initializer_range": 0.5},
    "xlnet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "initializer_range": 0.5},
    "convbert": {**WIDE, "embedding_size": 16},
    "fnet": {name: value for name, value in WIDE.items() if name != "num_attention_heads"},
    "t5": {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 16, "num_layers": 1, "initializer_factor": 4.0},
    "bart": SEQ2SEQ,
    "m2m_100": SEQ2SEQ,
    "fsmt": {**SEQ2SEQ, "src_vocab_size": 25, "tgt_vocab_size": 25, "langs": ["en", "de"]},
    "canine": {**WIDE, "num_hash_buckets": 64, "num_hash_functions": 4},
    "prophetnet": {
        "hidden_size": 16,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "num_encoder_attention_heads": 2,
        "num_decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "max_position_embeddings": 40,
        "init_std": 0.5,
    },
    "gptj": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40},
    "codegen": {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 40},
}
"""Settings by model type, WIDE for others. Loud weights, so that a difference shows."""


def rows() -> list[list[int]]:
    """Texts of 1 to 20 words with their special tokens, the shortest first."""
    rng = random.Random(1)
    words = range(len(tiny.SPECIAL), len(tiny.SPECIAL) + len(tiny.WORDS))
    return [[CLS, *rng.choices(words, k=length), SEP] for length in (1, 2, 5, 9, 13, 17, 20)]


def make(name: str, side: str = "right") -> Any:
    """A task of this name with texts of different lengths, and a tokenizer that pads on this side."""
    tokenizer, ids = tiny.tokenizer(), rows()
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = side
    number = len(ids)
    limits = {"max_length": LONGEST}

    def splits(**columns: Any) -> dict[str, Any]:
        return {"validation": Table({"input_ids": ids, **columns})}

    match name:
        case "multi_label":
            lists = [[0], [], [1], [0, 1], [0], [1], []]
            return MultiLabelTask(splits(label=lists), tokenizer, ["A", "B"], MultiLabel(name="multi_label"), **limits)
        case "classification":
            settings = Classification(name="classification")
            return ClassificationTask(splits(label=[0, 1, 0, 1, 0, 1, 0]), tokenizer, ["no", "yes"], settings, **limits)
        case "regression":
            return RegressionTask(splits(label=[1.0] * number), tokenizer, **limits)
        case "multiple_choice":
            choices = splits(label=[1] * number)["validation"][list(range(number))]
            choices["input_ids"] = [[row, [*row[:1], *row]] for row in choices["input_ids"]]
            return MultipleChoiceTask({"validation": Table(choices)}, tokenizer, **limits)
        case "masked_lm":
            return MaskedLmTask(splits(), tokenizer, MaskedLm(name="masked_lm"), seed=0, **limits)
        case "token_classification":
            places = [list(range(1, len(row) - 1)) for row in ids]
            tags = [[place % 2 for place in row] for row in places]
            return TokenClassificationTask(splits(places=places, tags=tags), tokenizer, ["A", "B"], **limits)
        case "question_answering":
            offsets = [[[-1, *(2 * place for place in range(len(row) - 2)), -1]] for row in ids]
            columns = {
                "input_ids": [[row] for row in ids],
                "offset_starts": offsets,
                "offset_ends": [[[place + 1 if place >= 0 else -1 for place in row[0]]] for row in offsets],
                "start_positions": [[1]] * number,
                "end_positions": [[1]] * number,
                "context": ["a b"] * number,
                "answers": [["a"]] * number,
                "id": [None] * number,
            }
            answers = QuestionAnswering(name="question_answering")
            return QuestionAnsweringTask({"validation": Table(columns)}, tokenizer, answers, **limits)
        case "seq2seq":
            table = splits(labels=[[*row[1 : 1 + len(row) // 3], SEP] for row in ids], reference=["text"] * number)
            options = Seq2Seq(name="seq2seq", max_target_length=8)
            return Seq2SeqTask(table, tokenizer, options, schema.Evaluation(), **limits)
        case "causal_lm":
            return CausalLmTask(splits(), tokenizer, is_char=False, settings=CausalLm(name="causal_lm"), **limits)
    raise AssertionError(name)


def model(task: Any, kind: str, **changes: Any) -> Any:
    """A random model for the task, in eval mode."""
    config = {"model_type": kind, **SIZES.get(kind, WIDE), **changes}
    settings = schema.Model(from_scratch=True, tokenizer="tokenizer", config=config)
    return load_model(settings, head=task.head, head_config=task.head_config, tokenizer=task.tokenizer, seed=3).eval()


@torch.no_grad()
def scores(module: nn.Module, task: Any, indices: list[int]) -> list[tuple[float, list[float]]]:
    """The loss and the prediction of each of these rows, from one batch."""
    batch = task.collate(task.splits["validation"][indices], DataPosition(0, indices))
    scored = task.score(module, batch, lock_step=False)
    predictions = torch.zeros(len(indices)) if scored.prediction is None else scored.prediction.double()
    return list(zip(scored.loss.tolist(), predictions.reshape(len(indices), -1).tolist(), strict=True))


# One answer per row


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[
            ("classification", kind)
            for kind in ("bert", "roberta", "gpt2", "llama", "xlnet", "convbert", "fnet", "canine", "t5", "bart")
        ],
        *[("multi_label", kind) for kind in ("gpt2", "xlnet")],
        *[("regression", kind) for kind in ("bert", "gpt2", "xlnet")],
        *[("multiple_choice", kind) for kind in ("bert", "roberta", "xlnet")],
        *[("masked_lm", kind) for kind in ("bert", "roberta", "convbert")],
        *[("token_classification", kind) for kind in ("bert", "xlnet", "convbert")],
        *[("question_answering", kind) for kind in ("bert", "convbert")],
        *[("seq2seq", kind) for kind in ("t5", "bart", "m2m_100", "fsmt", "prophetnet")],
    ],
)
def test_a_row_has_one_answer_alone_and_beside_longer_rows_on_either_padding_side(name: str, kind: str) -> None:
    task = make(name)
    module = model(task, kind)
    indices = list(range(len(task.splits["validation"])))
    found = {}
    for side in ("right", "left"):
        task = make(name, side)
        try_model(module, task, ONE_PROCESS)
        found[side, "alone"] = [scores(module, task, [index])[0] for index in indices]
        found[side, "together"] = scores(module, task, indices)

    expected = found["right", "alone"]
    assert len({round(loss, 4) for loss, _ in expected}) > 1  # the rows do differ
    for rows_found in found.values():
        assert [loss for loss, _ in rows_found] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
        for (_, prediction), (_, wanted) in zip(rows_found, expected, strict=True):
            assert prediction == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_answer_is_the_models_own_for_the_tokens_without_any_padding(kind: str) -> None:
    task = make("regression", "left")
    module = model(task, kind)
    try_model(module, task, ONE_PROCESS)
    ids = task.splits["validation"][list(range(7))]["input_ids"]

    with torch.no_grad():
        expected = [float(module(input_ids=torch.tensor([row])).logits) for row in ids]

    assert [prediction[0] for _, prediction in scores(module, task, list(range(7)))] == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize(("before", "kind", "expected"), [("left", "gpt2", "right"), ("right", "xlnet", "left")])
def test_the_saved_tokenizer_pads_on_the_side_of_training(
    tmp_path: Path, before: str, kind: str, expected: str
) -> None:
    task = make("classification", before)

    try_model(model(task, kind), task, ONE_PROCESS)
    task.tokenizer.save_pretrained(tmp_path)

    assert AutoTokenizer.from_pretrained(tmp_path, local_files_only=True).padding_side == expected


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("classification", "bert", Padding("right")),
        ("classification", "gpt2", Padding("right")),
        ("classification", "xlnet", Padding("left")),  # it reads the last position of a row
        ("token_classification", "xlnet", Padding("right")),
        ("masked_lm", "convbert", Padding("right", LONGEST)),  # its convolutions read neighbors, padding as well
        ("classification", "fnet", Padding("right", LONGEST)),  # it has no mask
        ("multiple_choice", "canine", Padding("right", LONGEST)),  # it joins groups of characters
        ("multiple_choice", "xlnet", Padding("left")),
        ("seq2seq", "t5", Padding("right")),
        ("seq2seq", "prophetnet", Padding("right", target_length=8)),  # its logits depend on the number of targets
    ],
)
def test_the_padding_is_the_first_that_changes_no_answer(name: str, kind: str, expected: Padding) -> None:
    task = make(name, "left")

    try_model(model(task, kind), task, ONE_PROCESS)

    assert task.padding == expected
    assert task.tokenizer.padding_side == expected.side  # as it is saved with the model


def test_padding_to_one_length_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="dtrain")
    task = make("classification")

    try_model(model(task, "fnet"), task, ONE_PROCESS)

    assert "every row is padded to data.max_length=24" in caplog.text


@pytest.mark.parametrize(("length", "expected"), [(24, None), (592, 592)])
def test_a_sparse_attention_that_changes_with_the_batch_gets_rows_of_one_length(
    length: int, expected: int | None
) -> None:
    task = make("classification")
    task.max_length = length
    module = model(task, "big_bird", block_size=16, num_random_blocks=1, max_position_embeddings=600)

    try_model(module, task, ONE_PROCESS)

    assert task.padding.length == expected


def test_a_trial_leaves_the_model_and_the_random_state_as_they_were() -> None:
    task = make("classification")
    module = model(task, "bert").train()
    module.bert.embeddings.eval()
    modes = [part.training for part in module.modules()]
    weights = [parameter.clone() for parameter in module.parameters()]
    state = torch.random.get_rng_state()

    try_model(module, task, ONE_PROCESS)

    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), weights, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not module._forward_hooks


# What the config lacks


@pytest.mark.parametrize(
    ("name", "kind", "lacks", "message"),
    [
        (
            "classification",
            "bart",
            {"eos_token_id": None},
            r"bart model reads its answer at the end token.*config\.eos_token_id=3",
        ),
        (
            "classification",
            "t5",
            {"eos_token_id": 1},
            r"t5 model reads .* token 1 ends no text here: .*config\.eos_token_id=3",
        ),
        ("classification", "t5", {"decoder_start_token_id": None}, r"decoder starts.*config\.decoder_start_token_id=0"),
        (
            "causal_lm",
            "roberta",
            {"pad_token_id": None, "is_decoder": True},
            r"by the pad token.*config\.pad_token_id=0",
        ),
        (
            "causal_lm",
            "gptj",
            {"rotary_dim": 64},
            r"gptj model rotates rotary_dim=64 values .* only 8",
        ),
        (
            "causal_lm",
            "codegen",
            {"rotary_dim": 64},
            r"codegen model rotates rotary_dim=64 values .* only 4",
        ),
        (
            "classification",
            "nystromformer",
            {"num_landmarks": 5},
            r"nystromformer model cannot compute the first example .*segment_means_seq_len=64",
        ),
        (
            "classification",
            "xmod",
            {},
            r"xmod model cannot compute .*Input language unknown.* ids and a mask, and nothing else",
        ),
        (
            "causal_lm",
            "prophetnet",
            {},
            r"prophetnet model predicts for a token depends on the number of tokens after it",
        ),
        ("causal_lm", "bert", {}, r"bert model sees the tokens that it has to predict.*is_decoder=true"),
    ],
)
def test_what_a_model_raises_in_its_first_forward_is_answered_with_what_its_config_lacks(
    name: str, kind: str, lacks: dict[str, Any], message: str
) -> None:
    task = make(name)
    module = model(task, kind, **lacks)
    for key, value in lacks.items():  # a config from a file may have what load_model would fill
        setattr(module.config, key, value)

    with pytest.raises(ConfigError, match=message) as refusal:
        try_model(module, task, ONE_PROCESS)

    cure = re.search(r"model\.config=\{(\w+): (\w+)\}", str(refusal.value))
    if cure is not None and cure[1] != "NAME":  # it works when pasted
        try_model(model(task, kind, **{**lacks, cure[1]: json.loads(cure[2])}), task, ONE_PROCESS)


def test_the_decoders_inputs_do_not_change_the_labels() -> None:
    task = make("seq2seq")
    labels = torch.tensor([[7, 8, SEP], [9, SEP, -100]])
    before = labels.clone()

    decoder_inputs(model(task, "fsmt"), labels)

    assert torch.equal(labels, before)


@pytest.mark.parametrize(
    ("kind", "sizes"), [("modernbert-decoder", {}), ("cwm", {"num_key_value_heads": 2, "head_dim": 8})]
)
def test_a_config_that_needs_a_token_gets_one_that_the_tokenizer_has(kind: str, sizes: dict[str, int]) -> None:
    task = make("causal_lm")
    module = model(task, kind, layer_types=["full_attention"], **sizes)

    try_model(module, task, ONE_PROCESS)

    assert module.config.bos_token_id in task.tokenizer.all_special_ids


def test_a_model_type_with_the_models_of_another_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model_type=gpt-sw3 has the models of gpt2: write that instead"):
        model(make("causal_lm"), "gpt-sw3", **SIZES["gpt2"])


def test_a_model_of_several_texts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"not a valid musicgen config: Multiple valid text configs"):
        load_model(
            schema.Model(from_scratch=True, tokenizer="tokenizer", config={"model_type": "musicgen"}),
            head=make("causal_lm").head,
            head_config={},
            tokenizer=tiny.tokenizer(),
            seed=0,
        )


def test_a_decoder_passes() -> None:
    task = make("causal_lm")
    try_model(model(task, "bert", is_decoder=True), task, ONE_PROCESS)
    try_model(model(task, "gpt2"), task, ONE_PROCESS)


def test_the_error_of_a_users_own_module_is_not_hidden() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, **inputs: torch.Tensor) -> Any:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        try_model(Broken(), make("classification"), ONE_PROCESS)


def test_a_users_own_module_that_reads_padding_is_found() -> None:
    class ReadsLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(25, 2)

        def forward(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> Any:
            return SimpleNamespace(logits=self.table(input_ids)[:, -1])

    task = make("classification")

    try_model(ReadsLast(), task, ONE_PROCESS)

    assert task.padding == Padding("left")

"""The end of the frozen part is found in models of every kind, and the training is that of a plain run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dtrain.config.task import Classification
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.models import unpadding_hooks
from dtrain.models.frozen_prefix import BackboneBorder, LayersBorder
from dtrain.tasks.classification import ClassificationTask
from dtrain.tasks.token_classification import TokenClassificationTask
from dtrain.training import build
from dtrain.training.evaluation import evaluate_split
from tests.support import tiny, training
from tests.support.training import Setting, apart, worst

SIZES = {"vocab_size": 25, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
COMMON = {**SIZES, "max_position_embeddings": 64, "pad_token_id": 0}
SMALL = {"vocab_size": 25, "pad_token_id": 0}

BASE = ("base_model",)
ENCODER = ("embeddings", "encoder.layer[:2]")
LLAMA = ("embed_tokens", "layers[:2]")

KINDS: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", COMMON, ENCODER),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", COMMON, ENCODER),
    "electra": (
        "ElectraForSequenceClassification",
        "ElectraConfig",
        {**COMMON, "embedding_size": 16},
        ("embeddings", "embeddings_project", "encoder.layer[:2]"),
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {**SMALL, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64},
        ("embeddings", "transformer.layer[:2]"),
    ),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**COMMON, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        ("embeddings", "encoder.rel_embeddings", "encoder.layer[:2]"),
    ),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", COMMON, (*ENCODER, "encoder.relative_attention_bias")),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**COMMON, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
        ("embeddings", "layers[:2]"),
    ),
    "gpt2": (
        "GPT2ForSequenceClassification",
        "GPT2Config",
        {**SMALL, "n_embd": 32, "n_layer": 3, "n_head": 4, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 1},
        ("wte", "wpe", "h[:2]"),
    ),
    "llama": ("LlamaForSequenceClassification", "LlamaConfig", COMMON, LLAMA),
    "qwen3": (
        "Qwen3ForSequenceClassification",
        "Qwen3Config",
        {**COMMON, "num_key_value_heads": 2, "head_dim": 8},
        LLAMA,
    ),
    "gpt-neox": ("GPTNeoXForSequenceClassification", "GPTNeoXConfig", COMMON, ("embed_in", "layers[:2]")),
    "opt": (
        "OPTForSequenceClassification",
        "OPTConfig",
        {**COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32},
        ("decoder.embed_tokens", "decoder.embed_positions", "decoder.layers[:2]"),
    ),
}


def model(name: str, **changes: Any) -> Any:
    kind, config, sizes, _ = KINDS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, kind)(getattr(transformers, config)(num_labels=2, **{**sizes, **changes}))


def trained(setting: Setting, make: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    built = training.build(ONE_PROCESS, setting, make())
    recorder, cache = training.Recorder(), built.prepared.frozen_cache
    built.go(recorder)
    return {"steps": recorder.steps, "weights": training.weights_of(built.engine)}, cache


def compare(frozen: tuple[str, ...], folder: Path, make: Callable[[], Any]) -> Any:
    """Trains with and without the cache; returns the cache after asserting that both runs are the same."""
    setting = Setting(freeze=frozen, cache="auto", cache_dir=str(folder), learning_rate=0.1)
    plain, _ = trained(replace(setting, cache="off"), make)
    cached, cache = trained(setting, make)
    assert all(step["applied"] for step in cached["steps"])
    assert worst(plain, cached) < 1e-5
    assert worst(plain, cached, "grad_norm") < 1e-4
    assert apart(plain, cached) < 1e-5
    return cache


@pytest.mark.parametrize("name", KINDS)
def test_a_head_on_a_frozen_backbone_reads_what_it_needs(name: str, tmp_path: Path) -> None:
    cache = compare(BASE, tmp_path, lambda: model(name))

    assert isinstance(cache.border, BackboneBorder)
    # A decoder's classifier reads one token's state, but which one depends on the row.
    assert cache.border.is_per_token == (name in ("gpt2", "llama", "qwen3", "gpt-neox", "opt"))
    assert (cache.hits > 0, cache.misses) == (True, 0)


@pytest.mark.parametrize("name", KINDS)
def test_layers_on_frozen_ones_read_the_states_of_real_tokens(name: str, tmp_path: Path) -> None:
    cache = compare(KINDS[name][3], tmp_path, lambda: model(name))

    assert isinstance(cache.border, LayersBorder)
    assert "after layer 2 of 3" in cache.border.shown
    assert (cache.hits > 0, cache.misses) == (True, 0)


@pytest.mark.parametrize("frozen", [BASE, LLAMA])
def test_a_decoder_that_packs_calls_without_a_mask_reads_them_too(
    frozen: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpadding_hooks, "_is_on_device", lambda _: True)  # as on a GPU

    cache = compare(frozen, tmp_path, lambda: model("llama"))

    assert (cache.hits > 0, cache.misses) == (True, 0)


REFUSED = {
    "embeddings that learn": ("bert", {}, ("encoder.layer[:2]",), "embeddings.word_embeddings learns"),
    "a first layer that learns": ("bert", {}, ("embeddings", "encoder.layer[1:]"), "no layer is frozen together"),
    "dropout outside of frozen modules": ("gpt2", {"embd_pdrop": 0.5}, ("wte", "wpe", "h[:2]"), "dropout"),
    "positions by the batch": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 10},
        BASE,
        "rotary positions depend on the length of the batch",
    ),
    "layers that are skipped": ("opt", {"layerdrop": 0.5}, KINDS["opt"][3], "skipped at random (layerdrop"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_part_whose_result_changes_is_computed_in_each_step_and_the_plan_says_why(case: str, tmp_path: Path) -> None:
    name, changes, frozen, reason = REFUSED[case]
    setting = Setting(freeze=frozen, cache="auto", cache_dir=str(tmp_path), find_unused=True)
    built = training.build(ONE_PROCESS, setting, model(name, **changes))
    described = built.prepared.frozen_cache.describe(
        type(built.engine).traits(built.config, ONE_PROCESS, total_steps=6)
    )

    assert built.prepared.frozen_cache.border is None
    assert described is not None
    assert described.startswith("off: ")
    assert reason in described


def read_or_computed(
    setting: Setting, make: Callable[[], Any], learns: Any
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The steps with the cache off and on, and the cache."""
    found = []
    for cache in ("off", "auto"):
        built, recorder = (
            training.build(ONE_PROCESS, replace(setting, cache=cache), make(), learns()),
            training.Recorder(),
        )
        built.go(recorder)
        found.append({"steps": recorder.steps, "weights": training.weights_of(built.engine)})
    return found[0], found[1], built.prepared.frozen_cache


def tagged(without: int, where: slice) -> TokenClassificationTask:
    """Tagged sentences, of which the first `without` rows have no tag, and those after it have tags in some places."""
    ids = [list(row) for row in tiny.sentences(21)[list(range(21))]["input_ids"]]
    places = [[] if row < without else list(range(1, len(each) - 1))[where] for row, each in enumerate(ids)]
    tags = [[each[place] % 2 for place in some] for each, some in zip(ids, places, strict=True)]
    split = tiny.Table({"input_ids": ids, "places": places, "tags": tags})
    return TokenClassificationTask({"train": split}, tiny.tokenizer(), ["odd", "even"], max_length=32)


@pytest.mark.parametrize(("without", "where"), [(4, slice(None)), (0, slice(-1, None))])
def test_rows_without_targets_do_not_hide_what_a_head_reads(tmp_path: Path, without: int, where: slice) -> None:
    setting = Setting(freeze=BASE, cache_dir=str(tmp_path), learning_rate=0.2)

    def make() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return transformers.BertForTokenClassification(tiny.bert(layers=2).config)

    off, on, cache = read_or_computed(setting, make, lambda: tagged(without, where))

    assert worst(off, on) < 1e-5
    assert (cache.border is not None, cache.misses) == (True, 0)


def test_no_target_at_all_is_no_trial(tmp_path: Path) -> None:
    setting = Setting(freeze=BASE, cache="auto", cache_dir=str(tmp_path), learning_rate=0.2, find_unused=True)
    module = transformers.BertForTokenClassification(tiny.bert(layers=2).config)

    cache = training.build(ONE_PROCESS, setting, module, tagged(21, slice(None))).prepared.frozen_cache

    assert cache.border is None
    assert "no target" in str(cache._why_off)


@pytest.mark.parametrize("method", ["requires_grad", "no_grad"])
@pytest.mark.parametrize("kind", ["Deberta", "DebertaV2"])
def test_frozen_layers_that_read_weights_that_learn_are_computed(tmp_path: Path, kind: str, method: str) -> None:
    options: dict[str, Any] = {
        **COMMON,
        "type_vocab_size": 0,
        "pooler_hidden_size": 32,
        "num_labels": 2,
        "max_relative_positions": 16,
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": ["c2p", "p2c"],
        **({"position_buckets": 8, "norm_rel_ebd": "none", "share_att_key": True} if kind == "DebertaV2" else {}),
    }

    def make() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = getattr(transformers, f"{kind}Config")(**options)
            return getattr(transformers, f"{kind}ForSequenceClassification")(config)

    frozen = ("embeddings", "encoder.layer[0]")
    setting = Setting(freeze=frozen, freeze_method=method, cache_dir=str(tmp_path), learning_rate=0.1, cache="auto")
    cache = training.build(ONE_PROCESS, setting, make()).prepared.frozen_cache

    assert cache.border is None
    assert "learn" in str(cache._why_off)


def test_a_row_that_ends_in_the_pad_token_is_read_as_it_is_computed(tmp_path: Path) -> None:
    end = 3  # [SEP], which also pads

    def learns() -> ClassificationTask:
        tokenizer = tiny.tokenizer()
        tokenizer.pad_token = "[SEP]"
        columns = dict(tiny.sentences(21)[list(range(21))])
        # The first rows were cut, later ones end in the end token.
        columns["input_ids"] = [row[1:-1] if n < 4 else row[1:] for n, row in enumerate(columns["input_ids"])]
        options = Setting().config().task
        assert isinstance(options, Classification)
        return ClassificationTask({"train": tiny.Table(columns)}, tokenizer, ["no", "yes"], options, max_length=32)

    setting = Setting(freeze=BASE, cache_dir=str(tmp_path), learning_rate=0.2)
    off, on, _cache = read_or_computed(
        setting, lambda: model("gpt2", pad_token_id=end, eos_token_id=end, bos_token_id=end), learns
    )

    assert worst(off, on) < 1e-5


class OverPadding(transformers.BertForSequenceClassification):
    """Its head reads the states of padding, too."""

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        states = self.bert(input_ids, **inputs).last_hidden_state
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.classifier(states.mean(dim=1)))


def test_a_head_that_reads_padding_is_noticed_though_the_first_rows_have_none(tmp_path: Path) -> None:
    columns = dict(tiny.sentences(21)[list(range(21))])
    columns["input_ids"] = [row[:5] if n < 8 else row for n, row in enumerate(columns["input_ids"])]
    options = Setting().config().task
    assert isinstance(options, Classification)
    learns = ClassificationTask({"train": tiny.Table(columns)}, tiny.tokenizer(), ["no", "yes"], options, max_length=32)
    setting = Setting(freeze=BASE, cache="auto", cache_dir=str(tmp_path), unpad="off", find_unused=True)

    cache = training.build(ONE_PROCESS, setting, OverPadding(tiny.bert(layers=2).config), learns).prepared.frozen_cache

    assert cache.border is None


class OtherInEvaluation(transformers.BertForSequenceClassification):
    """Its head reads the pooler's vector in training, and another state, or the states of frozen layers, in evaluation."""

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        output = self.bert(input_ids, **inputs)
        vector = output.pooler_output
        if not self.training:
            inner = output.hidden_states
            vector = output.last_hidden_state[:, 1] if inner is None else torch.stack(inner).mean(dim=0)[:, 0]
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.classifier(vector))


@pytest.mark.parametrize(("frozen", "inner"), [(BASE, False), (ENCODER, True)])
def test_a_head_that_reads_another_part_in_evaluation_is_evaluated_as_without_a_cache(
    tmp_path: Path, frozen: tuple[str, ...], inner: bool
) -> None:
    losses = []
    for cache in ("off", "auto"):
        setting = Setting(freeze=frozen, cache=cache, cache_dir=str(tmp_path), dropout=0.0, find_unused=True)
        config = tiny.bert(layers=3, dropout=0.0).config
        config.output_hidden_states = inner
        with torch.random.fork_rng():
            torch.manual_seed(0)
            built = training.build(ONE_PROCESS, setting, OtherInEvaluation(config))
        built.go()
        losses.append(evaluate_split(built.engine, built.task, "validation", micro_batch_size=4).metrics["loss"])

    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


class Normalized(transformers.BertForSequenceClassification):
    """Its head has running statistics."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.norm = torch.nn.BatchNorm1d(config.hidden_size)

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        vector = self.norm(self.bert(input_ids, **inputs).pooler_output)
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.classifier(vector))


def test_frozen_parts_of_a_new_model_are_in_eval_mode_from_the_first_step_on() -> None:
    module = Normalized(tiny.bert(layers=2).config).train()
    built = training.build(ONE_PROCESS, Setting(freeze=("embeddings",), cache="off", find_unused=True, steps=1), module)
    modes = []
    module.bert.embeddings.register_forward_hook(lambda part, *_: modes.append(part.training))
    module.norm.register_forward_hook(lambda part, *_: modes.append(part.training))
    built.go()

    assert modes
    assert not any(modes)


def test_the_trial_is_no_step_for_running_statistics(tmp_path: Path) -> None:
    module = Normalized(tiny.bert(layers=2).config)
    setting = Setting(freeze=BASE, cache="auto", cache_dir=str(tmp_path), find_unused=True)
    config = setting.config()
    config = config.model_copy(update={"model": config.model.model_copy(update={"batch_norm": "train"})})
    task = training.task(setting)

    prepared = build.prepare_training(module, config, task, build.step_plan(config, task))

    assert prepared.frozen_cache.border is not None
    assert module.norm.training
    assert int(module.norm.num_batches_tracked) == 0


def test_weights_that_layers_below_and_above_share_belong_to_the_frozen_part(tmp_path: Path) -> None:
    def make() -> Any:
        module = model("bert")
        module.bert.encoder.layer[2].output.dense.weight = module.bert.encoder.layer[0].output.dense.weight
        return module

    border = compare(ENCODER, tmp_path, make).border

    assert "encoder.layer.0.output.dense.weight" in dict(border.frozen())

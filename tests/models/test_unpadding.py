"""Models without padding: the same states and gradients as with it, on every architecture that is served."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from dtrain.config import schema
from dtrain.models import unpadding, unpadding_hooks
from dtrain.models.custom_head import HeadedModel
from dtrain.models.unpadding import prepare_unpadding
from dtrain.models.unpadding_calls import Group
from dtrain.models.unpadding_layout import PackedLayout, layout_of_mask
from tests.support.heads import HEADS
from tests.support.padded_models import DECODERS, ENCODERS, batch, make

KINDS = [*ENCODERS, *DECODERS]

Batch = dict[str, torch.Tensor]


def pair(kind: str, auto_class: Any = None, **changes: Any) -> tuple[Any, Any, Any]:
    """Returns a model with padding, an equal one without it, and the latter's hooks."""
    auto_class = auto_class or (AutoModelForMaskedLM if kind in ENCODERS else AutoModelForCausalLM)
    padded = make(kind, auto_class, **changes)
    unpadded = copy.deepcopy(padded)
    decision = prepare_unpadding(unpadded, schema.Model(unpad="on"))
    assert decision.hooks is not None
    decision.hooks.packed_calls = 0
    return padded, unpadded, decision.hooks


def at_tokens(logits: torch.Tensor, inputs: Batch) -> torch.Tensor:
    return logits[inputs["attention_mask"].bool()]


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative to the largest value."""
    return float((one - other).detach().abs().max() / one.detach().abs().max())


def gradients(model: Any, inputs: Batch) -> torch.Tensor:
    model.zero_grad()
    at_tokens(model(**inputs).logits, inputs).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def check_separation(model: Any) -> None:
    """Fails if another token in one row changes the logits of another row."""
    inputs = batch()
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][1, :3] = torch.tensor([7, 11, 5])
    before, after = (model(**one).logits.detach() for one in (inputs, other))
    kept = [0, 2, 3, 4]
    assert not torch.equal(before[1], after[1])
    assert torch.equal(
        before[kept][inputs["attention_mask"][kept].bool()], after[kept][inputs["attention_mask"][kept].bool()]
    )


# Architectures


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_padded_model(kind: str, side: str) -> None:
    padded, unpadded, hooks = pair(kind)
    inputs = batch(side=side)

    expected, found = (at_tokens(model(**inputs).logits, inputs) for model in (padded, unpadded))

    assert largest_difference(expected, found) < 1e-5
    assert largest_difference(gradients(padded, inputs), gradients(unpadded, inputs)) < 1e-5
    # The heads of encoders read the first position, which is padding on the left.
    assert hooks.packed_calls == (0 if side == "left" and kind in ENCODERS else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_ends_at_the_same_weights(kind: str) -> None:
    models = pair(kind)[:2]

    for model in models:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in (1, 2):
            gradients(model, batch(seed=seed))
            optimizer.step()

    expected, found = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
    assert largest_difference(expected, found) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_another_token_in_one_row_changes_no_other_row(kind: str) -> None:
    check_separation(pair(kind)[1])


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_one_token_attended_across_a_border_is_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def merged(mask: torch.Tensor, *, is_causal: bool) -> PackedLayout | None:
        """Makes one sequence of the two longest."""
        layout = layout_of_mask(mask, is_causal=is_causal)
        assert layout is not None
        *groups, short, long = layout.groups
        assert short.sequences == long.sequences == 1
        groups.append(Group(1, short.length + long.length))
        return PackedLayout(layout.rows, layout.width, layout.index, tuple(groups), is_causal)

    padded, unpadded, _ = pair(kind)
    inputs = batch()
    monkeypatch.setattr(unpadding_hooks, "layout_of_mask", merged)

    with pytest.raises(AssertionError):
        check_separation(unpadded)
    assert largest_difference(*(at_tokens(model(**inputs).logits, inputs) for model in (padded, unpadded))) > 1e-3
    # So the trial that every model takes refuses it as well.
    decision = prepare_unpadding(padded, schema.Model())
    assert decision.value == "off"
    assert "differ from the padded ones" in decision.reason


@pytest.mark.parametrize("kind", ["bert", "gpt2", "qwen3", "opt"])
def test_a_classifier_of_rows_gets_the_same_logits(kind: str) -> None:
    padded, unpadded, hooks = pair(kind, AutoModelForSequenceClassification, pad_token_id=0)
    inputs = batch()

    assert largest_difference(padded(**inputs).logits, unpadded(**inputs).logits) < 1e-5
    assert hooks.packed_calls == 1


# What is kept between calls: nothing


def hold_back(model: Any, *, checkpointed: bool) -> torch.Tensor:
    """Gradients of two batches whose forward passes both come before the first backward pass."""
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    batches = [batch(), batch(lengths=(3, 2, 8), seed=1)]
    losses = [at_tokens(model(**inputs).logits, inputs).square().mean() for inputs in batches]
    for loss in losses:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "albert"])  # albert cannot recompute activations
def test_layers_computed_again_in_the_backward_pass_use_their_own_batch(kind: str) -> None:
    padded, unpadded, _ = pair(kind)

    assert largest_difference(hold_back(padded, checkpointed=False), hold_back(unpadded, checkpointed=True)) < 1e-5


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_forward_pass_that_fails_leaves_nothing_behind(kind: str) -> None:
    padded, unpadded, _ = pair(kind)

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    handle = next(part for part in unpadded.modules() if isinstance(part, torch.nn.Linear)).register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        unpadded(**batch(lengths=(2, 30)))
    handle.remove()

    inputs = batch()
    assert largest_difference(*(at_tokens(model(**inputs).logits, inputs) for model in (padded, unpadded))) < 1e-5


def test_the_layout_of_another_batch_is_caught() -> None:
    layout = layout_of_mask(torch.tensor([[1, 1, 0], [1, 1, 1]]), is_causal=False)
    assert layout is not None

    for wrong in (torch.zeros(2, 4, 8), torch.zeros(3, 3, 8)):
        with pytest.raises(AssertionError, match="a layout of 2 x 3 with 5 tokens got"):
            layout.pack(wrong)
    with pytest.raises(AssertionError, match="a layout of 2 x 3 with 5 tokens got"):
        layout.unpack(torch.zeros(1, 6, 8))


def test_settling_a_model_again_replaces_its_hooks() -> None:
    padded, unpadded, first = pair("bert")
    second = prepare_unpadding(unpadded, schema.Model()).hooks
    assert second is not None
    inputs = batch()

    second.packed_calls = 0
    assert largest_difference(*(at_tokens(model(**inputs).logits, inputs) for model in (padded, unpadded))) < 1e-5
    assert (first.packed_calls, second.packed_calls) == (0, 1)

    prepare_unpadding(unpadded, schema.Model(unpad="off"))
    assert torch.equal(padded(**inputs).logits, unpadded(**inputs).logits)
    assert second.packed_calls == 1
    assert unpadded.config._attn_implementation == "sdpa"


# Calls that are left as they are


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_batch_without_padding_runs_as_it_is(kind: str) -> None:
    padded, unpadded, hooks = pair(kind)
    inputs = batch(lengths=(6, 6))

    assert torch.equal(padded(**inputs).logits, unpadded(**inputs).logits)
    assert torch.equal(padded(inputs["input_ids"]).logits, unpadded(inputs["input_ids"]).logits)
    assert hooks.packed_calls == 0


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_rows_of_nothing_but_padding_cost_nothing_and_are_finite(kind: str) -> None:
    padded, unpadded, hooks = pair(kind)
    inputs = batch(lengths=(4, 0, 2))

    expected, found = padded(**inputs).logits, unpadded(**inputs).logits

    assert largest_difference(at_tokens(expected, inputs), at_tokens(found, inputs)) < 1e-5
    assert bool(found.isfinite().all())
    assert hooks.packed_calls == 1
    empty = {"input_ids": torch.zeros(2, 3, dtype=torch.int64), "attention_mask": torch.zeros(2, 3, dtype=torch.int64)}
    unpadded(**empty)
    assert hooks.packed_calls == 1


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_inner_states_are_those_of_the_padded_batch(kind: str) -> None:
    padded, unpadded, hooks = pair(kind)
    inputs = batch()

    states = unpadded(**inputs, output_hidden_states=True).hidden_states

    assert all(
        torch.equal(one, other)
        for one, other in zip(padded(**inputs, output_hidden_states=True).hidden_states, states, strict=True)
    )
    assert hooks.packed_calls == 0


@pytest.mark.parametrize("kind", list(DECODERS))
def test_text_is_generated_with_a_cache_as_before(kind: str) -> None:
    padded, unpadded, hooks = pair(kind)
    inputs = batch(side="left")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    assert torch.equal(padded.generate(**inputs, **options), unpadded.generate(**inputs, **options))
    assert hooks.packed_calls == 0


def test_a_mask_with_holes_is_computed_by_encoders_and_left_alone_in_decoders() -> None:
    for kind, packed in (("bert", 1), ("mistral", 0)):
        padded, unpadded, hooks = pair(kind)
        inputs = batch(lengths=(8, 4))
        inputs["attention_mask"][0, 3] = 0

        assert largest_difference(*(at_tokens(model(**inputs).logits, inputs) for model in (padded, unpadded))) < 1e-5
        assert hooks.packed_calls == packed


# Numbers: dropout, types, adapters


def test_attention_dropout_is_applied_in_training_only() -> None:
    _, unpadded, hooks = pair("bert", attention_probs_dropout_prob=0.5)
    inputs = batch()

    def logits(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return at_tokens(unpadded(**inputs).logits, inputs).detach()

    assert torch.equal(logits(1), logits(2))
    unpadded.train()
    assert torch.equal(logits(1), logits(1))
    assert largest_difference(logits(1), logits(2)) > 1e-2
    assert hooks.packed_calls == 6


@pytest.mark.parametrize("kind", ["bert", "gemma3_text"])
def test_float64_and_bf16_keep_their_type(kind: str) -> None:
    padded, unpadded, hooks = pair(kind)
    inputs = batch()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = [at_tokens(model(**inputs).logits.float(), inputs) for model in (padded, unpadded)]
    assert largest_difference(*low) < 0.05
    double = [at_tokens(model.double()(**inputs).logits, inputs) for model in (padded, unpadded)]
    assert double[1].dtype == torch.float64
    assert largest_difference(*double) < 1e-12
    assert hooks.packed_calls == 2


def test_token_types_positions_and_embeddings_may_be_given() -> None:
    padded, unpadded, hooks = pair("bert")
    inputs = batch()
    shape = inputs["input_ids"].shape
    more = {
        "token_type_ids": torch.ones(shape, dtype=torch.int64),
        "position_ids": torch.arange(shape[1]).flip(0)[None],
    }
    embedded = {
        "inputs_embeds": padded.get_input_embeddings()(inputs["input_ids"]).detach(),
        "attention_mask": inputs["attention_mask"],
    }
    for given in ({**inputs, **more}, embedded):
        assert largest_difference(*(at_tokens(model(**given).logits, inputs) for model in (padded, unpadded))) < 1e-5
    assert hooks.packed_calls == 2

    padded, unpadded, hooks = pair("gpt2")
    given = {**inputs, **more}
    assert largest_difference(*(at_tokens(model(**given).logits, inputs) for model in (padded, unpadded))) < 1e-5
    assert hooks.packed_calls == 1


@pytest.mark.parametrize(("kind", "pooling"), [("bert", "cls"), ("roberta", "mean"), ("llama", "last")])
def test_a_head_of_dtrain_pools_the_same_states(kind: str, pooling: str) -> None:
    backbone = make(kind, AutoModel)
    settings = schema.NewHead.model_validate({"pooling": pooling})
    padded = HeadedModel(backbone, settings, task_head=HEADS["sequence_classification"], outputs=3, width=16).eval()
    unpadded = copy.deepcopy(padded)
    hooks = prepare_unpadding(unpadded, schema.Model(unpad="on")).hooks
    assert hooks is not None
    hooks.packed_calls = 0

    assert largest_difference(padded(**batch()).logits, unpadded(**batch()).logits) < 1e-5
    assert hooks.packed_calls == 1


def test_adapters_are_trained_as_in_the_padded_model() -> None:
    from dtrain.models import adapters

    padded = make("bert", AutoModelForSequenceClassification)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapters.add(padded, schema.Lora(targets=("query", "value")), base="base", new=[], embeddings=[])
    for name, parameter in padded.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    unpadded = copy.deepcopy(padded)
    hooks = prepare_unpadding(unpadded, schema.Model(unpad="on")).hooks
    assert hooks is not None
    hooks.packed_calls = 0
    found = []
    for model in (padded, unpadded):
        model(**batch()).logits.square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))

    assert largest_difference(*found) < 1e-5
    assert hooks.packed_calls == 1


# The decision


def decide(model: Any, **settings: Any) -> Any:
    return prepare_unpadding(model, schema.Model(**settings))


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("bloom", {}, "its attention has ALiBi biases"),
        ("deberta-v2", {}, "its attention cannot be replaced"),
        ("gemma2", {"head_dim": 8}, "its attention has a soft cap"),
        (
            "t5",
            {"d_model": 8, "num_layers": 1, "num_heads": 1, "d_ff": 8, "d_kv": 8},
            "it has an encoder and a decoder",
        ),
        ("fnet", {}, "fnet is not among the tested architectures"),
    ],
)
def test_other_architectures_are_padded_and_the_reason_is_given(
    kind: str, changes: dict[str, Any], reason: str
) -> None:
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=40, **{**sizes, **changes}))

    found = decide(model)

    assert (found.value, found.hooks) == ("off", None)
    assert found.reason.startswith(reason)


@pytest.mark.parametrize(
    ("kind", "changes", "settings", "reason"),
    [
        ("bert", {}, {"compile": True}, "model.compile would compile again"),
        ("bert", {}, {"attn_implementation": "eager"}, "model.attn_implementation=eager"),
        ("bert", {}, {"factory": "own:build"}, "model.factory builds the model"),
        ("bert", {"is_decoder": True}, {}, "this bert model is a decoder or has cross attention"),
        ("gpt2", {"add_cross_attention": True}, {}, "this gpt2 model is a decoder or has cross attention"),
        ("bert", {"chunk_size_feed_forward": 2}, {}, "model.config.chunk_size_feed_forward"),
        ("roberta", {"max_position_embeddings": 5}, {}, "it has fewer than 5 positions"),
        ("gemma3_text", {"use_bidirectional_attention": True}, {}, "this gemma3_text model is not causal"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            {},
            "its rotary positions depend on the length of the batch",
        ),
    ],
)
def test_a_config_that_needs_padding_is_noticed_and_on_is_an_error(
    kind: str, changes: dict[str, Any], settings: dict[str, Any], reason: str
) -> None:
    model = make(kind, AutoModelForSequenceClassification if kind in ENCODERS else AutoModelForCausalLM, **changes)

    assert decide(model, **settings).reason.startswith(reason)
    with pytest.raises(unpadding.ConfigError) as caught:
        decide(model, unpad="on", **settings)
    assert str(caught.value).startswith(f"model.unpad=on: this model cannot be computed without padding: {reason}")
    assert str(caught.value).endswith("Set model.unpad=off, or auto, which falls back to padding.")


def test_off_changes_nothing() -> None:
    model = make("bert", AutoModelForMaskedLM)

    assert str(decide(model, unpad="off")) == "off (as configured)"
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_the_decision_leaves_modes_gradients_and_the_random_state() -> None:
    model = make("bert", AutoModelForMaskedLM).train()
    model.bert.pooler = None
    model.bert.encoder.layer[0].eval()
    modes = [part.training for part in model.modules()]
    state = torch.get_rng_state()

    assert decide(model).value == "on"

    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_saved_model_does_not_know_of_it(tmp_path: Any) -> None:
    from transformers import AutoConfig

    for kind, auto_class in (("bert", AutoModelForMaskedLM), ("llama", AutoModelForCausalLM)):
        _, unpadded, _ = pair(kind)
        unpadded.save_pretrained(tmp_path / kind)

        text = (tmp_path / kind / "config.json").read_text()
        assert "dtrain" not in text
        assert "attn_implementation" not in text
        assert AutoConfig.from_pretrained(tmp_path / kind)._attn_implementation is None
        loaded = auto_class.from_pretrained(tmp_path / kind)
        assert loaded.config._attn_implementation == "sdpa"
        inputs = batch()
        assert largest_difference(*(at_tokens(one(**inputs).logits, inputs) for one in (loaded, unpadded))) < 1e-5

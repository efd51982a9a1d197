"""Logits of targets only, and in chunks: equal loss and gradients, little memory, and models that need all logits."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.models.fast_linear import set_fast_linear
from dtrain.tasks import target_loss
from dtrain.tasks.protocol import IGNORED
from dtrain.tasks.target_loss import COMPLETE, LINEAR, ROWS

VOCABULARY = 60
SIZES = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 16
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim"), 32),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "n_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("num_local_experts", "num_experts"), 2),
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}

KINDS = {
    "CausalLM": {
        "gpt2": LINEAR,
        "opt": LINEAR,
        "llama": LINEAR,
        "qwen2": LINEAR,
        "qwen3": LINEAR,
        "mistral": LINEAR,
        "gemma2": ROWS,  # a soft cap
        "gemma3_text": LINEAR,
        "phi3": LINEAR,
        "gpt_neox": LINEAR,
        "bloom": LINEAR,
        "mixtral": LINEAR,
        "cohere": ROWS,  # a scale of the logits
        "granite": LINEAR,
    },
    "MaskedLM": {
        "bert": LINEAR,
        "roberta": LINEAR,
        "xlm-roberta": LINEAR,
        "electra": LINEAR,
        "distilbert": LINEAR,
        "albert": LINEAR,
        "deberta-v2": LINEAR,
        "mpnet": LINEAR,
        "modernbert": LINEAR,
        "big_bird": COMPLETE,  # the trial would change its attention for good
    },
    "Seq2SeqLM": {"t5": LINEAR, "bart": LINEAR, "marian": LINEAR, "pegasus": LINEAR, "m2m_100": LINEAR},
}


@cache
def model(kind: str, name: str) -> Any:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[name]
    known = config_class()
    config = config_class(**{key: value for key, value in SIZES.items() if hasattr(known, key)})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tried(getattr(transformers, f"AutoModelFor{kind}").from_config(config).eval())


def tried(module: Any) -> Any:
    target_loss.try_last_layer(module, ONE_PROCESS)
    return module


def kind_of(module: nn.Module) -> str:
    return target_loss._head_kind(module)


def batch(kind: str = "CausalLM", *, targets: int = 11) -> tuple[dict[str, Any], torch.Tensor]:
    """Inputs of 3 rows and 9 columns, and labels at some places."""
    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=draws)
    labels = torch.full_like(ids, IGNORED).flatten()
    places = torch.randperm(27, generator=draws)[:targets]
    labels[places] = ids.flatten()[places]
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids.flip(1)} if kind == "Seq2SeqLM" else {})}
    return inputs, labels.view(3, 9)


def with_gradients(module: nn.Module, loss: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    module.zero_grad(set_to_none=True)
    value = loss()
    (value * 0.3).backward()  # type: ignore[no-untyped-call]
    found = {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return value.detach(), found


def plain_loss(module: nn.Module, inputs: dict[str, Any], labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """From the model's complete logits."""
    logits = module(**inputs).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum"
    )


def assert_equal(
    module: nn.Module, inputs: dict[str, Any], labels: torch.Tensor, *, to: float = 1e-6, **options: Any
) -> None:
    expected, slopes = with_gradients(
        module, lambda: plain_loss(module, inputs, labels, options.get("label_smoothing", 0.0))
    )
    found, ours = with_gradients(module, lambda: target_loss.target_loss(module, inputs, labels, **options))
    largest = max(float(slope.abs().max()) for slope in slopes.values() if slope is not None and slope.numel())
    assert float(found) == pytest.approx(float(expected), rel=to)
    assert found.dtype == expected.dtype
    for name, slope in slopes.items():
        assert (slope is None) == (ours[name] is None), name
        if slope is not None and slope.numel():
            assert float((slope - ours[name]).abs().max()) <= to * max(largest, 1e-9), name


CASES = [(kind, name) for kind, names in KINDS.items() for name in names]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_loss_and_gradients_are_those_of_the_complete_logits(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, (inputs, labels) = model(kind, name), batch(kind)

    for most in (2**24, 4 * VOCABULARY, 1):  # rows without chunks, chunks of 4 rows, of 2 rows
        monkeypatch.setattr(target_loss, "MAX_LOGITS", most)
        assert_equal(module, inputs, labels)

    assert kind_of(module) == KINDS[kind][name]


@pytest.mark.parametrize("most", [2**24, 4 * VOCABULARY])
def test_label_smoothing_double_precision_and_a_batch_without_targets(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_loss, "MAX_LOGITS", most)
    module, (inputs, labels) = model("Seq2SeqLM", "t5"), batch("Seq2SeqLM")

    assert_equal(module, inputs, labels, label_smoothing=0.1)
    assert_equal(module, inputs, torch.full_like(labels, IGNORED))  # every parameter still has a gradient: of 0
    module.double()
    try:
        assert_equal(module, inputs, labels, to=1e-14)
    finally:
        module.float()


@pytest.mark.parametrize("most", [2**24, 4 * VOCABULARY, 1])
def test_with_linear_layers_by_onednn(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.setattr(target_loss, "MAX_LOGITS", most)
    monkeypatch.setattr("dtrain.tasks.chunked_cross_entropy.PART_OF_PRODUCT", 100)  # parts of 6 words
    monkeypatch.setattr("dtrain.models.fast_linear.LEAST_PRODUCTS", 1)
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2)).eval()
    fast = copy.deepcopy(plain)
    set_fast_linear(fast, "on")
    tried(plain), tried(fast)
    inputs, labels = batch()

    expected, slopes = with_gradients(plain, lambda: plain_loss(plain, inputs, labels))
    found, ours = with_gradients(fast, lambda: target_loss.target_loss(fast, inputs, labels))

    assert kind_of(fast) == LINEAR
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    for name, slope in slopes.items():
        assert float((slope - ours[name]).abs().max()) <= 1e-6 * float(slope.abs().max()), name


@pytest.mark.parametrize("frozen", ["lm_head", "transformer", "transformer.h"])
def test_frozen_parts_get_no_gradient(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.setattr(target_loss, "MAX_LOGITS", 4 * VOCABULARY)
    torch.manual_seed(0)
    module = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False)
    ).eval()
    tried(module)
    module.get_submodule(frozen).requires_grad_(False)

    assert_equal(module, *batch())


def test_with_activation_checkpointing_gradients_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_loss, "MAX_LOGITS", 4 * VOCABULARY)
    module, (inputs, labels) = model("CausalLM", "llama"), batch()
    expected = with_gradients(module, lambda: plain_loss(module, inputs, labels))[1]
    module.gradient_checkpointing_enable({"use_reentrant": False})
    module.train()
    try:
        found = with_gradients(module, lambda: target_loss.target_loss(module, {**inputs, "use_cache": False}, labels))[
            1
        ]
    finally:
        module.gradient_checkpointing_disable()
        module.eval()

    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-5, atol=1e-6)


# Memory


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(value):
                self.elements = max(self.elements, value.numel())
        return result


class Kept:
    """What autograd holds for a tensor that backward needs; it lives as long as that."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def memory_of(loss: Callable[[], torch.Tensor], module: nn.Module) -> tuple[int, int]:
    """Elements of the largest tensor made in forward and backward, and of all those kept for backward, each once."""
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keep(tensor: torch.Tensor) -> Kept:
        kept.add(holder := Kept(tensor))
        return holder

    module.zero_grad(set_to_none=True)
    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda holder: holder.tensor):
            value = loss()
        sizes = {holder.tensor.data_ptr(): holder.tensor.numel() for holder in kept}
        value.backward()  # type: ignore[no-untyped-call]
    module.zero_grad(set_to_none=True)
    weights = {parameter.data_ptr() for parameter in module.parameters()}
    return largest.elements, sum(size for pointer, size in sizes.items() if pointer not in weights)


def test_no_tensor_of_all_tokens_and_the_vocabulary_is_made_or_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    vocabulary, tokens, chunk = 4000, 512, 32
    monkeypatch.setattr(target_loss, "MAX_LOGITS", chunk * vocabulary)
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=8, n_layer=1, n_head=2, n_positions=64))
    ids = torch.randint(0, vocabulary, (8, 64))
    inputs = {"input_ids": ids}
    tried(module)

    plain_largest, plain_kept = memory_of(lambda: plain_loss(module, inputs, ids), module)
    largest, kept = memory_of(lambda: target_loss.target_loss(module, inputs, ids), module)

    assert (plain_largest, plain_kept > tokens * vocabulary) == (tokens * vocabulary, True)  # the control
    assert largest <= chunk * vocabulary
    assert kept < tokens * vocabulary / 5  # hidden states and attention of this narrow model


def test_without_chunks_only_targets_have_logits() -> None:
    module, (inputs, labels) = model("MaskedLM", "bert"), batch("MaskedLM", targets=4)
    shapes = []
    hook = module.get_output_embeddings().register_forward_hook(lambda *found: shapes.append(tuple(found[2].shape)))

    loss = target_loss.target_loss(module, inputs, labels)
    logits = target_loss.target_logits(module, inputs, labels != IGNORED)
    hook.remove()

    assert shapes == [(1, 4, VOCABULARY)] * 2
    torch.testing.assert_close(logits, module(**inputs).logits[labels != IGNORED], rtol=0, atol=1e-6)
    assert float(loss) == pytest.approx(float(plain_loss(module, inputs, labels)), rel=1e-6)


# Precision


def test_in_bf16_the_difference_is_bf16s_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    module, (inputs, labels) = model("CausalLM", "llama"), batch()

    for most in (2**24, 4 * VOCABULARY):
        monkeypatch.setattr(target_loss, "MAX_LOGITS", most)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_equal(module, inputs, labels, to=1e-2)


def test_fp16_gradients_are_not_computed_before_the_loss_scale_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_loss, "MAX_LOGITS", 1)
    module, (_, labels) = model("CausalLM", "llama"), batch()
    layer = module.get_output_embeddings()

    assert target_loss._is_chunked(module, layer, labels)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not target_loss._is_chunked(module, layer, labels)
    with torch.no_grad():
        assert not target_loss._is_chunked(module, layer, labels)


# Models whose last layer is not all that there is


class Odd(nn.Module):
    """A language model with one linear layer and something around it.

    around: what is done. The logits of a new model are small, as here, so that a soft cap does not show in them.
    """

    def __init__(self, around: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)
        self.head.weight.data.mul_(1e-3)
        self.scale = nn.Parameter(torch.ones(()))
        self.around = around

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor) -> Any:
        hidden = self.embedding(input_ids)
        match self.around:
            case "soft cap":
                logits = 30 * torch.tanh(self.head(hidden) / 30)
            case "learned scale":
                logits = self.head(hidden) * self.scale
            case "mean over tokens":
                logits = self.head(hidden) - self.head(hidden).mean(dim=1, keepdim=True)
            case "mean of logits":
                logits = self.head(hidden)
                logits = logits - logits.mean(dim=1, keepdim=True)
            case "reshaped":
                logits = self.head(hidden.flatten(0, 1)).view(*input_ids.shape, VOCABULARY)
            case "not called":
                logits = F.linear(hidden, self.head.weight, self.head.bias)
            case _:
                logits = self.head(hidden)
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(
    ("around", "kind"),
    [
        ("nothing", LINEAR),
        ("soft cap", ROWS),
        ("learned scale", ROWS),
        ("mean over tokens", COMPLETE),
        ("mean of logits", COMPLETE),
        ("reshaped", COMPLETE),
        ("not called", COMPLETE),
    ],
)
def test_what_a_model_does_around_its_last_layer_is_kept(
    around: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_loss, "MAX_LOGITS", 4 * VOCABULARY)
    module, random_state = Odd(around).train(), torch.get_rng_state()
    tried(module)

    assert_equal(module, *batch())

    assert kind_of(module) == kind
    assert all(part.training for part in module.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not module.head._forward_pre_hooks
    assert not module.head._forward_hooks


def test_a_trial_that_is_believed_too_easily_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_loss, "MAX_LOGITS", 4 * VOCABULARY)
    module = Odd("mean of logits")
    module.__dict__[target_loss.KIND_ATTRIBUTE] = LINEAR

    with pytest.raises(AssertionError):
        assert_equal(module, *batch())


def test_rows_that_something_has_removed_before_the_last_layer_are_not_picked_again() -> None:
    module, (inputs, labels) = tried(Odd("nothing")), batch()
    expected = plain_loss(module, inputs, labels)

    class Packed(nn.Module):
        """Runs the layer on one row of all tokens, as unpadding does."""

        config = SimpleNamespace()
        get_output_embeddings = staticmethod(lambda: module.head)

        def forward(self, input_ids: torch.Tensor) -> Any:
            packed = module(input_ids.flatten()[None]).logits
            return SimpleNamespace(logits=packed.view(*input_ids.shape, VOCABULARY))

    packed = Packed()
    packed.__dict__[target_loss.KIND_ATTRIBUTE] = ROWS

    assert float(target_loss.target_loss(packed, inputs, labels)) == pytest.approx(float(expected), rel=1e-6)


class Wrapped(nn.Linear):
    """Stands for a layer that adapters have replaced."""


def test_a_layer_of_another_class_a_compiled_model_and_one_without_a_last_layer_use_complete_logits() -> None:
    replaced, compiled, without = Odd("nothing"), Odd("nothing"), nn.Linear(2, 2)
    replaced.head = Wrapped(8, VOCABULARY)
    compiled._compiled_call_impl = object()  # type: ignore[assignment]

    for module in (replaced, compiled, without):
        tried(module)
        assert (target_loss._last_layer(module), kind_of(module)) == (None, COMPLETE)
    assert_equal(replaced, *batch())


@pytest.mark.parametrize("is_early", [True, False])
def test_a_hook_on_the_last_layer_is_kept(is_early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_loss, "MAX_LOGITS", 4 * VOCABULARY)
    module = model("CausalLM", "gpt2") if not is_early else Odd("nothing")
    layer = module.head if is_early else module.lm_head

    layer.register_forward_hook(lambda _layer, _inputs, logits: 3 * logits)
    if is_early:
        tried(module)

    assert_equal(module, *batch())

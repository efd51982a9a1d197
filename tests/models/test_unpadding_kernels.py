"""Attention in one call: which kernel computes a batch, and that each is called as it has to be.

There is no GPU here. Nested tensors run on the CPU without a causal mask, so there they are tested themselves. The varlen
kernel is replaced by what its documentation says it computes, and on the meta device it runs without numbers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as varlen
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from dtrain.config import schema
from dtrain.models import unpadding_hooks, unpadding_kernels
from dtrain.models.host_copy import to_device
from dtrain.models.unpadding import prepare_unpadding
from dtrain.models.unpadding_calls import Group
from dtrain.models.unpadding_kernels import choose, try_kernels, works
from dtrain.models.unpadding_layout import Kernel, layout_of_mask
from dtrain.tasks.documents import document_inputs
from tests.support.padded_models import DECODERS, ENCODERS, batch, make

KINDS = [*ENCODERS, *DECODERS]
CPU, META = torch.device("cpu"), torch.device("meta")
VARLEN, FLASH, NESTED = (Kernel(name, torch.float32) for name in ("varlen", "flash", "nested"))

Batch = dict[str, torch.Tensor]


def documented(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What varlen_attn computes by its documentation."""
    assert cu_seq_k is not None
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert cu_seq_q[0] == 0
    assert cu_seq_q[-1] == len(query) == len(key) == len(value)
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    parts = []
    for start, stop in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (states[start:stop].transpose(0, 1) for states in (query, key, value))
        k, v = (states.repeat_interleave(len(q) // len(k), dim=0) for states in (k, v))
        places = torch.arange(stop - start)
        distance = places[:, None] - places[None, :]
        seen = torch.ones_like(distance, dtype=torch.bool)
        seen &= distance <= left if left >= 0 else seen
        seen &= -distance <= right if right >= 0 else seen
        scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        parts.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


def operator(*args: Any, **options: Any) -> tuple[torch.Tensor]:
    """What the operator computes that varlen_attn calls: checks the arguments against its schema."""
    names = [one.name for one in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **options}
    assert set(given) <= set(names)
    assert not given.pop("return_debug_mask")
    sides = given.pop("window_size_left"), given.pop("window_size_right")
    assert given.pop("is_causal") == (sides == (-1, 0))
    keep = 1 - given.pop("dropout_p")
    starts = (given.pop("cum_seq_q"), given.pop("cum_seq_k"), given.pop("max_q"), given.pop("max_k"))
    query, key, value = (given.pop(name) for name in ("query", "key", "value"))
    shared = query.shape[1] != key.shape[1]
    found = documented(query, key, value, *starts, window_size=sides, enable_gqa=shared, **given)
    # Not attention's dropout, but something random that is scaled alike.
    return (found * (torch.rand(found.shape) < keep) / keep,)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel], list[str]]:
    """Returns a function that makes models on the CPU use a kernel; it returns the list of ways in which they compute."""
    ways: list[str] = []

    def attend_by(name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        ways.append(name)
        return original(name, *args, **kwargs)  # type: ignore[arg-type]

    original = unpadding_kernels.attend_by
    monkeypatch.setattr(unpadding_kernels, "attend_by", attend_by)
    monkeypatch.setattr(varlen, "varlen_attn", documented)
    monkeypatch.setattr(unpadding_kernels, "flash_forward", operator)

    def use_it(kernel: Kernel) -> list[str]:
        monkeypatch.setattr(unpadding_hooks, "try_kernels", lambda *_, **__: frozenset([kernel]))
        return ways

    return use_it


def pair(kind: str, **changes: Any) -> tuple[Any, Any]:
    """Returns a model with padding, and an equal one without it."""
    padded = make(kind, AutoModelForMaskedLM if kind in ENCODERS else AutoModelForCausalLM, **changes)
    unpadded = copy.deepcopy(padded)
    assert prepare_unpadding(unpadded, schema.Model(unpad="on")).hooks is not None
    return padded, unpadded


def test_the_banner_names_the_kernels(use: Callable[[Kernel], list[str]]) -> None:
    model = make("bert", AutoModelForMaskedLM)
    assert str(prepare_unpadding(model, schema.Model())) == "on (tested for bert)"

    use(VARLEN)
    assert str(prepare_unpadding(model, schema.Model())) == "on (tested for bert), attention by varlen"


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative to the largest value."""
    return float((one - other).detach().abs().max() / one.detach().abs().max())


def logits_and_gradients(model: Any, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    logits.square().mean().backward()
    return logits, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def differences_from_padded(kind: str, ways: list[str]) -> list[float]:
    """Of logits and gradients. `ways` then has the kernels of the model's layers."""
    padded, unpadded = pair(kind)
    ways.clear()
    expected, found = (logits_and_gradients(model, batch()) for model in (padded, unpadded))
    return [largest_difference(one, other) for one, other in zip(expected, found, strict=True)]


@pytest.mark.parametrize("kernel", [VARLEN, FLASH])
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_gives_the_logits_and_gradients_of_the_padded_model(
    kind: str, kernel: Kernel, use: Callable[[Kernel], list[str]]
) -> None:
    ways = use(kernel)
    differences = differences_from_padded(kind, ways)

    assert max(differences) < 1e-5
    assert ways == [kernel.name] * 2  # layers


@pytest.mark.parametrize("kind", [*ENCODERS])
def test_one_nested_call_gives_the_logits_and_gradients_of_the_padded_model(
    kind: str, use: Callable[[Kernel], list[str]]
) -> None:
    ways = use(NESTED)
    differences = differences_from_padded(kind, ways)

    assert max(differences) < 1e-5
    # A window of ModernBERT is shorter than the longest row.
    assert ways == (["nested", "groups"] if kind == "modernbert" else ["nested"] * 2)


@pytest.mark.parametrize("kernel", [VARLEN, FLASH, NESTED])
def test_dropout_of_attention_is_computed_by_a_kernel_that_has_it(
    kernel: Kernel, use: Callable[[Kernel], list[str]]
) -> None:
    ways = use(kernel)
    model = pair("bert", attention_probs_dropout_prob=0.5)[1].train()
    inputs = batch()
    ways.clear()

    def logits(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return logits_and_gradients(model, inputs)[0].detach()

    assert torch.equal(logits(1), logits(1))
    assert largest_difference(logits(1), logits(2)) > 1e-2
    assert set(ways) == {"groups" if kernel == VARLEN else kernel.name}


@pytest.mark.parametrize(
    ("kernels", "groups", "options", "expected"),
    [
        ([VARLEN, NESTED], [(2, 3), (1, 9)], {}, "varlen"),
        ([VARLEN, NESTED], [(2, 3), (1, 9)], {"window": 4}, "varlen"),
        ([VARLEN, NESTED], [(2, 3), (1, 9)], {"dropout": 0.1}, "nested"),
        ([VARLEN, NESTED], [(2, 3), (1, 9)], {"dropout": 0.1, "window": 4}, "groups"),
        ([VARLEN, NESTED], [(2, 3), (1, 9)], {"dropout": 0.1, "window": 9}, "nested"),
        ([VARLEN, NESTED], [(2, 3), (1, 9)], {"dtype": torch.float64}, "groups"),
        ([VARLEN, NESTED], [(8, 9)], {}, "groups"),
        ([VARLEN, NESTED], [(8, 9)], {"window": 4}, "varlen"),
        ([NESTED], [(2, 3), (1, 9)], {}, "nested"),
        ([VARLEN], [(2, 3), (1, 9)], {"dropout": 0.1}, "groups"),
        ([VARLEN, FLASH, NESTED], [(2, 3), (1, 9)], {}, "varlen"),
        ([VARLEN, FLASH, NESTED], [(2, 3), (1, 9)], {"dropout": 0.1}, "flash"),
        ([VARLEN, FLASH, NESTED], [(2, 3), (1, 9)], {"dropout": 0.1, "window": 4}, "flash"),
        ([FLASH, NESTED], [(2, 3), (1, 9)], {}, "flash"),
        ([], [(2, 3), (1, 9)], {}, "groups"),
    ],
)
def test_the_kernel_is_chosen_by_what_it_can_do(
    kernels: list[Kernel], groups: list[tuple[int, int]], options: dict[str, Any], expected: str
) -> None:
    settings = {"dtype": torch.float32, "dropout": 0.0, "window": None, **options}

    assert choose(frozenset(kernels), [Group(*group) for group in groups], **settings) == expected


def test_the_varlen_call_fits_the_function_of_this_torch() -> None:
    inspect.signature(varlen.varlen_attn).bind(*(0,) * 7, scale=None, window_size=(-1, -1), enable_gqa=False)
    ours = inspect.signature(documented).parameters
    theirs = inspect.signature(varlen.varlen_attn).parameters
    assert [name for name in theirs if name in ours] == list(ours)


# The trial


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_kernel_that_computes_right_passes_the_trial(is_causal: bool, use: Callable[[Kernel], list[str]]) -> None:
    use(VARLEN)
    sizes = {"heads": 4, "width": 8, "is_causal": is_causal}
    state = torch.get_rng_state()

    assert works(VARLEN, CPU, shared_heads=2, window=4, **sizes)
    assert works(FLASH, CPU, shared_heads=2, window=4, **sizes)
    # On a CPU, torch has no causal attention for nested tensors.
    assert works(NESTED, CPU, shared_heads=2, window=None, **sizes) is not is_causal
    assert torch.equal(torch.get_rng_state(), state)


def test_a_kernel_that_fails_or_sees_another_sequence_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"heads": 2, "shared_heads": 2, "width": 8, "is_causal": False, "window": None}

    assert not works(VARLEN, CPU, **sizes)  # the real ones, which need a GPU
    assert not works(FLASH, CPU, **sizes)

    def merged(*args: Any, **kwargs: Any) -> torch.Tensor:
        starts = args[3][[0, 1, 2, 4]]
        return documented(*args[:3], starts, starts, 20, 20, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", merged)
    assert not works(VARLEN, CPU, **sizes)


def test_a_cpu_computes_by_groups_without_a_trial() -> None:
    model = make("bert", AutoModelForMaskedLM)

    assert try_kernels(model.config, CPU, is_causal=False) == frozenset()
    layout = layout_of_mask(batch()["attention_mask"], is_causal=False)
    assert layout is not None
    assert layout.starts is None


# Nothing is fetched from the device: the meta device refuses every fetch


@pytest.mark.parametrize("kernel", [VARLEN, FLASH])
@pytest.mark.parametrize("lengths", [(5, 9, 1, 5, 12), (6, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_fetches_nothing_from_the_device(
    kind: str, lengths: tuple[int, ...], kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_real(monkeypatch, kernel)  # it has a version for meta tensors
    model = pair(kind)[1].to(META).train()
    inputs = to_device(batch(lengths=lengths), META)

    logits = model(**inputs).logits

    assert logits.shape[:2] == inputs["input_ids"].shape
    logits.sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "layer" in name)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_without_the_hosts_copy_the_mask_is_fetched(kind: str) -> None:
    model = pair(kind)[1].to(META)
    inputs = {name: tensor.to(META) for name, tensor in batch().items()}

    with pytest.raises((NotImplementedError, RuntimeError)):
        model(**inputs)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_documents_in_a_row_fetch_nothing_either(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_real(monkeypatch)
    model = pair(kind)[1]
    hooks = prepare_unpadding(model, schema.Model(unpad="on")).hooks
    assert hooks is not None
    model.to(META)
    hooks.packed_calls = 0
    host = {
        "input_ids": torch.zeros(2, 8, dtype=torch.int64),
        "ids": torch.tensor([[1] * 3 + [2] * 5, [1] * 4 + [0] * 4]),
    }
    inputs = to_device(host, META)

    model(input_ids=inputs["input_ids"], use_cache=False, **document_inputs(inputs["ids"], torch.float32))

    assert hooks.packed_calls == 1


def test_documents_known_on_the_host_have_the_layout_of_those_read_from_the_mask() -> None:
    from dtrain.models.unpadding_layout import layout_of_documents

    ids = torch.tensor([[1] * 3 + [2] * 5, [1, 2, 3, 4, 0, 0, 0, 0]])
    on_cpu = layout_of_documents(*document_inputs(ids, torch.float32).values())
    on_meta = layout_of_documents(*document_inputs(to_device({"ids": ids}, META)["ids"], torch.float32).values())

    assert on_cpu is not None
    assert on_meta is not None
    assert on_cpu.groups == on_meta.groups
    assert on_meta.index.device == META


def use_real(monkeypatch: pytest.MonkeyPatch, kernel: Kernel = VARLEN) -> None:
    """Gives models on the CPU the kernel that they would have on a GPU; their trial computes by groups."""
    kernels = frozenset([kernel])
    monkeypatch.setattr(unpadding_hooks, "try_kernels", lambda *_, **__: kernels)
    chosen = unpadding_kernels.attend_by

    def attend_by(name: str, states: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return chosen("groups" if states[0].device == CPU else name, states, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(unpadding_kernels, "attend_by", attend_by)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_logits_and_gradients_of_the_padded_model(kind: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    padded = make(kind, AutoModelForMaskedLM if kind in ENCODERS else AutoModelForCausalLM).to(device)
    unpadded = copy.deepcopy(padded)
    decision = prepare_unpadding(unpadded, schema.Model(unpad="on"))
    assert decision.hooks is not None
    assert NESTED in decision.hooks.kernels, decision
    inputs = to_device(batch(), device)

    exact = [logits_and_gradients(model, inputs) for model in (padded, unpadded)]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        low = [logits_and_gradients(model, inputs) for model in (padded, unpadded)]

    assert largest_difference(exact[0][0], exact[1][0]) < 1e-4
    assert largest_difference(exact[0][1], exact[1][1]) < 1e-3
    assert largest_difference(low[0][0], low[1][0]) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_varlen_attention_of_a_gpu_is_that_of_groups(is_causal: bool, window: int | None) -> None:
    device = torch.device("cuda", torch.cuda.current_device())

    for dtype in (torch.bfloat16, torch.float16):
        for name in ("varlen", "flash"):
            kernel = Kernel(name, dtype)  # type: ignore[arg-type]
            assert works(kernel, device, heads=4, shared_heads=2, width=64, is_causal=is_causal, window=window)
        assert works(
            Kernel("nested", dtype), device, heads=4, shared_heads=2, width=64, is_causal=is_causal, window=None
        )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bert", "llama", "modernbert"])
def test_a_step_on_a_gpu_does_not_synchronize(kind: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    auto_class = AutoModelForSequenceClassification if kind in ENCODERS else AutoModelForCausalLM
    model = make(kind, auto_class).to(device).train()
    assert prepare_unpadding(model, schema.Model(unpad="on")).hooks is not None

    def step(seed: int) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(**to_device(batch(seed=seed), device)).logits
        logits.float().square().mean().backward()

    step(0)  # the first one allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")

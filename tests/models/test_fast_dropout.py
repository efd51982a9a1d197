"""Dropout with fast draws: torch's own in everything but the numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dtrain.models.fast_dropout import STEPS, FastDropout, fast_dropout, set_fast_dropout

ONES = torch.ones(1000, 1001)


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.9])
def test_the_share_and_the_mean_are_those_of_dropout(probability: float) -> None:
    torch.manual_seed(3)
    found = fast_dropout(ONES, probability)

    spread = (probability * (1 - probability) / ONES.numel()) ** 0.5
    assert abs(float((found == 0).double().mean()) - probability) < 5 * spread
    kept = found[found != 0]
    assert torch.allclose(kept, torch.tensor(1 / (1 - probability)), rtol=2 / STEPS / (1 - probability))
    # Neighbors, rows and columns are independent.
    dropped = (found == 0).double() - probability
    for shifted in (dropped[:, 1:] * dropped[:, :-1], dropped[1:] * dropped[:-1], dropped[:, 4:] * dropped[:, :-4]):
        assert abs(float(shifted.mean())) < 5 * probability * (1 - probability) / shifted.numel() ** 0.5


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 1.0), (1e-7, 1.0), (1.0, 0.0)])
def test_the_ends(probability: float, expected: float) -> None:
    assert torch.equal(fast_dropout(torch.ones(3, 3), probability), torch.full((3, 3), expected))


def test_the_draws_are_those_of_torchs_seed_and_advance_its_generator() -> None:
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append([fast_dropout(ONES, 0.1), fast_dropout(ONES, 0.1)])

    assert all(torch.equal(one, other) for one, other in zip(draws[0], draws[1], strict=True))
    assert not torch.equal(draws[0][0], draws[0][1])
    assert not torch.equal(draws[0][0], draws[2][0])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0, 5), (7, 5, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_pass_where_values_do(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.ones(shape, dtype=dtype).requires_grad_()

    found = fast_dropout(values, 0.5)
    found.sum().backward()  # type: ignore[no-untyped-call]

    assert found.dtype == dtype
    assert values.grad is not None
    assert torch.equal(values.grad, found.detach())


def test_activation_checkpointing_repeats_the_draws() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 8), FastDropout(0.5), nn.Linear(8, 8))
    inputs = torch.randn(16, 8)

    def gradient(*, again: bool) -> torch.Tensor:
        torch.manual_seed(5)
        layers.zero_grad()
        (checkpoint(layers, inputs, use_reentrant=False) if again else layers(inputs)).square().sum().backward()
        return layers[0].weight.grad.clone()  # type: ignore[union-attr,operator]

    assert torch.equal(gradient(again=True), gradient(again=False))


def test_only_plain_dropout_is_replaced_and_the_state_stays() -> None:
    class Own(nn.Dropout):
        pass

    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3), Own(0.2), nn.Dropout1d(0.1))
    before = copy.deepcopy(module.state_dict())

    set_fast_dropout(module, on=True)

    assert [type(part) for part in module] == [nn.Linear, FastDropout, Own, nn.Dropout1d]
    assert type(copy.deepcopy(module)[1]) is FastDropout
    assert module.state_dict().keys() == before.keys()
    assert torch.equal(module.eval()[1](ONES), ONES)
    set_fast_dropout(module, on=False)
    assert [type(part) for part in module] == [nn.Linear, nn.Dropout, Own, nn.Dropout1d]


def test_inside_vmap_it_is_torchs() -> None:
    found = torch.vmap(FastDropout(0.5), randomness="different")(torch.ones(4, 100))

    assert 0 < int((found == 0).sum()) < 400


def test_what_is_not_on_the_cpu_or_in_place_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.models.fast_dropout.fast_dropout", None)  # calling it fails
    module = FastDropout(0.5)

    assert module(torch.ones(3, device="meta")).is_meta
    assert FastDropout(0.5, inplace=True)(torch.ones(3)).shape == (3,)
    with pytest.raises(TypeError):
        module(torch.ones(3))

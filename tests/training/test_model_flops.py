"""The estimate of a model's arithmetic: which parameters cost 2, 4 or 6 a token, and which nothing."""

from __future__ import annotations

import pytest
from torch import nn

from dtrain.training.model_flops import PEAK_FLOPS, flops_per_token, peak_flops


def model() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))


def test_a_parameter_that_learns_costs_six_and_a_table_nothing() -> None:
    assert flops_per_token(model()) == 6 * (64 + 32)


def test_a_frozen_part_costs_its_forward_pass_and_what_the_gradient_passes() -> None:
    frozen = model()
    frozen[0].requires_grad_(requires_grad=False)
    frozen[1].requires_grad_(requires_grad=False)
    assert flops_per_token(frozen) == 2 * 64 + 6 * 32, "no gradient goes below the first part that learns"

    middle = model()
    middle[1].requires_grad_(requires_grad=False)
    assert flops_per_token(middle) == 4 * 64 + 6 * 32, "the gradient passes it on its way to the embeddings"


def test_a_table_that_is_also_the_output_layer_costs_what_a_layer_costs() -> None:
    tied = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 100, bias=False))
    tied[1].weight = tied[0].weight

    assert flops_per_token(tied) == 6 * 800


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_a_gpu_has_the_peak_of_its_name(device: str, name: str) -> None:
    assert peak_flops(device) == PEAK_FLOPS[name]


def test_the_peak_of_an_unknown_gpu_is_left_out() -> None:
    assert peak_flops("NVIDIA H1000") is None
    assert peak_flops("AMD Instinct MI300X") is None

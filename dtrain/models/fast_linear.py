"""Linear layers on a CPU whose BLAS is slow there (model.fast_linear).

torch multiplies fp32 matrices on x86 with Intel's MKL, which on a processor of AMD uses 256 of its 512 bits: 106 of 240
GFLOP/s on one core of an EPYC. oneDNN, which is part of torch too, asks for what a processor can do, not for its maker. So the three
products of a linear layer (forward, gradient of the input, gradient of the weight) go there, where they are large enough. They are
the same sums in another order: results differ in the last digits.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import linear as linear_of_torch
from transformers.pytorch_utils import Conv1D

LEAST_PRODUCTS = 2**22
"""Multiplications of a layer from which on oneDNN is faster: below, a call costs more than it saves."""

LEAST_ROWS = 4
"""Rows of the input from which on oneDNN is faster: with fewer, the time is that of reading the weight."""

PLAIN = (torch.Tensor, nn.Parameter)


class FastLinear(nn.Linear):
    """`nn.Linear`, by oneDNN for a large float32 input on the CPU. Everything else is torch's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # the name in torch
        return fast_linear(input, self.weight, self.bias)


class FastConv1D(Conv1D):  # type: ignore[misc]
    """The same for `Conv1D`, GPT-2's linear layer, whose weight is (inputs, outputs)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # the name in transformers
        weight = self.weight.t()
        return fast_linear(x, weight, self.bias) if _is_served(x, weight) else super().forward(x)


def fast_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns input (..., inputs) times the transpose of weight (outputs, inputs), plus bias (outputs,)."""
    if not _is_served(input, weight):
        return linear_of_torch(input, weight, bias)
    if not torch.is_grad_enabled():
        return _multiply(input, weight, bias)
    result: torch.Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return result


def fast_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns left (n, k) times right (k, m), without a gradient."""
    with torch.no_grad():
        return fast_linear(left, right.t(), None)


def set_fast_linear(module: nn.Module, choice: Literal["auto", "on", "off"]) -> None:
    """Replaces the linear layers of a model in place, or restores torch's. Subclasses stay: they may do more.

    Args:
        choice: `auto` is `on` if this processor gains from it.
    """
    is_on = choice == "on" or (choice == "auto" and gains())
    pairs: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FastLinear, Conv1D: FastConv1D}
    if not is_on:
        pairs = {after: before for before, after in pairs.items()}
    for part in module.modules():
        if type(part) in pairs:
            part.__class__ = pairs[type(part)]


def uses_fast_linear(module: nn.Module) -> bool:
    """Returns whether a model has a replaced layer."""
    return any(type(part) in (FastLinear, FastConv1D) for part in module.modules())


@cache
def gains() -> bool:
    """Returns whether oneDNN is much faster than torch's BLAS: MKL on a processor of AMD with AVX-512."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    is_wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_both and is_wide and "AuthenticAMD" in _processor()


def _processor() -> str:
    """Returns a text that has the maker of the processor in it."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")[:2000]
    except OSError:
        return platform.processor()


def _is_served(input: torch.Tensor, weight: torch.Tensor) -> bool:
    if not (_is_plain(input) and _is_plain(weight)) or input.dim() == 0 or input.shape[-1] != weight.shape[-1]:
        return False
    products = input.numel() * weight.shape[0]
    if products < LEAST_PRODUCTS or products < LEAST_ROWS * weight.numel():
        return False
    is_inside_functorch = torch._C._functorch.peek_interpreter_stack() is not None
    return not (torch.is_autocast_enabled("cpu") or is_inside_functorch or torch.compiler.is_compiling())


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in PLAIN and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _multiply(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns left (..., k) times the transpose of right (n, k), plus bias (n,)."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None)
        ctx.shape = input.shape
        return _multiply(input, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        input, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        # torch's product has a gradient of its own, for those who differentiate twice.
        multiply = _multiply_by_torch if torch.is_grad_enabled() else _multiply
        of_input = multiply(rows, weight.t()).reshape(ctx.shape) if weight is not None else None
        of_weight = multiply(rows.t(), input.reshape(-1, ctx.shape[-1]).t()) if input is not None else None
        return of_input, of_weight, rows.sum(dim=0) if ctx.needs_input_grad[2] else None


def _multiply_by_torch(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left @ right.t()

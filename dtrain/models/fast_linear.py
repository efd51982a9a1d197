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
from torch.autograd import forward_ad
from torch.nn.functional import linear as linear_of_torch
from transformers.pytorch_utils import Conv1D

from dtrain.models.layer_classes import replace_layers

LEAST_PRODUCTS = 2**22
"""Multiplications from which on oneDNN is faster. For a shape that is new it first compiles a kernel: 0.3 to 0.5 ms."""

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
        if not _is_served(x, self.weight.t(), self.bias):
            output: torch.Tensor = super().forward(x)
            return output
        return _apply(x, self.weight, self.bias, is_conv1d=True)


def fast_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns input (..., inputs) times the transpose of weight (outputs, inputs), plus bias (outputs,)."""
    if not _is_served(input, weight, bias):
        return linear_of_torch(input, weight, bias)
    return _apply(input, weight, bias, is_conv1d=False)


def _apply(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, is_conv1d: bool) -> torch.Tensor:
    # Two dimensions inside: what a Function returns must not be a view, which a model could not change in place.
    rows = input.reshape(-1, input.shape[-1])
    if torch.is_grad_enabled():
        result: torch.Tensor = _Linear.apply(rows, weight, bias, is_conv1d)  # type: ignore[no-untyped-call]
    else:
        result = _multiply(rows, weight.t() if is_conv1d else weight, bias)
    return result.view(*input.shape[:-1], result.shape[-1])


def fast_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns left (n, k) times right (k, m), without a gradient."""
    with torch.no_grad():
        return fast_linear(left, right.t(), None)


def set_fast_linear(module: nn.Module, choice: Literal["auto", "on", "off"]) -> None:
    """Replaces the linear layers of a model in place, or restores torch's. Subclasses stay: they may do more."""
    replace_layers(module, {nn.Linear: FastLinear, Conv1D: FastConv1D}, on=is_on(choice))


def is_on(choice: Literal["auto", "on", "off"]) -> bool:
    """Returns what a value of model.fast_linear means here: `auto` is `on` if this processor gains from it.

    A torch without oneDNN keeps its own.
    """
    return gains() if choice == "auto" else choice == "on" and _has_onednn()


def uses_fast_linear(module: nn.Module) -> bool:
    """Returns whether a model has a replaced layer."""
    return any(type(part) in (FastLinear, FastConv1D) for part in module.modules())


@cache
def gains() -> bool:
    """Returns whether oneDNN is much faster than torch's BLAS: MKL on a processor of AMD with AVX-512."""
    has_both = torch.backends.mkl.is_available() and _has_onednn()  # type: ignore[no-untyped-call]
    is_wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_both and is_wide and "AuthenticAMD" in _processor()


def _has_onednn() -> bool:
    found: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return found


def _processor() -> str:
    """Returns a text that has the maker of the processor in it."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")[:2000]
    except OSError:
        return platform.processor()


def _is_served(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    if not (_is_plain(input) and _is_plain(weight)) or input.dim() == 0 or input.shape[-1] != weight.shape[-1]:
        return False
    products = input.numel() * weight.shape[0]
    if products < LEAST_PRODUCTS or products < LEAST_ROWS * weight.numel():
        return False
    if bias is not None and not (_is_plain(bias) and bias.is_contiguous() and bias.shape == weight.shape[:1]):
        return False
    is_inside_functorch = torch._C._functorch.peek_interpreter_stack() is not None
    is_traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return not (torch.is_autocast_enabled("cpu") or is_inside_functorch or is_traced or forward_ad._current_level >= 0)


def _is_plain(tensor: torch.Tensor) -> bool:
    is_dense = type(tensor) in PLAIN and tensor.layout is torch.strided and not tensor.is_nested
    return is_dense and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _multiply(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns left (m, k) times the transpose of right (n, k), plus bias (n,)."""
    # oneDNN computes other strides number by number, 200 times as slowly. It copies left itself.
    if not (right.is_contiguous() or right.t().is_contiguous()):
        right = right.contiguous()
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return product


def _multiply_by_torch(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left @ right.t()


class _Linear(torch.autograd.Function):
    """The layer for rows (rows, inputs). The weight is kept as it is: ZeRO 3 takes its values away and brings them back."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_conv1d: bool
    ) -> torch.Tensor:
        needs_rows, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(rows if needs_weight else None, weight if needs_rows else None)
        ctx.is_conv1d = is_conv1d
        return _multiply(rows, weight.t() if is_conv1d else weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        # torch's product has a gradient of its own, for those who differentiate twice.
        multiply = _multiply_by_torch if torch.is_grad_enabled() else _multiply
        of_rows = of_weight = None
        if weight is not None:
            of_rows = multiply(gradient, weight if ctx.is_conv1d else weight.t())
        if rows is not None:
            left, right = (rows, gradient) if ctx.is_conv1d else (gradient, rows)
            of_weight = multiply(left.t(), right.t())
        return of_rows, of_weight, gradient.sum(dim=0) if ctx.needs_input_grad[2] else None, None

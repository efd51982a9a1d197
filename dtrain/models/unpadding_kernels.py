"""How attention inside the sequences of a packed row is computed: one call per length, or one call for all.

`groups`: one call of scaled_dot_product_attention for each group of equal lengths. It works everywhere, and is the fastest
way on a CPU. A GPU waits for many small calls, so there one call computes all sequences:

- `varlen`: torch.nn.attention.varlen (bf16 and fp16, windows, no dropout),
- `flash`: the operator that varlen calls, which torch does not document, with dropout,
- `nested`: scaled_dot_product_attention of nested tensors (all types, dropout, no windows; more work for the host).

Which of them work is tried once per model on its device (`try_kernels`), against `groups`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from dtrain.models.first_forward import FORWARD_ERRORS
from dtrain.models.host_copy import array_to
from dtrain.models.unpadding_calls import Group
from dtrain.models.unpadding_groups import attend_by_groups
from dtrain.models.unpadding_layout import Kernel, PackedLayout, make_layout

Name = Literal["groups", "varlen", "flash", "nested"]
States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value."""

TRIAL_LENGTHS = (1, 3, 3, 17)
TRIAL_WINDOW = 4
TRIAL_DROPOUT = 0.1
TOLERANCE = {torch.float32: 5e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
"""Type -> largest difference of the trial, relative to the largest value. A token that sees another sequence differs by 1."""


def attend(
    states: States,
    layout: PackedLayout,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Returns attention inside each sequence, (tokens, heads, width).

    Args:
        states: query, key and value, each (tokens, heads, width). Those of key and value may be fewer heads.
        window: distance from which on tokens do not see each other; None: no limit.
    """
    # Under autocast, scaled_dot_product_attention would cast by itself; the other functions do not.
    query, key, value = states
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    name = choose(layout.kernels, layout.groups, dtype=query.dtype, dropout=dropout, window=window)
    return attend_by(name, (query, key, value), layout, dropout=dropout, scaling=scaling, window=window)


def choose(
    kernels: frozenset[Kernel],
    groups: Sequence[Group],
    *,
    dtype: torch.dtype,
    dropout: float,
    window: int | None,
) -> Name:
    """Returns the way to compute a batch.

    Args:
        kernels: those that work on the device.
        window: see `attend`.
    """
    has_window = window is not None and groups[-1].length > window
    if len(groups) == 1 and not has_window:
        return "groups"  # A plain batch: torch has its fastest kernels for it.
    if dropout == 0 and Kernel("varlen", dtype) in kernels:
        return "varlen"
    if Kernel("flash", dtype) in kernels:
        return "flash"
    return "nested" if not has_window and Kernel("nested", dtype) in kernels else "groups"


def attend_by(
    name: Name,
    states: States,
    layout: PackedLayout,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Like `attend`, in a certain way."""
    match name:
        case "varlen":
            assert dropout == 0, "varlen attention has no dropout"
            return _by_varlen(states, layout, scaling=scaling, window=window)
        case "flash":
            return _by_flash(states, layout, dropout=dropout, scaling=scaling, window=window)
        case "nested":
            return _by_nested(states, layout, dropout=dropout, scaling=scaling)
        case "groups":
            return attend_by_groups(states, layout, dropout=dropout, scaling=scaling, window=window)


def _by_varlen(
    states: States,
    layout: PackedLayout,
    *,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert layout.starts is not None
    query, key, value = states
    longest = layout.groups[-1].length
    attended = varlen_attn(
        query,
        key,
        value,
        layout.starts,
        layout.starts,
        longest,
        longest,
        scale=scaling,
        window_size=_sides(layout, window),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, torch.Tensor)
    return attended


def _by_flash(
    states: States, layout: PackedLayout, *, dropout: float, scaling: float | None, window: int | None
) -> torch.Tensor:
    assert layout.starts is not None
    longest, sides = layout.groups[-1].length, _sides(layout, window)
    attended: torch.Tensor = flash_forward(
        *states,
        layout.starts,
        layout.starts,
        longest,
        longest,
        dropout,
        sides == (-1, 0),
        False,  # no mask for debugging
        scale=scaling,
        window_size_left=sides[0],
        window_size_right=sides[1],
    )[0]
    return attended


def flash_forward(*args: Any, **options: Any) -> Any:
    """Calls the operator. Its arguments are those that torch.nn.attention.varlen gives it."""
    return torch.ops.aten._flash_attention_forward(*args, **options)


def _sides(layout: PackedLayout, window: int | None) -> tuple[int, int]:
    """Returns how many tokens before and after it a token sees; -1 is all."""
    before = -1 if window is None or layout.groups[-1].length <= window else window - 1
    return before, 0 if layout.is_causal else before


def _by_nested(
    states: States,
    layout: PackedLayout,
    *,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    assert layout.starts is not None
    query, key, value = states
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    # With the shortest and the longest length given, nothing is fetched from the device.
    shortest, longest = layout.groups[0].length, layout.groups[-1].length
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(
            part.contiguous(), layout.starts, min_seqlen=shortest, max_seqlen=longest
        ).transpose(1, 2)
        for part in (query, key, value)
    )
    attended = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, scale=scaling, is_causal=layout.is_causal
    )
    values: torch.Tensor = attended.transpose(1, 2).values()
    return values


# The trial


def try_kernels(config: Any, device: torch.device, *, is_causal: bool) -> frozenset[Kernel]:
    """Returns the ways to compute a model's attention in one call that work on its device; none on a CPU.

    Args:
        config: the config of a model of transformers.
    """
    if device.type != "cuda":
        return frozenset()
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = TRIAL_WINDOW if getattr(config, "sliding_window", None) else None
    halves: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    candidates = [Kernel("varlen", dtype) for dtype in halves] + [Kernel("flash", dtype) for dtype in halves]
    candidates += [Kernel("nested", dtype) for dtype in (*halves, torch.float32)]
    return frozenset(
        kernel
        for kernel in candidates
        if works(kernel, device, heads=heads, shared_heads=shared, width=width, is_causal=is_causal, window=window)
    )


def works(
    kernel: Kernel,
    device: torch.device,
    *,
    heads: int,
    shared_heads: int,
    width: int,
    is_causal: bool,
    window: int | None,
) -> bool:
    """Returns whether outputs and gradients are those of `groups`. It leaves the random state as it is.

    Args:
        shared_heads: heads of key and value.
        window: also tried if the kernel computes windows.
    """
    name: Name = kernel.name
    layout = make_layout(
        len(TRIAL_LENGTHS),
        max(TRIAL_LENGTHS),
        np.arange(sum(TRIAL_LENGTHS)),
        np.array(TRIAL_LENGTHS),
        device,
        is_causal=is_causal,
        kernels=frozenset([kernel]),
    )
    drawn = np.random.default_rng(0).standard_normal((3, sum(TRIAL_LENGTHS), heads, width))
    query, key, value = array_to(drawn, device).to(kernel.dtype)
    inputs = (query, key[:, :shared_heads], value[:, :shared_heads])

    def results(way: Name, *, dropout: float = 0.0, window: int | None = None) -> list[torch.Tensor]:
        q, k, v = (part.detach().clone().requires_grad_() for part in inputs)
        output = attend_by(way, (q, k, v), layout, dropout=dropout, scaling=width**-0.5, window=window)
        return [output.detach(), *torch.autograd.grad(output.float().square().sum(), (q, k, v))]

    devices = [device] if device.type == "cuda" else []
    try:
        with (
            torch.enable_grad(),
            torch.random.fork_rng(devices=devices),
            torch.autocast(device.type, enabled=False),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # Nested tensors say once that they are a prototype.
            windows = [None] if name == "nested" else {None, window}
            agrees = all(
                _are_close(results(name, window=one), results("groups", window=one), TOLERANCE[kernel.dtype])
                for one in windows
            )
            if agrees and name != "varlen":
                return all(bool(part.isfinite().all()) for part in results(name, dropout=TRIAL_DROPOUT))
            return agrees
    except (*FORWARD_ERRORS, ImportError):
        return False


def _are_close(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float) -> bool:
    return all(
        one.shape == other.shape and bool((one - other).abs().max() <= tolerance * other.abs().max())
        for one, other in zip(found, expected, strict=True)
    )

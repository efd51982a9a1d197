"""Hooks that let a model of transformers compute a batch without its padding.

Encoders: the embeddings and everything above the layers (pooler, head) get the padded batch. The layers get one row of
tokens. Decoders, and encoders with rotary positions (ModernBERT): the whole model without its head gets one row of tokens.
All return padded states, zero for padding.

The layout of a call travels in its keyword arguments. So the hooks survive every wrapper, and nothing has to be cleared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dtrain.models.host_copy import host_copy
from dtrain.models.placement import compute_device
from dtrain.models.unpadding_attention import LAYOUT, no_mask
from dtrain.models.unpadding_kernels import try_kernels
from dtrain.models.unpadding_layout import PackedLayout, layout_of_documents, layout_of_mask, layout_of_whole_rows

HookResult = tuple[tuple[Any, ...], dict[str, Any]]

CARRIED = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
"""Tensors that a packed call of a whole model has. A call with others is left as it is."""


class UnpaddedModel:
    """The hooks of one model.

    Attributes:
        is_on: whether calls are packed. Switched off, the model computes padding as before.
        is_causal: whether it is a decoder.
        packed_calls: number of calls that were packed so far.
        kernels: attention that works on the model's device.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        layers: str | None,
        is_causal: bool = True,
        counts_tokens: bool = False,
        shares_calls: bool = True,
    ) -> None:
        """
        Args:
            base: the model without its head.
            layers: name of an encoder's layers in it; None if the whole model gets the packed row.
            is_causal: whether it is a decoder; read where `layers` is None.
            counts_tokens: whether the model numbers positions by the mask, not by the column.
            shares_calls: as in PackedLayout.
        """
        self._shares_calls = shares_calls
        self.is_causal = is_causal and layers is None
        device = compute_device(base)
        self.kernels = try_kernels(base.config, device, is_causal=self.is_causal)
        self.is_on = True
        self.packed_calls = 0
        self._base, self._counts_tokens = base, counts_tokens
        self._handles: list[RemovableHandle] = []
        if layers is None:
            before, after = self._before_model, self._after
            self._handles += [_before(base, before), _after(base, after)]
        else:
            inner = base.get_submodule(layers)
            self._handles += [
                _before(base, self._before_encoder),
                _before(inner, _pack_states),
                _after(inner, self._after),
            ]

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Lets the model compute padding inside the block."""
        self.is_on = False
        try:
            yield
        finally:
            self.is_on = True

    def _before_encoder(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookResult | None:
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or not self._may_pack(args, kwargs):
            return None
        layout = layout_of_mask(mask, is_causal=False, **self._options()) if _is_readable(mask) else None
        if layout is None:
            return None
        layout = replace(layout, shares_calls=self._shares_calls)
        self.packed_calls += 1
        return args, {**kwargs, "attention_mask": no_mask(mask.device), LAYOUT: layout}

    def _before_model(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookResult | None:
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        ids = tensors.get("input_ids")
        if ids is None or ids.dim() != 2 or not self._may_pack(args, kwargs) or not set(tensors) <= set(CARRIED):
            return None
        layout = self._layout(ids, tensors)
        if layout is None or (layout.rows, layout.width) != tuple(ids.shape):
            return None
        layout = replace(layout, shares_calls=self._shares_calls)
        self.packed_calls += 1
        packed = {name: layout.pack(tensors[name]) for name in tensors if name != "attention_mask"}
        if "position_ids" not in packed:
            packed["position_ids"] = self._positions(layout, tensors)
        mask = no_mask(ids.device)
        return (), {**kwargs, **packed, "attention_mask": mask, "use_cache": False, LAYOUT: layout}

    def _layout(self, ids: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> PackedLayout | None:
        mask, positions = tensors.get("attention_mask"), tensors.get("position_ids")
        if mask is None:
            # Without a mask, transformers would fetch the positions, to find out whether there are several documents.
            is_plain = self.is_causal and positions is None and _is_on_device(ids)
            return layout_of_whole_rows(ids.shape[0], ids.shape[1], ids.device) if is_plain else None
        if not _is_readable(mask):
            return None
        if mask.dim() == 2 and self.is_causal:
            return layout_of_mask(mask, is_causal=True, **self._options())
        if mask.dim() == 2:
            # A window counts positions, which are those of the packed row only where no token is left out.
            return layout_of_mask(mask, is_causal=False, needs_neighbors=True, **self._options())
        if mask.dim() == 4 and self.is_causal and positions is not None:
            return layout_of_documents(mask, positions, **self._options())
        return None

    def _options(self) -> dict[str, Any]:
        return {"kernels": self.kernels} if self.kernels else {}

    def _positions(self, layout: PackedLayout, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the positions that the model would have given to the tokens in the padded batch."""
        if not self._counts_tokens:
            return layout.columns()
        mask = (tensors["attention_mask"] != 0).long()
        return layout.pack(mask.cumsum(dim=1) - 1)

    def _may_pack(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Returns whether this is a plain call: no cache, no other model's states, no inner states wanted."""
        if not self.is_on or len(args) > 1 or LAYOUT in kwargs:  # a caller with a layout has done it, or wants none
            return False
        config: Any = self._base.config
        wanted = ("output_hidden_states", "output_attentions")
        if any(kwargs.get(name) or getattr(config, name, False) for name in wanted):
            return False
        absent = ("past_key_values", "encoder_hidden_states", "use_cache")
        return not any(kwargs.get(name) is not None and kwargs.get(name) is not False for name in absent)

    def _after(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        layout: PackedLayout | None = kwargs.get(LAYOUT)
        if layout is None:
            return None
        if isinstance(output, tuple):
            return (layout.unpack(output[0]), *output[1:])
        output.last_hidden_state = layout.unpack(output.last_hidden_state)
        return output


def remove_hooks(base: nn.Module) -> None:
    """Removes the hooks that a model has from an earlier UnpaddedModel."""
    hooks = [getattr(hook, "__self__", None) for hook in base._forward_pre_hooks.values()]
    for owner in hooks:
        if isinstance(owner, UnpaddedModel):
            owner.remove()


def _pack_states(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookResult | None:
    layout: PackedLayout | None = kwargs.get(LAYOUT)
    if layout is None:
        return None
    if args:
        return (layout.pack(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": layout.pack(kwargs["hidden_states"])}


def _is_on_device(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "cpu"


def _is_readable(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta or host_copy(tensor) is not None


def _before(module: nn.Module, hook: Any) -> RemovableHandle:
    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _after(module: nn.Module, hook: Any) -> RemovableHandle:
    return module.register_forward_hook(hook, with_kwargs=True)

"""The frozen beginning of a model: its result for a row is computed once and then put in place of the computation.

A border stands where the frozen part ends. While it has a `read` function, a call whose rows are all known does not compute
what is below. Any other call computes as always. frozen_border.py finds the border of a model; training/frozen_cache.py
decides what is read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import nn

from dtrain.models.custom_head import HeadedModel
from dtrain.models.host_copy import array_to
from dtrain.models.token_rows import TokenRows, token_rows
from dtrain.models.unpadding_attention import LAYOUT
from dtrain.models.unpadding_layout import PackedLayout

Read = Callable[[TokenRows], torch.Tensor | None]
"""Returns the vectors of all rows, one after the other, on the model's device; None if any row is missing."""

Inputs = Mapping[str, torch.Tensor]

OutputPart = Literal["pooler", "first", "states"]
"""What a head reads of its backbone's output: the pooler's vector, the first token's state, or all states.

A decoder's classifier reads one state, but which one depends on the row: the last that is not config.pad_token_id.
"""


class Border(Protocol):
    """The end of the frozen part."""

    shown: str
    """What is kept, for the banner."""
    is_per_token: bool
    """Whether a row has a vector for each of its tokens; if not, it has one."""
    is_above_layers: bool
    """Whether no layer is computed in a call that is read."""
    read: Read | None
    """None: every call computes."""

    def attach(self) -> None:
        """Prepares the model's calls. Changes no result while `read` is None."""
        ...

    def detach(self) -> None:
        """Restores the model's calls."""
        ...

    def compute(self, inputs: Inputs) -> torch.Tensor:
        """Returns the vectors of rows of equal length without padding: (rows, width), or (rows, length, width)."""
        ...

    def frozen(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the weights and buffers that the vectors depend on, by name."""
        ...


class PooledBorder:
    """All below a head of dtrain's that reads one vector per row."""

    is_per_token = False
    is_above_layers = True

    def __init__(self, module: HeadedModel) -> None:
        self._module = module
        self.shown = f"the pooled vector of each row ({module.pooling})"
        self.read: Read | None = None

    def attach(self) -> None:
        self._module.features = partial(self._features, self._module.features)  # type: ignore[method-assign]

    def detach(self) -> None:
        self.read = None
        del self._module.features

    def compute(self, inputs: Inputs) -> torch.Tensor:
        return HeadedModel.features(self._module, **inputs)

    def frozen(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from all_tensors(self._module.backbone)

    def _features(self, compute: Callable[..., torch.Tensor], **inputs: Any) -> torch.Tensor:
        found = _read(self.read, inputs)
        return compute(**inputs) if found is None else found[1]


class BackboneBorder:
    """A wholly frozen backbone below a head of transformers', or below one of dtrain's that reads all tokens."""

    is_above_layers = True

    def __init__(self, base: nn.Module, part: OutputPart, *, output: Any) -> None:
        """
        Args:
            output: an output of the backbone, whose type others will have.
        """
        self._base, self._part, self._type = base, part, type(output)
        self._has_pooler = getattr(output, "pooler_output", None) is not None
        self._names = argument_names(base)
        self._is_computing = False
        self._hook: Any = None
        self._found: tuple[TokenRows, torch.Tensor] | None = None  # for the call that is running, and no other
        self.read: Read | None = None
        self.is_per_token = part == "states"
        self.shown = {
            "pooler": "the pooler's vector of each row",
            "first": "the first token's state of each row",
            "states": "the last hidden states of each row's tokens",
        }[part]

    def attach(self) -> None:
        wrap_forward(self._base, self._forward)
        # Before the hooks that drop padding (unpadding_hooks.py), which change what a call gets.
        self._hook = self._base.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)

    def detach(self) -> None:
        self.read = None
        self._hook.remove()
        unwrap_forward(self._base)

    def compute(self, inputs: Inputs) -> torch.Tensor:
        self._is_computing = True
        try:
            output = self._base(**inputs)
        finally:
            self._is_computing = False
        vectors: torch.Tensor
        match self._part:
            case "pooler":
                vectors = output.pooler_output
            case "first":
                vectors = output.last_hidden_state[:, 0]
            case "states":
                vectors = output.last_hidden_state
        return vectors

    def frozen(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from all_tensors(self._base)

    def _begin(self, _base: nn.Module, args: Any, kwargs: Any) -> Any:
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._found = None if self._is_computing else _read(self.read, inputs)
        # Without a mask there is no padding to drop.
        return None if self._found is None else ((), {**inputs, "attention_mask": None, LAYOUT: None})

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found, self._found = self._found, None
        return forward(*args, **kwargs) if found is None else self._output(*found)

    def _output(self, rows: TokenRows, vectors: torch.Tensor) -> Any:
        """Returns an output in which what the head does not read is nan, or 0 where its gradient would be multiplied by it."""
        nothing = vectors.new_full((1, 1, 1), float("nan"))
        shape = (len(rows.counts), rows.length, vectors.shape[-1])
        match self._part:
            case "pooler":
                return self._type(last_hidden_state=nothing.expand(shape), pooler_output=vectors)
            case "first":
                states = vectors[:, None]
            case "states":
                states = spread(rows, vectors)
        pooled = {"pooler_output": nothing[0].expand(shape[0], shape[2])} if self._has_pooler else {}
        return self._type(last_hidden_state=states, **pooled)


class LayersBorder:
    """Embeddings and the first layers of an encoder or a decoder."""

    is_per_token = True

    def __init__(
        self,
        base: nn.Module,
        layers: Sequence[nn.Module],
        frozen_layers: int,
        *,
        embeddings: nn.Module | None,
        tuple_size: int,
    ) -> None:
        """
        Args:
            frozen_layers: number of layers below the border, at least 1.
            embeddings: the module whose output enters the first layer; None if something is computed between them.
            tuple_size: length of the tuple that a layer returns, the states first and None after them; 0: it returns a tensor.
        """
        self._base, self._layers, self._frozen = base, list(layers), frozen_layers
        self._embeddings, self._tuple_size = embeddings, tuple_size
        self._names = argument_names(base)
        self._hooks: list[Any] = []
        self._states: torch.Tensor | None = None  # of the call that is running, and of no other
        self._is_injected = self._is_computing = False
        self._captured: torch.Tensor | None = None
        self.read: Read | None = None
        self.is_above_layers = frozen_layers == len(self._layers)
        self.shown = f"the states after layer {frozen_layers} of {len(self._layers)} of each row's tokens"

    def attach(self) -> None:
        base, first = self._base, self._layers[0]
        self._hooks = [
            # Before the hooks that drop padding (unpadding_hooks.py), which change what a call gets.
            base.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            base.register_forward_hook(self._end, always_call=True),
        ]
        if self._embeddings is not None:
            wrap_forward(self._embeddings, self._embed)
        else:
            self._hooks.append(first.register_forward_pre_hook(self._inject, with_kwargs=True))
        for index, layer in enumerate(self._layers):
            wrap_forward(layer, partial(self._layer, index))

    def detach(self) -> None:
        self.read = None
        for hook in self._hooks:
            hook.remove()
        for module in [*self._layers, *([] if self._embeddings is None else [self._embeddings])]:
            unwrap_forward(module)

    def compute(self, inputs: Inputs) -> torch.Tensor:
        self._is_computing = True
        try:
            self._base(**inputs)
        finally:
            self._is_computing = False
        captured, self._captured = self._captured, None
        assert captured is not None, "the frozen layers did not run"
        # Layers that drop padding see the tokens of all rows in one; there is no padding here.
        return captured.reshape(*inputs["input_ids"].shape, captured.shape[-1])

    def frozen(self) -> Iterator[tuple[str, torch.Tensor]]:
        # A tensor may be shared between layers above and below.
        below = {id(tensor) for layer in self._layers[: self._frozen] for _, tensor in all_tensors(layer)}
        above = {id(tensor) for layer in self._layers[self._frozen :] for _, tensor in all_tensors(layer)} - below
        for name, tensor in all_tensors(self._base):
            if id(tensor) not in above and not tensor.requires_grad:
                yield name, tensor

    def _begin(self, _base: nn.Module, args: Any, kwargs: Any) -> None:
        self._states, self._is_injected = None, False
        if self._is_computing:
            return
        found = _read(self.read, {**dict(zip(self._names, args, strict=False)), **kwargs})
        if found is not None:
            self._states = spread(*found)

    def _end(self, *_: Any) -> None:
        self._states, self._is_injected = None, False

    def _embed(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._states is None:
            return forward(*args, **kwargs)
        self._is_injected = True
        return self._states

    def _inject(self, _layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Replaces the first layer's input, unless it has another form than the rows of the call."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        layout: PackedLayout | None = kwargs.get(LAYOUT)
        states = self._states if self._states is None or layout is None else layout.pack(self._states)
        if states is None or hidden.shape != states.shape:
            return None
        self._is_injected = True
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": states}
        return (states, *args[1:]), kwargs

    def _layer(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        is_below = index < self._frozen
        if (self._is_injected and is_below) or (self._is_computing and not is_below):
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            return (hidden, *[None] * (self._tuple_size - 1)) if self._tuple_size else hidden
        result = forward(*args, **kwargs)
        if self._is_computing and index == self._frozen - 1:
            self._captured = result[0] if self._tuple_size else result
        return result


def all_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields parameters and buffers by name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def argument_names(module: nn.Module) -> list[str]:
    """Returns the names of the arguments of a module's forward, in order."""
    return list(inspect.signature(module.forward).parameters)


def spread(rows: TokenRows, vectors: torch.Tensor) -> torch.Tensor:
    """Puts the vectors of all tokens in their places in the padded call; padding is 0. Returns (rows, length, width)."""
    shape = (len(rows.counts), rows.length, vectors.shape[-1])
    if len(vectors) == shape[0] * shape[1]:
        return vectors.view(shape)
    flat = vectors.new_zeros(shape[0] * shape[1], shape[2])
    flat[array_to(rows.places(), vectors.device)] = vectors
    return flat.view(shape)


def _read(read: Read | None, inputs: Mapping[str, Any]) -> tuple[TokenRows, torch.Tensor] | None:
    if read is None or (rows := token_rows(inputs)) is None or (vectors := read(rows)) is None:
        return None
    return rows, vectors


_MISSING = object()
_BEFORE = "_dtrain_forward_before"


def wrap_forward(module: nn.Module, wrapper: Callable[..., Any]) -> None:
    """Makes `module` call `wrapper(forward, ...)`. Another wrapper may be there already; it stays inside."""
    assert not hasattr(module, _BEFORE), "the module is wrapped already"
    object.__setattr__(module, _BEFORE, module.__dict__.get("forward", _MISSING))
    module.forward = partial(wrapper, module.forward)


def unwrap_forward(module: nn.Module) -> None:
    """Undoes `wrap_forward`."""
    before = module.__dict__.pop(_BEFORE)
    del module.forward
    if before is not _MISSING:
        module.forward = before

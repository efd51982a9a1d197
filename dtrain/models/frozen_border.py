"""Finds where the frozen beginning of a model ends, by watching a batch and by trying what it found.

Nothing is taken from a table of architectures: which modules run in which order, what a head reads, and whether a result
depends on dropout or on other rows are measured. A border is used only if a batch's loss and gradient stay the same with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dtrain.models.custom_head import HeadedModel
from dtrain.models.first_forward import FORWARD_ERRORS
from dtrain.models.frozen_prefix import (
    BackboneBorder,
    Border,
    LayersBorder,
    OutputPart,
    PooledBorder,
    argument_names,
)
from dtrain.models.modes import restored_modes
from dtrain.models.placement import compute_device
from dtrain.models.token_rows import TokenRows, token_rows
from dtrain.models.unpadding_attention import LAYOUT
from dtrain.models.unpadding_layout import PackedLayout

TOLERANCE = 1e-4
"""Largest relative difference of a loss, a gradient or vectors that is rounding: rows are computed in other batches."""

SAMPLES = 4096
"""Elements of each parameter's gradient that are compared."""

PARTS: tuple[OutputPart, ...] = ("pooler", "first", "states")


def find_border(module: nn.Module, loss: Callable[[], torch.Tensor]) -> Border | str:
    """Returns the border of the frozen beginning of a model; a string says why there is none.

    Args:
        module: the bare model, frozen, in training mode.
        loss: computes the loss of a batch with padding, each time with the same random draws.
    """
    base = _backbone(module)
    if isinstance(base, str):
        return base
    with torch.no_grad():
        seen = _observe(base, loss)
    if seen.calls != 1 or seen.rows is None:
        return "it does not read rows of tokens that are padded on the right, in one call"
    candidates = list(_candidates(module, base, seen))
    if not candidates:
        return _why_none(seen)
    expected, reason = _passes(module, loss), ""
    if not any(gradient.any() for gradient in expected[0].gradients):
        return "no target was found to try it with"  # any two results without a target are the same
    for candidate in candidates:
        found = _try(candidate, seen.rows, loss, expected, module)
        if found is None:
            return candidate
        reason = found
    return reason


@dataclass(frozen=True)
class _Pass:
    """The loss of a batch, and some elements of the gradient of each parameter."""

    loss: float
    gradients: list[torch.Tensor]

    def is_close(self, expected: _Pass) -> bool:
        """Returns whether another pass differs from this one by rounding only. nan is never close.

        Each parameter is judged by itself: a large gradient, such as that of a head, would hide a wrong small one.
        """
        if not abs(self.loss - expected.loss) <= TOLERANCE * max(abs(expected.loss), 1e-3):
            return False
        # Gradients that cancel out, of rows that are almost alike, are rounding themselves.
        whole = max(float(torch.stack([each.norm() for each in expected.gradients]).norm()), 0.01 * abs(expected.loss))
        pairs = zip(self.gradients, expected.gradients, strict=True)
        return all(float((a - b).norm()) <= 10 * TOLERANCE * float(b.norm()) + 1e-5 * whole for a, b in pairs)


def _passes(module: nn.Module, loss: Callable[[], torch.Tensor]) -> tuple[_Pass, _Pass]:
    """Runs the batch in training and in evaluation: a head may read another part of its backbone's output there."""
    in_training = _pass(module, loss)
    with _evaluating(module):
        return in_training, _pass(module, loss)


def _pass(module: nn.Module, loss: Callable[[], torch.Tensor]) -> _Pass:
    module.zero_grad(set_to_none=True)
    value = loss()
    if value.requires_grad:
        torch.autograd.backward(value)
    gradients = [_sample(p) for p in module.parameters() if p.requires_grad]
    module.zero_grad(set_to_none=True)
    return _Pass(float(value.detach()), gradients)


def _backbone(module: nn.Module) -> nn.Module | str:
    base: object = None
    if isinstance(module, HeadedModel):
        base = module.backbone
    elif isinstance(module, PreTrainedModel) and module.base_model is not module:
        base = module.base_model
    if base is None:
        return "it is not a model of transformers with a head"
    if not isinstance(base, PreTrainedModel):
        return "trainable adapters are inside the backbone"
    if base.config.is_encoder_decoder:
        return "an encoder with a decoder is not supported"
    backbone: nn.Module = base
    return backbone


@dataclass
class _Seen:
    """What one forward pass did.

    Attributes:
        calls: number of calls of the backbone.
        rows: the rows of the call; None if they are not rows of tokens.
        output: of the backbone.
        layers: the list of layers, the largest list of modules in the backbone; empty if there is none.
        events: the layers, and the modules inside the backbone that have trainable weights of their own, as they were called.
        first_input: what entered the first layer.
        embedded: the output of the module called `embeddings`.
        layer_output: of the first layer.
    """

    calls: int = 0
    rows: TokenRows | None = None
    output: Any = None
    layers: list[nn.Module] = field(default_factory=list)
    events: list[int | str] = field(default_factory=list)
    first_input: Any = None
    embedded: Any = None
    layer_output: Any = None


def _observe(base: nn.Module, loss: Callable[[], torch.Tensor]) -> _Seen:
    lists = [part for part in base.modules() if isinstance(part, nn.ModuleList) and len(part)]
    largest = max(lists, key=lambda part: sum(p.numel() for p in part.parameters()), default=None)
    seen = _Seen(layers=[] if largest is None else list(largest))
    names = argument_names(base)

    def begin(_base: nn.Module, args: Any, kwargs: Any) -> None:
        seen.calls += 1
        seen.rows = token_rows({**dict(zip(names, args, strict=False)), **kwargs})

    def end(_base: nn.Module, _args: Any, output: Any) -> None:
        seen.output = output

    def enter(index: int, _layer: nn.Module, args: Any, kwargs: Any) -> None:
        seen.events.append(index)
        if index == 0:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0] if args else None
            layout: PackedLayout | None = kwargs.get(LAYOUT)
            seen.first_input = hidden if layout is None or hidden is None else layout.unpack(hidden)

    def leave(_layer: nn.Module, _args: Any, output: Any) -> None:
        seen.layer_output = output

    def embed(_embeddings: nn.Module, _args: Any, output: Any) -> None:
        seen.embedded = output

    def event(name: str) -> Callable[..., None]:
        return lambda *_: seen.events.append(name)

    def layer(index: int) -> Callable[..., None]:
        return lambda *call: enter(index, *call)

    # Before the hooks that drop padding (unpadding_hooks.py), which change what a call gets.
    hooks = [base.register_forward_pre_hook(begin, with_kwargs=True, prepend=True), base.register_forward_hook(end)]
    for name, part in base.named_modules():
        if any(parameter.requires_grad for parameter in part.parameters(recurse=False)):
            hooks.append(part.register_forward_pre_hook(event(name)))
    for index, part in enumerate(seen.layers):
        hooks.append(part.register_forward_pre_hook(layer(index), with_kwargs=True))
    if seen.layers:
        hooks.append(seen.layers[0].register_forward_hook(leave))
    if isinstance(embeddings := getattr(base, "embeddings", None), nn.Module):
        hooks.append(embeddings.register_forward_hook(embed))
    try:
        loss()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _frozen_layers(seen: _Seen) -> int:
    """Returns the number of layers that are called one after the other before anything trainable is."""
    count = 0
    for event in seen.events:
        if event != count:
            break
        count += 1
    has_trainable = [any(p.requires_grad for p in layer.parameters()) for layer in seen.layers[:count]]
    return has_trainable.index(True) if True in has_trainable else count


def _candidates(module: nn.Module, base: nn.Module, seen: _Seen) -> Iterator[Border]:
    """Yields the borders to try, the cheapest first."""
    if not any(isinstance(event, str) for event in seen.events) and not any(p.requires_grad for p in base.parameters()):
        if isinstance(module, HeadedModel) and not module.is_per_token:
            yield PooledBorder(module)
            return
        has_states = getattr(seen.output, "last_hidden_state", None) is not None
        for part in PARTS if has_states else ():
            if part != "pooler" or getattr(seen.output, "pooler_output", None) is not None:
                yield BackboneBorder(base, part, output=seen.output)
        return
    count = _frozen_layers(seen)
    result = seen.layer_output
    size = len(result) if isinstance(result, tuple) else 0
    hidden = result[0] if size else result
    numbers = [event for event in seen.events if isinstance(event, int)]
    if count == 0 or numbers != list(range(len(seen.layers))) or not torch.is_tensor(hidden):
        return
    if any(value is not None for value in result[1:size]) or not torch.is_tensor(seen.first_input):
        return
    embeddings = getattr(base, "embeddings", None)
    assert seen.rows is not None
    shape = (*seen.rows.ids.shape, hidden.shape[-1])
    # At the embeddings, whatever the layers do to drop padding also does it to what was read.
    if torch.is_tensor(seen.embedded) and seen.embedded.shape == shape:
        yield LayersBorder(base, seen.layers, count, embeddings=embeddings, tuple_size=size)
    if seen.first_input.shape == shape:
        yield LayersBorder(base, seen.layers, count, embeddings=None, tuple_size=size)


def _why_none(seen: _Seen) -> str:
    if seen.events and isinstance(seen.events[0], str):
        return f"{seen.events[0] or 'the backbone itself'} learns, and everything after it changes with it"
    if _frozen_layers(seen) == 0:
        return "no layer is frozen together with all that is before it"
    return "the layers of this model do not follow one another"


def _sample(parameter: nn.Parameter) -> torch.Tensor:
    """Returns evenly spaced elements of a gradient: copies of all gradients of a large model would not fit in memory."""
    stride = max(1, parameter.numel() // SAMPLES)
    gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    return gradient.detach().reshape(-1)[::stride].float()


def _try(
    border: Border, rows: TokenRows, loss: Callable[[], torch.Tensor], expected: Sequence[_Pass], module: nn.Module
) -> str | None:
    """Returns why a border cannot be used; None if the batch's loss and gradient stay the same with it."""
    border.attach()
    try:
        with torch.no_grad():
            training = _alone(border, rows, module)
            with _evaluating(module):
                vectors = _alone(border, rows, module)
                if not _keeps_order(border, rows, module):
                    return "its rows depend on each other"
                if _reads_what_learns(border, rows, module, vectors):
                    return "its results depend on weights that learn"
        if not are_close(training, vectors):
            return "it gives other results in training than in evaluation, because dropout or statistics in it are not frozen"
        keys = rows.keys()
        border.read = lambda found: vectors if found.keys() == keys else None
        pairs = zip(_passes(module, loss), expected, strict=True)
        is_same = all(found.is_close(wanted) for found, wanted in pairs)
    except FORWARD_ERRORS:
        is_same = False
    finally:
        border.detach()
    return None if is_same else "more of the frozen part is used than its states"


def _reads_what_learns(border: Border, rows: TokenRows, module: nn.Module, vectors: torch.Tensor) -> bool:
    """Returns whether the vectors change with the weights that learn, which may be read without a call of their module."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    saved = [parameter.detach().clone() for parameter in learning]
    try:
        for parameter in learning:
            parameter.add_(1.0)
        return not torch.equal(_alone(border, rows, module), vectors)
    finally:
        for parameter, values in zip(learning, saved, strict=True):
            parameter.copy_(values)


def _alone(border: Border, rows: TokenRows, module: nn.Module) -> torch.Tensor:
    """Returns the vectors of all rows, each computed by itself."""
    return torch.cat([_one(border, ids[None], types, module) for ids, types in rows.rows()])


def _one(border: Border, ids: Any, types: Any, module: nn.Module) -> torch.Tensor:
    """Returns the vectors of rows of equal length: (vectors, width)."""
    vectors = border.compute(tensors_of(ids, None if types is None else types.reshape(ids.shape), module))
    return vectors.reshape(-1, vectors.shape[-1])


def tensors_of(ids: Any, types: Any, module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the inputs of a call whose rows have no padding, on the module's device."""
    device = compute_device(module)
    inputs = {"input_ids": torch.from_numpy(ids).long()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if types is not None:
        inputs["token_type_ids"] = torch.from_numpy(types).long()
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _keeps_order(border: Border, rows: TokenRows, module: nn.Module) -> bool:
    """Returns whether rows that are computed together get the vectors that they get alone."""
    count = int(rows.counts.min())
    ids, types = rows.ids[:, :count].copy(), None if rows.types is None else rows.types[:, :count].copy()
    together = _one(border, ids, types, module)
    alone = torch.cat(
        [_one(border, ids[row : row + 1], None if types is None else types[row], module) for row in range(len(ids))]
    )
    return are_close(together, alone)


def are_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> bool:
    """Returns whether two tensors differ by rounding only."""
    tolerance = tolerance or {torch.bfloat16: 5e-2, torch.float16: 1e-2}.get(found.dtype, TOLERANCE)
    difference = (found - expected).abs().max()
    return bool(difference <= tolerance * expected.abs().max())


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    with restored_modes(module):
        module.eval()
        yield

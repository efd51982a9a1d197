"""Cross entropy over a vocabulary, with logits of the targets only.

A language model's last layer is a linear one over the vocabulary, and its logits are the largest tensor of a training step.
While a model runs, a hook on that layer hands it the rows that are targets and no others. Where even those are many, the
layer gets no row, and chunks of the rows are multiplied with the layer's weights: by `ChunkedCrossEntropy` in training,
by `score_targets` in an evaluation. A hook works inside
DDP's wrapper and leaves everything else to the model. `try_last_layer` finds out on a few tokens whether it is right for a
model. The complete logits are used where it is not, where nobody has tried, and where the layer is not a plain `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from dtrain.distributed.collectives import node_first
from dtrain.distributed.rank_context import RankContext
from dtrain.models.fast_linear import FastLinear, fast_linear
from dtrain.models.first_forward import FORWARD_ERRORS
from dtrain.models.host_copy import host_copy, pick, remember
from dtrain.models.modes import restored_modes
from dtrain.tasks.chunked_cross_entropy import ChunkedCrossEntropy
from dtrain.tasks.protocol import IGNORED
from dtrain.tasks.tensors import full_precision

MAX_LOGITS = 2**24
"""Number of logits from which on they are computed in chunks: 64 MiB in float32."""

MAX_LOGITS_ON_GPU = 2**28
"""The same on a GPU, where each chunk reads and writes the gradient of all weights: 1 GiB."""

KIND_ATTRIBUTE = "_dtrain_head_kind"
"""Attribute of a model under which the result of the trial is kept."""

COMPLETE, ROWS, LINEAR = "complete", "rows", "linear"
"""Kinds of heads: needs every token; works row by row; is nothing but its linear layer."""


@dataclass
class _Selection:
    """The rows that are targets, picked from what enters the last layer.

    Attributes:
        is_target: (batch, length) bool.
        passes_rows: whether the layer gets these rows; else it gets none.
        rows: (targets, width) once picked; None before, and where the layer's input has another shape.
        calls: number of times that the layer ran.
        autocast: the lower type in which the layer ran; None in full precision. DeepSpeed sets it inside its wrapper only.
    """

    is_target: torch.Tensor
    passes_rows: bool
    rows: torch.Tensor | None = None
    calls: int = 0
    autocast: torch.dtype | None = None

    def __call__(self, _layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = inputs[0]
        self.calls += 1
        device = hidden.device.type
        self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if hidden.shape[:-1] != self.is_target.shape:
            return None
        self.rows = pick(hidden, self.is_target)
        passed = self.rows[None] if self.passes_rows else hidden[:, :0]
        return (passed, *inputs[1:])


def try_last_layer(model: nn.Module, context: RankContext) -> None:
    """Collective. Finds out how a model may compute logits of some tokens only, and keeps the answer on the model.

    Call it before an engine wraps the model. It changes nothing else.
    """
    layer = _last_layer(model)
    # BigBird would switch to full attention for good at the few tokens of the trial.
    if layer is not None and getattr(getattr(model, "config", None), "attention_type", None) != "block_sparse":
        model.__dict__[KIND_ATTRIBUTE] = node_first(lambda: _try_head(model, layer), context)


def target_logits(model: nn.Module, inputs: Mapping[str, Any], is_target: torch.Tensor) -> torch.Tensor:
    """Returns logits (targets, vocabulary) in full precision.

    Args:
        model: the model, or an engine's wrapper of it.
        inputs: everything that the model is called with.
        is_target: (batch, length) bool, the tokens whose logits count.
    """
    return full_precision(_target_logits(model, inputs, is_target))


def _target_logits(model: nn.Module, inputs: Mapping[str, Any], is_target: torch.Tensor) -> torch.Tensor:
    """Returns logits (targets, vocabulary) in the model's own precision."""
    layer = _last_layer(model)
    if layer is None or _head_kind(model) == COMPLETE:
        return pick(cast("torch.Tensor", model(**inputs).logits), is_target)
    with _selecting(layer, _Selection(is_target, passes_rows=True)) as selection:
        logits: torch.Tensor = model(**inputs).logits
    return pick(logits, is_target) if selection.rows is None else logits[0]


@dataclass(frozen=True)
class TargetScores:
    """The targets of each row of a batch, scored without a gradient.

    Attributes:
        loss: (batch,) float64, summed over the row's targets, in nats.
        targets: (batch,) int64, their number.
        correct: (batch,) int64, how many of them were the most likely token.
    """

    loss: torch.Tensor
    targets: torch.Tensor
    correct: torch.Tensor


@torch.no_grad()
def score_targets(model: nn.Module, inputs: Mapping[str, Any], labels: torch.Tensor) -> TargetScores:
    """Returns the plain cross entropy and the number of correct targets of each row.

    A row without a target has a loss of 0. Logits are computed in parts of at most MAX_LOGITS, except by a model whose last
    layer has to work inside it.

    Args:
        labels: (batch, length) int64.
    """
    is_target = _is_target(labels)
    expected, parts = pick(labels, is_target), _logits_in_parts(model, inputs, labels)
    losses = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    correct = torch.zeros_like(labels)
    scored = [
        (F.cross_entropy(logits, expected[rows], reduction="none").double(), logits.argmax(dim=-1) == expected[rows])
        for rows, logits in parts
    ]
    if scored:
        losses[is_target] = torch.cat([loss for loss, _ in scored])
        correct[is_target] = torch.cat([is_right for _, is_right in scored]).long()
    return TargetScores(losses.sum(dim=1), is_target.sum(dim=1), correct.sum(dim=1))


def _logits_in_parts(
    model: nn.Module, inputs: Mapping[str, Any], labels: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Runs the model; yields numbers of targets and their logits in full precision, at most MAX_LOGITS at a time."""
    is_target, layer = _is_target(labels), _last_layer(model)
    if layer is not None and _is_separable(model, layer, labels):
        with _selecting(layer, _Selection(is_target, passes_rows=False)) as selection:
            logits = model(**inputs).logits
        if selection.rows is not None:
            linear = fast_linear if type(layer) is FastLinear else F.linear
            for part in _parts(len(selection.rows), layer.out_features, labels.device):
                # Autocast casts, as it would in the layer.
                yield part, full_precision(linear(selection.rows[part], layer.weight, layer.bias))
            return
        logits = pick(logits, is_target)
    else:
        logits = _target_logits(model, inputs, is_target)
    for part in _parts(len(logits), logits.shape[-1], labels.device):
        yield part, full_precision(logits[part])


def _parts(rows: int, vocabulary: int, device: torch.device) -> list[slice]:
    chunk = max(1, _most_logits(device) // vocabulary)
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


def target_loss(
    model: nn.Module, inputs: Mapping[str, Any], labels: torch.Tensor, *, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Returns the summed cross entropy of the labels that are not IGNORED, in nats.

    Args:
        labels: (batch, length) int64.
    """
    is_target, layer = _is_target(labels), _last_layer(model)
    if layer is not None and _is_chunked(model, layer, labels):
        with _selecting(layer, _Selection(is_target, passes_rows=False)) as selection:
            logits = model(**inputs).logits
        if selection.rows is not None:
            return _loss_of_rows(layer, selection.rows, pick(labels, is_target), label_smoothing, selection.autocast)
        logits = full_precision(pick(logits, is_target))
    else:
        logits = target_logits(model, inputs, is_target)
    return F.cross_entropy(logits, pick(labels, is_target), label_smoothing=label_smoothing, reduction="sum")


def _is_target(labels: torch.Tensor) -> torch.Tensor:
    is_target = labels != IGNORED
    known = host_copy(labels)
    if known is not None and labels.device.type != "cpu":
        remember(is_target, known != IGNORED)
    return is_target


def _loss_of_rows(
    layer: nn.Linear, rows: torch.Tensor, labels: torch.Tensor, label_smoothing: float, autocast: torch.dtype | None
) -> torch.Tensor:
    """Returns the loss of the rows that enter the last layer, in the precision in which that runs."""
    with torch.autocast(rows.device.type, dtype=autocast, enabled=autocast is not None):
        if autocast == torch.float16:  # seen too late by _is_chunked
            logits = full_precision(layer(rows))
            return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum")
        # As large as the rows: smaller chunks would spend their time on adding to the gradient of the weights.
        chunk = max(1, max(_most_logits(rows.device), rows.numel()) // layer.out_features)
        loss: torch.Tensor = ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            rows, layer.weight, layer.bias, labels, label_smoothing, chunk, type(layer) is FastLinear
        )
        return loss


def _is_chunked(model: nn.Module, layer: nn.Linear, labels: torch.Tensor) -> bool:
    """Returns whether a loss is computed in chunks. Decided from shapes, so that nothing is fetched from the device."""
    device = labels.device.type
    # Gradients of a chunk do not have the loss scale of fp16 yet, so that small ones would become 0.
    is_fp16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    if is_fp16 or not torch.is_grad_enabled():
        return False
    return _is_separable(model, layer, labels) and _keeps_order(model, layer)


def _is_separable(model: nn.Module, layer: nn.Linear, labels: torch.Tensor) -> bool:
    """Returns whether there are so many logits that the layer is left out, and multiplying with its weights replaces it."""
    is_large = labels.numel() * layer.out_features > _most_logits(labels.device)
    is_hooked = bool(layer._forward_hooks)  # one that changes the logits
    is_whole = not hasattr(layer.weight, "ds_id") and "forward" not in layer.__dict__  # ZeRO 3; freeze.method=no_grad
    return is_large and is_whole and not is_hooked and _head_kind(model) == LINEAR


def _most_logits(device: torch.device) -> int:
    return MAX_LOGITS_ON_GPU if device.type == "cuda" else MAX_LOGITS


def _keeps_order(model: nn.Module, layer: nn.Linear) -> bool:
    """Returns whether backward gives the gradients of the layer's parameters in the same order with and without chunks.

    ZeRO 2 adds gradients of ranks in the order in which they arrive, and another rank's micro-batch may have no chunks. A
    weight that is also the input embeddings' gets its gradient last in either case.
    """
    if layer.bias is None or not layer.bias.requires_grad:
        return True
    inputs = getattr(_bare(model), "get_input_embeddings", lambda: None)()
    return getattr(inputs, "weight", None) is layer.weight


def _last_layer(model: nn.Module) -> nn.Linear | None:
    """Returns the model's linear layer over the vocabulary, if its input may be changed."""
    bare = _bare(model)
    # A compiled forward has no place for a hook that comes and goes.
    is_compiled = getattr(bare, "_compiled_call_impl", None) is not None
    embeddings = getattr(bare, "get_output_embeddings", None)
    if is_compiled or embeddings is None:
        return None
    layer = embeddings()
    return layer if type(layer) in (nn.Linear, FastLinear) else None


def _bare(model: nn.Module) -> nn.Module:
    bare = getattr(model, "module", model)
    return bare if isinstance(bare, nn.Module) else model


@contextmanager
def _selecting(layer: nn.Linear, selection: _Selection) -> Iterator[_Selection]:
    handle = layer.register_forward_pre_hook(selection)
    try:
        yield selection
    finally:
        handle.remove()


def _head_kind(model: nn.Module) -> str:
    kind: str = _bare(model).__dict__.get(KIND_ATTRIBUTE, COMPLETE)
    return kind


def _try_head(model: nn.Module, layer: nn.Linear) -> str:
    """Returns the kind of head: compares the logits of some tokens with the model's own.

    Also with large numbers in place of what the layer computes: a new model's small logits would pass a soft cap unchanged.
    """
    device = layer.weight.device
    tokens = torch.arange(12, device=device).view(2, 6) % layer.out_features
    is_target = tokens % 3 != 0
    inputs: dict[str, Any] = {"input_ids": tokens}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens.flip(1)
    numbers = torch.linspace(-1e3, 1e3, 12 * layer.out_features, device=device, dtype=layer.weight.dtype)
    numbers = numbers.view(2, 6, layer.out_features)

    def logits(passes_rows: bool | None, outputs: torch.Tensor | None = None) -> torch.Tensor:
        """Runs the model; `outputs` take the place of the layer's. None selects nothing."""
        selection = _Selection(is_target, passes_rows=bool(passes_rows))
        hook = layer.register_forward_hook(lambda *_: outputs)
        try:
            if passes_rows is None:
                found = model(**inputs).logits
            else:
                with _selecting(layer, selection):
                    found = model(**inputs).logits
                if selection.calls != 1 or selection.rows is None:
                    raise ValueError("the layer was not called once with a row for each token")
        finally:
            hook.remove()
        return torch.as_tensor(found)

    is_fp32 = torch.autocast(device.type, enabled=False)
    try:
        with restored_modes(model), is_fp32, torch.enable_grad(), torch.random.fork_rng(devices=[]):
            model.eval()
            expected, processed = logits(None)[is_target], logits(None, numbers)
            works_on_rows = _are_equal(logits(True)[0], expected) and _are_equal(
                logits(True, numbers[is_target][None])[0], processed[is_target]
            )
            if not works_on_rows:
                return COMPLETE
            # A learned scale of 1 after the layer changes nothing yet, but needs a gradient.
            is_linear = torch.equal(processed, numbers) and not processed.requires_grad and not layer._forward_hooks
            return LINEAR if is_linear and logits(False).numel() == 0 else ROWS
    except FORWARD_ERRORS:
        return COMPLETE


def _are_equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = max(1e-5, 8 * torch.finfo(expected.dtype).eps) * float(expected.detach().abs().max())
    return found.shape == expected.shape and float((found - expected).detach().abs().max()) <= tolerance

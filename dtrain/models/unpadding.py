"""Decides whether a model computes its batches without padding (model.unpad), and installs that.

Only architectures whose results are tested against the padded ones are served (tests/models/test_unpadding.py), and each
model is tried once with two rows before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from dtrain.config import schema
from dtrain.console import log
from dtrain.errors import ConfigError
from dtrain.models import unpadding_attention
from dtrain.models.first_forward import FORWARD_ERRORS, rotates_by_length
from dtrain.models.modes import restored_modes
from dtrain.models.placement import compute_device, gathered
from dtrain.models.unpadding_hooks import UnpaddedModel, remove_hooks
from dtrain.models.unpadding_layout import NAME

ENCODERS: Mapping[str, str] = {
    "AlbertModel": "encoder",
    "BertModel": "encoder",
    "CamembertModel": "encoder",
    "DistilBertModel": "transformer",
    "ElectraModel": "encoder",
    "ErnieModel": "encoder",
    "RobertaModel": "encoder",
    "XLMRobertaModel": "encoder",
}
"""Class of an encoder in transformers -> name of its layers."""

DECODERS = (
    "GPT2Model",
    "GPTNeoXModel",
    "Gemma3TextModel",
    "LlamaModel",
    "MistralModel",
    "OPTDecoder",
    "Phi3Model",
    "Qwen2Model",
    "Qwen3Model",
)
"""Classes of decoders in transformers."""

WHOLE_ENCODERS = ("ModernBertModel",)
"""Classes of encoders in transformers that number positions in their layers."""

REASONS: Mapping[str, str] = {
    "bloom": "its attention has ALiBi biases",
    "deberta": "its attention cannot be replaced",
    "deberta-v2": "its attention cannot be replaced",
    "falcon": "its attention may have ALiBi biases",
    "gemma2": "its attention has a soft cap",
    "mpnet": "its attention cannot be replaced",
    "mpt": "its attention has ALiBi biases",
    "xlnet": "its attention cannot be replaced",
}
"""Type of a model -> why it is not served."""

COUNTED_FROM_PADDING = ("CamembertModel", "RobertaModel", "XLMRobertaModel")
"""Classes whose first position is one after the number of the pad token."""

WIDTH = 5
"""Positions of the trial's rows."""

TOLERANCE = 1e-4
"""Largest difference of the trial's states, relative to the largest one. Rounding gives 1e-6."""


@dataclass(frozen=True)
class Unpadding:
    """The decision for a model.

    Attributes:
        value: the value for the run's config.yaml.
        reason: a few words on why.
        hooks: the installed hooks; None if it is off.
    """

    value: Literal["on", "off"]
    reason: str
    hooks: UnpaddedModel | None = None

    def __str__(self) -> str:
        found = {kernel.name for kernel in self.hooks.kernels} if self.hooks is not None else set()
        names = [name for name in ("varlen", "flash", "nested") if name in found]
        return f"{self.value} ({self.reason})" + (f", attention by {', '.join(names)}" if names else "")


def prepare_unpadding(module: nn.Module, settings: schema.Model, *, reads_padding: bool = False) -> Unpadding:
    """Decides for a model, and installs the hooks if it is on. Call it before an engine wraps the model.

    Args:
        reads_padding: whether the model's answer for a row depends on the row's padding (tasks/trial.py).

    Raises:
        ConfigError: model.unpad=on, but the model cannot be served.
    """
    remove_unpadding(module)
    if settings.unpad == "off":
        return Unpadding("off", "as configured")
    decision = _install(module, settings, reads_padding=reads_padding)
    is_named = "unpad" in settings.model_fields_set  # else it is the choice of an earlier start (earlier_runs.py)
    if settings.unpad == "on" and decision.hooks is None and is_named:
        raise ConfigError(
            f"model.unpad=on: this model cannot be computed without padding: {decision.reason}. Set model.unpad=off, or "
            "auto, which falls back to padding."
        )
    if settings.unpad == "on" and decision.hooks is None:
        log.warning(
            "model.unpad was on when this run began, and is off from here on: %s. With dropout the numbers differ",
            decision.reason,
        )
    return decision


def remove_unpadding(module: nn.Module) -> None:
    """Removes the hooks of an earlier `prepare_unpadding`."""
    for part in _served_parts(module):
        if part.config._attn_implementation == NAME:
            remove_hooks(part)
            part.set_attn_implementation("sdpa")


def _install(module: nn.Module, settings: schema.Model, *, reads_padding: bool) -> Unpadding:
    reason = "its answer for a row depends on the row's padding" if reads_padding else _obstacle_of_settings(settings)
    found = list(_served_parts(module))
    if reason is None and len(found) != 1:
        reason = _not_served(module)
    if reason is None:
        reason = _obstacle_of_config(found[0].config, type(found[0]).__name__)
    if reason is not None:
        return Unpadding("off", reason)
    base, kind = found[0], type(found[0]).__name__
    config: Any = base.config
    unpadding_attention.register()
    base.set_attn_implementation(NAME)
    hooks = UnpaddedModel(
        base,
        layers=ENCODERS.get(kind),
        is_causal=kind in DECODERS,
        counts_tokens=kind == "OPTDecoder",
        # It came with model.fast_dropout, and changes the draws of attention's dropout: older runs go on without it.
        shares_calls=settings.fast_dropout,
    )
    fault = _try(base, hooks)
    if fault is None:
        return Unpadding("on", f"tested for {config.model_type}", hooks)
    hooks.remove()
    base.set_attn_implementation("sdpa")
    return Unpadding("off", fault)


def _obstacle_of_settings(settings: schema.Model) -> str | None:
    if settings.factory is not None:
        return "model.factory builds the model"
    if settings.compile:
        return "model.compile would compile again for each number of tokens"
    if settings.attn_implementation not in (None, "sdpa"):
        return f"model.attn_implementation={settings.attn_implementation}"
    return None


def _served_parts(module: nn.Module) -> Iterator[Any]:
    """Yields the parts of a model that are a tested architecture of transformers."""
    for part in module.modules():
        is_named = type(part).__name__ in (*ENCODERS, *WHOLE_ENCODERS, *DECODERS)
        if is_named and isinstance(part, PreTrainedModel) and type(part).__module__.startswith("transformers.models."):
            yield part


def _not_served(module: nn.Module) -> str:
    config: Any = getattr(module, "config", None)
    kind = getattr(config, "model_type", None)
    if kind is None:
        return "it is not a model of transformers"
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder and a decoder"
    return REASONS.get(kind, f"{kind} is not among the tested architectures")


def _obstacle_of_config(config: Any, kind: str) -> str | None:
    """Returns why a model of a tested class is not served because of its config; None if it is."""
    name = config.model_type
    if config._attn_implementation != "sdpa":
        return f"its attention is {config._attn_implementation}"
    if getattr(config, "add_cross_attention", False) or getattr(config, "is_decoder", False):
        return f"this {name} model is a decoder or has cross attention"
    if getattr(config, "use_bidirectional_attention", False):
        return f"this {name} model is not causal"
    if getattr(config, "chunk_size_feed_forward", 0):
        return "model.config.chunk_size_feed_forward needs a certain number of tokens"
    first = (config.pad_token_id or 0) + 1 if kind in COUNTED_FROM_PADDING else 0
    if getattr(config, "max_position_embeddings", WIDTH) - first < WIDTH:
        return f"it has fewer than {WIDTH} positions"
    if rotates_by_length(config):
        return "its rotary positions depend on the length of the batch"
    return None


def _try(base: Any, hooks: UnpaddedModel) -> str | None:
    """Runs two rows of different lengths with and without padding; returns what is wrong, None if they agree.

    Leaves modes, weights and the random state as they are.
    """
    config, device = base.config, compute_device(base)
    tokens = [token for token in range(min(config.vocab_size, 8)) if token != config.pad_token_id]
    ids = torch.tensor([(tokens * WIDTH)[:WIDTH], (tokens[::-1] * WIDTH)[:WIDTH]], device=device)
    mask = torch.tensor([[1] * WIDTH, [1] * (WIDTH - 2) + [0] * 2], device=device)
    if isinstance(config.pad_token_id, int) and 0 <= config.pad_token_id < config.vocab_size:
        ids = ids.masked_fill(mask == 0, config.pad_token_id)
    try:
        with _evaluating(base), gathered(base):
            packed = base(input_ids=ids, attention_mask=mask).last_hidden_state
            with hooks.switched_off():
                padded = base(input_ids=ids, attention_mask=mask).last_hidden_state
    except FORWARD_ERRORS as error:
        return f"its trial failed: {' '.join(str(error).split())[:200]}"
    if hooks.packed_calls == 0:
        return "its layers get no attention mask"
    difference = ((packed - padded) * mask[:, :, None]).abs().max()
    if not difference <= TOLERANCE * padded.abs().max():
        return f"its states differ from the padded ones by {float(difference):.1e}"
    return None


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    device = compute_device(module).type
    with (
        restored_modes(module),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        torch.autocast(device, enabled=False),
    ):
        module.eval()
        yield

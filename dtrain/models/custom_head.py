"""A new head on any backbone: what `model.head` asks for, trained and saved as one model.

The saved folder is the backbone's own (`AutoModel.from_pretrained` gives it back, config.json and all), with the head
beside it in head.safetensors; config.json says under `dtrain_head` what the head is. dtrain loads both again from
model.name_or_path=<folder>, whether model.head is set or not.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import cached_file

from dtrain.config import schema
from dtrain.errors import CheckpointError, ConfigError
from dtrain.models.compatibility import learned_positions
from dtrain.models.heads import Head
from dtrain.models.pooling import pool

KEY = "dtrain_head"
"""In the backbone's config.json: the settings of the head beside it, the task it was made for, and its outputs."""

FILE = "head.safetensors"


class HeadedModel(nn.Module):
    """`backbone` and `head`; paths like `embeddings` or `base_model` are looked up in the backbone as well."""

    base_model_prefix = "backbone"

    def __init__(
        self,
        backbone: PreTrainedModel,
        settings: schema.NewHead,
        *,
        task_head: Head,
        outputs: int,
        width: int,
        pads_left: bool,
    ) -> None:
        """
        Args:
            task_head: what the task wants: logits per example or per token.
            outputs: logits.
            width: of the backbone's last hidden state.
            pads_left: whether batches are padded in front, where positions have to be counted from the first token.
        """
        super().__init__()
        self.backbone = backbone
        self.head = LinearHead(width, outputs, settings)
        self.config: PretrainedConfig = backbone.config
        self._pooling, self._task_head = settings.pooling, task_head
        takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters
        numbers_by_padding = any(table.padding_idx is not None for table in learned_positions(backbone))
        # RoBERTa and its kin count from the pad tokens themselves, and from another number.
        self._counts_positions = pads_left and takes_positions and not numbers_by_padding
        setattr(backbone.config, KEY, {**settings.model_dump(mode="json"), "task": task_head.name, "outputs": outputs})

    def forward(self, **inputs: Any) -> SequenceClassifierOutput:
        """The backbone's inputs.

        Returns:
            logits: (batch, outputs); (batch, length, outputs) for a task of tokens; (batch, choices) for choices.
        """
        choices = None
        if self._task_head.logits == "choice":
            choices = next(iter(inputs.values())).shape[1]
            inputs = {name: value.flatten(0, 1) for name, value in inputs.items()}
        mask = inputs.get("attention_mask")
        if self._counts_positions and mask is not None and "position_ids" not in inputs:
            inputs["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        hidden = self.backbone(**inputs).last_hidden_state
        if self._task_head.logits != "token":
            hidden = pool(hidden, mask, self._pooling)
        logits = self.head(hidden)
        return SequenceClassifierOutput(logits=logits if choices is None else logits.view(-1, choices))

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's."""
        embeddings: nn.Module = self.backbone.get_input_embeddings()
        return embeddings

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """Whether the backbone does."""
        return bool(self.backbone.supports_gradient_checkpointing)

    def gradient_checkpointing_enable(self, options: Mapping[str, Any]) -> None:
        """In the backbone, where the activations are."""
        # Renamed within transformers 5; the old name warns.
        name = "activation_checkpointing_enable"
        getattr(self.backbone, name, self.backbone.gradient_checkpointing_enable)(dict(options))

    def save_pretrained(self, folder: str, *, state_dict: Mapping[str, torch.Tensor]) -> None:
        """The backbone as itself, the head beside it.

        Args:
            state_dict: whole, by the names in this module.
        """
        body = {name.removeprefix("backbone."): v for name, v in state_dict.items() if name.startswith("backbone.")}
        top = {name.removeprefix("head."): v.clone() for name, v in state_dict.items() if name.startswith("head.")}
        self.backbone.save_pretrained(folder, state_dict=body)
        save_file(top, Path(folder) / FILE)


class LinearHead(nn.Module):
    """[dropout, linear, tanh,] dropout, linear."""

    def __init__(self, width: int, outputs: int, settings: schema.NewHead) -> None:
        super().__init__()
        self.dropout = nn.Dropout(settings.dropout)
        self.dense = nn.Linear(width, settings.hidden) if settings.hidden is not None else None
        self.out = nn.Linear(settings.hidden or width, outputs)
        for layer in (self.dense, self.out):
            if layer is not None:  # as transformers begins its heads
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., width) to (..., outputs)."""
        hidden = self.dropout(hidden)
        if self.dense is not None:
            hidden = self.dropout(torch.tanh(self.dense(hidden)))
        logits: torch.Tensor = self.out(hidden)
        return logits


def settings_of(model: schema.Model, config: PretrainedConfig) -> schema.NewHead | None:
    """The head to put on, or to load: `model.head`, or what a folder says was trained there; None where there is none.

    Raises:
        ConfigError: the folder has another head than the one asked for.
    """
    saved = _saved(config)
    if saved is None or (model.from_scratch and model.head is not None):
        return model.head
    kept = schema.NewHead.model_validate({key: saved[key] for key in schema.NewHead.model_fields if key in saved})
    asked = model.head
    if asked is None:
        return kept
    if asked.model_copy(update={"dropout": kept.dropout}) != kept:
        raise ConfigError(
            f"model.name_or_path={model.name_or_path} was trained with model.head={kept.model_dump()}, not with "
            f"{asked.model_dump()}. Leave model.head out to use it. {_take_off(str(model.name_or_path))}"
        )
    return asked


def add_head(
    backbone: PreTrainedModel,
    settings: schema.NewHead,
    model: schema.Model,
    *,
    task_head: Head,
    pads_left: bool,
    local_only: bool,
    is_stored: bool,
) -> HeadedModel:
    """The backbone with its head: the saved one, or a new one, drawn from torch's random state.

    Args:
        is_stored: whether model.name_or_path has the head's weights.

    Raises:
        ConfigError: a task or backbone that this head does not fit, or a head saved for another one.
        CheckpointError: the saved head is missing or damaged.
    """
    config = backbone.config
    if task_head.logits is None or config.is_encoder_decoder:
        what = f"a {config.model_type} model" if config.is_encoder_decoder else f"{task_head.name.replace('_', ' ')}"
        raise ConfigError(
            f"model.head puts logits on the states of one encoder or decoder, which does not serve {what}. Leave "
            "model.head out: transformers has a head for it."
        )
    saved = None if model.from_scratch else _saved(config)
    outputs = config.vocab_size if task_head.is_over_vocabulary else int(config.num_labels)
    if task_head.logits == "choice":
        outputs = 1
    if saved is not None and (saved["task"], saved["outputs"]) != (task_head.name, outputs):
        raise ConfigError(
            f"model.name_or_path={model.name_or_path} has a head for {saved['task']} with {saved['outputs']} outputs; "
            f"this task wants {task_head.name} with {outputs}. {_take_off(str(model.name_or_path))}"
        )
    width = _check(backbone, settings, task_head)
    headed = HeadedModel(
        backbone, settings, task_head=task_head, outputs=outputs, width=width, pads_left=pads_left
    ).train(backbone.training)
    if is_stored:
        _load(headed.head, str(model.name_or_path), local_only=local_only)
    return headed


def _saved(config: PretrainedConfig) -> dict[str, Any] | None:
    saved: dict[str, Any] | None = getattr(config, KEY, None)
    return saved


def _take_off(name: str) -> str:
    return (
        'To put a new head on its backbone: python -c "from transformers import AutoModel; m = '
        f"AutoModel.from_pretrained('{name}'); del m.config.{KEY}; m.save_pretrained('FOLDER')\", then "
        f"model.name_or_path=FOLDER model.tokenizer={name}"
    )


def _load(head: LinearHead, name: str, *, local_only: bool) -> None:
    try:
        file = cached_file(name, FILE, local_files_only=local_only)
        head.load_state_dict(load_file(str(file)))
    except (OSError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"model.name_or_path={name}: its config.json says that {FILE} holds a head, which cannot be loaded: {why}. "
            "Copy the whole folder again."
        ) from error


@torch.no_grad()
def _check(backbone: PreTrainedModel, settings: schema.NewHead, task_head: Head) -> int:
    """The width of the last hidden state, found by asking the backbone: it is called by many names in configs.

    Raises:
        ConfigError: pooling that means nothing here, or a next token that the backbone can see.
    """
    was_training, kind = backbone.training, backbone.config.model_type
    backbone.eval()
    states = backbone(**_two_inputs(backbone)).last_hidden_state
    backbone.train(was_training)
    if states.dim() == 4:
        if settings.pooling != "mean":
            raise ConfigError(
                f"model.head.pooling={settings.pooling}: a {kind} model has a map of states, no first or last one. "
                "Set model.head.pooling=mean."
            )
        return int(states.shape[1])
    if backbone.main_input_name == "input_ids":
        looks_ahead = not torch.allclose(states[0, 0], states[1, 0], rtol=1e-4, atol=1e-6)
        if task_head.is_causal and looks_ahead:
            raise ConfigError(
                f"The task predicts the next token: this {kind} model sees the tokens that it would have to predict. Set "
                "model.config={is_decoder: true} where it has that, or use a decoder such as gpt2."
            )
        if task_head.logits != "token" and settings.pooling == "cls" and not looks_ahead:
            raise ConfigError(
                f"model.head.pooling=cls: the first token of a {kind} model sees nothing but itself. Set "
                "model.head.pooling=last (or mean)."
            )
    return int(states.shape[-1])


def _two_inputs(backbone: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A batch of two: texts of two tokens that differ in the second, or two blank images."""
    config = backbone.config
    if backbone.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.zeros(2, getattr(config, "num_channels", 3), height, width)}
    pad = getattr(config, "pad_token_id", None)
    first, second, third = [token for token in range(5) if token != pad][:3]
    ids = torch.tensor([[first, second], [first, third]]).clamp(max=config.get_text_config().vocab_size - 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

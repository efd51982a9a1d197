"""A new head on any backbone, as `model.head` describes it, trained and saved as one model.

The saved folder is that of the backbone, including config.json (`AutoModel.from_pretrained` loads it), plus the head in
head.safetensors. `dtrain_head` in config.json describes the head. dtrain loads both from model.name_or_path=<folder>,
whether or not model.head is set.
"""

from __future__ import annotations

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
from dtrain.models.first_forward import FORWARD_ERRORS, explain_forward
from dtrain.models.heads import Head
from dtrain.models.placement import compute_device
from dtrain.models.pooling import pool

CONFIG_KEY = "dtrain_head"
"""Entry of the backbone's config.json with the head's settings, the task that it was made for, and its outputs."""

WEIGHTS_FILE = "head.safetensors"

MAX_SIZE = 1_000_000
"""Outputs and hidden width that a saved head may have."""

ADAPTER_CONFIG = "adapter_config.json"
"""File of a folder of adapters, which holds no backbone that AutoModel loads without peft."""


class HeadedModel(nn.Module):
    """A `backbone` and a `head`. Paths such as `embeddings` or `base_model` also resolve inside the backbone."""

    base_model_prefix = "backbone"

    def __init__(
        self,
        backbone: PreTrainedModel,
        settings: schema.NewHead,
        *,
        task_head: Head,
        outputs: int,
        width: int,
    ) -> None:
        """
        Args:
            task_head: the task's kind of head: logits per example or per token.
            outputs: number of logits.
            width: width of the backbone's last hidden state.
        """
        super().__init__()
        self.backbone = backbone
        self.head = LinearHead(width, outputs, settings)
        self.config: PretrainedConfig = backbone.config
        self.pooling, self._task_head = settings.pooling, task_head
        setattr(
            backbone.config,
            CONFIG_KEY,
            {**settings.model_dump(mode="json"), "task": task_head.name, "outputs": outputs},
        )

    def forward(self, **inputs: Any) -> SequenceClassifierOutput:
        """Takes the inputs of the backbone.

        Returns:
            logits: (batch, outputs); (batch, length, outputs) for tasks per token; (batch, choices) for choices.
        """
        choices = None
        if self._task_head.logits == "choice":
            choices = next(iter(inputs.values())).shape[1]
            inputs = {name: value.flatten(0, 1) for name, value in inputs.items()}
        logits = self.head(self.features(**inputs))
        return SequenceClassifierOutput(logits=logits if choices is None else logits.view(-1, choices))

    def features(self, **inputs: Any) -> torch.Tensor:
        """Returns what the head reads: the pooled states (batch, width), or (batch, length, width) for tasks per token."""
        hidden: torch.Tensor = self.backbone(**inputs).last_hidden_state
        return hidden if self.is_per_token else pool(hidden, inputs.get("attention_mask"), self.pooling)

    @property
    def is_per_token(self) -> bool:
        """Whether the head computes logits for each token, without pooling."""
        return self._task_head.logits == "token"

    def get_input_embeddings(self) -> nn.Module:
        """Returns the backbone's input embeddings."""
        embeddings: nn.Module = self.backbone.get_input_embeddings()
        return embeddings

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return compute_device(self)

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """Whether the backbone supports it."""
        return bool(self.backbone.supports_gradient_checkpointing)

    def gradient_checkpointing_enable(self, options: Mapping[str, Any]) -> None:
        """Enables it in the backbone, which holds the activations."""
        # transformers 5 renamed the method; the old name warns.
        name = "activation_checkpointing_enable"
        getattr(self.backbone, name, self.backbone.gradient_checkpointing_enable)(dict(options))

    def save_pretrained(self, folder: str, *, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Writes the backbone in its own format, and the head next to it.

        Args:
            state_dict: full (unsharded) weights by their names in this module.
        """
        body = {name.removeprefix("backbone."): v for name, v in state_dict.items() if name.startswith("backbone.")}
        top = {name.removeprefix("head."): v.clone() for name, v in state_dict.items() if name.startswith("head.")}
        self.backbone.save_pretrained(folder, state_dict=body)
        save_file(top, Path(folder) / WEIGHTS_FILE)


class LinearHead(nn.Module):
    """[dropout, linear, tanh,] dropout, linear."""

    def __init__(self, width: int, outputs: int, settings: schema.NewHead) -> None:
        super().__init__()
        self.dropout = nn.Dropout(settings.dropout)
        self.dense = nn.Linear(width, settings.hidden) if settings.hidden is not None else None
        self.out = nn.Linear(settings.hidden or width, outputs)
        for layer in (self.dense, self.out):
            if layer is not None:  # the initialization that transformers uses for its heads
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps (..., width) to (..., outputs)."""
        hidden = self.dropout(hidden)
        if self.dense is not None:
            hidden = self.dropout(torch.tanh(self.dense(hidden)))
        logits: torch.Tensor = self.out(hidden)
        return logits


def head_settings(model: schema.Model, config: PretrainedConfig) -> schema.NewHead | None:
    """Returns the settings of the head: `model.head`, or those of the saved head; None if there is neither.

    Raises:
        ConfigError: the folder has another head than model.head.
    """
    saved = saved_head(config, str(model.name_or_path))
    if saved is None or (model.from_scratch and model.head is not None):
        return model.head
    stored = saved[0]
    if model.head is None:
        return stored
    if model.head.model_copy(update={"dropout": stored.dropout}) != stored:
        raise ConfigError(
            f"model.name_or_path={model.name_or_path} was trained with model.head={stored.model_dump()}, not with "
            f"{model.head.model_dump()}. Leave model.head out to use it. {_how_to_replace(str(model.name_or_path))}"
        )
    return model.head


def add_head(
    backbone: PreTrainedModel,
    settings: schema.NewHead,
    model: schema.Model,
    *,
    task_head: Head,
    local_only: bool,
    is_stored: bool,
    shown_name: str | None = None,
) -> HeadedModel:
    """Returns the backbone with its head: the saved head, or a new one drawn from torch's random state.

    Args:
        is_stored: whether model.name_or_path has the head's weights.
        shown_name: the user's model.name_or_path, if `model` names the base model of its adapters.

    Raises:
        ConfigError: the head does not fit the task or the backbone, or the saved head belongs to another task.
        CheckpointError: the saved head is missing or damaged.
    """
    config = backbone.config
    if task_head.logits is None or config.is_encoder_decoder:
        reason = f"a {config.model_type} model" if config.is_encoder_decoder else f"{task_head.name.replace('_', ' ')}"
        raise ConfigError(
            f"model.head computes logits from the states of one encoder or decoder, which does not work for {reason}. "
            "Leave model.head out: transformers has a head for it."
        )
    name = shown_name or str(model.name_or_path)
    saved = None if model.from_scratch else saved_head(config, name)
    outputs = config.vocab_size if task_head.is_over_vocabulary else int(config.num_labels)
    if task_head.logits == "choice":
        outputs = 1
    if saved is not None and saved[1:] != (task_head.name, outputs):
        raise ConfigError(
            f"model.name_or_path={name} has a head for {saved[1]} with {saved[2]} outputs; "
            f"this task needs {task_head.name} with {outputs}. {_how_to_replace(name)}"
        )
    width = hidden_width(backbone, settings, task_head)
    headed = HeadedModel(backbone, settings, task_head=task_head, outputs=outputs, width=width).train(backbone.training)
    if is_stored:
        _load(headed.head, str(model.name_or_path), local_only=local_only)
    return headed


def saved_head(config: PretrainedConfig, name: str) -> tuple[schema.NewHead, str, int] | None:
    """Returns settings, task and outputs of the head in a model's config; None if it has none.

    Args:
        name: the model's name or folder, for messages.

    Raises:
        CheckpointError: the entry is damaged, or its sizes are those of no head.
    """
    saved = getattr(config, CONFIG_KEY, None)
    if saved is None:
        return None
    try:
        settings = schema.NewHead.model_validate(
            {key: saved[key] for key in schema.NewHead.model_fields if key in saved}
        )
        task, outputs = saved["task"], saved["outputs"]
    except (ValueError, TypeError, KeyError, AttributeError):
        task, outputs = None, 0
    if (
        not isinstance(task, str)
        or type(outputs) is not int
        or not 1 <= outputs <= MAX_SIZE
        or (settings.hidden or 1) > MAX_SIZE
    ):
        raise CheckpointError(
            f"model.name_or_path={name}: config.json has {CONFIG_KEY}={saved!r:.200}, which describes no head. Copy the "
            "folder again from a source that you trust."
        )
    return settings, task, outputs


def _how_to_replace(name: str) -> str:
    merge, folder = "", name
    if (Path(name) / ADAPTER_CONFIG).is_file():
        merge, folder = f"dtrain export model.name_or_path={name} export.to=MERGED export.merge=true && ", "MERGED"
    return (
        f'To put a new head on its backbone: {merge}python -c "from transformers import AutoModel; m = '
        f"AutoModel.from_pretrained('{folder}'); del m.config.{CONFIG_KEY}; m.save_pretrained('FOLDER')\", then "
        f"model.name_or_path=FOLDER model.tokenizer={folder}"
    )


def _load(head: LinearHead, name: str, *, local_only: bool) -> None:
    try:
        file = cached_file(name, WEIGHTS_FILE, local_files_only=local_only)
        head.load_state_dict(load_file(str(file)))
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"model.name_or_path={name}: config.json describes a head in {WEIGHTS_FILE}, but it cannot be loaded: "
            f"{reason}. Copy the complete folder again."
        ) from error


@torch.no_grad()
def hidden_width(backbone: PreTrainedModel, settings: schema.NewHead, task_head: Head) -> int:
    """Returns the width of the last hidden state, measured by a forward pass, because configs use many names for it.

    Raises:
        ConfigError: the backbone cannot compute states, the pooling makes no sense for it, or a language model sees the
            token to predict.
    """
    was_training, kind = backbone.training, backbone.config.model_type
    backbone.eval()
    inputs = _two_inputs(backbone)
    try:
        states = backbone(**inputs).last_hidden_state
    except FORWARD_ERRORS as error:
        raise explain_forward(error, backbone, None, inputs.get("input_ids")) from error
    backbone.train(was_training)
    if states.dim() == 4:
        if settings.pooling != "mean":
            raise ConfigError(
                f"model.head.pooling={settings.pooling}: a {kind} model has a map of states, without a first or last one. "
                "Set model.head.pooling=mean."
            )
        return int(states.shape[1])
    if backbone.main_input_name == "input_ids":
        looks_ahead = not torch.allclose(states[0, 0], states[1, 0], rtol=1e-4, atol=1e-6)
        if task_head.is_causal and looks_ahead:
            raise ConfigError(
                f"The task predicts the next token: this {kind} model sees the tokens that it has to predict. Set "
                "model.config.is_decoder=true if the model supports it, or use a decoder such as gpt2."
            )
        if task_head.logits != "token" and settings.pooling == "cls" and not looks_ahead:
            raise ConfigError(
                f"model.head.pooling=cls: the first token of a {kind} model sees only itself. Set "
                "model.head.pooling=last (or mean)."
            )
    return int(states.shape[-1])


def _two_inputs(backbone: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns a batch of two: texts of eight tokens that differ in the last one, or two blank images."""
    config = backbone.config
    if backbone.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.zeros(2, getattr(config, "num_channels", 3), height, width)}
    pad = getattr(config, "pad_token_id", None)
    first, second, third = [token for token in range(5) if token != pad][:3]
    ids = torch.tensor([[first] * 7 + [last] for last in (second, third)]).clamp(
        max=config.get_text_config().vocab_size - 1
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

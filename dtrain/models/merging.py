"""Merges LoRA adapters into their base model, and checks that the result gives the same outputs.

A layer that shares its weight with another, such as an output layer tied to the embedding, gets a weight of its own first:
merged in place, the change would reach the other layer as well.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from dtrain.config import schema
from dtrain.console import log
from dtrain.errors import ConfigError
from dtrain.models import adapters
from dtrain.models.architecture import read_config
from dtrain.models.custom_head import CONFIG_KEY, WEIGHTS_FILE, HeadedModel, hidden_width, saved_head
from dtrain.models.foreign_files import check_sizes
from dtrain.models.heads import Head
from dtrain.models.hub_errors import LOADING_ERRORS, check_reachable, explain, quiet

TOLERANCE = 1e-4
"""Allowed difference between outputs, relative to the largest one. Rounding gives about 1e-6."""

PROBE_LENGTH = 8
"""Tokens of the text on which outputs are compared."""


def merge_folder(source: Path, target: Path, *, base: str | None = None) -> None:
    """Writes the base model of a folder of adapters, with the adapters merged in, as a plain model.

    Args:
        target: a new or empty folder.
        base: the base model, if it is not the one that the folder names.

    Raises:
        ConfigError: the folder holds no adapters or names no model class, the base model is missing, or transformers
            cannot load a model with these outputs.
        CheckpointError: files are damaged.
    """
    difference = 0.0
    for unties in (True, False):  # A T5 model scales its outputs if its config says that weights are tied.
        module = load_with_adapters(source, base=base)
        inputs = _probe(module)
        expected = _outputs(module, inputs)
        separated = merge(module)
        if separated and unties:
            for config in (module.config, module.config.get_text_config()):
                config.tie_word_embeddings = False
        with quiet():
            module.save_pretrained(str(target), state_dict=module.state_dict())
        model_class, kind = (AutoModel if isinstance(module, HeadedModel) else type(module)), module.config.model_type
        del module  # A large model should not be in memory twice.
        reloaded = _build(model_class, str(target), None)
        if isinstance(reloaded, HeadedModel):
            reloaded.head.load_state_dict(load_file(target / WEIGHTS_FILE))
        if expected is None:
            log.warning("%s: the merged model was not compared with the unmerged one, whose inputs are unknown", source)
            return
        found = _outputs(reloaded, inputs)
        difference = _difference(expected, found)
        if difference <= TOLERANCE:
            return
    raise ConfigError(
        f"{source}: its adapters cannot be merged, because transformers would load a {kind} model with "
        f"other outputs (they differ by {difference:.1g} of the largest one). "
        + (f"The weights of {', '.join(separated)} are tied to another layer. " if separated else "")
        + "Use the folder as it is, with its adapters (evaluate, predict and peft load it), or train again with "
        "model.lora.targets that leave out tied layers."
    )


def load_with_adapters(folder: Path, *, base: str | None = None) -> Any:
    """Returns the base model of a folder of adapters, with the adapters as separate matrices, in eval mode.

    Raises:
        ConfigError: the folder holds no adapters or does not name the model class, or the base model is missing.
        CheckpointError: files are damaged.
    """
    saved = adapters.find_saved_adapters(schema.Model(name_or_path=str(folder), lora_base=base))
    if saved is None:
        raise ConfigError(
            f"model.name_or_path={folder} holds no adapters ({adapters.CONFIG_FILE}): there is nothing to merge."
        )
    config = read_config(schema.Model(name_or_path=str(folder)), local_only=True)
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    if hasattr(config, CONFIG_KEY):
        model_class = AutoModel
    elif not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ConfigError(f"{folder}/config.json does not name the model class of the adapters in `architectures`.")
    with adapters.naming_the_base(saved):
        module = adapters.load_base(saved, config, lambda: _build(model_class, saved.base, config))
    if isinstance(module, HeadedModel) and not any(name.startswith("head.") for name in saved.heads):
        module.head.load_state_dict(load_file(Path(saved.base) / WEIGHTS_FILE))
    adapters.load(module, saved)
    return module.eval()


def merge(module: nn.Module) -> list[str]:
    """Merges the adapters into their base layers, in place, so that the model is a plain one.

    Returns:
        Names of the layers whose weights were tied to another layer's and are now separate.
    """
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    separated = []
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, adapters.peft_layer())]
    for name, layer in layers:
        original = layer.get_base_layer()
        for key, parameter in list(original.named_parameters(recurse=False)):
            if uses[id(parameter)] > 1:
                own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                original.register_parameter(key, own)
                separated.append(name)
        layer.merge(safe_merge=True)
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, original)
    if hasattr(module, adapters.CONFIG_ATTRIBUTE):
        delattr(module, adapters.CONFIG_ATTRIBUTE)
    return sorted(set(separated))


def _build(model_class: Any, name: str, config: PretrainedConfig | None) -> Any:
    """Returns a model in eval mode. One with a head of `model.head` gets it, with new weights."""
    local_only = check_reachable(name, file="config.json", setting="the adapters' base model")
    if config is not None:
        check_sizes(model_class, name, config, setting="the adapters' base model")
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            module = model_class.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                trust_remote_code=False,  # the default asks on the terminal whether to run code in the folder
                local_files_only=local_only,
                ignore_mismatched_sizes=True,
            )
    except LOADING_ERRORS as error:
        raise explain(error, name=name, setting="the adapters' base model") from error
    head = saved_head(module.config, name) if model_class is AutoModel else None
    if head is None:
        return module.eval()
    settings, task, outputs = head
    task_head = Head(task, AutoModel)  # its weights do not depend on how the logits are arranged
    width = hidden_width(module, settings, task_head)
    return HeadedModel(module, settings, task_head=task_head, outputs=outputs, width=width).eval()


def _probe(module: Any) -> dict[str, torch.Tensor] | None:
    """Returns inputs for a forward pass; None for a model with other inputs than text or images."""
    config, generator = module.config, torch.Generator().manual_seed(0)
    backbone = module.backbone if isinstance(module, HeadedModel) else module
    if backbone.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.rand(1, getattr(config, "num_channels", 3), height, width, generator=generator)}
    if backbone.main_input_name != "input_ids":
        return None
    ids = torch.randint(config.get_text_config().vocab_size, (1, PROBE_LENGTH), generator=generator)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int):  # BART's classifier reads the state of the one end token
        ids[ids == end] = (end + 1) % 2
        ids[0, -1] = end
    if type(module).__name__.endswith("ForMultipleChoice"):
        ids = ids[:, None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return (
        {**inputs, "decoder_input_ids": ids} if config.is_encoder_decoder and "For" in type(module).__name__ else inputs
    )


@torch.no_grad()
def _outputs(module: Any, inputs: dict[str, torch.Tensor] | None) -> list[torch.Tensor] | None:
    """Returns the floating-point outputs; None if the model does not accept the inputs."""
    if inputs is None:
        return None
    if "ForSequenceClassification" in type(module).__name__ or "ForQuestionAnswering" in type(module).__name__:
        inputs = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    try:
        found = module(**inputs)
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError):
        return None
    return [value for value in found.to_tuple() if isinstance(value, torch.Tensor) and value.is_floating_point()]


def _difference(expected: list[torch.Tensor], found: list[torch.Tensor] | None) -> float:
    if found is None or [value.shape for value in expected] != [value.shape for value in found]:
        return float("inf")
    return max(
        float((one - other).abs().max() / one.abs().max().clamp(min=1e-12))
        for one, other in zip(expected, found, strict=True)
    )

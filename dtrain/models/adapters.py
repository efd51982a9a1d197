"""LoRA adapters: small trainable matrices beside the frozen layers of a loaded model, by peft (imported when used).

Adapters are added in place, so the model keeps its class, its parameter paths and its forward. Only the adapters train,
and the parameters without pretrained weights, such as a new head. The saved folder has peft's format
(adapter_config.json, adapter_model.safetensors) plus the model's config.json. `PeftModel.from_pretrained` puts it on the
base model, and so does dtrain for model.name_or_path=<folder>.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dtrain.config import schema
from dtrain.errors import CheckpointError, ConfigError
from dtrain.models.hub_errors import LOADING_ERRORS, check_reachable, explain, quiet

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

CONFIG_ATTRIBUTE = "_dtrain_adapters"
"""Attribute of a module under which `add` stores its LoraConfig."""

PEFT_PREFIX = "base_model.model."
"""Prefix of each name in peft's weights file, because peft wraps the model twice."""

ADAPTER_NAME = "default"


@dataclass(frozen=True)
class SavedAdapters:
    """A folder of adapters.

    Attributes:
        folder: the folder.
        base: name or folder of the base model.
        config: the content of adapter_config.json.
    """

    folder: Path
    base: str
    config: LoraConfig

    @property
    def heads(self) -> tuple[str, ...]:
        """Modules that the folder stores in full."""
        return tuple(self.config.modules_to_save or ())


def find_saved_adapters(model: schema.Model) -> SavedAdapters | None:
    """Returns the adapters in model.name_or_path, or None if it is not a folder of adapters.

    Raises:
        ConfigError: peft is missing, or the adapters have another type or size than model.lora.
        CheckpointError: a file is damaged.
    """
    if model.name_or_path is None or not (folder := Path(model.name_or_path)).joinpath(CONFIG_FILE).is_file():
        return None
    config_class = _peft().LoraConfig
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if content["peft_type"] != "LORA":
            raise ConfigError(f"model.name_or_path={folder} holds adapters of type {content['peft_type']}, not LoRA.")
        config, base = config_class.from_pretrained(str(folder)), str(content["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged ({error}). Copy it again.") from None
    lora = model.lora
    if lora is not None and (lora.r, lora.alpha) != (config.r, config.lora_alpha):
        raise ConfigError(
            f"model.name_or_path={folder} holds adapters with r={config.r} and alpha={config.lora_alpha}, but model.lora "
            f"has r={lora.r} and alpha={lora.alpha}. Leave model.lora out to use them, or name the base model {base}."
        )
    return SavedAdapters(folder, base, config)


def add(module: nn.Module, lora: schema.Lora, *, base: str, new: Sequence[str]) -> None:
    """Adds new adapters to the module and freezes all other parameters except `new`.

    The initial values are drawn from torch's random state.

    Args:
        base: name or folder of the loaded model.
        new: names of parameters without pretrained weights, which train as well.

    Raises:
        ConfigError: model.lora.targets matches no layer, or is not set and peft has no default for this model type.
    """
    base_folder = Path(base)
    heads = sorted({name.rpartition(".")[0] for name in new} - {""})
    config = _peft().LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) if lora.targets is not None else None,
        modules_to_save=heads or None,
        base_model_name_or_path=str(base_folder.resolve()) if base_folder.is_dir() else base,
    )
    _inject(module, config)


def load(module: nn.Module, saved: SavedAdapters) -> None:
    """Adds the adapters and heads of a saved folder to the base model.

    Raises:
        CheckpointError: the files are damaged or do not belong to this model.
    """
    _inject(module, saved.config)
    try:
        weights = load_file(saved.folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{saved.folder / WEIGHTS_FILE} is missing or damaged ({error}). Copy it again."
        ) from None
    trained = {_peft_name(name): value for name, value in module.named_parameters() if value.requires_grad}
    wrong = sorted(trained.keys() ^ weights.keys()) or [n for n, v in trained.items() if v.shape != weights[n].shape]
    if wrong:
        raise CheckpointError(
            f"{saved.folder / WEIGHTS_FILE} does not fit {saved.base}: {', '.join(wrong[:4])}. Is this still the model "
            "that the adapters were trained on?"
        )
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(weights[name])


def save(module: nn.Module, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes the adapters and heads in peft's format, and the model's config.json.

    Args:
        state: full (unsharded) weights by their names in this module.
    """
    config = getattr(module, CONFIG_ATTRIBUTE)
    folder.mkdir(parents=True)
    trained = {name for name, _ in module.named_parameters() if _is_trained(name, tuple(config.modules_to_save or ()))}
    save_file({_peft_name(name): state[name].clone() for name in state if name in trained}, folder / WEIGHTS_FILE)
    config.save_pretrained(str(folder))
    model_config: Any = module.config
    model_config.architectures = [type(module).__name__]  # as save_pretrained does; `load_merged` reads it
    model_config.save_pretrained(str(folder))
    if getattr(module, "generation_config", None) is not None:  # it may name the end of a turn, unlike the base model's
        generation_config: Any = module.generation_config
        generation_config.save_pretrained(str(folder))


def load_merged(folder: Path) -> Any:
    """Returns the base model of a folder of adapters, as a plain transformers model with the adapters merged in.

    Raises:
        ConfigError: the folder holds no adapters or does not name the model class, or the base model is missing.
        CheckpointError: files are damaged.
    """
    saved = find_saved_adapters(schema.Model(name_or_path=str(folder)))
    if saved is None:
        raise ConfigError(f"model.name_or_path={folder} holds no adapters ({CONFIG_FILE}): there is nothing to merge.")
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    if model_class is None:
        raise ConfigError(f"{folder}/config.json does not name the model class of the adapters in `architectures`.")
    local_only = check_reachable(saved.base, file="config.json", setting="base_model_name_or_path")
    try:
        with quiet():
            module = model_class.from_pretrained(
                saved.base,
                config=config,
                dtype=torch.float32,
                local_files_only=local_only,
                ignore_mismatched_sizes=True,
            )
    except LOADING_ERRORS as error:
        raise explain(error, name=saved.base, setting="base_model_name_or_path") from error
    load(module, saved)
    if (folder / transformers.utils.GENERATION_CONFIG_NAME).is_file():
        module.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return merge(module)


def merge(module: nn.Module) -> nn.Module:
    """Merges the adapters into their base layers, in place, and returns the plain model."""
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, _peft_layer())]
    for name, layer in layers:
        layer.merge(safe_merge=True)
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, layer.get_base_layer())
    if hasattr(module, CONFIG_ATTRIBUTE):
        delattr(module, CONFIG_ATTRIBUTE)
    return module


def _inject(module: nn.Module, config: LoraConfig) -> None:
    heads = tuple(config.modules_to_save or ())
    # peft copies and wraps heads so that one model can hold several adapters. Here there is only one set.
    config.modules_to_save = None
    try:
        _peft().inject_adapter_in_model(config, module, adapter_name=ADAPTER_NAME)
    except (ValueError, TypeError, RuntimeError) as error:
        layers = sorted(
            {name.rpartition(".")[2] for name, part in module.named_modules() if isinstance(part, nn.Linear)}
        )
        raise ConfigError(
            f"model.lora.targets: {' '.join(str(error).split())[:200]}. The linear layers of this model are named "
            f"{', '.join(layers)}."
        ) from error
    finally:
        config.modules_to_save = list(heads) or None
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(_is_trained(name, heads))
    setattr(module, CONFIG_ATTRIBUTE, config)


def _is_trained(name: str, heads: tuple[str, ...]) -> bool:
    """Returns whether a parameter belongs to an adapter or to a new head."""
    return ".lora_" in name or any(name.startswith(f"{head}.") for head in heads)


def _peft_name(name: str) -> str:
    return PEFT_PREFIX + name.replace(f".{ADAPTER_NAME}.", ".") if ".lora_" in name else PEFT_PREFIX + name


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("LoRA adapters need peft, which is not installed: pip install peft") from None
    return peft


def _peft_layer() -> Any:
    _peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    return BaseTunerLayer

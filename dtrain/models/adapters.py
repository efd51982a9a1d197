"""LoRA: small matrices beside the frozen layers of a loaded model, by peft (imported when used).

Adapters go into the model in place, so that its class, its paths and its forward stay what they are. Only they learn,
and what was new in the model: a head without pretrained weights. The saved folder is peft's (adapter_config.json,
adapter_model.safetensors) with the model's config.json beside it; `PeftModel.from_pretrained` puts it on the base model,
and so does dtrain for model.name_or_path=<folder>.
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
from dtrain.models.hub_errors import LOADING_ERRORS, explain, quiet, reach

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

RECORD = "_dtrain_adapters"
"""The attribute of a module under which `add` keeps its LoraConfig."""

PREFIX = "base_model.model."
"""Before each name in a file of peft's, which wraps the model twice."""

ADAPTER = "default"


@dataclass(frozen=True)
class Saved:
    """A folder of adapters, and the base model that they belong on."""

    folder: Path
    base: str
    config: LoraConfig

    @property
    def heads(self) -> tuple[str, ...]:
        """Modules that the folder has whole."""
        return tuple(self.config.modules_to_save or ())


def saved_adapters(model: schema.Model) -> Saved | None:
    """What model.name_or_path holds, if it is a folder of adapters.

    Raises:
        ConfigError: peft is missing, the folder's adapters are of another kind or size than model.lora.
        CheckpointError: a damaged file.
    """
    if model.name_or_path is None or not (folder := Path(model.name_or_path)).joinpath(CONFIG).is_file():
        return None
    kind = _peft().LoraConfig
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if content["peft_type"] != "LORA":
            raise ConfigError(f"model.name_or_path={folder} holds adapters of type {content['peft_type']}, not LoRA.")
        config, base = kind.from_pretrained(str(folder)), str(content["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is damaged ({error}). Copy it again.") from None
    asked = model.lora
    if asked is not None and (asked.r, asked.alpha) != (config.r, config.lora_alpha):
        raise ConfigError(
            f"model.name_or_path={folder} holds adapters with r={config.r} and alpha={config.lora_alpha}; model.lora says "
            f"r={asked.r} and alpha={asked.alpha}. Leave model.lora out to use them, or name the base model {base}."
        )
    return Saved(folder, base, config)


def add(module: nn.Module, lora: schema.Lora, *, base: str, new: Sequence[str]) -> None:
    """Puts new adapters into the module, drawn from torch's random state, and switches everything else off.

    Args:
        base: name or folder of the loaded model.
        new: names of parameters that no file gave, which learn as well.

    Raises:
        ConfigError: no layer is called as model.lora.targets says, or peft does not know which this model has.
    """
    place = Path(base)
    heads = sorted({name.rpartition(".")[0] for name in new} - {""})
    config = _peft().LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) if lora.targets is not None else None,
        modules_to_save=heads or None,
        base_model_name_or_path=str(place.resolve()) if place.is_dir() else base,
    )
    _inject(module, config)


def load(module: nn.Module, saved: Saved) -> None:
    """Puts a folder's adapters, and the heads in it, into the base model.

    Raises:
        CheckpointError: the files are damaged or not those of this model.
    """
    _inject(module, saved.config)
    try:
        weights = load_file(saved.folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{saved.folder / WEIGHTS} is missing or damaged ({error}). Copy it again.") from None
    own = {_in_file(name): value for name, value in module.named_parameters() if value.requires_grad}
    wrong = sorted(own.keys() ^ weights.keys()) or [n for n, v in own.items() if v.shape != weights[n].shape]
    if wrong:
        raise CheckpointError(
            f"{saved.folder / WEIGHTS} does not fit on {saved.base}: {', '.join(wrong[:4])}. Is that still the model that "
            "the adapters were trained on?"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(weights[name])


def save(module: nn.Module, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes the adapters and heads, as peft does, and the model's config.json.

    Args:
        state: whole weights by the names in this module.
    """
    config = getattr(module, RECORD)
    folder.mkdir(parents=True)
    kept = {name for name, _ in module.named_parameters() if _belongs(name, tuple(config.modules_to_save or ()))}
    save_file({_in_file(name): state[name].clone() for name in state if name in kept}, folder / WEIGHTS)
    config.save_pretrained(str(folder))
    own: Any = module.config
    own.architectures = [type(module).__name__]  # as save_pretrained says it; `merged` goes by it
    own.save_pretrained(str(folder))


def merged(folder: Path) -> Any:
    """The plain model of transformers that a folder of adapters and its base model make together.

    Raises:
        ConfigError: the folder holds no adapters, or does not say for which class; or the base model is not there.
        CheckpointError: damaged files.
    """
    saved = saved_adapters(schema.Model(name_or_path=str(folder)))
    if saved is None:
        raise ConfigError(
            f"model.name_or_path={folder} holds no adapters ({CONFIG}), so that there is nothing to merge."
        )
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        raise ConfigError(f"{folder}/config.json does not say in `architectures` which class the adapters belong in.")
    local_only = reach(saved.base, file="config.json", setting="base_model_name_or_path")
    try:
        with quiet():
            module = kind.from_pretrained(
                saved.base,
                config=config,
                dtype=torch.float32,
                local_files_only=local_only,
                ignore_mismatched_sizes=True,
            )
    except LOADING_ERRORS as error:
        raise explain(error, name=saved.base, setting="base_model_name_or_path") from error
    load(module, saved)
    return merge(module)


def merge(module: nn.Module) -> nn.Module:
    """The module with its adapters added into the layers that they stand beside; a plain model again. In place."""
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, _peft_layer())]
    for name, layer in layers:
        layer.merge(safe_merge=True)
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, layer.get_base_layer())
    if hasattr(module, RECORD):
        delattr(module, RECORD)
    return module


def _inject(module: nn.Module, config: LoraConfig) -> None:
    heads = tuple(config.modules_to_save or ())
    # Heads are not copied and wrapped, as peft does to keep several: there is one set of adapters here.
    config.modules_to_save = None
    try:
        _peft().inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    except (ValueError, TypeError, RuntimeError) as error:
        layers = sorted(
            {name.rpartition(".")[2] for name, part in module.named_modules() if isinstance(part, nn.Linear)}
        )
        raise ConfigError(
            f"model.lora.targets: {' '.join(str(error).split())[:200]}. The linear layers of this model are called "
            f"{', '.join(layers)}."
        ) from error
    finally:
        config.modules_to_save = list(heads) or None
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(_belongs(name, heads))
    setattr(module, RECORD, config)


def _belongs(name: str, heads: tuple[str, ...]) -> bool:
    """Whether a parameter is an adapter's or a new head's."""
    return ".lora_" in name or any(name.startswith(f"{head}.") for head in heads)


def _in_file(name: str) -> str:
    return PREFIX + name.replace(f".{ADAPTER}.", ".") if ".lora_" in name else PREFIX + name


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

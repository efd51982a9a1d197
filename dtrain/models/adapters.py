"""LoRA adapters: small trainable matrices beside the frozen layers of a loaded model, by peft (imported when used).

Adapters are added in place, so the model keeps its class, its parameter paths and its forward. Only the adapters train,
and the parameters without pretrained weights, such as a new head. The saved folder has peft's format
(adapter_config.json, adapter_model.safetensors) plus the model's config.json. `PeftModel.from_pretrained` puts it on the
base model, and so does dtrain for model.name_or_path=<folder>.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig

from dtrain.config import bounded_json, schema
from dtrain.errors import CheckpointError, ConfigError, DataError
from dtrain.models.added_tokens import resize, set_pad_token
from dtrain.models.hub_errors import LOADING_ERRORS

if TYPE_CHECKING:
    from peft import LoraConfig

T = TypeVar("T")

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

CONFIG_ATTRIBUTE = "_dtrain_adapters"
"""Attribute of a module under which `add` stores its LoraConfig."""

MAX_NEW_TOKENS = 100_000
"""Tokens that adapters may add to the vocabulary of their base model."""

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
        if model.lora_base is not None:
            raise ConfigError(
                f"model.lora_base={model.lora_base} is the base model of adapters, but model.name_or_path={model.name_or_path} "
                f"has no {CONFIG_FILE}: leave model.lora_base out."
            )
        return None
    config_class = _peft().LoraConfig
    try:
        content = bounded_json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if content["peft_type"] != "LORA":
            raise ConfigError(f"model.name_or_path={folder} holds adapters of type {content['peft_type']}, not LoRA.")
        config, base = config_class.from_pretrained(str(folder)), str(content["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged ({error}). Copy it again.") from None
    if config.megatron_config is not None:  # peft would import the module that megatron_core names
        raise ConfigError(
            f"{folder / CONFIG_FILE} has megatron_config, which makes peft import {config.megatron_core}. dtrain supports "
            "no Megatron layers: remove the entry."
        )
    _bound(folder, config)
    if model.lora_base is not None:
        base = config.base_model_name_or_path = _whole_path(model.lora_base)
    lora = model.lora
    if lora is not None and (lora.r, lora.alpha) != (config.r, config.lora_alpha):
        raise ConfigError(
            f"model.name_or_path={folder} holds adapters with r={config.r} and alpha={config.lora_alpha}, but model.lora "
            f"has r={lora.r} and alpha={lora.alpha}. Leave model.lora out to use them, or name the base model {base}."
        )
    return SavedAdapters(folder, base, config)


def _bound(folder: Path, config: LoraConfig) -> None:
    """Replaces or refuses settings with which peft would fill the memory or never end.

    Raises:
        ConfigError: a rank is larger than any matrix in the folder, layers are copied, initial values take many passes, or
            a pattern repeats several parts.
    """
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - it is not a mapping
    except (OSError, SafetensorError):
        return  # `load` says what is wrong
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    if isinstance(config.target_modules, str) or config.exclude_modules or config.layers_pattern:
        # A regular expression can take forever. The weights say which layers have adapters.
        layers = {key.removeprefix(PEFT_PREFIX).partition(".lora_")[0] for key in shapes if ".lora_" in key}
        config.target_modules, config.exclude_modules = layers, None
        config.layers_pattern = config.layers_to_transform = None
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    passes = re.fullmatch(r"pissa_niter_(\d+)", str(config.init_lora_weights))
    found = next((f"r={rank!r:.20}" for rank in ranks if not isinstance(rank, int) or not 0 < rank <= largest), None)
    if config.layer_replication:
        found = f"layer_replication={config.layer_replication!r:.40}"
    if passes is not None and len(passes[1]) > 2:
        found = f"init_lora_weights={passes[0]:.30}"
    patterns = [key for pattern in (config.rank_pattern, config.alpha_pattern) for key in pattern or {}]
    if slow := [key for key in patterns if len(re.findall(r"[*+{]", key)) > ("|" not in key)]:
        found = f"the pattern {slow[0]!r:.60}"
    if found is not None:
        raise ConfigError(
            f"{folder / CONFIG_FILE} has {found}, which does not fit the adapters in {WEIGHTS_FILE} or could take all the memory "
            "or time. Get the adapters again from a source that you trust."
        )


@contextmanager
def naming_the_base(saved: SavedAdapters) -> Iterator[None]:
    """Says in errors about the base model which file names it, and which setting replaces it.

    Raises:
        ConfigError, DataError or CheckpointError, as inside.
    """
    try:
        yield
    except (ConfigError, DataError, CheckpointError) as error:
        raise type(error)(
            f"{saved.folder} holds adapters for the base model {saved.base}, which cannot be used. If it has moved, set "
            f"model.lora_base to its folder or name. The reason: {error}"
        ) from error


def load_base(saved: SavedAdapters, config: PretrainedConfig, load: Callable[[], T]) -> T:
    """Calls `load` for the base model and gives it the vocabulary of the adapters' config, which may have added tokens.

    Args:
        config: the config in the adapters' folder, with which `load` loads the base.
        load: returns the model, or a tuple that starts with it.
    """
    try:
        content = PretrainedConfig.get_config_dict(saved.base)[0]
    except LOADING_ERRORS:
        return load()  # which says what is wrong
    text = config.get_text_config()
    inner = content.get("text_config")
    stored = content.get("vocab_size", inner.get("vocab_size") if isinstance(inner, Mapping) else None)
    wanted = getattr(text, "vocab_size", None)
    if not isinstance(stored, int) or not isinstance(wanted, int) or wanted <= stored:
        return load()
    if wanted > stored + MAX_NEW_TOKENS:
        raise ConfigError(
            f"{saved.folder}/config.json has vocab_size={wanted!r:.20} for a base model with {stored} tokens: it is damaged or "
            "forged. Get the adapters again from a source that you trust."
        )
    text.vocab_size, pad = stored, getattr(text, "pad_token_id", None)
    if pad is not None and pad >= stored:
        set_pad_token(config, None)  # the base has no row for it yet
    loaded = load()
    module: Any = loaded[0] if isinstance(loaded, tuple) else loaded
    resize(module, wanted)
    set_pad_token(module.config, pad)
    return loaded


def add(module: nn.Module, lora: schema.Lora, *, base: str, new: Sequence[str], embeddings: Sequence[str] = ()) -> None:
    """Adds new adapters to the module and freezes all other parameters except `new`.

    The initial values are drawn from torch's random state.

    Args:
        base: name or folder of the loaded model.
        new: names of parameters without pretrained weights, which train as well.
        embeddings: names of modules that hold added tokens, which train as well.

    Raises:
        ConfigError: model.lora.targets matches no layer, or is not set and peft has no default for this model type.
    """
    heads = sorted({name.rpartition(".")[0] for name in new} - {""} | set(embeddings))
    config = _peft().LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) if lora.targets is not None else None,
        modules_to_save=heads or None,
        base_model_name_or_path=_whole_path(base),
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
    _refuse_other_labels(saved, {name: value.shape for name, value in trained.items()}, weights)
    wrong = sorted(trained.keys() ^ weights.keys()) or [n for n, v in trained.items() if v.shape != weights[n].shape]
    if wrong:
        raise CheckpointError(
            f"{saved.folder / WEIGHTS_FILE} does not fit {saved.base}: {', '.join(wrong[:4])}. Is this still the model "
            "that the adapters were trained on?"
        )
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(weights[name])


def _refuse_other_labels(
    saved: SavedAdapters, expected: Mapping[str, torch.Size], weights: Mapping[str, torch.Tensor]
) -> None:
    """Refuses a folder whose adapters fit, but whose head has another number of outputs."""
    wrong = [name for name in expected.keys() & weights.keys() if expected[name] != weights[name].shape]
    if not wrong or expected.keys() != weights.keys() or any(".lora_" in name for name in wrong):
        return
    shapes = ", ".join(
        f"{name.removeprefix(PEFT_PREFIX)} is {tuple(weights[name].shape)}, expected {tuple(expected[name])}"
        for name in sorted(wrong)[:2]
    )
    raise ConfigError(
        f"model.name_or_path={saved.folder} was trained for another number of labels ({shapes}). To train its adapters on "
        f"for other labels, merge them and leave out the head: dtrain export model.name_or_path={saved.folder} "
        'export.to=MERGED export.merge=true && python -c "from transformers import AutoModel; '
        "AutoModel.from_pretrained('MERGED').save_pretrained('BASE')\", then model.name_or_path=BASE model.tokenizer=MERGED "
        "and model.lora as before."
    )


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
    model_config.architectures = [type(module).__name__]  # as save_pretrained does; merging.py reads it
    model_config.save_pretrained(str(folder))
    if getattr(module, "generation_config", None) is not None:  # it may name the end of a turn, unlike the base model's
        generation_config: Any = module.generation_config
        generation_config.save_pretrained(str(folder))


def _inject(module: nn.Module, config: LoraConfig) -> None:
    heads = tuple(config.modules_to_save or ())
    # peft copies and wraps heads so that one model can hold several adapters. Here there is only one set.
    config.modules_to_save = None
    try:
        _peft().inject_adapter_in_model(config, module, adapter_name=ADAPTER_NAME)
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
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


def _whole_path(base: str) -> str:
    """Returns the absolute path of a folder, so that adapters find it from anywhere; a name on the hub as it is."""
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def _is_trained(name: str, heads: tuple[str, ...]) -> bool:
    """Returns whether a parameter belongs to an adapter or to a new head."""
    return ".lora_" in name or any(name.startswith(f"{head}.") for head in heads)


def _peft_name(name: str) -> str:
    """Returns the name in peft's weights file. The adapter's name is a module's, or the parameter's for an embedding."""
    return PEFT_PREFIX + (name.replace(f".{ADAPTER_NAME}", "", 1) if ".lora_" in name else name)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("LoRA adapters need peft, which is not installed: pip install peft") from None
    return peft


def peft_layer() -> Any:
    """Returns the base class of layers with adapters."""
    _peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    return BaseTunerLayer

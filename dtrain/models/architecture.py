"""A model's own config, read from where the model is, with the overrides of `model.config`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from dtrain.config import schema
from dtrain.errors import ConfigError
from dtrain.models import adapters
from dtrain.models.hub_errors import LOADING_ERRORS, explain, quiet, reach
from dtrain.models.user_module import refuse_without_factory

SHARDED = "shard-00000.safetensors"
"""Is there in place of weights, in a checkpoint whose pieces dtrain itself puts together."""

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

OWNED_CONFIG_KEYS = {
    "num_labels": "the labels in the data",
    "id2label": "the labels in the data",
    "label2id": "the labels in the data",
    "attn_implementation": "model.attn_implementation",
    "dtype": "engine.precision",
    "torch_dtype": "engine.precision",
    "dtrain_head": "model.head",
}
"""Keys of a model's own config that something else decides, and what does."""


def locate(model: schema.Model) -> bool:
    """Whether to load from local files only. Checks what a setting can get wrong before transformers looks at it."""
    name = model.name_or_path
    if name is None:
        if not model.from_scratch:
            raise ConfigError(
                "model.name_or_path is not set. Give a folder or a hub name, or train a new model with "
                "model.from_scratch=true and model.config={model_type: ...}."
            )
        if "model_type" not in model.config:
            raise ConfigError(
                "model.from_scratch=true without model.name_or_path needs model.config={model_type: gpt2, ...}."
            )
        return True
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model.name_or_path={name} has no config.json: it is not a folder that from_pretrained loads."
            )
        refuse_without_factory(folder)
        files = (*WEIGHT_FILES, adapters.WEIGHTS, SHARDED)
        if not model.from_scratch and not any((folder / file).is_file() for file in files):
            raise ConfigError(
                f"model.name_or_path={name} has no weights ({', '.join(WEIGHT_FILES[::2])} or their .index.json). Copy "
                "them there, name another folder, or start from new weights with model.from_scratch=true."
            )
    return reach(name, file="config.json", setting="model.name_or_path")


def read_config(model: schema.Model, local_only: bool) -> PretrainedConfig:
    """The model's own config with the overrides of `model.config`, each of which it must know."""
    overrides = dict(model.config)
    kind = overrides.pop("model_type", None)
    for key in OWNED_CONFIG_KEYS.keys() & overrides.keys():
        raise ConfigError(f"model.config.{key} is decided by {OWNED_CONFIG_KEYS[key]}: leave it out here.")
    name, options = model.name_or_path, {"trust_remote_code": model.trust_remote_code, "local_files_only": local_only}
    try:
        with quiet():
            config = AutoConfig.for_model(kind) if name is None else AutoConfig.from_pretrained(name, **options)
    except LOADING_ERRORS as error:
        if name is None:
            raise ConfigError(
                f"model.config.model_type={kind} is not a model type that transformers knows.{_near_type(kind)}"
            ) from error
        raise explain(error, name=name, setting="model.name_or_path") from error
    if kind not in (None, config.model_type):
        raise ConfigError(
            f"model.config.model_type={kind}, but {name} is a {config.model_type} model: leave model_type out."
        )
    _refuse_unknown(config, overrides)
    try:
        with quiet():
            if name is None:
                return AutoConfig.for_model(kind, **overrides)
            return AutoConfig.from_pretrained(name, **options, **overrides)
    except LOADING_ERRORS as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"model.config does not make a {config.model_type} config: {what}") from error


def _refuse_unknown(config: PretrainedConfig, overrides: Mapping[str, Any]) -> None:
    known = sorted(
        {key for key in (*vars(config), *config.attribute_map, *config.to_dict()) if not key.startswith("_")}
    )
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"Did you mean {', '.join(near)}?" if near else f"It has: {', '.join(known)}."
            raise ConfigError(f"model.config.{key} is not a setting of a {config.model_type} model. {hint}")


def _near_type(kind: object) -> str:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING_NAMES), n=3)
    return f" Did you mean {', '.join(near)}?" if near else ""


def real_label_names(config: PretrainedConfig) -> tuple[str, ...] | None:
    """The labels' names by output; None where they are the LABEL_0, LABEL_1 that every config is born with."""
    names = [str(config.id2label[index]) for index in sorted(config.id2label or {})]
    return None if not names or all(re.fullmatch(r"LABEL_\d+", name) for name in names) else tuple(names)


def refuse_auxiliary_loss(config: PretrainedConfig) -> None:
    """A mixture of experts adds a loss of its own that no task sums exactly, unless its coefficients are 0."""
    inner = config.get_text_config()
    names = [n for n in ("router_aux_loss_coef", "router_z_loss_coef", "aux_loss_alpha") if getattr(inner, n, None)]
    if not names and getattr(inner, "output_router_logits", False):
        names = ["output_router_logits"]
    if names:
        off = ", ".join(f"{name}: {'false' if name.startswith('output') else 0}" for name in names)
        raise ConfigError(
            f"A {config.model_type} model is a mixture of experts with a loss of its own ({', '.join(names)}), which "
            f"is not summed exactly over ranks and is therefore refused. To train it without: model.config={{{off}}}"
        )


def fit_to_tokenizer(config: PretrainedConfig, model: schema.Model, tokenizer: PreTrainedTokenizerBase) -> None:
    """Vocabulary size and special tokens of a new model. With its own tokenizer a config stays as it is."""
    if model.name_or_path is not None and model.tokenizer in (None, model.name_or_path):
        return
    if "vocab_size" not in model.config:
        config.vocab_size = max(tokenizer.get_vocab().values()) + 1
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key not in model.config and hasattr(config, key):
            setattr(config, key, getattr(tokenizer, key))

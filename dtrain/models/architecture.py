"""Reads a model's config from its folder or the hub, and applies the overrides of `model.config`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from dtrain.config import schema
from dtrain.errors import ConfigError
from dtrain.models import adapters
from dtrain.models.foreign_files import check_config_file
from dtrain.models.hub_errors import LOADING_ERRORS, check_reachable, explain, quiet
from dtrain.models.user_module import refuse_without_factory

SHARDED_WEIGHTS = "shard-00000.safetensors"
"""Stands in for the weights in a checkpoint of shards, which dtrain itself assembles."""

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
"""Keys of a model's config that are set elsewhere, and where."""

TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Keys that a model may need although its config class does not declare them (T5's decoder start)."""


def check_name_or_path(model: schema.Model) -> bool:
    """Checks model.name_or_path before transformers tries it. Returns whether to load from local files only."""
    name = model.name_or_path
    if name is None:
        if not model.from_scratch:
            raise ConfigError(
                "model.name_or_path is not set. Give a folder or a hub name, or train a new model with "
                "model.from_scratch=true and model.config.model_type=gpt2 (or another)."
            )
        if "model_type" not in model.config:
            raise ConfigError(
                "model.from_scratch=true without model.name_or_path needs model.config.model_type, e.g. model.config.model_type=gpt2."
            )
        return True
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model.name_or_path={name} has no config.json: it is not a folder that from_pretrained loads."
            )
        refuse_without_factory(folder)
        files = (*WEIGHT_FILES, adapters.WEIGHTS_FILE, SHARDED_WEIGHTS)
        if not model.from_scratch and not any((folder / file).is_file() for file in files):
            raise ConfigError(
                f"model.name_or_path={name} has no weights ({', '.join(WEIGHT_FILES[::2])} or their .index.json). Copy "
                "them there, name another folder, or start from new weights with model.from_scratch=true."
            )
    return check_reachable(name, file="config.json", setting="model.name_or_path")


def read_config(model: schema.Model, local_only: bool) -> PretrainedConfig:
    """Returns the model's config with the overrides of `model.config`. An unknown key is a ConfigError."""
    overrides = dict(model.config)
    kind = overrides.pop("model_type", None)
    for key in OWNED_CONFIG_KEYS.keys() & overrides.keys():
        raise ConfigError(f"model.config.{key} is set by {OWNED_CONFIG_KEYS[key]}: leave it out here.")
    if model.name_or_path is not None:
        check_config_file(model.name_or_path, local_only=local_only, setting="model.name_or_path")
    name, options = model.name_or_path, {"trust_remote_code": model.trust_remote_code, "local_files_only": local_only}
    try:
        with quiet():
            config = AutoConfig.for_model(kind) if name is None else AutoConfig.from_pretrained(name, **options)
    except (*LOADING_ERRORS, AttributeError, ArithmeticError) as error:  # such as a list where a mapping belongs
        if name is None:
            raise ConfigError(
                f"model.config.model_type={kind} is not a model type that transformers knows.{_suggest_model_type(kind)}"
            ) from error
        raise explain(error, name=name, setting="model.name_or_path") from error
    if kind not in (None, config.model_type):
        if name is None:
            raise ConfigError(
                f"model.config.model_type={kind} has the models of {config.model_type}: write that instead."
            )
        raise ConfigError(
            f"model.config.model_type={kind}, but {name} is a {config.model_type} model: leave model_type out."
        )
    tokens = {key: overrides[key] for key in TOKEN_KEYS if key in overrides}
    _reject_unknown_overrides(config, {key: value for key, value in overrides.items() if key not in tokens})
    overrides = {key: _as_field(config, key, value) for key, value in overrides.items()}
    try:
        with quiet():
            if name is None:
                made = AutoConfig.for_model(kind, **overrides)
            else:
                made = AutoConfig.from_pretrained(name, **options, **overrides)
        made.get_text_config()  # raises ValueError for a model of several texts
        for key, value in tokens.items():  # from_pretrained ignores what the config does not declare
            setattr(made, key, value)
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model.config is not a valid {config.model_type} config: {reason}") from error
    _check_rotary_overrides(made, overrides)
    refuse_kernels(made, model)
    return made


def refuse_kernels(config: PretrainedConfig, model: schema.Model) -> None:
    """Refuses a config.json that asks for compiled code from the hub (`org/name`) to compute attention or experts.

    Raises:
        ConfigError: it does, and the user has not chosen an implementation.
    """
    parts: list[Any] = [config]
    for part in parts:  # grows: a part may have parts itself
        parts += [inner for inner in vars(part).values() if isinstance(inner, PretrainedConfig)]
        for name in ("attn_implementation", "experts_implementation"):
            value = getattr(part, f"_{name}", None)
            is_chosen = name == "attn_implementation" and model.attn_implementation is not None
            if "/" in str(value) and not is_chosen:
                cure = (
                    f"set model.attn_implementation={value}; otherwise set model.attn_implementation=sdpa"
                    if name == "attn_implementation"
                    else "load it once and save it without that entry; otherwise remove the entry"
                )
                raise ConfigError(
                    f"model.name_or_path={model.name_or_path}: its config.json has {name}={value}, which would download "
                    f"and run compiled code from the hub. If you trust its author, {cure}."
                )


def _reject_unknown_overrides(config: PretrainedConfig, overrides: Mapping[str, Any]) -> None:
    names = {*vars(config), *config.attribute_map, *config.to_dict(), *_rotary_values(config), *_read_by_model(config)}
    known = sorted(name for name in names if not name.startswith("_"))
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"Did you mean {', '.join(near)}?" if near else f"It has: {', '.join(known)}."
            raise ConfigError(f"model.config.{key} is not a setting of a {config.model_type} model. {hint}")


def _as_field(config: PretrainedConfig, key: str, value: Any) -> Any:
    """Returns a whole number as a float for a setting that is one: transformers refuses `0` for `0.0`."""
    key = config.attribute_map.get(key, key)
    kinds = next((str(field.type) for field in dataclasses.fields(config) if field.name == key), "")
    needs_float = re.search(r"\bfloat\b", kinds) and not re.search(r"\bint\b", kinds)
    return float(value) if needs_float and type(value) is int else value


def _read_by_model(config: PretrainedConfig) -> set[str]:
    """Returns settings that a model of transformers reads though its config does not list them, such as `head_dim` of qwen2."""
    place = inspect.getsourcefile(type(config)) or ""
    code = Path(place).with_name(Path(place).name.replace("configuration_", "modeling_"))
    if not code.is_file():
        return set()
    names = set(re.findall(r"""getattr\((?:self\.)?config,\s*["'](\w+)["'],""", code.read_text(encoding="utf-8")))
    return {name for name in names if not isinstance(getattr(type(config), name, None), property)}


def _rotary_values(config: PretrainedConfig) -> dict[str, list[Any]]:
    """Returns the values of `rope_parameters` by name, from each kind of layer: transformers also takes them by themselves."""
    parameters = getattr(config, "rope_parameters", None) or {}
    layers = [part for part in parameters.values() if isinstance(part, Mapping)] or [parameters]
    return {
        name: [part[name] for part in layers if name in part]
        for name in ("rope_theta", "partial_rotary_factor")
        if any(name in part for part in layers)
    }


def _check_rotary_overrides(config: PretrainedConfig, overrides: Mapping[str, Any]) -> None:
    """Refuses a rotary setting that transformers ignored, as it does for gpt_neox."""
    for name, values in _rotary_values(config).items():
        if name in overrides and overrides[name] not in values:
            raise ConfigError(
                f"model.config.{name} has no effect on a {config.model_type} model. Set "
                f"model.config.rope_parameters.rope_type=default model.config.rope_parameters.{name}={overrides[name]} instead."
            )


def _suggest_model_type(kind: object) -> str:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING_NAMES), n=3)
    return f" Did you mean {', '.join(near)}?" if near else ""


def real_label_names(config: PretrainedConfig) -> tuple[str, ...] | None:
    """Returns the label names by output, or None for the placeholders LABEL_0, LABEL_1, ... of a new config."""
    names = [str(config.id2label[index]) for index in sorted(config.id2label or {})]
    return None if not names or all(re.fullmatch(r"LABEL_\d+", name) for name in names) else tuple(names)


def asks_for_router_loss(config: PretrainedConfig) -> bool:
    """Returns whether a mixture of experts adds the load-balancing loss of its router, as transformers decides it."""
    return bool(getattr(config.get_text_config(), "output_router_logits", False))


def fit_to_tokenizer(config: PretrainedConfig, model: schema.Model, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets vocabulary size and special tokens of a new model, unless it uses the tokenizer of its own family."""
    if model.name_or_path is not None and model.tokenizer in (None, model.name_or_path):
        return
    if "vocab_size" not in model.config:
        config.vocab_size = max(tokenizer.get_vocab().values()) + 1
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key not in model.config and hasattr(config, key):
            _set_token(config, key, getattr(tokenizer, key), tokenizer)


def _set_token(config: PretrainedConfig, key: str, token: int | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets a special token. If the tokenizer has none and the config needs one, it gets another special token."""
    try:
        setattr(config, key, token)
    except StrictDataclassError:
        setattr(config, key, min(tokenizer.all_special_ids, default=0))

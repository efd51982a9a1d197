"""A module of the user's own: what `model.factory: package.module:function` makes, saved and loaded like any other.

The function is called with keyword arguments: those of OFFERED that it names, and model.config as it stands. What it
gives is a torch module whose forward takes what it needs of the batch (input_ids, attention_mask, pixel_values, ...)
by name and gives logits, or an object with `.logits`.

The saved folder has model.safetensors, and in config.json the factory's name: code is run only where model.factory
names it.
"""

from __future__ import annotations

import inspect
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from dtrain.config import schema
from dtrain.config.user_function import import_function
from dtrain.errors import CheckpointError, ConfigError
from dtrain.models.heads import Head

KEY = "dtrain_factory"
"""In config.json of a saved folder: which factory made the module."""

RECORD = "_dtrain_own"
"""The attribute of a module under which `make` keeps what config.json has to say of it."""

OFFERED = ("num_labels", "vocab_size", "tokenizer", "head")
"""Outputs (None for a language model), rows of an embedding that fits the tokenizer, the tokenizer (None without text),
and what the task wants on top (sequence_classification, causal_lm, ...)."""


def make(model: schema.Model, *, head: Head, head_config: Mapping[str, Any], tokenizer: Any) -> nn.Module:
    """The module, drawn from torch's random state; with the weights of model.name_or_path where that is set.

    Args:
        head, head_config, tokenizer: as in load.load_model.

    Raises:
        ConfigError: a factory that cannot be imported, called, or gives no module; a folder with other weights.
        CheckpointError: damaged weights.
    """
    assert model.factory is not None
    folder = (model.factory_folder or Path()).expanduser()
    _refuse_taken_name(model.factory, folder)
    function = import_function(model.factory, folder=folder, setting="model.factory")
    module = _call(function, model, head=head, head_config=head_config, tokenizer=tokenizer)
    module.register_forward_pre_hook(_only_what_it_takes, with_kwargs=True)
    module.register_forward_hook(_logits)
    told = {"id2label": head_config.get("id2label"), "label2id": head_config.get("label2id")}
    setattr(module, RECORD, {KEY: model.factory, **{key: value for key, value in told.items() if value is not None}})
    if model.name_or_path is not None:
        _load(module, Path(model.name_or_path))
    return module


def label_names(model: schema.Model) -> tuple[str, ...] | None:
    """The labels of a saved folder by output; None without one."""
    if model.name_or_path is None:
        return None
    names = _config_json(Path(model.name_or_path)).get("id2label")
    return None if not names else tuple(str(names[index]) for index in sorted(names, key=int))


def refuse_without_factory(folder: Path) -> None:
    """A folder of a user's module, named without the code that makes it."""
    factory = _config_json(folder).get(KEY)
    if factory is not None:
        raise ConfigError(
            f"model.name_or_path={folder} holds the weights of a module that model.factory={factory} made: set "
            "model.factory to it as well."
        )


def _config_json(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _refuse_taken_name(factory: str, folder: Path) -> None:
    """A name that Python had imported before, from elsewhere, is not looked for again."""
    name = factory.partition(":")[0]
    module = sys.modules.get(name)
    if module is None:
        return
    own = folder.joinpath(*name.split("."))
    files = [file for file in (own.with_suffix(".py"), own / "__init__.py") if file.is_file()]
    if files and Path(module.__file__ or "").resolve() not in [file.resolve() for file in files]:
        raise ConfigError(
            f"model.factory={factory}: the name {name} is taken by {module.__file__}, so {files[0]} cannot be imported "
            "under it. Rename your file."
        )


def _call(
    function: Callable[..., Any], model: schema.Model, *, head: Head, head_config: Mapping[str, Any], tokenizer: Any
) -> nn.Module:
    factory = str(model.factory)
    offered = {
        "num_labels": head_config.get("num_labels"),
        "vocab_size": None if tokenizer is None else max(tokenizer.get_vocab().values()) + 1,
        "tokenizer": tokenizer,
        "head": head.name,
    }
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError) as error:
        raise _failed(factory, "reading its parameters", error) from error
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    arguments = {key: value for key, value in offered.items() if takes_all or key in signature.parameters}
    arguments.update(model.config)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"model.factory={factory}{signature}: {error}. It is called with those of {', '.join(OFFERED)} that it "
            f"names, and with model.config={dict(model.config)}."
        ) from error
    try:
        module = function(**arguments)
    except Exception as error:
        raise _failed(factory, "calling it", error) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"model.factory={factory} gave {type(module).__name__}: expected a torch.nn.Module.")
    if not any(True for _ in module.parameters()):
        raise ConfigError(f"model.factory={factory} gave a {type(module).__name__} without parameters.")
    return module.float()


def _failed(factory: str, doing: str, error: BaseException) -> ConfigError:
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = f" ({last.tb_frame.f_code.co_filename}, line {last.tb_lineno})" if last is not None else ""
    return ConfigError(
        f"model.factory={factory}: {doing} raised {type(error).__name__}: {' '.join(str(error).split())[:400]}{where}."
    )


def _only_what_it_takes(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Of the batch, what the forward names: not every module has a use for token types or a cache."""
    parameters = inspect.signature(module.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return args, kwargs
    return args, {name: value for name, value in kwargs.items() if name in parameters}


def _logits(module: nn.Module, _args: Any, output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return SequenceClassifierOutput(logits=output)  # which DDP and DeepSpeed know how to look into
    if not isinstance(getattr(output, "logits", None), torch.Tensor):
        raise ConfigError(
            f"The forward of {type(module).__name__} gave {type(output).__name__}: expected logits, or an object with "
            ".logits."
        )
    return output


def _load(module: nn.Module, folder: Path) -> None:
    """The folder's weights, all of them and no others."""
    file = folder / "model.safetensors"
    if not file.is_file():
        raise ConfigError(
            f"model.name_or_path={folder} has no model.safetensors. With model.factory it is a folder that dtrain "
            "saved; leave it out to train a new module."
        )
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Copy it again.") from error
    own = module.state_dict()
    if isinstance(module, PreTrainedModel):  # transformers saves what is tied once
        there = {own[name].data_ptr() for name in weights.keys() & own.keys()}
        own = {name: value for name, value in own.items() if name in weights or value.data_ptr() not in there}
    wrong = [
        *(f"{name} is missing" for name in own.keys() - weights.keys()),
        *(f"{name} is not in the module" for name in weights.keys() - own.keys()),
        *(
            f"{name} is {tuple(weights[name].shape)}, wanted {tuple(own[name].shape)}"
            for name in own.keys() & weights.keys()
            if own[name].shape != weights[name].shape
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ConfigError(
            f"model.name_or_path={folder} does not fit what model.factory makes: {', '.join(sorted(wrong)[:4])}{more}. "
            "Use the factory and the model.config that it was trained with."
        )
    module.load_state_dict(weights, strict=False)  # compared above


@contextmanager
def all_drawn_from(seed: int) -> Iterator[None]:
    """A user's code may draw from numpy or `random` as well; both are as before afterwards."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])

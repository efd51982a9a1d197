"""Custom modules: built by `model.factory: package.module:function`, saved and loaded like other models.

The function is called with those keyword arguments of OFFERED_ARGUMENTS that it accepts, and with model.config. It
returns a torch module whose forward takes by name what it needs of the batch (input_ids, attention_mask,
pixel_values, ...) and returns logits, or an object with `.logits`.

The saved folder has model.safetensors and a config.json with the factory's name. That name is not executed: code runs
only if model.factory names it.
"""

from __future__ import annotations

import inspect
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

from dtrain.config import bounded_json, schema
from dtrain.config.user_function import import_function
from dtrain.errors import CheckpointError, ConfigError
from dtrain.models.heads import Head

CONFIG_KEY = "dtrain_factory"
"""Entry of config.json in a saved folder: the factory that made the module."""

CONFIG_ATTRIBUTE = "_dtrain_own"
"""Attribute of a module under which `build` stores entries for config.json."""

OFFERED_ARGUMENTS = ("num_labels", "vocab_size", "tokenizer", "head")
"""Arguments that a factory may accept:

num_labels: number of outputs; None for a language model.
vocab_size: rows of an embedding that fits the tokenizer; None without text.
tokenizer: the tokenizer; None without text.
head: the kind of head that the task needs (sequence_classification, causal_lm, ...).
"""


def build(model: schema.Model, *, head: Head, head_config: Mapping[str, Any], tokenizer: Any) -> nn.Module:
    """Builds the module from torch's random state, and loads the weights of model.name_or_path if it is set.

    Args:
        head, head_config, tokenizer: as in load.load_model.

    Raises:
        ConfigError: the factory cannot be imported or called, or returns no module; or the folder has other weights.
        CheckpointError: the weights are damaged.
    """
    assert model.factory is not None
    folder = (model.factory_folder or Path()).expanduser()
    _check_module_name(model.factory, folder)
    function = import_function(model.factory, folder=folder, setting="model.factory")
    module = _call(function, model, head=head, head_config=head_config, tokenizer=tokenizer)
    module.register_forward_pre_hook(_drop_unused_inputs, with_kwargs=True)
    module.register_forward_hook(_wrap_logits)
    labels = {key: head_config[key] for key in ("id2label", "label2id") if head_config.get(key) is not None}
    setattr(module, CONFIG_ATTRIBUTE, {CONFIG_KEY: model.factory, **labels})
    if model.name_or_path is not None:
        _load(module, Path(model.name_or_path))
    return module


def label_names(model: schema.Model) -> tuple[str, ...] | None:
    """Returns the label names in a saved folder, by output; None if there are none."""
    if model.name_or_path is None:
        return None
    names = _config_json(Path(model.name_or_path)).get("id2label")
    return None if not names else tuple(str(names[index]) for index in sorted(names, key=int))


def refuse_without_factory(folder: Path) -> None:
    """Raises ConfigError for a saved folder of a custom module if it is named without its factory."""
    factory = _config_json(folder).get(CONFIG_KEY)
    if factory is not None:
        raise ConfigError(
            f"model.name_or_path={folder} holds the weights of a module that model.factory={factory} made: set "
            "model.factory to the same value."
        )


def _config_json(folder: Path) -> dict[str, Any]:
    try:
        content = bounded_json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_module_name(factory: str, folder: Path) -> None:
    """Raises ConfigError if Python has already imported another module of this name, as it would not import ours."""
    name = factory.partition(":")[0]
    module = sys.modules.get(name)
    if module is None:
        return
    path = folder.joinpath(*name.split("."))
    files = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
    if files and Path(module.__file__ or "").resolve() not in [file.resolve() for file in files]:
        raise ConfigError(
            f"model.factory={factory}: the name {name} is already used by {module.__file__}, so {files[0]} cannot be "
            "imported under it. Rename your file."
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
        raise _factory_error(factory, "reading its parameters", error) from error
    accepts_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    arguments = {key: value for key, value in offered.items() if accepts_all or key in signature.parameters}
    arguments.update(model.config)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"model.factory={factory}{signature}: {error}. It is called with those of {', '.join(OFFERED_ARGUMENTS)} that "
            f"it accepts, and with model.config={dict(model.config)}."
        ) from error
    try:
        module = function(**arguments)
    except Exception as error:
        raise _factory_error(factory, "calling it", error) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"model.factory={factory} returned {type(module).__name__}: expected a torch.nn.Module.")
    if not any(True for _ in module.parameters()):
        raise ConfigError(f"model.factory={factory} returned a {type(module).__name__} without parameters.")
    return module.float()


def _factory_error(factory: str, action: str, error: BaseException) -> ConfigError:
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = f" ({last.tb_frame.f_code.co_filename}, line {last.tb_lineno})" if last is not None else ""
    return ConfigError(
        f"model.factory={factory}: {action} raised {type(error).__name__}: {' '.join(str(error).split())[:400]}{where}."
    )


def _drop_unused_inputs(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Keeps only the inputs that the forward accepts, because not every module uses token types or a cache."""
    parameters = inspect.signature(module.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return args, kwargs
    return args, {name: value for name, value in kwargs.items() if name in parameters}


def _wrap_logits(module: nn.Module, _args: Any, output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return SequenceClassifierOutput(logits=output)  # a type in which DDP and DeepSpeed can find the tensors
    if not isinstance(getattr(output, "logits", None), torch.Tensor):
        raise ConfigError(
            f"The forward of {type(module).__name__} returned {type(output).__name__}: expected logits, or an object "
            "with .logits."
        )
    return output


def _load(module: nn.Module, folder: Path) -> None:
    """Loads the folder's weights, whose names and shapes must match exactly."""
    file = folder / "model.safetensors"
    if not file.is_file():
        raise ConfigError(
            f"model.name_or_path={folder} has no model.safetensors. With model.factory it has to be a folder that dtrain "
            "saved; leave it out to train a new module."
        )
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Copy it again.") from error
    expected = module.state_dict()
    if isinstance(module, PreTrainedModel):  # transformers saves tied tensors only once
        stored = {expected[name].data_ptr() for name in weights.keys() & expected.keys()}
        expected = {n: value for n, value in expected.items() if n in weights or value.data_ptr() not in stored}
    wrong = [
        *(f"{name} is missing" for name in expected.keys() - weights.keys()),
        *(f"{name} is not in the module" for name in weights.keys() - expected.keys()),
        *(
            f"{name} is {tuple(weights[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in expected.keys() & weights.keys()
            if expected[name].shape != weights[name].shape
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ConfigError(
            f"model.name_or_path={folder} does not fit the module of model.factory: {', '.join(sorted(wrong)[:4])}{more}. "
            "Use the factory and the model.config that it was trained with."
        )
    module.load_state_dict(weights, strict=False)  # names were compared above


@contextmanager
def seeded_python_random(seed: int) -> Iterator[None]:
    """Seeds numpy and `random`, which a user's code may draw from, and restores both afterwards."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])

"""A model by name, folder or from scratch, with the head that a task asks for, in fp32 on the host.

The same on every rank and in every run: new weights are drawn from the seed alone, and the global random state is left
as it was. Freezing (freezing.py), fitting the tokenizer (checks.py) and devices (engines) come after.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dtrain.config import schema
from dtrain.console import log
from dtrain.errors import ConfigError
from dtrain.models import adapters, user_module
from dtrain.models.architecture import fit_to_tokenizer, locate, read_config, real_label_names, refuse_auxiliary_loss
from dtrain.models.custom_head import KEY, add_head, settings_of
from dtrain.models.heads import Head
from dtrain.models.hub_errors import LOADING_ERRORS, explain, quiet
from dtrain.models.seq2seq import fit_decoder

ALIGNMENT = 64
"""Bytes to which PyTorch aligns its own memory on a CPU."""

ODD_SIZES = (ArithmeticError, AssertionError, AttributeError)
"""What a constructor raises for sizes that make no layers."""


def load_model(
    model: schema.Model,
    *,
    head: Head,
    head_config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
) -> PreTrainedModel:
    """The model that the config names.

    Args:
        model: the model section of the config.
        head: what the task puts on top.
        head_config: entries of the model's config that the task decides, e.g. num_labels, id2label, label2id.
        tokenizer: gives a new model its vocabulary size and special tokens, and the config a pad token that it lacks;
            None where there is no text.
        seed: of weights that no file holds: a new head, or all from scratch.

    Returns:
        The model, fp32, on the host, in train mode as PyTorch makes it.

    Raises:
        ConfigError: a name, a folder or an override that does not make such a model, or one with a loss of its own.
        DataError: the hub does not answer.
        CheckpointError: damaged files.
    """
    if model.factory is not None:
        with _drawn_from(seed), user_module.all_drawn_from(seed):
            module = user_module.make(model, head=head, head_config=head_config, tokenizer=tokenizer)
        if model.gradient_checkpointing:
            _checkpoint_activations(module)
        return module
    local_only = locate(model)
    config = read_config(model, local_only)
    own_labels = real_label_names(config)
    refuse_auxiliary_loss(config)
    if model.from_scratch and tokenizer is not None:
        born_pad = getattr(config, "pad_token_id", None)
        fit_to_tokenizer(config, model, tokenizer)
        if head.has_decoder:
            fit_decoder(config, model, tokenizer, born_pad=born_pad)
    for key, value in head_config.items():
        setattr(config, key, value)
    if tokenizer is not None and not head.is_causal and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id  # a decoder's classifier looks for the last token before it
    if head.problem_type is not None:
        config.problem_type = head.problem_type
    with quiet(), _drawn_from(seed):
        loaded = _with_its_parts(model, config, head=head, tokenizer=tokenizer, local_only=local_only)
    names = real_label_names(loaded.config)
    if head.has_label_names and not model.from_scratch and own_labels not in (None, names):
        log.info("Note: %s knows the labels %s; they become %s, one by one", model.name_or_path, own_labels, names)
    if model.gradient_checkpointing:
        _checkpoint_activations(loaded)
    return loaded


def label_names_of(model: schema.Model) -> tuple[str, ...] | None:
    """The label names that a trained classifier brings, in the order of its outputs; None where it has none.

    Reads the model's config only. Labels are mapped by name: where these are the data's names in another order (MNLI
    has had several), the task has to number its labels in this order.
    """
    if model.factory is not None:
        return user_module.label_names(model)
    if model.from_scratch or model.name_or_path is None:
        return None
    return real_label_names(read_config(model, locate(model)))


def _with_its_parts(
    model: schema.Model,
    config: PretrainedConfig,
    *,
    head: Head,
    tokenizer: PreTrainedTokenizerBase | None,
    local_only: bool,
) -> Any:
    """The model with transformers' head or one of `model.head`, and with adapters: those of the folder, or new ones."""
    saved = adapters.saved_adapters(model)
    if saved is not None:
        model = model.model_copy(update={"name_or_path": saved.base, "lora": None})
        local_only = locate(model)
    new_head = settings_of(model, config)
    kind = head.auto_class if new_head is None else AutoModel
    new: list[str] = []
    if model.from_scratch:
        loaded = _new(kind, model, config, head)
    else:
        loaded, new = _pretrained(kind, model, config, head, local_only)
    if new_head is not None:
        among_adapters = saved is not None and any(name.startswith("head.") for name in saved.heads)
        is_stored = hasattr(config, KEY) and not model.from_scratch and not among_adapters
        loaded = add_head(
            loaded,
            new_head,
            model,
            task_head=head,
            pads_left=tokenizer is not None and tokenizer.padding_side == "left",
            local_only=local_only,
            is_stored=is_stored,
        )
        drawn = [] if is_stored else [f"head.{name}" for name, _ in loaded.head.named_parameters()]
        new = [*(f"backbone.{name}" for name in new), *drawn]
    if saved is not None:
        adapters.load(loaded, saved)
    elif model.lora is not None:
        adapters.add(loaded, model.lora, base=str(model.name_or_path), new=new)
    return loaded


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    """New weights come from the seed alone; the global random state is as before afterwards, on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would reseed CUDA for good
        yield


def _new(kind: Any, model: schema.Model, config: PretrainedConfig, head: Head) -> PreTrainedModel:
    try:
        return kind.from_config(
            config,
            dtype=torch.float32,
            trust_remote_code=model.trust_remote_code,
            attn_implementation=model.attn_implementation,
        )
    except (*LOADING_ERRORS, *ODD_SIZES) as error:
        raise _unsuitable(error, model, config, head) or ConfigError(
            f"model.config does not make a {config.model_type} model: {' '.join(str(error).split())[:400]}"
        ) from error


def _pretrained(
    kind: Any, model: schema.Model, config: PretrainedConfig, head: Head, local_only: bool
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of its weights that no file held."""
    name = model.name_or_path
    assert name is not None
    try:
        loaded, info = kind.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,  # also where the file is bf16: an optimizer needs the digits
            trust_remote_code=model.trust_remote_code,
            local_files_only=local_only,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # not ignored: refused below, with a cure
            attn_implementation=model.attn_implementation,
        )
    except LOADING_ERRORS as error:
        raise _unsuitable(error, model, config, head) or explain(
            error, name=name, setting="model.name_or_path"
        ) from error
    _refuse_mismatch(name, loaded, info["mismatched_keys"])
    new, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if len(new) >= sum(1 for _ in loaded.parameters()):
        raise ConfigError(
            f"model.name_or_path={name}: none of its weights belongs to a {config.model_type} model, which its "
            "config.json says it is. Copy both from one place."
        )
    if new:
        log.info("Newly initialised (not in %s): %s", name, _some(new))
    if unused:
        log.info("Not used from %s: %s", name, _some(unused))
    _align(loaded)
    return loaded, new


def _align(loaded: PreTrainedModel) -> None:
    """Weights into memory of their own, where PyTorch puts new ones.

    In a mapped file they begin at any multiple of 4 bytes, and other kernels then give other last digits than the process
    that trained them.
    """
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def _unsuitable(error: BaseException, model: schema.Model, config: PretrainedConfig, head: Head) -> ConfigError | None:
    """The refusals that transformers words in its own terms: an architecture without that head, and the attention."""
    if "Unrecognized configuration class" in str(error):
        return ConfigError(
            f"A {config.model_type} model has no {head.name.replace('_', ' ')} head in transformers. Choose another model "
            "or another task."
        )
    if model.attn_implementation and ("attn_implementation" in str(error) or isinstance(error, ImportError)):
        return ConfigError(
            f"model.attn_implementation={model.attn_implementation} cannot be used: {' '.join(str(error).split())}"
        )
    return None


def _refuse_mismatch(name: str, loaded: PreTrainedModel, mismatched: Collection[tuple[str, Any, Any]]) -> None:
    if not mismatched:
        return
    shapes = _some(
        [f"{key} is {tuple(found)}, wanted {tuple(wanted)}" for key, found, wanted in sorted(mismatched)], most=2
    )
    is_backbone = not hasattr(loaded, loaded.base_model_prefix)
    if is_backbone or any(key.startswith(f"{loaded.base_model_prefix}.") for key, _, _ in mismatched):
        raise ConfigError(
            f"model.name_or_path={name}: its weights do not fit model.config ({shapes}). Drop the override, or set "
            "model.from_scratch=true."
        )
    raise ConfigError(
        f"model.name_or_path={name} was trained for another number of labels ({shapes}). Name the model it was made "
        'from, or take its head off: python -c "from transformers import AutoModel; '
        f"AutoModel.from_pretrained('{name}').save_pretrained('FOLDER')\", then model.name_or_path=FOLDER "
        f"model.tokenizer={name}"
    )


def _some(names: list[str], *, most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _checkpoint_activations(loaded: PreTrainedModel) -> None:
    if not getattr(loaded, "supports_gradient_checkpointing", False):
        kind = getattr(getattr(loaded, "config", None), "model_type", type(loaded).__name__)
        raise ConfigError(f"model.gradient_checkpointing=true: transformers cannot do that for a {kind} model.")
    # Renamed within transformers 5; the old name warns.
    enable = getattr(loaded, "activation_checkpointing_enable", None) or loaded.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if hasattr(loaded, "config"):
        loaded.config.use_cache = False  # keys and values kept for later would be recomputed as well

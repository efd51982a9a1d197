"""Loads a model by name or folder, or creates one from scratch, with the task's head, in fp32 on the host.

The result is the same on every rank and in every run: new weights depend only on the seed, and the global random state
does not change. Freezing (freezing.py), the checks against the tokenizer (compatibility.py) and devices (engines) follow
later.
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
from dtrain.models.added_tokens import fit_config, fit_embeddings
from dtrain.models.architecture import (
    check_name_or_path,
    fit_to_tokenizer,
    read_config,
    real_label_names,
)
from dtrain.models.custom_head import CONFIG_KEY, add_head, head_settings
from dtrain.models.foreign_files import check_sizes
from dtrain.models.heads import Head
from dtrain.models.hub_errors import LOADING_ERRORS, explain, quiet
from dtrain.models.pickled_weights import PICKLE_ERRORS, damaged_pickle
from dtrain.models.seq2seq import fit_decoder
from dtrain.models.tokenizer import new_tokens

ALIGNMENT = 64
"""PyTorch aligns tensors on the CPU to this many bytes."""

SIZE_ERRORS = (ArithmeticError, AssertionError, AttributeError)
"""What a constructor may raise for impossible layer sizes."""


def load_model(
    model: schema.Model,
    *,
    head: Head,
    head_config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    is_trained: bool = False,
    is_copied: bool = False,
) -> PreTrainedModel:
    """Loads or creates the model of the config.

    Args:
        model: the model section of the config.
        head: the kind of head that the task needs.
        head_config: entries of the model's config that the task decides, e.g. num_labels, id2label, label2id.
        tokenizer: gives a new model its vocabulary size and special tokens, and any model a missing pad token; None
            for tasks without text.
        seed: seed of weights that no file provides: a new head, or all from scratch.
        is_trained: whether the model must have all its weights already, because nothing will train it.
        is_copied: whether an engine will copy the weights that it keeps. Until then they stay in the file's pages, which the
            ranks of a node share.

    Returns:
        The model, fp32, on the host, in PyTorch's initial train mode.

    Raises:
        ConfigError: the name, folder or overrides do not make such a model.
        DataError: the hub does not answer.
        CheckpointError: files are damaged.
    """
    if model.factory is not None:
        with _seeded(seed), user_module.seeded_python_random(seed):
            module = user_module.build(model, head=head, head_config=head_config, tokenizer=tokenizer)
        if model.gradient_checkpointing:
            _checkpoint_activations(module)
        return module
    local_only = check_name_or_path(model)
    config = read_config(model, local_only)
    old_labels = real_label_names(config)
    old_pad = getattr(config.get_text_config(), "pad_token_id", None)
    if model.from_scratch and tokenizer is not None:
        default_pad_id = getattr(config, "pad_token_id", None)
        fit_to_tokenizer(config, model, tokenizer)
        if head.has_decoder or config.is_encoder_decoder:  # a classifier may have a decoder, too
            fit_decoder(config, model, tokenizer, default_pad_id=default_pad_id)
    if tokenizer is not None and model.from_scratch:
        fit_config(config, model, tokenizer)
    for key, value in head_config.items():
        setattr(config, key, value)
    for part in (config, config.get_text_config()):
        if tokenizer is None or model.pad_token is not None:
            break  # fit_config or fit_embeddings sets it
        if not head.is_causal and getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = tokenizer.pad_token_id  # a decoder's classifier uses it to find the last token
    if head.problem_type is not None:
        config.problem_type = head.problem_type
    with quiet(), _seeded(seed):
        loaded, new = _build_model(
            model, config, head=head, tokenizer=tokenizer, old_pad=old_pad, local_only=local_only, is_copied=is_copied
        )
    if new and is_trained:
        raise ConfigError(
            f"model.name_or_path={model.name_or_path} has no weights for {_first_names(new)}, which the task needs: they would "
            "be random, and so would the answers. Name a model that was trained for this task, e.g. a run's folder, or "
            "train it first."
        )
    new_labels = real_label_names(loaded.config)
    if head.has_label_names and not model.from_scratch and old_labels not in (None, new_labels):
        log.info("Note: %s has the labels %s; they are replaced by %s", model.name_or_path, old_labels, new_labels)
    if model.gradient_checkpointing:
        _checkpoint_activations(loaded)
    return loaded


def pretrained_label_names(model: schema.Model) -> tuple[str, ...] | None:
    """Returns the label names of a trained classifier in the order of its outputs; None if it has none.

    Reads only the model's config. Labels are matched by name: if the data has the same names in another order (as for
    the variants of MNLI), the task has to number its labels in the model's order.
    """
    if model.factory is not None:
        return user_module.label_names(model)
    if model.from_scratch or model.name_or_path is None:
        return None
    return real_label_names(read_config(model, check_name_or_path(model)))


def _build_model(
    model: schema.Model,
    config: PretrainedConfig,
    *,
    head: Head,
    tokenizer: PreTrainedTokenizerBase | None,
    old_pad: int | None,
    local_only: bool,
    is_copied: bool,
) -> tuple[Any, list[str]]:
    """Returns the model with its head (of transformers or of `model.head`) and with saved or new adapters.

    The second value lists the weights that no file provides, except those of new adapters.
    """
    saved, given = adapters.find_saved_adapters(model), model
    if saved is not None:
        model = model.model_copy(update={"name_or_path": saved.base, "lora": None})
        with adapters.naming_the_base(saved):
            local_only = check_name_or_path(model)
    new_head = head_settings(given, config)
    auto_model = head.auto_class if new_head is None else AutoModel
    new: list[str] = []
    if model.from_scratch:
        loaded = _from_scratch(auto_model, model, config, head)
    elif saved is not None:
        with adapters.naming_the_base(saved):
            loaded, new = adapters.load_base(
                saved, config, lambda: _pretrained(auto_model, model, config, head, local_only, is_copied=is_copied)
            )
    else:
        loaded, new = _pretrained(auto_model, model, config, head, local_only, is_copied=is_copied)
    holders: list[str] = []
    adds = given.add_tokens or given.pad_token is not None
    if tokenizer is not None and adds and not model.from_scratch:
        holders = fit_embeddings(loaded, given, tokenizer, new_tokens(given, tokenizer), old_pad=old_pad)
    if new_head is not None:
        is_in_adapters = saved is not None and any(name.startswith("head.") for name in saved.heads)
        is_stored = hasattr(config, CONFIG_KEY) and not model.from_scratch and not is_in_adapters
        loaded = add_head(
            loaded,
            new_head,
            model,
            task_head=head,
            local_only=local_only,
            is_stored=is_stored,
            shown_name=given.name_or_path,
        )
        drawn = [] if is_stored else [f"head.{name}" for name, _ in loaded.head.named_parameters()]
        new = [*(f"backbone.{name}" for name in new), *drawn]
        holders = [f"backbone.{name}" for name in holders]
    if saved is not None:
        adapters.load(loaded, saved)
        new = [name for name in new if not any(name.startswith(f"{stored}.") for stored in saved.heads)]
    elif model.lora is not None:
        adapters.add(loaded, model.lora, base=str(model.name_or_path), new=new, embeddings=holders)
    # The output of a pooler does not reach a head of ours.
    return loaded, [name for name in new if new_head is None or "pooler" not in name]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws new weights from this seed only, and restores torch's global random state afterwards, on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed CUDA, permanently
        yield


def _from_scratch(auto_model: Any, model: schema.Model, config: PretrainedConfig, head: Head) -> PreTrainedModel:
    try:
        return auto_model.from_config(
            config,
            dtype=torch.float32,
            trust_remote_code=model.trust_remote_code,
            attn_implementation=model.attn_implementation,
        )
    except (*LOADING_ERRORS, *SIZE_ERRORS) as error:
        raise _unsupported_error(error, model, config, head) or ConfigError(
            f"model.config is not a valid {config.model_type} model: {' '.join(str(error).split())[:400]}"
        ) from error


def _pretrained(
    auto_model: Any, model: schema.Model, config: PretrainedConfig, head: Head, local_only: bool, *, is_copied: bool
) -> tuple[PreTrainedModel, list[str]]:
    """Returns the model, and the names of its weights that no file provides."""
    name = model.name_or_path
    assert name is not None
    check_sizes(auto_model, name, config, setting="model.name_or_path")
    try:
        loaded, info = auto_model.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,  # even if the file is bf16, because the optimizer needs the precision
            trust_remote_code=model.trust_remote_code,
            local_files_only=local_only,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _refuse_mismatch raises a better error below
            attn_implementation=model.attn_implementation,
        )
    except (*LOADING_ERRORS, *PICKLE_ERRORS) as error:
        raise (
            damaged_pickle(name)
            or _unsupported_error(error, model, config, head)
            or explain(error, name=name, setting="model.name_or_path")
        ) from error
    _refuse_mismatch(name, loaded, info["mismatched_keys"])
    new, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if len(new) >= sum(1 for _ in loaded.parameters()):
        raise damaged_pickle(name) or ConfigError(
            f"model.name_or_path={name}: none of its weights belongs to a {config.model_type} model, the type in its "
            "config.json. Copy both from the same source."
        )
    if new:
        log.info("Newly initialized (not in %s): %s", name, _first_names(new))
    if unused:
        log.info("Unused weights in %s: %s", name, _first_names(unused))
    if not is_copied and not torch.cuda.is_available():
        # A GPU gets the weights straight from the file's pages, which the ranks of a node share.
        _align_memory(loaded)
    return loaded, new


def _align_memory(loaded: PreTrainedModel) -> None:
    """Copies misaligned weights into memory with PyTorch's usual alignment.

    In a memory-mapped file, weights start at any multiple of 4 bytes. Other kernels are then used, and the results differ
    in the last digits from those of the process that trained the weights.
    """
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def _unsupported_error(
    error: BaseException, model: schema.Model, config: PretrainedConfig, head: Head
) -> ConfigError | None:
    """Returns a clear error for two failures of transformers: a missing head and an unsupported attention."""
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
    shapes = _first_names(
        [f"{key} is {tuple(stored)}, expected {tuple(wanted)}" for key, stored, wanted in sorted(mismatched)], most=2
    )
    is_backbone = not hasattr(loaded, loaded.base_model_prefix)
    if is_backbone or any(key.startswith(f"{loaded.base_model_prefix}.") for key, _, _ in mismatched):
        raise ConfigError(
            f"model.name_or_path={name}: its weights do not fit model.config ({shapes}). Remove the override, or set "
            "model.from_scratch=true."
        )
    raise ConfigError(
        f"model.name_or_path={name} was trained for another number of labels ({shapes}). Name the model that it was "
        'trained from, or remove its head: python -c "from transformers import AutoModel; '
        f"AutoModel.from_pretrained('{name}').save_pretrained('FOLDER')\", then model.name_or_path=FOLDER "
        f"model.tokenizer={name}"
    )


def _first_names(names: list[str], *, most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _checkpoint_activations(loaded: PreTrainedModel) -> None:
    if not getattr(loaded, "supports_gradient_checkpointing", False):
        kind = getattr(getattr(loaded, "config", None), "model_type", type(loaded).__name__)
        raise ConfigError(f"model.gradient_checkpointing=true: transformers does not support it for a {kind} model.")
    # transformers 5 renamed the method; the old name warns.
    enable = getattr(loaded, "activation_checkpointing_enable", None) or loaded.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if hasattr(loaded, "config"):
        loaded.config.use_cache = False  # otherwise the cached keys and values would be recomputed as well

"""Checks the small files of a model's folder before a library reads them, because the folder may come from a stranger.

transformers builds as many layers and labels as config.json says, opens the files that tokenizer_config.json names, and
follows links. So a few bytes could fill the memory, and a tokenizer could be made of a private file, which is then
saved with the trained model.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.utils import cached_file

from dtrain.errors import ConfigError
from dtrain.models.hub_errors import LOADING_ERRORS

CONFIG_FILE, TOKENIZER_CONFIG_FILE = "config.json", "tokenizer_config.json"

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

MAX_COUNT = 10_000
"""Layers, experts and other parts that a model may have. Each is a Python object, whatever its size."""

MAX_LABELS = 1_000_000

MAX_GROWTH = 1000

MIN_ELEMENTS = 100_000_000
"""Elements that a model may have whatever its files hold: a new head, or new tokens."""

_NO_SIZES = re.compile(r"theta|_ids?$|eps|seed|prob|factor|range|version")

_COUNTS = re.compile(
    r"(^|_)(layers?|depths?|experts|stages|blocks|groups?_num|hidden_groups|feedforward_networks|repeats)$"
)

FILE_ENTRIES = ("vocab", "merges", "init_inputs")
"""Entries of tokenizer_config.json that transformers opens if they are paths. It ignores `vocab_file` and the like."""

LINK_TARGETS = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx")
"""Files of weights. They are often kept on another disk, and nothing but weights is read from them."""


def check_config_file(name: str, *, local_only: bool, setting: str) -> None:
    """Checks the links of a folder, the numbers in its config.json, and the names of its files of weights.

    Args:
        name: a folder or a name on the hub.
        local_only: whether to read local files only.
        setting: the setting that gave the name, for messages.

    Raises:
        ConfigError: a link leads out of the folder, or config.json asks for more parts than any model has.
    """
    _check_links(Path(name), setting)
    file, content = _read(name, CONFIG_FILE, local_only=local_only)
    for key, value in _numbers(content):
        limit = MAX_LABELS if key == "num_labels" else MAX_COUNT if _COUNTS.search(key) else None
        if limit is not None and value > limit:
            raise ConfigError(
                f"{setting}={name}: {file} has {key}={value!r:.20}, and a model has at most {limit}: building it would take "
                "all the memory. The file is damaged or forged: get the model again from a source that you trust."
            )

    for index in INDEX_FILES:
        index_file, content = _read(name, index, local_only=local_only)
        named = content.get("weight_map") if isinstance(content, dict) else None
        for part in named.values() if isinstance(named, dict) else ():
            if not isinstance(part, str) or PurePath(part).name != part:
                raise ConfigError(
                    f"{setting}={name}: {index_file} names the file of weights {part!r:.100}, which is not a name in that "
                    "folder. The file is damaged or forged: get the model again from a source that you trust."
                )


def check_tokenizer_files(name: str, *, local_only: bool, setting: str) -> None:
    """Checks what `check_config_file` checks, and the files that tokenizer_config.json names.

    Raises:
        ConfigError: as there; or tokenizer_config.json names a file to read.
    """
    check_config_file(name, local_only=local_only, setting=setting)
    file, content = _read(name, TOKENIZER_CONFIG_FILE, local_only=local_only)
    for key in FILE_ENTRIES:
        value = content.get(key) if isinstance(content, dict) else None
        if value and (isinstance(value, str) or key == "init_inputs"):
            raise ConfigError(
                f"{setting}={name}: {file} has {key}={value!r:.100}, so that the tokenizer would be read from another file, "
                f"which may be private. Remove that entry and put the tokenizer's own files beside {TOKENIZER_CONFIG_FILE}."
            )


def check_growth(backend: Any, name: str, *, setting: str) -> None:
    """Checks that a tokenizer's replacements do not multiply the length of a text, as ten times `o` -> `oooooooooo` would.

    Args:
        backend: a `tokenizers.Tokenizer`.

    Raises:
        ConfigError: they do.
    """
    for kind in ("normalizer", "decoder"):
        part = getattr(backend, kind)
        growth = 1.0 if part is None else _growth(json.loads(part.__getstate__()))
        if growth > MAX_GROWTH:
            raise ConfigError(
                f"{setting}={name}: the replacements in tokenizer.json ({kind}) can make a text {growth:.3g} times as long, "
                f"which would take all the memory (at most {MAX_GROWTH} times is usual). Take the tokenizer from a source that "
                "you trust."
            )


def _growth(part: Any) -> float:
    """Returns how many times longer a normalizer or decoder can make a text."""
    match part:
        case {"type": "Sequence", "normalizers": list(steps)} | {"type": "Sequence", "decoders": list(steps)}:
            return min(math.prod(map(_growth, steps)), 1e300)
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return max(1.0, len(new) / max(len(old), 1))
        case {"type": "Replace", "content": str(new)}:  # a pattern, which may match between two characters
            return 1.0 + len(new)
    return 1.0


def check_sizes(model_class: Any, name: str, config: PretrainedConfig, *, setting: str) -> None:
    """Checks that a model is not much larger than its weights: transformers allocates what the files lack before it complains.

    Args:
        model_class: the class that builds the model, or an Auto class.
        name: its folder. A name on the hub is not checked.

    Raises:
        ConfigError: it is.
    """
    folder = Path(name)
    files = (
        [file for file in folder.iterdir() if file.suffix in LINK_TARGETS and file.is_file()] if folder.is_dir() else []
    )
    limit = MIN_ELEMENTS + 8 * sum(
        file.stat().st_size for file in files
    )  # quantized models have several elements per byte
    sizes = sorted(value for key, value in _numbers(config.to_dict()) if not _NO_SIZES.search(key))
    if not files or math.prod(sizes[-2:]) <= limit:
        return
    try:
        with torch.device("meta"):  # without memory
            build = getattr(model_class, "from_config", None) or model_class._from_config
            built = build(copy.deepcopy(config))
    except LOADING_ERRORS:
        return  # loading it will say what is wrong
    largest, elements = max(((key, value.numel()) for key, value in built.named_parameters()), key=lambda item: item[1])
    if elements > limit:
        raise ConfigError(
            f"{setting}={name}: by its config.json, {largest} has {elements} elements, far more than all files of weights in "
            "the folder hold. The file is damaged or forged: get the model again from a source that you trust."
        )


def leads_outside(file: Path, folder: Path) -> bool:
    """Returns whether a file is a link that leads out of its folder to a file of another kind.

    A link to a file of the same name, or to the blobs of the hub's cache, is how users save room. Private files have other names.
    """
    if not file.is_symlink() and file.parent == folder:
        return False
    target = file.resolve()
    in_hub_cache = target.parent.name == "blobs" and target.parents[1].name.startswith(("models--", "datasets--"))
    return not in_hub_cache and target.name != file.name and not target.is_relative_to(folder.resolve())


def _check_links(folder: Path, setting: str) -> None:
    if not folder.is_dir():
        return  # of the hub's cache
    for file in (*folder.iterdir(), *folder.glob("*/*.jinja")):
        if file.suffix not in LINK_TARGETS and not file.is_dir() and leads_outside(file, folder):
            raise ConfigError(
                f"{setting}={folder}: {file.relative_to(folder)} is a link to {file.resolve()}, outside of the folder, "
                f"which may be private. If the file belongs to the model, replace the link by a copy: {copy_command(file)}"
            )


def copy_command(file: Path) -> str:
    """Returns the command that replaces a link by a copy of the file that it leads to."""
    return f"cp --remove-destination {shlex.quote(str(file.resolve()))} {shlex.quote(str(file))}"


def _read(name: str, file: str, *, local_only: bool) -> tuple[Path, Any]:
    """Returns a JSON file of a folder or repository, and its content; {} if it is missing or damaged, which others report."""
    try:
        found = cached_file(
            name,
            file,
            local_files_only=local_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return Path(str(found)), {} if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return Path(file), {}


def _numbers(content: Any) -> Iterator[tuple[str, float]]:
    """Yields the numbers in a config with their keys; those of a list with the key of the list."""
    stack: list[tuple[str, Any]] = [("", content)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, dict):
            stack += [(str(name), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            stack += [(key, inner) for inner in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value

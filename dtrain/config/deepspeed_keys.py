"""The keys of DeepSpeed's config, read from the source of the installed version. Imports no deepspeed, which takes seconds.

DeepSpeed ignores an unknown key at the top of its config. What it reads is found by following its config object through
the functions that get it, from DeepSpeedConfig._initialize_params on (runtime/config.py). Its sections are pydantic models.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

START = ("_initialize_params", "param_dict")
"""The function that reads the config, and the name of the config in it."""
BY_THE_ENGINE = {"sequence_parallel_size", "vocabulary_size"}
"""Keys that DeepSpeedConfig's other methods and the engine read."""
REMOVED = ("_REMOVED_TOP_LEVEL_CONFIG_KEYS", "_REMOVED_ZERO_CONFIG_KEYS")
"""Dictionaries of keys that DeepSpeed refuses."""
MODELS = {
    "zero_optimization": "DeepSpeedZeroConfig",
    "comms_logger": "CommsLoggerConfig",
    "tensorboard": "TensorBoardConfig",
    "wandb": "WandbConfig",
    "csv_monitor": "CSVConfig",
    "comet": "CometConfig",
    "hybrid_engine": "HybridEngineConfig",
    "compile": "CompileConfig",
}
"""Section -> its pydantic model."""
CONSTANTS = {
    "activation_checkpointing": "runtime/activation_checkpointing/config.py",
    "flops_profiler": "profiling/constants.py",
    "aio": "runtime/swap_tensor/constants.py",
}
"""Section -> the file whose constants are its keys. DeepSpeed ignores other keys in them."""
READERS = ("get_scalar_param", "get_list_param", "get_dict_param", "isinstance", "len")
"""Functions that read only the key in their second argument, or none."""
NOT_FOR_TRAINING = ("inference", "ops", "launcher", "model_implementations")
"""Folders of deepspeed whose config files are about something else."""

_KEY = re.compile(r"[a-z][a-z0-9_]*")


@dataclass
class KnownKeys:
    """What a section of the config may hold."""

    names: set[str]
    sections: dict[str, KnownKeys] = field(default_factory=dict)
    """The keys below some of the names."""


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """Returns a message for each key that the installed DeepSpeed does not know; none without DeepSpeed.

    Args:
        config: DeepSpeed's config, with sections as nested mappings.
    """
    known = known_keys() if config else None
    return [] if known is None else list(_unknown(config, known, "engine.deepspeed", known))


def _unknown(config: Mapping[str, Any], known: KnownKeys, prefix: str, top: KnownKeys) -> Iterator[str]:
    for key, value in config.items():
        if key not in known.names:
            version = importlib.metadata.version("deepspeed")
            yield f"{prefix}.{key} is not a key of DeepSpeed {version}{_hint(key, known, top)}"
        elif isinstance(value, Mapping) and key in known.sections:
            yield from _unknown(value, known.sections[key], f"{prefix}.{key}", top)


def _hint(key: str, known: KnownKeys, top: KnownKeys) -> str:
    if nearest := difflib.get_close_matches(key, sorted(known.names), 1):
        return f". Did you mean {nearest[0]}?"
    if homes := [section for section, keys in top.sections.items() if key in keys.names]:
        return f" at this place. Move it below {homes[0]}"
    if key in top.names:
        return f" at this place. Move it to engine.deepspeed.{key}"
    return ": remove it"


@cache
def known_keys() -> KnownKeys | None:
    """Returns the keys that the installed DeepSpeed reads; None if it is not installed, or written in another way."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0])
    files = [*root.rglob("*config.py"), *root.rglob("constants.py")]
    source = _Source()
    for file in sorted(file for file in files if file.relative_to(root).parts[0] not in NOT_FOR_TRAINING):
        try:
            source.read(ast.parse(file.read_text(encoding="utf-8")), file.relative_to(root).as_posix())
        except (OSError, SyntaxError, ValueError):
            return None
    names = source.keys_read(*START) | BY_THE_ENGINE
    if source.not_found or not {"zero_optimization", "steps_per_print", "gradient_clipping"} <= names:
        return None
    sections = {name: keys for name, model in MODELS.items() if (keys := source.keys_of_model(model)) is not None}
    sections |= {
        name: KnownKeys(source.constants_of[file]) for name, file in CONSTANTS.items() if file in source.constants_of
    }
    return KnownKeys(names - source.removed, sections)


class _Source:
    """What DeepSpeed's config files define."""

    def __init__(self) -> None:
        self.constants: dict[str, str] = {}
        self.constants_of: dict[str, set[str]] = {}
        self.functions: dict[str, ast.FunctionDef] = {}
        self.models: dict[str, ast.ClassDef] = {}
        self.removed: set[str] = set()
        self.not_found: set[str] = set()
        """Functions that get the config and are in none of the files."""

    def read(self, tree: ast.Module, file: str) -> None:
        """Adds the definitions of one file."""
        for node in ast.walk(tree):
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))) if _KEY.fullmatch(
                    text
                ):
                    self.constants[name] = text
                    if not name.endswith("DEFAULT"):
                        self.constants_of.setdefault(file, set()).add(text)
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Dict(keys=keys)) if name in REMOVED:
                    self.removed |= {str(key.value) for key in keys if isinstance(key, ast.Constant)}
                case ast.FunctionDef(name=name) if name != "__init__":
                    self.functions[name] = node
                case ast.ClassDef(name=name, body=body):
                    self.models[name] = node
                    for method in body:
                        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                            self.functions[name] = method

    def keys_read(self, function: str, config: str, seen: frozenset[str] = frozenset()) -> set[str]:
        """Returns the keys that a function, and those it calls, read from the argument `config`."""
        node = self.functions.get(function)
        if node is None:
            self.not_found.add(function)
        if node is None or function in seen:
            return set()
        names = {argument.arg: default for argument, default in _defaults(node)}
        for part in ast.walk(node):
            if isinstance(part, ast.comprehension) and isinstance(part.target, ast.Name):
                names[part.target.id] = part.iter
        keys: set[str] = set()
        for part in ast.walk(node):
            match part:
                case ast.Subscript(value=value, slice=key) if _is(value, config):
                    keys |= self._texts(key, names)
                case ast.Compare(left=key, comparators=[value]) if _is(value, config):
                    keys |= self._texts(key, names)
                case ast.Call(func=ast.Attribute(value=value, attr="get"), args=[key, *_]) if _is(value, config):
                    keys |= self._texts(key, names)
                case ast.Call(func=ast.Name(id=name), args=[value, *rest]) if _is(value, config):
                    keys |= {text for key in rest[:1] for text in self._texts(key, names)}
                    if name not in READERS:
                        keys |= self.keys_read(name, self._first_argument(name), seen | {function})
        return keys

    def _first_argument(self, function: str) -> str:
        node = self.functions.get(function)
        arguments = [argument.arg for argument in node.args.args if argument.arg != "self"] if node is not None else []
        return arguments[0] if arguments else ""

    def _texts(self, node: ast.AST, names: Mapping[str, ast.AST]) -> set[str]:
        """Returns the texts that an expression can be: a literal, a constant, a default, or the items of a tuple."""
        match node:
            case ast.Constant(value=str(text)):
                return {text}
            case ast.Tuple(elts=items) | ast.List(elts=items):
                return {text for item in items for text in self._texts(item, {})}
            case ast.Name(id=name) if name in names:
                return self._texts(names[name], {})
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in self.constants:
                return {self.constants[name]}
        return set()

    def keys_of_model(self, name: str) -> KnownKeys | None:
        """Returns the fields of a pydantic model, with those of the models in it."""
        if name not in self.models:
            return None
        keys = KnownKeys(set())
        for node in self.models[name].body:
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            options = node.value.keywords if isinstance(node.value, ast.Call) else []
            aliases = {text for option in options if option.arg == "alias" for text in self._texts(option.value, {})}
            keys.names |= {node.target.id} | aliases
            inner = [
                part.id for part in ast.walk(node.annotation) if isinstance(part, ast.Name) and part.id in self.models
            ]
            if (below := self.keys_of_model(inner[0]) if inner else None) is not None and below.names:
                keys.sections |= dict.fromkeys({node.target.id} | aliases, below)
        return keys


def _defaults(function: ast.FunctionDef) -> Iterator[tuple[ast.arg, ast.AST]]:
    defaults = function.args.defaults
    return zip(function.args.args[len(function.args.args) - len(defaults) :], defaults, strict=True)


def _is(node: ast.AST, name: str) -> bool:
    """Returns whether an expression is the variable, or its keys()."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "keys":
        node = node.func.value
    return isinstance(node, ast.Name) and node.id == name

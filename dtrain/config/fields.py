"""The parts that every config section is built from: the frozen base model, the field declaration and shared types."""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict
from pydantic.fields import FieldInfo

OnResume = Literal["free", "warn", "refuse"]


def setting(default: Any, meaning: str, *, resume: OnResume = "refuse", **limits: Any) -> Any:
    """Returns a config field.

    Args:
        default: its default value; `...` makes the field required.
        meaning: one line for the reference in configs/README.md.
        resume: how a resumed run treats a changed value. free: accepts it. warn: accepts it and logs a warning.
            refuse: stops with an error, because the change would alter the results.
        limits: pydantic constraints, such as `ge=1`.
    """
    if isinstance(default, tuple):
        limits["strict"] = False  # YAML has lists but no tuples. The items stay strict.
    if isinstance(default, BaseModel):
        limits["default_factory"] = lambda: default
    else:
        limits["default"] = default
    field: FieldInfo = Field(description=meaning, json_schema_extra={"resume": resume}, **limits)
    return field


def _expand_home(path: str | Path) -> Any:
    return type(path)(os.path.expanduser(path))  # noqa: PTH111 - a str may also be a name on the hub


def _check_folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}", name):
        raise ValueError(
            f"{name!r} is not a name for a folder: letters, digits, '.', '_', '-', and a letter or digit first"
        )
    return name


FolderName = Annotated[str, AfterValidator(_check_folder_name)]
"""One folder's name on every system: it cannot lead out of the folder that it is put in."""

AnyPath = Annotated[Path, Strict(False), AfterValidator(_expand_home)]
NameOrPath = Annotated[str, AfterValidator(_expand_home)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base class of a config section. Frozen; rejects unknown keys, `true` for 1, text for a number, and nan."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), validate_default=True
    )


def read_eval_every(value: Any) -> Any:
    """Reads train.eval_every."""
    if not re.fullmatch(r"epoch|[1-9]\d*( epochs?)?|never", str(value)):
        raise ValueError("it must be a number of steps, at least 1, or epoch, 'N epochs' or never")
    return int(value) if str(value).isdecimal() else value


def read_checkpoint_every(value: Any) -> Any:
    """Reads checkpoint.every."""
    if value is not None and not re.fullmatch(r"epoch|[1-9]\d*( epochs?)?", str(value)):
        raise ValueError("it must be a number of steps, at least 1, or epoch, 'N epochs' or null")
    return int(value) if str(value).isdecimal() else value


NOT_OF_FILES = ("idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape")
"""Python's names of encodings that no text file has. Some take hours for a long line."""


EvalEvery = Annotated[int | str, BeforeValidator(read_eval_every)]
CheckpointEvery = Annotated[int | str | None, BeforeValidator(read_checkpoint_every)]


def is_text_encoding(name: str) -> bool:
    """Returns whether Python knows an encoding of text files by this name."""
    try:
        return "".encode(name) is not None and codecs.lookup(name).name not in NOT_OF_FILES
    except (LookupError, ValueError, UnicodeError):
        return False

"""What every section of the config is made of: frozen models, one way to declare a field, types that sections share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict
from pydantic.fields import FieldInfo

OnResume = Literal["free", "warn", "refuse"]


def setting(default: Any, meaning: str, *, resume: OnResume = "refuse", **limits: Any) -> Any:
    """A config field. `resume` says what a resumed run may do with a changed value.

    free: may change. warn: may change, with a word about it. refuse: it changes the mathematics.
    `...` as the default makes the field required.
    """
    if isinstance(default, tuple):
        limits["strict"] = False  # YAML has lists, no tuples; the items stay strict
    if isinstance(default, BaseModel):
        limits["default_factory"] = lambda: default
    else:
        limits["default"] = default
    field: FieldInfo = Field(description=meaning, json_schema_extra={"resume": resume}, **limits)
    return field


def _below_home(path: str | Path) -> Any:
    return type(path)(os.path.expanduser(path))  # noqa: PTH111 - a str may also be a name on the hub


AnyPath = Annotated[Path, Strict(False), AfterValidator(_below_home)]
NameOrPath = Annotated[str, AfterValidator(_below_home)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """One section of the config, frozen. Unknown keys, `true` for 1, text for a number, and nan are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), validate_default=True
    )

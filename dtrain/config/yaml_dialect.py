"""YAML as dtrain reads and writes it: scalars as YAML 1.2 has them, text quoted where another reader would misread it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import yaml

from dtrain.config.error_messages import ABSENT

TAG = "tag:yaml.org,2002:"


class Loader(yaml.SafeLoader):
    """For parsing only. Plain scalars are YAML 1.2's: `1e-4` is a number; `no`, `1:30` and dates are text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own way


class Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would not read back as text; short lists stay on one line."""


for _kind, _pattern, _first in (
    ("null", r"(~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    ("int", r"[-+]?\d+(_\d+)*\Z", list("-+0123456789")),
    (
        "float",
        r"([-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z",
        list("-+.0123456789"),
    ),
):
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(TAG + _kind, re.compile(_pattern), _first)
Dumper.add_representer(
    list,
    lambda dumper, items: dumper.represent_sequence(
        TAG + "seq", items, flow_style=not any(isinstance(item, dict | list) for item in items)
    ),
)
Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(f"{TAG}str", text, style='"' if "\n" in text else None),
)

SCALARS: dict[str, Callable[[str], Any]] = {
    TAG + "null": lambda text: None,
    TAG + "bool": lambda text: text.lower() == "true",
    TAG + "int": int,
    TAG + "float": lambda text: float(re.sub(r"\.(?=[in])", "", text.lower())),
    TAG + "str": str,
}


def dump(values: Any) -> str:
    """Plain values as a YAML file, mappings in their order."""
    text: str = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def quoted(text: str) -> str:
    """A text as a value that is read as that text however it looks: null, 'quoted', nothing at all."""
    value: str = yaml.dump(text, default_style='"', allow_unicode=True, width=sys.maxsize)
    return value.removesuffix("\n")


def show(value: Any) -> str:
    """A value as one line of YAML, cut where it is long."""
    if value is ABSENT:
        return "(not set)"
    try:
        text = yaml.dump(
            value, Dumper=Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6
        )
    except yaml.YAMLError:
        text = repr(value)
    text = " ".join(text.removesuffix("...\n").split("\n")).strip()
    return text if len(text) <= 100 else f"{text[:97]}..."

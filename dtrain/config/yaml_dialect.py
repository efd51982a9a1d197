"""The YAML that dtrain reads and writes: scalars of YAML 1.2, with quotes where a YAML 1.1 reader needs them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import yaml

from dtrain.config.error_messages import ABSENT

TAG = "tag:yaml.org,2002:"


class Loader(yaml.SafeLoader):
    """Parses with the plain scalars of YAML 1.2: `1e-4` is a number; `no`, `1:30` and dates are text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's class attribute


class Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would not read back as text. Short lists stay on one line."""


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
    """Returns plain values as the text of a YAML file. Mappings keep their order."""
    text: str = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def quote(text: str) -> str:
    """Returns the text as a quoted YAML value, which is read back unchanged even if it is `null`, quoted or empty."""
    value: str = yaml.dump(text, default_style='"', allow_unicode=True, width=sys.maxsize)
    return value.removesuffix("\n")


def show(value: Any) -> str:
    """Returns a value as one line of YAML, shortened to 100 characters."""
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

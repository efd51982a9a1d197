"""The YAML that dtrain reads and writes: scalars of YAML 1.2, with quotes where a YAML 1.1 reader needs them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import yaml

from dtrain.config.error_messages import ABSENT

TAG = "tag:yaml.org,2002:"


MAX_BYTES = 1_000_000
"""Size of a config file."""
MAX_NODES = 100_000
"""Values in a YAML text, after its aliases (*name) are replaced by what they stand for."""
MAX_DEPTH = 100
"""Lists and mappings inside each other, aliases replaced."""
MAX_DIGITS = 100
"""Characters of a number."""


class LimitError(yaml.MarkedYAMLError):
    """A YAML text exceeds a limit. Such a text can be short: aliases of aliases double it with every line."""


class Loader(yaml.SafeLoader):
    """Parses with the plain scalars of YAML 1.2: `1e-4` is a number; `no`, `1:30` and dates are text. Has limits."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's class attribute

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._measures: dict[int, tuple[int, int]] = {}
        """Id of each complete node -> its number of values and of levels."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Composes the next node. PyYAML calls it for every node of a text.

        Raises:
            LimitError: the text exceeds a limit.
        """
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark, is_alias = event.start_mark, isinstance(event, yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise LimitError(None, None, f"values are nested more than {MAX_DEPTH} levels deep", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if is_alias:
            if id(node) not in self._measures:
                raise LimitError(None, None, "an alias (*name) contains itself", mark)
            return node
        values = node.value if isinstance(node, yaml.CollectionNode) else []
        below = [
            self._measures[id(child)] for value in values for child in (value if isinstance(value, tuple) else [value])
        ]
        size, depth = 1 + sum(size for size, _ in below), 1 + max((depth for _, depth in below), default=0)
        if size > MAX_NODES:
            raise LimitError(
                None, None, f"with aliases (*name) replaced, there are more than {MAX_NODES:,} values", mark
            )
        if depth > MAX_DEPTH:
            raise LimitError(
                None, None, f"with aliases replaced, values are nested more than {MAX_DEPTH} levels deep", mark
            )
        self._measures[id(node)] = size, depth
        return node


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

NUMBERS = (TAG + "int", TAG + "float")


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

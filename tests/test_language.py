"""The repository is written in plain American English: a list of spellings and turns of phrase that it does not use.

The list holds what was found and removed. It cannot judge a sentence; it keeps old habits from coming back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("dtrain", "launch", "configs", "hostfiles", "docs")
PAGES = ("README.md", "CONTRIBUTING.md", "tests/README.md", "tests/benchmarks/README.md")
TEXT_SUFFIXES = (".py", ".md", ".yaml", ".sh", ".sbatch", "")

# Written in pieces, so that this file does not contain them.
BRITISH = (
    *("behavi" + "our", "col" + "our", "fav" + "our", "neighb" + "our", "hon" + "our"),
    *("initial" + "is", "serial" + "is", "token" + "is", "normal" + "is(?!m)", "recogn" + "is", "organ" + "is(?!m)"),
    *("summar" + "is", "optim" + "ise", "synchron" + "is", "minim" + "ise", "maxim" + "ise", "general" + "ise"),
    *("label" + "l", "cancel" + "led", "travel" + "l", "model" + "ling", "gr" + "ey", "whi" + "lst", "catal" + "ogue"),
)
TURNS = (
    "without a w" + "ord",
    "to be h" + "ad",
    "what (becomes|became|becom) " + "of",
    "for want " + "of",
    "last w" + "ords?",
    "the pen " + "of",
    "pass(es)? us " + "by",
    "roll-" + "call",
    "turned " + "away",
    "tells nob" + "ody",
    "wish(es)? to (stop|roll|end)",
    "whoe" + "ver",
    "whats" + "oever",
    "whose " + "is whose",
    "guil" + "ty",
    "ver" + "dict",
    "fare" + "well",
    "testi" + "f(y|ies)",
    "lea" + "sh",
    "an" + "ew",
    "beh" + "old",
    "is n" + "ot asked",
    "go(es)? as" + "tray",
    "while it is a" + "t it",
    "under the h" + "ood",
)
DENIED = re.compile("|".join([*(rf"\b\w*{word}" for word in BRITISH), *(rf"\b{turn}\b" for turn in TURNS)]), re.I)

ALLOWED = re.compile(r"\.cancel" + r"led\(|\"label" + r"led\"")
"""A method of asyncio, and a kind of row whose name is part of the keys of tokenized data in users' caches."""


def texts() -> Iterator[tuple[str, str]]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    for path in [*paths, *(ROOT / page for page in PAGES)]:
        if path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts:
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def breaches(name: str, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        for match in DENIED.finditer(ALLOWED.sub("", line)):
            yield f"{name}:{number}: {match.group()}: {line.strip()[:100]}"


def test_no_text_uses_a_denied_spelling_or_turn_of_phrase() -> None:
    found = [breach for name, text in texts() for breach in breaches(name, text)]

    assert not found, "\n".join(found)


@pytest.mark.parametrize("line", ["the behavi" + "our of it", "it dies without a w" + "ord", "a label" + "led row"])
def test_a_denied_line_would_be_found(line: str) -> None:
    assert list(breaches("a.md", line))


@pytest.mark.parametrize("line", ["the behavior of it", "it exits without a message", "optimism, organism, gray"])
def test_plain_lines_pass(line: str) -> None:
    assert not list(breaches("a.md", line))


UNQUOTED = re.compile(r"(?<![\w'])[a-z_]+\.[a-z_]+=\{+\w+: ")
"""A setting to paste, with a mapping as its value: the shell would cut it at the space. Write model.config.key=value."""


@pytest.mark.parametrize("path", sorted((ROOT / "dtrain").rglob("*.py")), ids=lambda path: path.name)
def test_a_setting_to_paste_needs_no_quotes(path: Path) -> None:
    assert UNQUOTED.findall(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("Set model.config={{pad_token_id: {token}}}.", True),
        ("Set model.config={pad_token_id: 0}.", True),
        ("Set 'model.config={pad_token_id: 0}'.", False),
        ("Set model.config.pad_token_id={token}.", False),
    ],
)
def test_a_mapping_without_quotes_is_found(text: str, *, is_found: bool) -> None:
    assert (UNQUOTED.search(text) is not None) == is_found

"""docs/cuda.md lists every place in dtrain that calls CUDA, NCCL or a stream, and what holds it. Nothing may be missing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dtrain"
PAGE = ROOT / "docs" / "cuda.md"

PREFIXES = ("torch.cuda.", "torch.backends.cuda.", "torch.backends.cudnn.", "torch.version.")
NAMES = ("torch.OutOfMemoryError", "torch.use_deterministic_algorithms")
ARGUMENTS = ("pin_memory", "non_blocking", "device_ids")
METHODS = ("pin_memory", "cuda")
WORDS = re.compile(
    r"(?:(?:TORCH_)?NCCL|CUDA|CUBLAS|PYTORCH)_[A-Z_]*|DS_ACCELERATOR|cpu:gloo,cuda:nccl|_dump_nccl\w+"
)  # whole strings: what a message tells the user is no call
CODE_IN_TEXT = re.compile(r"torch\.(?:cuda|version)\.[\w.]*\w")
"""In code that is sent to another process as text."""


def calls(source: str) -> Iterator[str]:
    """The calls of CUDA, NCCL and streams in a module, as the page names them. Comments and docstrings are no calls."""
    tree = ast.parse(source)
    prose = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute() if id(node) not in inner:
                name = ast.unparse(node)
                if name.startswith(PREFIXES) or name in NAMES:
                    yield name
                elif node.attr in METHODS:
                    yield f".{node.attr}()"
            case ast.keyword(arg=str(name)) if name in ARGUMENTS:
                yield f"{name}="
            case ast.Constant(value="cuda" | "nccl" as word):
                yield f'"{word}"'
            case ast.Constant(value=str(text)) if id(node) not in prose:
                yield from [text] if WORDS.fullmatch(text) else []
                yield from (
                    CODE_IN_TEXT.findall(text) if re.search(r"^import .*torch", text, re.M) and "\n" in text else []
                )


def found() -> set[tuple[str, str]]:
    return {
        (call, file.relative_to(PACKAGE).as_posix())
        for file in sorted(PACKAGE.rglob("*.py"))
        for call in calls(file.read_text(encoding="utf-8"))
    }


def rows() -> list[list[str]]:
    """Call, file, purpose and what holds it, of each row of the page's tables of calls."""
    _, _, tables = PAGE.read_text(encoding="utf-8").partition("## Every call")
    lines = [line.strip("| ").split(" | ") for line in tables.splitlines() if line.startswith("| `")]
    return [[call.strip("`"), file.strip("`"), *others] for call, file, *others in lines]


def test_the_scan_finds_calls_and_leaves_out_prose() -> None:
    source = '"""NCCL_DEBUG, torch.cuda.Event"""\nimport torch\n# torch.cuda.Stream\n'
    source += 'a = torch.cuda.Event(x=1)\nb.pin_memory()\nc.to(d, non_blocking=True)\ne = "cpu:gloo,cuda:nccl"\n'
    source += 'f = "CUDA"\ng = "set NCCL_DEBUG=WARN"\nh = """import torch\\ntorch.cuda.nccl.version()"""\nj = "NCCL_IB"\ni.type == "cuda"\n'

    assert sorted(calls(source)) == sorted(
        [
            "torch.cuda.Event",
            ".pin_memory()",
            "non_blocking=",
            "cpu:gloo,cuda:nccl",
            "NCCL_IB",
            "torch.cuda.nccl.version",
            '"cuda"',
        ]
    )


def test_every_call_has_a_row_and_every_row_a_call() -> None:
    listed = {(call, file) for call, file, *_ in rows()}

    assert sorted(found() - listed) == [], "calls without a row in docs/cuda.md"
    assert sorted(listed - found()) == [], "rows in docs/cuda.md whose call is gone"
    assert len(listed) == len(rows()), "two rows for one call"


def test_every_row_says_what_for_and_names_a_test_that_exists_or_a_reading() -> None:
    names = names_of_tests()
    for call, file, purpose, held_by in rows():
        tests = re.findall(r"`(test_\w+)`", held_by)
        assert len(purpose.split()) >= 2, f"{call} in {file}: what for?"
        assert tests or "by reading" in held_by, f"{call} in {file}: neither a test nor a reading holds it"
        assert [name for name in tests if name not in names] == [], f"{call} in {file}: no such test"


def names_of_tests() -> frozenset[str]:
    files = (ROOT / "tests").rglob("test_*.py")
    return frozenset(name for file in files for name in re.findall(r"^def (test_\w+)\(", file.read_text("utf-8"), re.M))

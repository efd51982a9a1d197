"""Functions imported by name from the config file's folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.config.user_function import describe_error, import_function
from dtrain.errors import ConfigError


@pytest.fixture(autouse=True)
def forget_modules() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_importing_a_function_from_the_folder_leaves_the_search_path_unchanged(tmp_path: Path) -> None:
    (tmp_path / "own_part").mkdir()
    (tmp_path / "own_part" / "inner.py").write_text("from own_other import FACTOR\ndef twice(x): return FACTOR * x\n")
    (tmp_path / "own_other.py").write_text("FACTOR = 2\n")
    before = list(sys.path)

    twice = import_function("own_part.inner:twice", folder=tmp_path, setting="evaluation.factory")

    assert twice(3) == 6
    assert sys.path == before


def test_an_installed_function_is_found_as_well(tmp_path: Path) -> None:
    assert import_function("statistics:mean", folder=tmp_path, setting="evaluation.factory")([1, 3]) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_metrics", "is not the name of a function: write package.module:function"),
        ("own-metrics:f", "is not the name of a function"),
        ("own_metrics:", "is not the name of a function"),
        ("a:b:c", "is not the name of a function"),
        ("own_missing:f", "there is no module own_missing"),
        ("own_needs:f", "it imports own_absent_library, which is not installed"),
        ("own_broken:f", r"SyntaxError"),
        ("own_raises:f", r"ValueError: no luck \(own_raises.py, line 2\)"),
        ("own_metrics:g", r"own_metrics.py has no function g"),
        ("own_metrics:LIMIT", r"own_metrics.py has no function LIMIT"),
    ],
)
def test_a_function_that_cannot_be_imported_is_named_with_its_setting(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "own_metrics.py").write_text("LIMIT = 3\ndef f(): pass\n")
    (tmp_path / "own_needs.py").write_text("import own_absent_library\n")
    (tmp_path / "own_broken.py").write_text("def f(:\n")
    (tmp_path / "own_raises.py").write_text("\nraise ValueError('no luck')\n")
    before = list(sys.path)

    with pytest.raises(ConfigError, match=rf"evaluation\.factory={spec}.*{message}"):
        import_function(spec, folder=tmp_path, setting="evaluation.factory")
    assert sys.path == before


def test_an_error_is_located_in_the_users_own_file(tmp_path: Path) -> None:
    (tmp_path / "own_calls.py").write_text("import json\ndef f(text):\n    return json.loads(text)\n")
    call = import_function("own_calls:f", folder=tmp_path, setting="evaluation.factory")

    with pytest.raises(ValueError, match="Expecting") as caught:
        call("{")

    assert describe_error(caught.value, "own_calls").endswith("(own_calls.py, line 3)")

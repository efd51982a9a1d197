"""Options are written out: no program of this repository takes an abbreviation for one."""

from __future__ import annotations

import ast
import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

from dtrain.cluster.hostfile import main as check_hostfile
from dtrain.commands.arguments import Parser, parse
from dtrain.commands.launch import read_arguments
from dtrain.config.option_parser import OptionParser
from dtrain.errors import ConfigError

ROOT = Path(__file__).parents[2]
OWN_PARSERS = {("dtrain/config/option_parser.py", "OptionParser"), ("launch/simulate-cluster", "Parser")}
"""The only classes that extend argparse's."""


def options_of_dtrain(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    parsers: list[Parser] = []
    read = Parser.parse_known_intermixed_args

    def note(self: Parser, *arguments: Any) -> Any:
        parsers.append(self)
        return read(self, *arguments)

    monkeypatch.setattr(Parser, "parse_known_intermixed_args", note)
    parse([])
    return parsers[0].long_options()


def test_every_option_of_dtrain_is_refused_without_its_last_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of_dtrain(monkeypatch)
    assert {"--ranks", "--max-restarts", "--config", "--json"} <= set(options)

    for option in options:
        with pytest.raises(ConfigError) as error:
            parse([option[:-1], "2"])
        assert f"{option[:-1]} is not an option. Did you mean {option}?" in str(error.value)


@pytest.mark.parametrize("option", ["--hostfi", "--includ", "--exclud"])
def test_options_of_the_hostfiles_check_are_written_out(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_hostfile(["hosts", option, "node1"]) == ConfigError.exit_code
    assert f"{option} is not an option." in capsys.readouterr().err


def test_a_launch_script_passes_an_abbreviation_on_to_dtrain_which_refuses_it() -> None:
    options = read_arguments(["torchrun", "hosts", "--max-restart", "1"])
    with pytest.raises(ConfigError, match=r"--max-restart is not an option\. Did you mean --max-restarts\?"):
        parse(options.rest, program=options.program, launcher_options=options.options)


def test_subcommands_refuse_abbreviations_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    parser = OptionParser(prog="compare", allow_abbrev=True)
    parser.add_subparsers(dest="command").add_parser("record").add_argument("--folder")

    assert parser.parse_args(["record", "--folder", "x"]).folder == "x"
    with pytest.raises(SystemExit):
        parser.parse_args(["record", "--fold", "x"])
    assert "--fold is not an option. Did you mean --folder?" in capsys.readouterr().err


def test_the_simulator_of_clusters_refuses_abbreviations(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # the program changes both
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    path = str(ROOT / "launch" / "simulate-cluster")
    spec = importlib.util.spec_from_loader("simulate_cluster", SourceFileLoader("simulate_cluster", path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    for words, option in ((["up", "2", "--slot", "2"], "--slots"), (["status", "--js"], "--json")):
        with pytest.raises(SystemExit):
            module.parse(words)
        assert f"Did you mean {option}?" in capsys.readouterr().err


def other_parsers(path: str, source: str) -> list[str]:
    """Names of the classes that make or extend argparse's own parser in a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and any("ArgumentParser" in ast.unparse(base) for base in node.bases):
            if (path, node.name) not in OWN_PARSERS:
                found.append(node.name)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser"):
            found.append(ast.unparse(node.func))
    return found


def test_no_program_has_a_parser_that_takes_abbreviations() -> None:
    files = [path for folder in ("dtrain", "tests", "launch") for path in (ROOT / folder).rglob("*.py")]
    sources = {
        path.relative_to(ROOT).as_posix(): path.read_text() for path in [*files, ROOT / "launch/simulate-cluster"]
    }
    parsers = {path: source for path, source in sources.items() if "OptionParser(" in source}

    assert len(parsers) > 15
    assert {path: found for path, source in sources.items() if (found := other_parsers(path, source))} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import argparse\nargparse.ArgumentParser(allow_abbrev=False)", ["argparse.ArgumentParser"]),
        ("class Own(ArgumentParser): pass\nOwn()", ["Own"]),
        ("parser = OptionParser()", []),
    ],
)
def test_such_a_parser_would_be_found(source: str, found: list[str]) -> None:
    assert other_parsers("a.py", source) == found

"""The line that says what a command took from a run names only what the command uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.config.load import load_config

FILE = """
run: {name: mine, seed: 3}
task: {name: chat}
data: {path: talk.jsonl, max_length: 77}
evaluation: {micro_batch_size: 5}
generate: {max_new_tokens: 9}
"""


@pytest.mark.parametrize(("command", "reads_rows"), [("generate", False), ("chat", False), ("evaluate", True)])
def test_data_are_named_to_commands_that_read_rows(command: str, reads_rows: bool, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(FILE)

    note = load_config(None, [f"model.name_or_path={tmp_path}"], command=command).note

    assert note is not None
    assert "run.seed=3" in note
    assert "generate.max_new_tokens=9" in note
    assert ("data.max_length=77" in note) == ("evaluation.micro_batch_size=5" in note) == reads_rows

"""The export command as a process: transformers alone loads what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from tests.support import jobs, tiny
from tests.support.command_line import dtrain

pytestmark = pytest.mark.commands


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained classifier and a trained language model, of a few steps."""
    folder = tmp_path_factory.mktemp("exported") / "runs"
    sizes = ["model.config.n_layer=1", "model.config.n_positions=32", "data.max_length=32", "data.limit=300"]
    for command in (
        jobs.settings(folder, "bert", train__eval_every="epoch"),
        ["run.name=gpt2", f"run.output_dir={folder}", "train.max_steps=2", "schedule.warmup_steps=0", *sizes],
    ):
        ended = dtrain(*command)
        assert ended.code == 0, ended.text
    return folder


def logits(folder: Path, kind: str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    auto: Any = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("the old cat sleeps", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        found: torch.Tensor = auto.from_pretrained(folder).eval()(**inputs).logits
    return found


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_an_exported_model_gives_the_same_logits_with_plain_transformers(tmp_path: Path, runs: Path, kind: str) -> None:
    source = runs / kind / "model"
    before = logits(source, kind)

    whole = dtrain("export", f"model.name_or_path={source}", f"export.to={tmp_path / 'whole'}", "export.dtype=fp32")
    half = dtrain("export", f"model.name_or_path={source}", f"export.to={tmp_path / 'half'}", "export.dtype=bf16")
    twice = dtrain("export", f"model.name_or_path={source}", f"export.to={tmp_path / 'half'}")

    assert (whole.code, half.code, twice.code) == (0, 0, 2), whole.text + half.text
    assert torch.allclose(logits(tmp_path / "whole", kind), before, rtol=0, atol=1e-6)
    rounded = logits(tmp_path / "half", kind)
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded.float(), before, rtol=0, atol=5e-2)
    assert "exists already" in twice.text
    assert sorted(path.name for path in runs.iterdir()) == ["bert", "gpt2"], "export makes no run folder"


def test_training_writes_a_card_and_export_copies_it(tmp_path: Path, runs: Path) -> None:
    ended = dtrain("export", f"model.name_or_path={runs / 'bert' / 'model'}", f"export.to={tmp_path / 'out'}")

    assert ended.code == 0, ended.text
    trained = (runs / "bert" / "model" / "README.md").read_text()
    assert (tmp_path / "out" / "README.md").read_text() == trained
    data = ModelCard(trained).data.to_dict()
    assert data["pipeline_tag"] == "text-classification"
    accuracy = jobs.summary_of(runs / "bert")["eval"]["accuracy"]
    assert {"type": "accuracy", "value": accuracy} in data["model-index"][0]["results"][0]["metrics"]
    assert "| train | 40 |" in trained
    assert "| validation | 7 |" in trained
    assert "dtrain train run.name=bert task.name=classification" in trained
    assert str(tmp_path.parent.parent) not in trained
    assert str(runs.parent) not in trained


def test_an_invalid_run_folder_gives_a_minimal_card(tmp_path: Path, runs: Path) -> None:
    model = tiny.write_model(tmp_path / "run" / "model", layers=1)
    (tmp_path / "run" / "summary.json").write_text('{"command": "train"}')
    (tmp_path / "run" / "config.yaml").write_text("no: config\n")

    ended = dtrain("export", f"model.name_or_path={model}", f"export.to={tmp_path / 'out'}")

    assert ended.code == 0, ended.text
    assert "# out" in (tmp_path / "out" / "README.md").read_text()

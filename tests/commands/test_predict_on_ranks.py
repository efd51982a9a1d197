"""predict writes the same files at every world size, even with more ranks than rows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from dtrain.commands.predict import run_predict
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.rank_context import RankContext
from tests.support import tiny
from tests.support.multirank import run_ranks

pytestmark = pytest.mark.ranks

ROWS = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier and the test file of CoLA."""
    folder = tmp_path_factory.mktemp("made")
    module = tiny.bert(dropout=0.1)
    module.classifier.weight.data.mul_(30.0)
    module.config.id2label = {0: "acceptable", 1: "unacceptable"}
    module.config.label2id = {"acceptable": 0, "unacceptable": 1}
    module.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    lines = ["index\tsentence", *(f"{row}\tthe {tiny.WORDS[3 * row]} sleeps" for row in range(ROWS))]
    (folder / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def predicted(context: RankContext, folder: str, name: str, text: str | None) -> list[str]:
    """Collective. Returns the files that the command writes or, with a text, its log message."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    sections: dict[str, Any] = {
        "run": {"name": name, "output_dir": folder},
        "task": {"name": "classification"},
        "model": {"name_or_path": f"{folder}/model"},
        "data": {"name": "cola", "path": folder, "cache_dir": f"{folder}/cache", "max_length": 16},
        "predict": {"text": text},
        "evaluation": {"micro_batch_size": 2},
    }
    run_predict(Config.model_validate(sections), context)
    if text is not None:
        return messages[-1:]
    run = Path(folder) / name
    return [(run / file).read_text() for file in ("predictions/test.jsonl", "submission/CoLA.tsv")]


def test_every_world_size_writes_the_same_files(made: Path) -> None:
    (alone,) = run_ranks(predicted, 1, str(made), "alone", None)

    for world_size in (2, 4):
        for found in run_ranks(predicted, world_size, str(made), f"on-{world_size}", None):
            assert found == alone
    assert len(alone[0].splitlines()) == ROWS
    assert len(alone[1].splitlines()) == ROWS + 1


def test_one_text_gets_the_same_answer_on_every_rank(made: Path) -> None:
    (alone,) = run_ranks(predicted, 1, str(made), "text", "the cat sleeps")

    assert run_ranks(predicted, 2, str(made), "text", "the cat sleeps") == [alone, alone]
    assert "probability" in alone[0]
    assert not (made / "text").exists()

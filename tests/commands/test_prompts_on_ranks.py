"""Prompts are distributed over the ranks, and the output is the same at every world size."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from transformers import BertForTokenClassification

from dtrain.commands.predict import run_predict
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import DataError
from tests.support import tiny, tiny_chat
from tests.support.multirank import run_ranks
from tests.support.tiny_lm import bert

pytestmark = pytest.mark.ranks

TAGS = "token_classification"

PROMPTS = {
    "causal_lm": "".join(f"{word} a\n" for word in ("a", "\u4f60", "b", "\u597d", "a b")),
    "masked_lm": "".join(f"the [MASK] {word}\n" for word in tiny.WORDS[:5]),
    "chat": "".join(f"{word}\n" for word in ("a", "\u4f60", "b", "\u597d", "a b")),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for task, text in PROMPTS.items():
        tokenizer = tiny.tokenizer() if task == "masked_lm" else tiny_chat.tokenizer()
        (bert(tokenizer) if task == "masked_lm" else tiny_chat.gpt()).save_pretrained(folder / task)
        tokenizer.save_pretrained(folder / task)
        (folder / f"{task}.txt").write_text(text, encoding="utf-8")
    tagger = BertForTokenClassification(bert(tiny.tokenizer()).config)
    tagger.config.id2label, tagger.config.label2id = {0: "O", 1: "B-A"}, {"O": 0, "B-A": 1}
    tagger.save_pretrained(folder / TAGS)
    tiny.tokenizer().save_pretrained(folder / TAGS)
    (folder / "bad.txt").write_text("the [MASK]\nthe cat\n")
    return folder


def settings(folder: str, task: str, run: str, **asked: str) -> Config:
    return Config.model_validate(
        {
            "run": {"name": run, "output_dir": folder},
            "task": {"name": task},
            "model": {"name_or_path": f"{folder}/{task}"},
            "data": {"max_length": 8},
            "generate": {"max_new_tokens": 5, "temperature": 1.5},
            "predict": asked,
        }
    )


def predicted(context: RankContext, folder: str) -> list[str]:
    """Collective. Returns the predictions of each task."""
    predictions = []
    for task in PROMPTS:
        run = f"{task}-on-{context.world_size}"
        run_predict(settings(folder, task, run, file=f"{folder}/{task}.txt"), context)
        predictions.append((Path(folder) / run / "predictions" / "test.jsonl").read_text(encoding="utf-8"))
    return predictions


def answered(context: RankContext, folder: str) -> list[str]:
    """Collective. Returns the answers to one text per task. One rank evaluates the token_classification example."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    for task, text in (*((task, text.partition("\n")[0]) for task, text in PROMPTS.items()), (TAGS, "the cat sees")):
        run_predict(settings(folder, task, "text", text=text), context)
    return messages


def refused(context: RankContext, folder: str) -> str:
    """Collective. Returns the error for a file with an invalid prompt."""
    try:
        run_predict(settings(folder, "masked_lm", "refused", file=f"{folder}/bad.txt"), context)
    except DataError as error:
        return str(error)
    return ""


def test_every_world_size_writes_the_same_predictions_even_with_more_ranks_than_prompts(made: Path) -> None:
    (alone,) = run_ranks(predicted, 1, str(made))

    for world_size in (2, 6):
        assert run_ranks(predicted, world_size, str(made)) == [alone] * world_size
    for text in alone:
        assert len(text.splitlines()) == 5
        # Otherwise the order of the predictions would not be tested.
        assert len({line.partition('"prediction"')[2] for line in text.splitlines()}) > 1


def test_one_text_gets_the_same_answer_on_every_rank(made: Path) -> None:
    (alone,) = run_ranks(answered, 1, str(made))

    assert run_ranks(answered, 2, str(made)) == [alone] * 2
    assert [len(text.splitlines()) for text in alone] == [1, 2, 1, 1]
    assert re.fullmatch(r"the/\S+ cat/\S+ sees/\S+", alone[-1])
    assert not (made / "text").exists()


def test_an_invalid_prompt_is_reported_on_every_rank(made: Path) -> None:
    found = run_ranks(refused, 2, str(made))

    assert len(set(found)) == 1
    assert "bad.txt, line 2 has no [MASK]" in found[0]

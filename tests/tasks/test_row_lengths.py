"""Every task's rows: the lengths that are read from the table are those of its batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.load import load_config
from dtrain.data.batches import evaluation_batches
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.distributed.topology import SINGLE
from dtrain.tasks.build import build_task
from dtrain.tasks.protocol import Task
from dtrain.tasks.row_lengths import row_lengths
from tests.benchmarks.every_task import CASES, ROOT, settings_of

TASKS = (
    "cola",
    "stsb",
    "swag",
    "squad",
    "ner",
    "masked_lm",
    "char_gpt",
    "wikitext2",
    "chat_zh",
    "translation",
    "images",
)


def task_of(name: str, folder: Path, *more: str) -> Task:
    case = CASES[name]
    overrides = [*settings_of(case, folder), f"data.cache_dir={folder / 'cache'}", *more]
    return build_task(load_config(ROOT / "configs" / f"{case.config}.yaml", overrides), ONE_PROCESS)


def batches_of(task: Task, split: str) -> list[dict[str, Any]]:
    """All batches of a split, each compared with the lengths."""
    lengths = row_lengths(task, split)
    assert lengths is not None
    assert lengths.is_promised
    made = evaluation_batches(
        task.splits[split], task.collate, SINGLE, micro_batch_size=4, lock_step=False, workers=0, lengths=lengths
    )
    return [batch.tensors for batch in made]


@pytest.mark.parametrize("name", TASKS)
def test_batches_have_the_lengths_of_the_table(name: str, tmp_path: Path) -> None:
    task = task_of(name, tmp_path)

    if name == "images":
        assert {row_lengths(task, split) for split in task.splits} == {None}
        return
    for split in task.splits:
        lengths, batches = row_lengths(task, split), batches_of(task, split)
        assert lengths is not None
        assert set(lengths.widths) <= set(batches[0])
        real = sum(int(b["attention_mask"].sum()) for b in batches if "attention_mask" in b)
        if len(lengths.widths) == 1 and all("attention_mask" in b for b in batches):
            assert real == lengths.tokens.sum()


@pytest.mark.parametrize("name", ["cola", "squad", "swag", "translation"])
def test_batches_of_a_fixed_width_have_it_in_the_table(name: str, tmp_path: Path) -> None:
    task: Any = task_of(name, tmp_path)
    task.padding = replace(task.padding, length=128, target_length=128 if name == "translation" else None)

    for split in task.splits:
        assert {batch["input_ids"].shape[-1] for batch in batches_of(task, split)} == {128}


def test_documents_packed_in_rows_count_their_inputs(tmp_path: Path) -> None:
    texts = [" ".join(["cat"] * number) for number in (3, 9, 14, 5, 2, 16, 7)]
    (tmp_path / "documents.csv").write_text("text\n" + "\n".join(texts), encoding="utf-8")
    data = [f"data.path={tmp_path}", "data.splits={train: documents.csv, validation: documents.csv}"]
    task = task_of("wikitext2", tmp_path, "task.packing=documents", "task.stride=null", "model.tokenizer=char", *data)

    assert len({batch["input_ids"].shape[1] for batch in batches_of(task, "train")}) > 1

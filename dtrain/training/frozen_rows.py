"""The rows of tokens that a run reads, in a fixed order: those of its training steps, and of the splits that it evaluates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dtrain.data.order import StepPlan, chunks
from dtrain.data.seeding import DataPosition
from dtrain.models.token_rows import INPUTS, token_rows
from dtrain.tasks.protocol import Batch, Task
from dtrain.tasks.row_lengths import row_lengths

CHUNK_ROWS = 256

TRIAL_ROWS = 4
"""Examples of the batch by which the frozen part is judged."""

SEARCHED_ROWS = 64
"""Examples in which those of the trial are searched: they must have targets."""

TRIAL_EPOCHS = 3

Small = npt.NDArray[np.int32]


@dataclass
class DistinctRows:
    """Distinct rows of tokens.

    Attributes:
        keys: see TokenRows.
        ids: tokens of each row, without padding.
        types: token types of each row, if the task has them.
    """

    keys: list[bytes] = field(default_factory=list)
    ids: list[Small] = field(default_factory=list)
    types: list[Small] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each row."""
        return [len(ids) for ids in self.ids]

    def vectors(self, *, is_per_token: bool) -> int:
        """Returns how many vectors the rows have: one each, or one for each token."""
        return sum(self.lengths) if is_per_token else len(self.keys)

    def batch(self, group: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
        """Returns ids and types of rows of equal length: (rows, length) each."""
        ids = np.stack([self.ids[row] for row in group]).astype(np.int64)
        return ids, np.stack([self.types[row] for row in group]).astype(np.int64) if self.types else None


def training_indices(plan: StepPlan, steps: range) -> Sequence[int]:
    """Returns the examples that these steps take, each once."""
    if len(steps) >= plan.steps_per_epoch:
        return range(plan.num_examples)
    return sorted({index for step in steps for index in plan.indices(step)})


def most_vectors(task: Task, indices: Mapping[str, Sequence[int]], *, is_per_token: bool) -> int | None:
    """Returns how many vectors these examples have at most, by the table of lengths; None if lengths are not known."""
    total = 0
    for split, wanted in indices.items():
        lengths = row_lengths(task, split)
        if lengths is None:
            return None
        numbers = lengths.tokens if is_per_token else lengths.sequences
        total += int(numbers[np.asarray(wanted, dtype=np.int64)].sum())
    return total


def collect(
    task: Task,
    indices: Mapping[str, Sequence[int]],
    *,
    progress: Callable[[], None],
    most: int | None = None,
    is_per_token: bool = False,
) -> DistinctRows:
    """Returns the distinct rows of these examples of each split.

    Args:
        progress: called now and then.
        most: number of vectors with which the rest is not read; None: no limit.
        is_per_token: whether a row has a vector for each token.
    """
    rows, known, vectors = DistinctRows(), set[bytes](), 0
    for split, wanted in indices.items():
        for part in chunks(wanted, CHUNK_ROWS):
            found = token_rows(inputs_of(task, split, part))
            assert found is not None, "the task's batches changed after they were tried"
            for key, (ids, types) in zip(found.keys(), found.rows(), strict=True):
                if key not in known and len(ids):
                    known.add(key)
                    rows.keys.append(key)
                    rows.ids.append(ids.astype(np.int32))
                    if types is not None:
                        rows.types.append(types.astype(np.int32))
                    vectors += len(ids) if is_per_token else 1
            if most is not None and vectors > most:
                return rows
            progress()
    return rows


def trial_indices(task: Task) -> list[int]:
    """Returns a few of the first training examples, with targets and of different lengths where there are such."""
    sizes = {}
    for index in range(min(SEARCHED_ROWS, len(task.splits["train"]))):
        batch = collated(task, "train", [index])
        if task.targets(batch).count:
            sizes[index] = sum(tensor.numel() for name, tensor in batch.items() if name in INPUTS)
    if not sizes:
        return list(range(min(TRIAL_ROWS, len(task.splits["train"]))))
    shortest, longest = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)  # the batch has padding
    return sorted([*dict.fromkeys([shortest, longest, *sizes])][:TRIAL_ROWS])


def inputs_of(task: Task, split: str, indices: Sequence[int], *, epoch: int = 0) -> dict[str, torch.Tensor]:
    """Returns the model's inputs of some examples, a row for each sequence: the choices of an example are rows."""
    batch = collated(task, split, indices, epoch=epoch)
    return {name: value.flatten(0, -2) for name, value in batch.items() if name in INPUTS}


def collated(task: Task, split: str, indices: Sequence[int], *, epoch: int = 0) -> Batch:
    """Returns a batch of a split."""
    examples: Mapping[str, Sequence[Any]] = task.splits[split][list(indices)]
    return task.collate(examples, DataPosition(epoch, tuple(indices)))


def why_not_fixed(task: Task) -> str | None:
    """Returns why the task's rows are not the same tokens in each epoch; None if they are."""
    indices = list(range(min(2 * TRIAL_ROWS, len(task.splits["train"]))))
    first, *others = (inputs_of(task, "train", indices, epoch=epoch) for epoch in range(TRIAL_EPOCHS))
    if "input_ids" not in first:
        return "the model's inputs are not tokens"
    if any(not torch.equal(first["input_ids"], other["input_ids"]) for other in others):
        return "the task draws other inputs in each epoch (masks)"
    padding = getattr(task, "padding", None)
    if padding is not None and (padding.side != "right" or padding.length is not None):
        return "this model's result for a row depends on its padding"
    return None

"""Counts the texts that are cut at a maximum number of tokens, so that every start says how many there are.

Also counts the rows of a language model's text that are too short to have a target. They are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from dtrain.console import log
from dtrain.data.sources import Source
from dtrain.distributed.serialization import Json

FULL_LENGTH = "full_length"
"""Column of an example: tokens of its text, or of its longest text, before it was cut at data.max_length."""

FULL_TARGET_LENGTH = "full_target_length"
"""The same for a target, which is cut at task.max_target_length."""

SETTINGS = {FULL_LENGTH: "data.max_length", FULL_TARGET_LENGTH: "task.max_target_length"}


def full_lengths(
    tokenizer: Any,
    encoded: Sequence[Sequence[int]],
    texts: Mapping[str, Sequence[Any] | None],
    *,
    max_length: int,
    encodings: Sequence[Any] | None = None,
) -> list[int]:
    """Returns the number of tokens of each text without truncation.

    Args:
        encoded: the tokens with truncation. Only texts that have max_length of them are encoded again.
        texts: the tokenizer's arguments for the same texts, e.g. text and text_pair.
        encodings: of single texts, by a fast tokenizer. They hold what was cut off, so no text is encoded again.
    """
    lengths = [len(ids) for ids in encoded]
    full = [row for row, length in enumerate(lengths) if length >= max_length]
    if not full:
        return lengths
    if encodings is not None:
        added = tokenizer.num_special_tokens_to_add(pair=False)  # to each part
        for row in full:
            lengths[row] += sum(len(part) - added for part in encodings[row].overflowing)
        return lengths
    arguments = {name: [rows[row] for row in full] for name, rows in texts.items() if rows is not None}
    again = tokenizer(**arguments, return_attention_mask=False, verbose=False)["input_ids"]
    for row, ids in zip(full, again, strict=True):
        lengths[row] = len(ids)
    return lengths


def take_cuts(rows: datasets.Dataset, limits: Mapping[str, int]) -> tuple[datasets.Dataset, dict[str, Json]]:
    """Removes the columns of full lengths from a split, and returns what `report_cuts` needs.

    Args:
        limits: the maximum number of tokens by column.
    """
    found: dict[str, Json] = {}
    for column in (name for name in limits if name in rows.column_names):
        lengths = rows.with_format("numpy", columns=[column])[:][column]
        cut = lengths[lengths > limits[column]]
        if len(cut):
            count = int((lengths > 0).sum())  # further examples of the same row have 0
            found[column] = {"cut": len(cut), "of": count, "limit": limits[column], "longest": int(cut.max())}
    return rows.remove_columns([name for name in SETTINGS if name in rows.column_names]), found


def report_cuts(cuts: Mapping[str, Any]) -> None:
    """Logs how many texts of each split were cut, and the setting that keeps them.

    Args:
        cuts: by split, what `take_cuts` returned.
    """
    for split, columns in cuts.items():
        for column, found in columns.items():
            setting, cut, count = SETTINGS[column], found["cut"], found["of"]
            log.warning(
                "data: %s: %d of %d %s (%.1f %%) have more than %s=%d tokens and are cut there; %s=%d keeps all",
                *(split, cut, count, "targets" if column == FULL_TARGET_LENGTH else "texts", 100 * cut / count),
                *(setting, found["limit"], setting, found["longest"]),
            )


def report_rows_without_targets(source: Source, used: int) -> None:
    """Logs how many rows of a split have no token to predict and are left out.

    Args:
        used: the number of rows that have one.
    """
    number = len(source.rows)
    if used < number:
        log.warning(
            "data: %s: %d of %d rows have no token to predict and are left out (empty lines, or a single token)",
            *(source.split, number - used, number),
        )

"""What was read from each split, as numbers: made with the prepared data, and shown before training.

They are stored with the cache, so a later start shows the same.
"""

from __future__ import annotations

import re
from typing import Any

import datasets

from dtrain.data.columns import value_counts
from dtrain.data.sources import Source
from dtrain.distributed.serialization import Json

SAMPLE_EXAMPLES = 1000
MOST_LABELS = 1000


def split_facts(source: Source, examples: datasets.Dataset, tokenizer: Any, *, max_length: int) -> dict[str, Json]:
    """Returns the facts of one split.

    Returns:
        read: rows in the source, without the skipped ones. used: after the draws. skipped: bad rows. examples: their number.
        columns: our column -> the source's. labels: label -> rows, by frequency; None without classes. tokens: facts of
        a sample of the examples, see `token_facts`; None for a task without tokens.
    """
    rows = source.rows
    has_classes = "label" in rows.column_names and rows.features["label"] == datasets.Value("string")
    labels = dict(value_counts(rows, "label").most_common(MOST_LABELS)) if has_classes else None
    has_rows = len(examples) == len(rows)  # not blocks or windows of them
    has_texts = has_rows and "text" in rows.column_names and "text_pair" not in rows.column_names
    return {
        "read": max(source.read, len(rows)),
        "used": len(rows),
        "skipped": source.skipped,
        "examples": len(examples),
        "columns": dict(source.columns),
        "labels": labels,
        "tokens": token_facts(
            examples, rows if has_texts else None, tokenizer, max_length=max_length, can_be_cut=has_rows
        ),
    }


def token_facts(
    examples: datasets.Dataset,
    source_rows: datasets.Dataset | None,
    tokenizer: Any,
    *,
    max_length: int,
    can_be_cut: bool,
) -> dict[str, Json] | None:
    """Returns facts of up to 1,000 examples that are spread evenly; None if they have no list of tokens.

    Args:
        source_rows: the rows of the same numbers, with their `text`; None if an example is not one text.

    Returns:
        sample: examples. mean, longest: tokens. unknown: share of tokens that the tokenizer does not know. per_character:
        tokens per character; None if the texts are unknown. is_chinese: of the texts. at_limit: share of examples that fill max_length.
    """
    if tokenizer is None or "input_ids" not in examples.column_names:
        return None
    indices = range(0, len(examples), -(-len(examples) // SAMPLE_EXAMPLES))
    rows: list[list[int]] = examples.select_columns(["input_ids"])[list(indices)]["input_ids"]
    if any(not isinstance(row, list) or (row and not isinstance(row[0], int)) for row in rows):
        return None
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    unknown_id = tokenizer.unk_token_id
    if unknown_id in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        unknown_id = None  # GPT-2: its bytes know every text
    content = [token for row in rows for token in row if token not in special]
    text = "".join(source_rows.select_columns(["text"])[list(indices)]["text"]) if source_rows is not None else ""
    at_limit = sum(len(row) >= max_length for row in rows) / len(rows)
    return {
        "sample": len(rows),
        "mean": sum(map(len, rows)) / len(rows),
        "longest": max(map(len, rows)),
        "unknown": content.count(unknown_id) / len(content) if content and unknown_id is not None else 0.0,
        "per_character": len(content) / len(text) if text and at_limit == 0 else None,
        "is_chinese": len(re.findall(r"[\u4e00-\u9fff]", text)) > 0.3 * len(text) > 0,
        "at_limit": at_limit if can_be_cut else None,
    }

"""What was understood of the data, for the banner and `--dry-run`: columns, rows, labels, tokens and two examples.

A wrong column, a lost class or a tokenizer for another language is visible here before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dtrain.data.seeding import DataPosition
from dtrain.tasks.protocol import IGNORED, Batch, Task

SHOWN_EXAMPLES = 2
SHOWN_LABELS = 8
SHOWN_CHARACTERS = 160
MANY_UNKNOWN = 0.05
MANY_PER_CHARACTER = 1.1
"""Tokens per character. Ordinary text has at most one; bytes of another script have two or three."""


def describe_data(task: Task, *, has_decoder: bool) -> list[str]:
    """Returns indented lines; empty for the user's own task, whose rows dtrain has not read.

    Args:
        has_decoder: the labels are another text than the inputs.
    """
    facts: Mapping[str, Any] = getattr(task.splits, "facts", {})
    lines = [f"  {split:<8} {_split_line(facts[split])}" for split in facts]
    columns: Mapping[str, str] = next((facts[split]["columns"] for split in facts if facts[split]["columns"]), {})
    if columns:
        lines.insert(0, "  columns  " + ", ".join(f"{ours}: {theirs!r}" for ours, theirs in columns.items()))
    lines += [f"  baseline {line}" for line in _baselines(facts)]
    first = facts.get("train") or next(iter(facts.values()), None)
    if first and first["tokens"]:
        lines += [f"  tokens   {_token_line(first['tokens'], task)}", *_token_warnings(first["tokens"])]
    if facts and task.tokenizer is not None:
        split = "train" if "train" in facts else next(iter(facts))
        number = min(SHOWN_EXAMPLES, len(task.splits[split]))
        lines += [f"  example  {_example(task, split, index, has_decoder=has_decoder)}" for index in range(number)]
    return lines


def _split_line(facts: Mapping[str, Any]) -> str:
    rows = f"{facts['used']} of {facts['read']} rows" if facts["used"] != facts["read"] else f"{facts['used']} rows"
    skipped = f", {facts['skipped']} bad rows skipped" if facts["skipped"] else ""
    examples = f", {facts['examples']} examples" if facts["examples"] != facts["used"] else ""
    labels: Mapping[str, int] = facts["labels"] or {}
    shown = [f"{label!r} {count}" for label, count in list(labels.items())[:SHOWN_LABELS]]
    more = f" and {len(labels) - SHOWN_LABELS} more" if len(labels) > SHOWN_LABELS else ""
    return rows + skipped + examples + (f"; labels {', '.join(shown)}{more}" if shown else "")


def _baselines(facts: Mapping[str, Any]) -> list[str]:
    """Returns the accuracy of always predicting the most frequent training label, for each other split."""
    known: Mapping[str, int] = (facts.get("train") or {}).get("labels") or {}
    if not known:
        return []
    label = next(iter(known))
    return [
        f"accuracy {counts.get(label, 0) / sum(counts.values()):.4f} on {split} by always predicting {label!r}"
        for split, counts in ((split, facts[split]["labels"]) for split in facts if split != "train")
        if counts
    ]


def _token_line(tokens: Mapping[str, Any], task: Task) -> str:
    parts = [f"{tokens['mean']:.1f} per example, at most {tokens['longest']} (of {tokens['sample']} examples)"]
    if tokens["at_limit"]:
        parts.append(f"{tokens['at_limit']:.1%} fill max_length={task.max_length}")
    return ", ".join([*parts, f"{tokens['unknown']:.1%} unknown"])


def _token_warnings(tokens: Mapping[str, Any]) -> list[str]:
    if tokens["unknown"] >= MANY_UNKNOWN:
        chinese = "; for Chinese, e.g., model.name_or_path=bert-base-chinese" if tokens["is_chinese"] else ""
        return [
            f"warning: the tokenizer does not know {tokens['unknown']:.0%} of the tokens, so the model cannot read them. Choose a "
            f"model of the language of this text{chinese}"
        ]
    if (tokens["per_character"] or 0) >= MANY_PER_CHARACTER:
        return [
            f"warning: the tokenizer needs {tokens['per_character']:.1f} tokens for a character: it is made for another language"
        ]
    return []


def _example(task: Task, split: str, index: int, *, has_decoder: bool) -> str:
    """Returns an example as the model gets it, with its targets in [[ ]] or after an arrow."""
    batch = task.collate(task.splits[split][[index]], DataPosition(0, [index]))
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if ids is None or labels is None or ids.dim() != 2:
        return "(not text)"
    inputs = _row(ids, batch, "attention_mask")
    if labels.shape[:2] == ids.shape and not has_decoder:
        return _shorten(_marked(task.tokenizer, inputs, labels[0].tolist()))
    return f"{_shorten(task.tokenizer.decode(inputs))!r} -> {_target(task, labels[0], has_decoder=has_decoder)}"


def _row(ids: torch.Tensor, batch: Batch, mask: str) -> list[int]:
    kept = batch[mask][0].bool() if mask in batch and batch[mask].shape == ids.shape else torch.ones_like(ids[0]).bool()
    row: list[int] = ids[0][kept].tolist()
    return row


def _marked(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> str:
    """Returns the decoded tokens with every run of targets in [[ ]]. A model learns to predict the tokens inside."""
    pieces: list[tuple[bool, list[int]]] = []
    for token, label in zip(ids, labels[: len(ids)], strict=True):
        is_target = label != IGNORED
        if not pieces or pieces[-1][0] != is_target:
            pieces.append((is_target, []))
        pieces[-1][1].append(token)
    return "".join(
        f"[[{tokenizer.decode(tokens)}]]" if is_target else tokenizer.decode(tokens) for is_target, tokens in pieces
    )


def _target(task: Task, labels: torch.Tensor, *, has_decoder: bool) -> str:
    names: Sequence[str] = getattr(task, "labels", ())
    values = [value for value in labels.flatten().tolist() if value != IGNORED]
    if has_decoder and labels.dim() == 1:
        return f"[[{_shorten(task.tokenizer.decode(values))}]]"
    if labels.dim() == 1 and len(labels) == len(names) and labels.is_floating_point():  # several labels
        return f"[[{', '.join(name for name, value in zip(names, values, strict=True) if value == 1) or 'no label'}]]"
    shown = [names[value] if names and isinstance(value, int) else f"{value:g}" for value in values]
    return f"[[{', '.join(shown) or 'no label'}]]"


def _shorten(text: str) -> str:
    text = text.replace("\n", "\\n")
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} ... {text[-half:]}"

"""The transformers class and config entries of each kind of head."""

from __future__ import annotations

from typing import Any

import transformers

from dtrain.config.task import Head

CLASSES: dict[Head, str] = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "multiple_choice": "AutoModelForMultipleChoice",
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "question_answering": "AutoModelForQuestionAnswering",
    "token_classification": "AutoModelForTokenClassification",
    "image_classification": "AutoModelForImageClassification",
    "image_regression": "AutoModelForImageClassification",
}

PROBLEM_TYPES: dict[Head, str] = {
    "sequence_classification": "single_label_classification",
    "regression": "regression",
    "image_classification": "single_label_classification",
    "image_regression": "regression",
}
"""Tells the loss inside transformers how to read the labels, for users of the exported model."""


def auto_class(head: Head) -> Any:
    """Returns the AutoModel class of a head."""
    return getattr(transformers, CLASSES[head])


def has_labels(head: Head) -> bool:
    """Returns whether the head has one output per label, with label names in the config."""
    return head in ("sequence_classification", "token_classification", "image_classification")

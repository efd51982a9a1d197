"""Which class of transformers carries which head, and what its config has to say for it."""

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
"""How from_pretrained's own loss reads the labels, for those who use the exported model with it."""


def auto_class(head: Head) -> Any:
    """The AutoModel class."""
    return getattr(transformers, CLASSES[head])


def has_labels(head: Head) -> bool:
    """Whether the head has an output for each label, with names that the config keeps."""
    return head in ("sequence_classification", "token_classification", "image_classification")

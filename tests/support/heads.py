"""The heads of all tasks by name, for tests of models."""

from __future__ import annotations

from dtrain.models.heads import Head
from dtrain.tasks import (
    causal_lm,
    classification,
    image_classification,
    image_regression,
    masked_lm,
    multi_label,
    multiple_choice,
    question_answering,
    regression,
    seq2seq,
    token_classification,
)

HEADS: dict[str, Head] = {
    task.HEAD.name: task.HEAD
    for task in (
        causal_lm,
        classification,
        image_classification,
        image_regression,
        masked_lm,
        multi_label,
        multiple_choice,
        question_answering,
        regression,
        seq2seq,
        token_classification,
    )
}

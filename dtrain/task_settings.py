"""The settings of each task: what `task.name` chooses between."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from dtrain.settings import Section, setting

Head = Literal[
    "sequence_classification",
    "regression",
    "multiple_choice",
    "causal_lm",
    "masked_lm",
    "seq2seq_lm",
    "question_answering",
    "token_classification",
    "image_classification",
]
"""What a task wants on top of a model: which AutoModel class carries it."""


class Classification(Section):
    """One label for a sentence or a pair of sentences."""

    name: Literal["classification"] = setting(..., "classification: one label for a sentence or a pair")
    class_weights: Literal["balanced"] | dict[str, float] | None = setting(
        None, "weight of each label in the training loss, by label name; balanced: rows / (labels x rows of the label)"
    )
    label_smoothing: float = setting(0.0, "share of the target spread over all labels, in training only", ge=0, lt=1)

    @field_validator("class_weights")
    @classmethod
    def _weights_are_positive(cls, weights: Any) -> Any:
        if isinstance(weights, dict) and (bad := [k for k, w in weights.items() if not w > 0]):
            raise ValueError(f"the weight of label {bad[0]!r} must be above 0")
        return weights


class CausalLm(Section):
    """The next token of a text, in blocks of data.max_length; every token but the first of a split is a target once."""

    name: Literal["causal_lm"] = setting(..., "causal_lm: the next token of a text")
    joiner: str = setting("\n\n", "text put between two rows before they are cut into blocks")


class MultipleChoice(Section):
    """Which of several endings goes on a text."""

    name: Literal["multiple_choice"] = setting(..., "multiple_choice: which of several endings goes on a text (SWAG)")


class QuestionAnswering(Section):
    """The answer to a question as a span of a text."""

    name: Literal["question_answering"] = setting(
        ..., "question_answering: the answer to a question as a span of a text (SQuAD)"
    )
    doc_stride: int = setting(128, "tokens that two neighbouring windows of a long context share", ge=0)
    max_answer_length: int = setting(30, "tokens of a predicted answer at most", resume="warn", ge=1)
    n_best: int = setting(20, "starts and ends of each window that are tried for the answer", resume="warn", ge=1)


class TokenClassification(Section):
    """A tag for each word of a sentence."""

    name: Literal["token_classification"] = setting(
        ..., "token_classification: a tag for each word of a sentence (named entities, CoNLL)"
    )


TaskSettings = Annotated[
    Classification | CausalLm | MultipleChoice | QuestionAnswering | TokenClassification, Field(discriminator="name")
]

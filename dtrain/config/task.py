"""The settings of each task, selected by `task.name`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from dtrain.config.fields import Section, setting


class TaskOptions(Section):
    """The settings of one task. Its class attributes are not settings: they tell the config what it must know of the task."""

    default_max_length: ClassVar[int] = 128
    """data.max_length if it is not set."""
    generates_texts: ClassVar[bool] = False
    """Whether evaluation.generate can make the model write a text for each example. The predict command always needs it."""
    allows_factory: ClassVar[bool] = True
    """Whether model.factory can make a model for this task."""

    def conflicts(self, *, max_length: int) -> list[str]:
        """Returns a message for each of these settings that does not fit data.max_length."""
        return []


class Classification(TaskOptions):
    """One label for a sentence or a pair of sentences."""

    name: Literal["classification"] = setting(..., "classification: one label for a sentence or a pair")
    class_weights: Literal["balanced"] | dict[str, float] | None = setting(
        None, "weight of each label in the training loss, by label name; balanced: rows / (labels x rows of the label)"
    )
    label_smoothing: float = setting(
        0.0, "share of the target probability spread over all labels, in training only", ge=0, lt=1
    )

    @field_validator("class_weights")
    @classmethod
    def _weights_are_positive(cls, weights: Any) -> Any:
        return _positive(weights)


class MultiLabel(TaskOptions):
    """Any number of labels for a text or a pair of texts."""

    name: Literal["multi_label"] = setting(..., "multi_label: any number of labels for a text or a pair")
    threshold: float = setting(
        0.5, "a label is predicted if its probability is at least this", resume="warn", gt=0, lt=1
    )
    separator: str = setting(",", "text between two labels of a row, where they are a text (CSV)", min_length=1)


class Regression(TaskOptions):
    """One number for a sentence or a pair of sentences."""

    name: Literal["regression"] = setting(..., "regression: one number for a sentence or a pair")


class CausalLm(TaskOptions):
    """The next token of a text, in blocks of data.max_length. Every token of a split but the first is a target once."""

    default_max_length = 256

    name: Literal["causal_lm"] = setting(..., "causal_lm: the next token of a text")
    joiner: str = setting("\n\n", "text inserted between two rows before they are cut into blocks")
    packing: Literal["stream", "documents"] = setting(
        "stream", "stream: one text of all rows; documents: several rows share a block without seeing each other"
    )
    stride: int | None = setting(
        None, "evaluate with a sliding window of data.max_length that moves by this many tokens; null: in blocks", ge=1
    )

    def conflicts(self, *, max_length: int) -> list[str]:
        if self.stride is None or self.stride <= max_length:
            return []
        return [
            f"task.stride={self.stride} skips tokens, because a window of data.max_length={max_length} is shorter: "
            "set it to that or less (half is usual)"
        ]


class MultipleChoice(TaskOptions):
    """The ending, out of several, that continues a text."""

    name: Literal["multiple_choice"] = setting(..., "multiple_choice: which of several endings continues a text (SWAG)")


class QuestionAnswering(TaskOptions):
    """The answer to a question as a span of a text."""

    default_max_length = 384

    name: Literal["question_answering"] = setting(
        ..., "question_answering: the answer to a question as a span of a text (SQuAD)"
    )
    doc_stride: int = setting(128, "tokens shared by two neighboring windows of a long context", ge=0)
    max_answer_length: int = setting(30, "maximum tokens of a predicted answer", resume="warn", ge=1)
    n_best: int = setting(20, "start and end positions per window that are considered", resume="warn", ge=1)
    no_answer: bool = setting(False, "whether a context may not answer the question (SQuAD 2); answers is then empty")
    no_answer_threshold: float = setting(
        0.0, "with no_answer: by how much [CLS] must score above the best span to predict no answer", resume="warn"
    )


class TokenClassification(TaskOptions):
    """A tag for each word of a sentence."""

    name: Literal["token_classification"] = setting(
        ..., "token_classification: a tag for each word of a sentence (named entities, CoNLL)"
    )


class Seq2Seq(TaskOptions):
    """A text from a text with an encoder and a decoder, such as translation or summarization."""

    generates_texts = True
    allows_factory = False  # the loss needs transformers' own encoder and decoder

    name: Literal["seq2seq"] = setting(..., "seq2seq: a text from a text, such as a translation or a summary")
    metric: Literal["translation", "summarization"] = setting(
        "translation", "metrics of generated texts. translation: BLEU and chrF; summarization: ROUGE", resume="free"
    )
    source: str | None = setting(
        None, "input: a side of the column `translation` (en), or a column; default: the usual names"
    )
    target: str | None = setting(
        None, "output: a side of the column `translation` (ro), or a column; default: the usual names"
    )
    prefix: str = setting("", "text before every source, trailing space included; T5 needs it to select its task")
    source_lang: str | None = setting(
        None, "source language code for a multilingual tokenizer (mBART: en_XX, NLLB: eng_Latn)"
    )
    target_lang: str | None = setting(None, "target language code for such a tokenizer; generation starts with it")
    max_target_length: int = setting(128, "maximum tokens of a target; longer ones are truncated", ge=2)
    label_smoothing: float = setting(
        0.0, "share of the target probability spread over the vocabulary, in training only", ge=0, lt=1
    )

    @model_validator(mode="after")
    def _both_or_neither(self) -> Seq2Seq:
        for one, other in (("source", "target"), ("source_lang", "target_lang")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                missing = one if getattr(self, one) is None else other
                raise ValueError(f"task.{one} and task.{other} belong together: set task.{missing} as well")
        if self.source is not None and self.source == self.target:
            raise ValueError(f"task.source and task.target are both {self.source}: they must differ")
        return self


class Chat(TaskOptions):
    """Dialogues: the next token of every turn, or of the assistant's turns only."""

    default_max_length = 256

    name: Literal["chat"] = setting(..., "chat: dialogues, as turns or messages")
    loss_on: Literal["all", "replies"] = setting("all", "targets: tokens of all turns, or of the assistant's only")
    format: Literal["auto", "turns", "template"] = setting(
        "auto",
        "turns: [CLS] turn [SEP] turn [SEP]; template: the tokenizer's chat template; auto: template if there is one",
    )


class MaskedLm(TaskOptions):
    """Masked tokens of a text, predicted from both sides. Rows longer than data.max_length become several examples."""

    name: Literal["masked_lm"] = setting(..., "masked_lm: masked tokens of a text, predicted from both sides")
    mask_probability: float = setting(0.15, "share of the tokens (or words) to predict", gt=0, le=1)
    whole_word: bool = setting(False, "mask all tokens of a word or none")


def _low_below_high(limits: tuple[float, float]) -> tuple[float, float]:
    if not limits[0] < limits[1]:
        raise ValueError(f"the first value {limits[0]:g} (black) must be below the second {limits[1]:g} (white)")
    return limits


PixelLimits = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_low_below_high)]


class ImageClassification(TaskOptions):
    """One label for an image."""

    name: Literal["image_classification"] = setting(..., "image_classification: one label for an image")
    class_weights: Literal["balanced"] | dict[str, float] | None = setting(
        None, "weight of each label in the training loss, by label name; balanced: rows / (labels x rows of the label)"
    )
    label_smoothing: float = setting(
        0.0, "share of the target probability spread over all labels, in training only", ge=0, lt=1
    )
    image_size: int | None = setting(
        None, "side of the square that images are resized to; default: the model's image size", ge=1
    )
    pixel_range: PixelLimits | None = setting(
        None, "black and white in images with more than 8 bits; default: [0, 65535] in 16 bits, [0, 1] for floats"
    )

    @field_validator("class_weights")
    @classmethod
    def _weights_are_positive(cls, weights: Any) -> Any:
        return _positive(weights)


class ImageRegression(TaskOptions):
    """Numbers for an image: landmarks, a size, an age."""

    name: Literal["image_regression"] = setting(..., "image_regression: numbers for an image, e.g. landmarks")
    targets: tuple[str, ...] = setting(
        ..., "columns of the numbers, in the order of the model's outputs", min_length=1, strict=False
    )
    image_size: int | None = setting(
        None, "side of the square that images are resized to; default: the model's image size", ge=1
    )
    pixel_range: PixelLimits | None = setting(
        None, "black and white in images with more than 8 bits; default: [0, 65535] in 16 bits, [0, 1] for floats"
    )


def _positive(weights: Any) -> Any:
    if isinstance(weights, dict) and (bad := [k for k, w in weights.items() if not w > 0]):
        raise ValueError(f"the weight of label {bad[0]!r} must be above 0")
    return weights


TaskSettings = Annotated[
    Classification
    | MultiLabel
    | Regression
    | CausalLm
    | MaskedLm
    | MultipleChoice
    | QuestionAnswering
    | TokenClassification
    | Seq2Seq
    | Chat
    | ImageClassification
    | ImageRegression,
    Field(discriminator="name"),
]

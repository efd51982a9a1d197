"""The settings of each task: what `task.name` chooses between."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dtrain.config.fields import Section, setting


class TaskOptions(Section):
    """The settings of one task. The class attributes are no settings: they say what the config has to know of the task."""

    default_max_length: ClassVar[int] = 128
    """Value of data.max_length where it is not set."""
    generates_texts: ClassVar[bool] = False
    """evaluation.generate makes the model write a text for each example, which the predict command always needs."""
    allows_factory: ClassVar[bool] = True
    """model.factory can make a model for this task."""

    def conflicts(self, *, max_length: int) -> list[str]:
        """Returns a message for each of these settings that does not fit data.max_length."""
        return []


class Classification(TaskOptions):
    """One label for a sentence or a pair of sentences."""

    name: Literal["classification"] = setting(..., "classification: one label for a sentence or a pair")
    class_weights: Literal["balanced"] | dict[str, float] | None = setting(
        None, "weight of each label in the training loss, by label name; balanced: rows / (labels x rows of the label)"
    )
    label_smoothing: float = setting(0.0, "share of the target spread over all labels, in training only", ge=0, lt=1)

    @field_validator("class_weights")
    @classmethod
    def _weights_are_positive(cls, weights: Any) -> Any:
        return _positive(weights)


class Regression(TaskOptions):
    """One number for a sentence or a pair of sentences."""

    name: Literal["regression"] = setting(..., "regression: one number for a sentence or a pair")


class CausalLm(TaskOptions):
    """The next token of a text, in blocks of data.max_length; every token but the first of a split is a target once."""

    default_max_length = 256

    name: Literal["causal_lm"] = setting(..., "causal_lm: the next token of a text")
    joiner: str = setting("\n\n", "text put between two rows before they are cut into blocks")
    packing: Literal["stream", "documents"] = setting(
        "stream", "documents: each row is one, and a token sees its own only; several share a block"
    )
    stride: int | None = setting(
        None, "evaluate by a window of data.max_length that moves on by so many tokens; null: by blocks", ge=1
    )

    def conflicts(self, *, max_length: int) -> list[str]:
        if self.stride is None or self.stride <= max_length:
            return []
        return [
            f"task.stride={self.stride} leaves tokens out that no window of data.max_length={max_length} scores: "
            "set it to that or less (half is usual)"
        ]


class MultipleChoice(TaskOptions):
    """Which of several endings goes on a text."""

    name: Literal["multiple_choice"] = setting(..., "multiple_choice: which of several endings goes on a text (SWAG)")


class QuestionAnswering(TaskOptions):
    """The answer to a question as a span of a text."""

    default_max_length = 384

    name: Literal["question_answering"] = setting(
        ..., "question_answering: the answer to a question as a span of a text (SQuAD)"
    )
    doc_stride: int = setting(128, "tokens that two neighbouring windows of a long context share", ge=0)
    max_answer_length: int = setting(30, "tokens of a predicted answer at most", resume="warn", ge=1)
    n_best: int = setting(20, "starts and ends of each window that are tried for the answer", resume="warn", ge=1)


class TokenClassification(TaskOptions):
    """A tag for each word of a sentence."""

    name: Literal["token_classification"] = setting(
        ..., "token_classification: a tag for each word of a sentence (named entities, CoNLL)"
    )


class Seq2Seq(TaskOptions):
    """A text from a text: translation, summarisation, anything an encoder and a decoder learn together."""

    generates_texts = True
    allows_factory = False  # the loss needs transformers' own encoder and decoder

    name: Literal["seq2seq"] = setting(..., "seq2seq: a text from a text, such as a translation or a summary")
    metric: Literal["translation", "summarization"] = setting(
        "translation", "what judges generated texts: BLEU and chrF, or ROUGE", resume="free"
    )
    source: str | None = setting(None, "side of `translation` (en) or column to read from; default: the usual names")
    target: str | None = setting(None, "side of `translation` (ro) or column to write; default: the usual names")
    prefix: str = setting("", "put before every source, blank included: T5 is told its task by one")
    source_lang: str | None = setting(None, "language code of a multilingual tokenizer (mBART: en_XX, NLLB: eng_Latn)")
    target_lang: str | None = setting(None, "the same of the targets; generation begins with it")
    max_target_length: int = setting(128, "tokens of a target; longer ones are cut", ge=2)
    label_smoothing: float = setting(
        0.0, "share of the target spread over the vocabulary, in training only", ge=0, lt=1
    )

    @model_validator(mode="after")
    def _both_or_neither(self) -> Seq2Seq:
        for one, other in (("source", "target"), ("source_lang", "target_lang")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                missing = one if getattr(self, one) is None else other
                raise ValueError(f"task.{one} and task.{other} go together: set task.{missing} as well")
        if self.source is not None and self.source == self.target:
            raise ValueError(f"task.source and task.target are both {self.source}: a text is not learned from itself")
        return self


class Chat(TaskOptions):
    """Dialogues: the next token of every turn, or of the assistant's turns only."""

    default_max_length = 256

    name: Literal["chat"] = setting(..., "chat: dialogues, in turns or messages")
    loss_on: Literal["all", "replies"] = setting("all", "which tokens are learnt: all turns', or the assistant's only")
    format: Literal["auto", "turns", "template"] = setting(
        "auto", "turns: [CLS] turn [SEP] turn [SEP]; template: the tokenizer's chat template; auto: that if it has one"
    )


class MaskedLm(TaskOptions):
    """Words hidden in a text, to be guessed from both sides. Rows longer than data.max_length go on in further examples."""

    name: Literal["masked_lm"] = setting(..., "masked_lm: hidden tokens of a text, guessed from both sides")
    mask_probability: float = setting(0.15, "share of the tokens (or words) that are to be guessed", gt=0, le=1)
    whole_word: bool = setting(False, "hide all tokens of a word or none")


class ImageClassification(TaskOptions):
    """One label for an image."""

    name: Literal["image_classification"] = setting(..., "image_classification: one label for an image")
    class_weights: Literal["balanced"] | dict[str, float] | None = setting(
        None, "weight of each label in the training loss, by label name; balanced: rows / (labels x rows of the label)"
    )
    label_smoothing: float = setting(0.0, "share of the target spread over all labels, in training only", ge=0, lt=1)
    image_size: int | None = setting(
        None, "edge of the square that images are resized to; default: as the model says", ge=1
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
        None, "edge of the square that images are resized to; default: as the model says", ge=1
    )


def _positive(weights: Any) -> Any:
    if isinstance(weights, dict) and (bad := [k for k, w in weights.items() if not w > 0]):
        raise ValueError(f"the weight of label {bad[0]!r} must be above 0")
    return weights


TaskSettings = Annotated[
    Classification
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

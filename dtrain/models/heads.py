"""The output layers that a task needs on top of a model. Each task defines its head in its own file in dtrain/tasks/."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Head:
    """A head of transformers, and what is needed to put a head of `model.head` in its place.

    Attributes:
        name: Passed to `model.factory` as `head` and saved in config.json by models with `model.head`.
        auto_class: AutoModel class of transformers that loads a model with this head.
        logits: What the model has logits for: each example, each token, or each choice of an example. None if its outputs
            are more than logits of one backbone, so that `model.head` cannot replace the head.
        is_over_vocabulary: One output per token of the vocabulary instead of `num_labels` outputs.
        has_label_names: Each output is a label, with a name in config.json.
        problem_type: How the loss of transformers reads the labels of an exported model. None: not set.
        is_causal: The logits of a token may depend on earlier tokens only.
        has_decoder: The model is an encoder and a decoder.
    """

    name: str
    auto_class: Any
    logits: Literal["example", "token", "choice"] | None = "example"
    is_over_vocabulary: bool = False
    has_label_names: bool = False
    problem_type: str | None = None
    is_causal: bool = False
    has_decoder: bool = False

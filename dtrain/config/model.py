"""The settings of the model section: which model, which head, which adapters."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import field_validator, model_validator

from dtrain.config.fields import AnyPath, NameOrPath, Section, setting

BUILT_TOKENIZERS = ("char", "train-bpe")
"""Values of model.tokenizer that make a tokenizer of the training text; it is saved with the model."""


class NewHead(Section):
    """A head of one's own on the bare backbone; how many outputs it has is the task's business."""

    kind: Literal["linear"] = setting("linear", "a linear layer, or two with tanh between them where hidden is set")
    pooling: Literal["cls", "mean", "last"] = setting(
        "cls", "the first token's state (encoders), the mean, or the last token's (decoders); padding does not count"
    )
    hidden: int | None = setting(None, "width of a layer before the last", ge=1)
    dropout: float = setting(0.0, "before each linear layer", ge=0, lt=1)


class Lora(Section):
    """Low-rank adapters beside the layers of a pretrained model, by peft."""

    r: int = setting(8, "rank of the adapters", ge=1)
    alpha: int = setting(16, "their output is multiplied by alpha / r", ge=1)
    dropout: float = setting(0.0, "before each adapter", ge=0, lt=1)
    targets: tuple[str, ...] | None = setting(
        None, "names of layers, e.g. [query, value]; default: those that peft knows for the model", strict=False
    )


class Model(Section):
    """Which model and tokenizer, and how the model is run."""

    name_or_path: NameOrPath | None = setting(None, "a Hugging Face name, or a folder that from_pretrained loads")
    from_scratch: bool = setting(False, "new random weights (from model.config, on top of name_or_path's if given)")
    config: dict[str, Any] = setting({}, "overrides of the model's own config; from scratch it needs model_type")
    tokenizer: NameOrPath | None = setting(
        None, "name, folder, vocabulary file (.txt), char, or train-bpe; default: the model's"
    )
    tokenizer_vocab_size: int = setting(8000, "tokens that train-bpe makes of the training text, at most", ge=260)
    trust_remote_code: bool = setting(False, "run Python code that comes with the model. Only for authors you trust")
    attn_implementation: str | None = setting(None, "eager, sdpa, ...: passed to from_pretrained", resume="warn")
    gradient_checkpointing: bool = setting(False, "recompute activations in backward: less memory", resume="free")
    compile: bool = setting(False, "torch.compile the model: faster steps after a slow first one", resume="warn")
    batch_norm: Literal["eval", "train"] = setting("eval", "running statistics kept, or updated per rank (inexact)")
    head: NewHead | None = setting(
        None, "a new head on the bare backbone, e.g. {pooling: mean}; null: transformers' own"
    )
    lora: Lora | None = setting(None, "adapters that learn instead of the model, e.g. {r: 8, alpha: 16}; needs peft")
    factory: str | None = setting(None, "package.module:function that makes your own torch module, instead of a name")
    factory_folder: AnyPath | None = setting(
        None, "where that module's file is; default: the config file's folder, or the current one", resume="free"
    )

    @field_validator("factory")
    @classmethod
    def _names_a_function(cls, factory: str | None) -> str | None:
        if factory is not None and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", factory):
            raise ValueError(
                "expected package.module:function, e.g. own_model:build for the function build in own_model.py"
            )
        return factory

    @model_validator(mode="after")
    def _factory_stands_alone(self) -> Model:
        others = ("from_scratch", "head", "lora", "attn_implementation", "trust_remote_code")
        if self.factory is not None and (set_too := [name for name in others if getattr(self, name)]):
            raise ValueError(
                f"model.{set_too[0]} has no effect on what model.factory={self.factory} makes: drop one of the two"
            )
        return self

    @model_validator(mode="after")
    def _adapters_need_a_pretrained_model(self) -> Model:
        if self.lora is not None and self.from_scratch:
            raise ValueError(
                "model.lora adapts a pretrained model, but model.from_scratch=true makes a new one: drop one"
            )
        return self

    @model_validator(mode="after")
    def _from_scratch_knows_what(self) -> Model:
        if self.from_scratch and self.name_or_path is None and "model_type" not in self.config:
            raise ValueError(
                "model.from_scratch=true does not say what to make: set model.config.model_type (gpt2, bert, ...) "
                "or model.name_or_path"
            )
        return self

"""The settings of the model section: model, head, adapters."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import field_validator, model_validator

from dtrain.config.fields import AnyPath, NameOrPath, Section, setting

BUILT_TOKENIZERS = ("char", "train-bpe")
"""Values of model.tokenizer that build a tokenizer from the training text. It is saved with the model."""


class NewHead(Section):
    """A new head on the bare backbone. The task decides the number of outputs."""

    kind: Literal["linear"] = setting("linear", "one linear layer; if hidden is set, two with tanh between them")
    pooling: Literal["cls", "mean", "last"] = setting(
        "cls", "cls: the first token's state (encoders); mean; last: the last token's (decoders); padding is ignored"
    )
    hidden: int | None = setting(None, "width of an extra layer before the output layer; null: none", ge=1)
    dropout: float = setting(0.0, "dropout before each linear layer", ge=0, lt=1)


class Lora(Section):
    """Low-rank adapters for the layers of a pretrained model, by peft."""

    r: int = setting(8, "rank of the adapters", ge=1)
    alpha: int = setting(16, "the adapters' output is multiplied by alpha / r", ge=1)
    dropout: float = setting(0.0, "dropout before each adapter", ge=0, lt=1)
    targets: tuple[str, ...] | None = setting(
        None, "names of the layers, e.g. [query, value]; default: peft's choice for the model", strict=False
    )


class Model(Section):
    """The model, its tokenizer, and how the model runs."""

    name_or_path: NameOrPath | None = setting(
        None, "a model name on the Hugging Face hub, or a folder that from_pretrained loads"
    )
    from_scratch: bool = setting(
        False, "start from random weights; model.config gives the architecture, or changes that of name_or_path"
    )
    config: dict[str, Any] = setting({}, "changes to the model's config; from_scratch without a name needs model_type")
    tokenizer: NameOrPath | None = setting(
        None, "name, folder, vocabulary file (.txt), char, or train-bpe; default: the model's"
    )
    tokenizer_vocab_size: int = setting(8000, "maximum number of tokens that train-bpe learns", ge=260)
    add_tokens: tuple[str, ...] = setting(
        (), "words to add to the tokenizer, e.g. [<name>, <date>]; the embeddings get rows for them", strict=False
    )
    pad_token: str | None = setting(
        None,
        "the token for padding, e.g. <pad>, added if the tokenizer lacks it; default: the tokenizer's",
        min_length=1,
    )
    trust_remote_code: bool = setting(False, "run Python code that comes with the model; only for authors you trust")
    attn_implementation: str | None = setting(None, "eager, sdpa, ...: passed to from_pretrained", resume="warn")
    unpad: Literal["auto", "on", "off"] = setting(
        "auto", "compute no padding; auto: if the model is tested for it. A run keeps its choice in its config.yaml"
    )
    fast_dropout: bool = setting(
        True, "draw dropout's numbers on a CPU 3 times as fast as torch; they are other numbers"
    )
    fast_linear: Literal["auto", "on", "off"] = setting(
        "auto",
        "compute linear layers on a CPU by oneDNN, not MKL; auto: on processors of AMD with AVX-512, twice as fast",
        resume="warn",
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, more time", resume="free"
    )
    compile: bool = setting(False, "apply torch.compile: faster steps after a slow first one", resume="warn")
    batch_norm: Literal["eval", "train"] = setting(
        "eval", "eval: running statistics stay fixed; train: each rank updates its own, so results depend on the ranks"
    )
    head: NewHead | None = setting(
        None, "a new head on the bare backbone, e.g. {pooling: mean}; null: the head of transformers"
    )
    lora: Lora | None = setting(None, "train adapters instead of the model, e.g. {r: 8, alpha: 16}; needs peft")
    lora_base: NameOrPath | None = setting(
        None, "base model of the adapters in name_or_path, if it is not where they say", resume="free"
    )
    factory: str | None = setting(
        None, "package.module:function that builds your own torch module, instead of a model by name"
    )
    factory_folder: AnyPath | None = setting(
        None, "folder of that module's file; default: the config file's folder, or the current one", resume="free"
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
    def _check_factory(self) -> Model:
        others = ("from_scratch", "head", "lora", "lora_base", "add_tokens", "attn_implementation", "trust_remote_code")
        if self.factory is not None and (conflicting := [name for name in others if getattr(self, name)]):
            raise ValueError(
                f"model.{conflicting[0]} has no effect on the module that model.factory={self.factory} builds: "
                "remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_adapters(self) -> Model:
        if self.lora is not None and self.from_scratch:
            raise ValueError(
                "model.lora adapts a pretrained model, but model.from_scratch=true creates a new one: remove one"
            )
        return self

    @model_validator(mode="after")
    def _check_from_scratch(self) -> Model:
        if self.from_scratch and self.name_or_path is None and "model_type" not in self.config:
            raise ValueError(
                "model.from_scratch=true does not say which model to create: set model.config.model_type "
                "(gpt2, bert, ...) or model.name_or_path"
            )
        return self

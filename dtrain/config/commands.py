"""The settings of the commands that only use a model: export, inspect, download, generate, predict, chat."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dtrain.config.fields import AnyPath, Section, setting


class Export(Section):
    """The export command."""

    to: AnyPath | None = setting(None, "folder for the model; an existing one only with run.overwrite", resume="free")
    dtype: Literal["fp32", "bf16", "fp16"] | None = setting(None, "of the weights; null: as they are", resume="free")
    merge: bool = setting(False, "LoRA adapters are added into their base model: a plain model", resume="free")


class Inspect(Section):
    """The inspect command."""

    text: str | None = setting(None, "a text to look at", resume="free")
    split: str | None = setting(None, "or the split that the examples are from: train, validation, ...", resume="free")
    examples: tuple[Annotated[int, Field(ge=0)], ...] = setting(
        (), "indices in that split, from 0 on; default: the first", resume="free"
    )

    @model_validator(mode="after")
    def _text_or_split(self) -> Inspect:
        if self.text is not None and self.split is not None:
            raise ValueError("give inspect.text or inspect.split, not both: set the other to null")
        if self.examples and self.split is None:
            raise ValueError("inspect.examples are of a split: set inspect.split, e.g. to validation")
        return self


class Download(Section):
    """The download command."""

    to: AnyPath | None = setting(None, "folder for the files; null: the cache of the hub's libraries", resume="free")
    ignore: tuple[str, ...] = setting((), "files of a model to leave out: ['*.bin', '*.h5']", resume="free")


class Generate(Section):
    """The generate command."""

    prompt: str | None = setting(None, "text to go on from; default: a line break", resume="free")
    max_new_tokens: int = setting(200, "tokens to add", resume="free", ge=1)
    temperature: float = setting(0.8, "0: always the likeliest token", resume="free", ge=0)
    top_k: int | None = setting(None, "draw among the k likeliest tokens only", resume="free", ge=1)
    top_p: float | None = setting(
        None, "draw among the likeliest tokens up to this probability", resume="free", gt=0, le=1
    )


class Predict(Section):
    """The predict command."""

    text: str | None = setting(
        None, "one text, image or JSON row: its answer is printed, and nothing is written", resume="free"
    )
    text_pair: str | None = setting(None, "second text of a pair, or the context of a question", resume="free")
    file: AnyPath | None = setting(
        None, "rows or prompts to answer, in place of the data section's splits", resume="free"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Predict:
        if self.text_pair is not None and self.text is None:
            raise ValueError("predict.text_pair is the second text of a pair: give the first as predict.text")
        if self.text is not None and self.file is not None:
            raise ValueError("give predict.text or predict.file, not both")
        return self


class Talk(Section):
    """The chat command, which draws its replies as `generate` says."""

    system: str | None = setting(None, "a system message that every dialogue begins with", resume="free")
    input: AnyPath | None = setting(
        None, "dialogues to answer: .txt with one on a line, or JSONL; default: the terminal", resume="free"
    )
    output: AnyPath | None = setting(
        None, "JSONL of the replies to talk.input; default: predictions/replies.jsonl of a run folder", resume="free"
    )

    @model_validator(mode="after")
    def _output_has_an_input(self) -> Talk:
        if self.output is not None and self.input is None:
            raise ValueError("talk.output is for the replies to talk.input: set that as well, or neither")
        return self

    @property
    def makes_run_folder(self) -> bool:
        """Whether the replies go to a run folder of the command's own."""
        return self.input is not None and self.output is None

"""The settings of the commands that only use a model: export, inspect, download, generate, predict, chat."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dtrain.config.fields import AnyPath, Section, setting


class Export(Section):
    """The export command."""

    to: AnyPath | None = setting(
        None, "folder for the model; an existing folder needs run.overwrite=true", resume="free"
    )
    dtype: Literal["fp32", "bf16", "fp16"] | None = setting(
        None, "data type of the exported weights; null: unchanged", resume="free"
    )
    merge: bool = setting(
        False, "merge LoRA adapters into their base model: the result is a plain model", resume="free"
    )


class Inspect(Section):
    """The inspect command."""

    text: str | None = setting(None, "text to inspect", resume="free")
    split: str | None = setting(
        None, "split of the examples to inspect, instead of a text: train, validation, ...", resume="free"
    )
    examples: tuple[Annotated[int, Field(ge=0)], ...] = setting(
        (), "0-based indices in that split; default: the first example", resume="free"
    )

    @model_validator(mode="after")
    def _text_or_split(self) -> Inspect:
        if self.text is not None and self.split is not None:
            raise ValueError("set inspect.text or inspect.split, not both: set the other to null")
        if self.examples and self.split is None:
            raise ValueError("inspect.examples selects examples of a split: set inspect.split, e.g. to validation")
        return self


class Download(Section):
    """The download command."""

    to: AnyPath | None = setting(
        None, "folder for the files; null: the cache of the Hugging Face libraries", resume="free"
    )
    ignore: tuple[str, ...] = setting((), "files of a model to skip, e.g. ['*.bin', '*.h5']", resume="free")


class Generate(Section):
    """The generate command."""

    prompt: str | None = setting(None, "text to continue; default: a line break", resume="free")
    max_new_tokens: int = setting(200, "number of tokens to generate", resume="free", ge=1)
    temperature: float = setting(0.8, "sampling temperature; 0: always the most likely token", resume="free", ge=0)
    top_k: int | None = setting(None, "sample from the k most likely tokens only", resume="free", ge=1)
    top_p: float | None = setting(
        None, "sample from the most likely tokens up to this total probability only", resume="free", gt=0, le=1
    )


class Predict(Section):
    """The predict command."""

    text: str | None = setting(
        None, "one text, image or JSON row to answer; the answer is printed and no file is written", resume="free"
    )
    text_pair: str | None = setting(None, "second text of a pair, or the context of a question", resume="free")
    file: AnyPath | None = setting(
        None, "file of rows or prompts to answer, instead of the data section's splits", resume="free"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Predict:
        if self.text_pair is not None and self.text is None:
            raise ValueError("predict.text_pair is the second text of a pair: set the first one as predict.text")
        if self.text is not None and self.file is not None:
            raise ValueError("set predict.text or predict.file, not both")
        return self


class Talk(Section):
    """The chat command. It samples replies with the settings of the `generate` section."""

    system: str | None = setting(None, "system message at the start of every dialogue", resume="free")
    input: AnyPath | None = setting(
        None, "dialogues to answer: .txt with one per line, or JSONL; default: the terminal", resume="free"
    )
    output: AnyPath | None = setting(
        None,
        "JSONL file for the replies to talk.input; default: predictions/replies.jsonl of a run folder",
        resume="free",
    )

    @model_validator(mode="after")
    def _output_has_an_input(self) -> Talk:
        if self.output is not None and self.input is None:
            raise ValueError("talk.output is the file for the replies to talk.input: set both or neither")
        return self

    @property
    def makes_run_folder(self) -> bool:
        """Whether the replies go to a run folder that the command creates."""
        return self.input is not None and self.output is None

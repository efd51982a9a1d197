"""The settings of the commands that only use a model: export, inspect, download."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dtrain.settings import AnyPath, Section, setting


class Export(Section):
    """The export command."""

    to: AnyPath | None = setting(None, "folder for the model; an existing one only with run.overwrite", resume="free")
    dtype: Literal["fp32", "bf16", "fp16"] | None = setting(None, "of the weights; null: as they are", resume="free")


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

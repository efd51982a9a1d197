"""The settings of the data section: where the examples come from, and which of them are used."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from dtrain.config.fields import AnyPath, FolderName, Section, is_text_encoding, setting


class Data(Section):
    """The source of the examples."""

    name: str | None = setting(None, "a GLUE task (cola, sst2, ...), swag, python_docs, or a data set on the hub")
    path: AnyPath | None = setting(None, "a folder or file; with a GLUE name, the folder of its files")
    config: str | None = setting(None, "configuration of a hub data set")
    splits: dict[FolderName, str] = setting({}, "our split (train, validation) -> the source's split or file name")
    validation_fraction: float | None = setting(None, "validation share of a single split", gt=0, lt=1)
    split: Literal["stratified", "mixed", "end"] | None = setting(
        None,
        "rows that validation_fraction and limit take: stratified: drawn from each class in proportion; mixed: drawn from "
        "all rows; end: the last and the first rows; default: stratified for classes, end for language models, else mixed",
    )
    split_seed: int = setting(0, "seed of that draw, apart from run.seed so that runs with other seeds compare", ge=0)
    columns: dict[str, str] = setting({}, "our column (text, text_pair, label) -> the source's column")
    delimiter: str | None = setting(None, "delimiter of CSV and TSV files; default: by file suffix")
    encoding: str | None = setting(None, "encoding of text files, e.g. gb18030; default: UTF-8, or by byte order mark")
    header: bool | None = setting(None, "whether the first line of a CSV or TSV names the columns; default: true")
    max_length: int | None = setting(
        None,
        "tokens per example (default 128), per block of a language model (256), per window of a context (384)",
        ge=2,
    )
    limit: int | None = setting(None, "use only n rows of each split, for a quick run", ge=1)
    max_bad_rows: int = setting(0, "unusable rows of a split that are skipped, each with a warning", ge=0)
    workers: int = setting(0, "processes per rank that prepare batches ahead; 0: none", resume="free", ge=0)
    num_proc: int = setting(1, "processes that tokenize rows, once per node", resume="free", ge=1)
    cache_dir: AnyPath | None = setting(None, "cache of tokenized data; default: the datasets library's", resume="free")

    @field_validator("encoding")
    @classmethod
    def _is_text_encoding(cls, encoding: str | None) -> str | None:
        if encoding is not None and not is_text_encoding(encoding):
            raise ValueError(
                "Python knows no such encoding of text files; usual ones: utf-8, utf-16, gb18030, big5, shift_jis, cp1252"
            )
        return encoding

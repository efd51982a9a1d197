"""What tasks have in common before the first batch: rows of a shape, tokenised once per node, the tokenizer beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.data.cache import Json, prepare, save_split
from dtrain.data.sources import Source, load_sources, source_key
from dtrain.data.tables import RowFormat
from dtrain.distributed.collectives import node_first
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import DataError
from dtrain.models.load import pretrained_label_names
from dtrain.models.tokenizer import fingerprint, load_tokenizer, reload_tokenizer
from dtrain.tasks.protocol import Split

Meta = Mapping[str, Json]

Encode = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Columns of some rows to columns of examples; a row that it cannot encode is a DataError that says which."""


@dataclass(frozen=True)
class Recipe:
    """How one task makes its examples. Called on one rank of each node, and only where the result is not kept yet.

    Args:
        task: name, for the cache; with a number behind it when the meaning of the other parts changes.
        shape: of a row.
        texts: of the training split, for a tokenizer that is built from them.
        encode: a split's examples; its columns are what `Task.collate` is given.
        describe: what the ranks have to know besides, from all splits, before any is encoded (the labels' names).
        options: what else the result depends on, e.g. settings of the task.
        needs_padding: whether batches hold examples of different lengths.
        has_text: False where there is nothing to tokenise, and no tokenizer.
    """

    task: str
    shape: RowFormat
    texts: Callable[[Source], Iterable[str]]
    encode: Callable[[Source, Any, Meta], datasets.Dataset]
    describe: Callable[[Mapping[str, Source], Any], Meta] = lambda _sources, _tokenizer: {}
    options: Meta | None = None
    needs_padding: bool = True
    has_text: bool = True


@dataclass(frozen=True)
class Examples:
    """splits: memory-mapped examples. tokenizer: the one that made them, if any. meta: what `Recipe.describe` gave."""

    splits: Mapping[str, datasets.Dataset]
    tokenizer: Any
    meta: Meta


def prepare_examples(recipe: Recipe, config: Config, context: RankContext) -> Examples:
    """Collective. The examples of all splits, from the cache or made now, equal on all nodes.

    Raises:
        DataError: on every rank: what reading raises, or nodes that hold different data.
        ConfigError: settings that do not fit the data.
    """

    @cache
    def made_tokenizer() -> PreTrainedTokenizerBase | None:
        if not recipe.has_text:
            return None
        return load_tokenizer(
            config.model,
            training_texts=lambda: recipe.texts(load_sources(config.data, recipe.shape)["train"]),
            needs_padding=recipe.needs_padding,
        )

    def tokenizer_key() -> Json:
        if config.model.tokenizer == "train-bpe":  # told apart by what makes it, so that it is trained once
            return {"train-bpe": config.model.tokenizer_vocab_size, "pad": recipe.needs_padding}
        tokenizer = made_tokenizer()
        return None if tokenizer is None else fingerprint(tokenizer)

    def plan() -> tuple[Meta, Callable[[Path], Meta]]:
        key: dict[str, Json] = {
            "task": recipe.task,
            "shape": recipe.shape.name,
            "source": source_key(config.data),
            "tokenizer": tokenizer_key(),
            "max_length": config.max_length if recipe.has_text else None,
            "options": dict(recipe.options or {}),
        }

        def build(folder: Path) -> Meta:
            tokenizer = made_tokenizer()
            with TemporaryDirectory(dir=folder) as scratch:  # rows on disk, not in memory
                sources = load_sources(config.data, recipe.shape, scratch=Path(scratch))
                meta = dict(recipe.describe(sources, tokenizer))
                for split, source in sources.items():
                    save_split(folder, split, recipe.encode(source, tokenizer, meta))
            if tokenizer is not None:
                tokenizer.save_pretrained(folder / "tokenizer")
            return {**meta, "skipped": {split: source.skipped for split, source in sources.items() if source.skipped}}

        return key, build

    prepared = prepare(plan, cache_dir=config.data.cache_dir, context=context)
    for split, number in prepared.meta["skipped"].items():
        log.warning("data: %s lacks %d bad row(s), passed over as data.max_bad_rows allows", split, number)
    tokenizer = reload_tokenizer(prepared.folder / "tokenizer", config.model) if recipe.has_text else None
    return Examples(prepared.splits, tokenizer, prepared.meta)


def known_labels(config: Config, context: RankContext) -> tuple[str, ...] | None:
    """Collective. The label names that a trained model brings; one rank of each node asks a hub."""
    names: list[str] | None = node_first(lambda: pretrained_label_names(config.model), context)
    return None if names is None else tuple(names)


def map_rows(source: Source, encode: Encode, config: Config) -> datasets.Dataset:
    """The source's rows, batch by batch through `encode` (columns in, columns out), by `data.num_proc` processes.

    A row that `encode` refuses with a DataError is a bad row: as many as data.max_bad_rows still allows are passed over.

    Raises:
        DataError: more rows than that are refused, or all.
    """
    try:
        return _mapped(source.rows, encode, config)
    except DataError:
        if config.data.max_bad_rows == 0:
            raise
    # Bad rows are few: all are looked at again only where there is one, and told in their order by this process.
    faults = _mapped(source.rows, partial(_faults, encode), config, features=_FAULT)["fault"][:]
    for fault in faults:
        if fault is not None:
            source.bad.add(DataError(fault))
    kept = [number for number, fault in enumerate(faults) if fault is None]
    if not kept:
        raise DataError(f"{source.origin} has no rows that can be used: a split needs at least one")
    return _mapped(source.rows.select(kept), encode, config)


_FAULT = datasets.Features({"fault": datasets.Value("string")})


def _faults(encode: Encode, rows: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """What `encode` says against each row; None: nothing."""
    names, number = list(rows), len(next(iter(rows.values())))
    faults: list[str | None] = [None] * number
    try:
        encode({name: rows[name] for name in names})
    except DataError:
        for row in range(number):
            try:
                encode({name: [rows[name][row]] for name in names})
            except DataError as error:
                faults[row] = str(error)
    return {"fault": faults}


def _mapped(
    rows: datasets.Dataset, encode: Encode, config: Config, *, features: datasets.Features | None = None
) -> datasets.Dataset:
    # The result is kept under our own key, so the library need not hash the function.
    return rows.map(
        encode,
        batched=True,
        remove_columns=rows.column_names,
        features=features,
        num_proc=config.data.num_proc if config.data.num_proc > 1 else None,
        new_fingerprint="dtrain",
        load_from_cache_file=False,
    )


def all_texts(source: Source) -> Iterator[str]:
    """Both texts of every row."""
    rows = source.rows
    return chain.from_iterable(rows[column] for column in ("text", "text_pair") if column in rows.column_names)


def columns_of(rows: Split, *names: str) -> Mapping[str, Sequence[Any]]:
    """Those columns of a split in data order, without the tokens of the whole split."""
    whole: Any = rows.select_columns(list(names)) if isinstance(rows, datasets.Dataset) else rows
    columns: Mapping[str, Sequence[Any]] = whole[list(range(len(whole)))]
    return columns


def label_outputs(labels: Sequence[str]) -> dict[str, Any]:
    """What the config of a head with an output for each label says."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def encode_texts(rows: Mapping[str, Any], tokenizer: Any, *, max_length: int) -> Mapping[str, Any]:
    """`text`, or `text` and `text_pair`, as the tokenizer joins them, cut to max_length."""
    encoded: Mapping[str, Any] = tokenizer(
        rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length, return_attention_mask=False
    )
    return encoded

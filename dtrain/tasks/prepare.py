"""Data preparation that tasks share: rows are read and encoded once per node and cached with their tokenizer."""

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
from dtrain.data.cache import prepare, save_split
from dtrain.data.columns import column_values
from dtrain.data.sources import Source, load_sources, source_key, source_notes
from dtrain.data.tables import RowFormat
from dtrain.distributed.collectives import node_first
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.serialization import Json
from dtrain.errors import ConfigError, DataError
from dtrain.models.load import pretrained_label_names
from dtrain.models.saved_tokenizer import fingerprint, save_tokenizer
from dtrain.models.template_limits import TemplateLimitError
from dtrain.models.tokenizer import bpe_class, load_tokenizer, reload_tokenizer
from dtrain.models.tokenizer_limits import limited_time
from dtrain.tasks.data_facts import split_facts
from dtrain.tasks.encoding import encode_all
from dtrain.tasks.progress import progress
from dtrain.tasks.protocol import Split
from dtrain.tasks.truncation import FULL_LENGTH, FULL_TARGET_LENGTH, full_lengths, report_cuts, take_cuts

Meta = Mapping[str, Json]

Encode = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Converts columns of rows to columns of examples. Raises a DataError that names a row that it cannot encode."""


ENCODED_ROWS = 1000
"""Rows that are encoded at once."""


@dataclass(frozen=True)
class Recipe:
    """How a task makes its examples. The functions run on one rank of each node, and only if the result is not cached.

    Attributes:
        task: Name for the cache. A number is appended when the meaning of the other parts changes.
        row_format: What a row of the data consists of.
        texts: Returns the texts of the training split, for a tokenizer that is built from them.
        encode: Returns the examples of a split. `Task.collate` gets their columns.
        describe: Returns further values that all ranks need, from all splits, before any split is encoded, e.g. the
            label names.
        options: Other values that the result depends on, such as settings of the task.
        needs_padding: Whether batches hold examples of different lengths.
        has_text: False for a task without text, and so without a tokenizer.
        max_target_length: Maximum tokens of a target, for tasks whose targets are texts of their own.
    """

    task: str
    row_format: RowFormat
    texts: Callable[[Source], Iterable[str]]
    encode: Callable[[Source, Any, Meta], datasets.Dataset]
    describe: Callable[[Mapping[str, Source], Any], Meta] = lambda _sources, _tokenizer: {}
    options: Meta | None = None
    needs_padding: bool = True
    has_text: bool = True
    max_target_length: int | None = None


@dataclass(frozen=True)
class Examples:
    """The examples of all splits.

    Attributes:
        splits: Memory-mapped examples.
        tokenizer: The tokenizer that encoded them. None for a task without text.
        meta: The values that `Recipe.describe` returned.
    """

    splits: Mapping[str, datasets.Dataset]
    tokenizer: Any
    meta: Meta


def prepare_examples(recipe: Recipe, config: Config, context: RankContext) -> Examples:
    """Collective. Returns the examples of all splits, equal on all nodes, from the cache if they are there.

    Raises:
        DataError: on every rank, if the data cannot be read or nodes hold different data.
        ConfigError: settings do not fit the data.
    """

    @cache
    def built_tokenizer() -> PreTrainedTokenizerBase | None:
        if not recipe.has_text:
            return None
        return load_tokenizer(
            config.model,
            training_texts=lambda: recipe.texts(load_sources(config.data, recipe.row_format)["train"]),
            needs_padding=recipe.needs_padding,
        )

    def tokenizer_key() -> Json:
        if config.model.tokenizer == "train-bpe":  # its settings are the key, so that it is trained only once
            like = bpe_class(config.model)
            own: dict[str, Json] = {} if like is None else {"like": like.__name__}
            if config.model.add_tokens or config.model.pad_token is not None:
                own["added"] = [list(config.model.add_tokens), config.model.pad_token]
            return {"train-bpe": config.model.tokenizer_vocab_size, "pad": recipe.needs_padding, **own}
        tokenizer = built_tokenizer()
        return None if tokenizer is None else fingerprint(tokenizer)

    limits = {FULL_LENGTH: config.max_length, FULL_TARGET_LENGTH: recipe.max_target_length or 0}

    def plan() -> tuple[Meta, Callable[[Path], Meta]]:
        key: dict[str, Json] = {
            "task": recipe.task,
            "encoding": 3,  # increased when the same settings begin to give other examples
            "shape": recipe.row_format.name,
            "source": source_key(config.data),
            "tokenizer": tokenizer_key(),
            "max_length": config.max_length if recipe.has_text else None,
            "options": dict(recipe.options or {}),
        }

        def build(folder: Path) -> Meta:
            tokenizer = built_tokenizer()
            with TemporaryDirectory(dir=folder) as scratch:  # rows on disk, not in memory
                sources = load_sources(config.data, recipe.row_format, scratch=Path(scratch))
                notes = source_notes(sources)
                meta = dict(recipe.describe(sources, tokenizer))
                facts: dict[str, Json] = {}
                cuts: dict[str, Json] = {}
                for split, source in sources.items():
                    with limited_time(tokenizer):
                        encoded = recipe.encode(source, tokenizer, meta)
                    examples, cuts[split] = take_cuts(encoded, limits)
                    facts[split] = split_facts(source, examples, tokenizer, max_length=config.max_length)
                    save_split(folder, split, examples)
            if tokenizer is not None:
                _save_tokenizer(tokenizer, folder / "tokenizer", config)
            skipped = {split: source.skipped for split, source in sources.items() if source.skipped}
            return {**meta, "skipped": skipped, "notes": notes, "facts": facts, "cuts": cuts}

        return key, build

    prepared = prepare(plan, cache_dir=config.data.cache_dir, context=context)
    for split, number in prepared.meta["skipped"].items():
        log.warning("data: %s: skipped %d bad row(s), as data.max_bad_rows allows", split, number)
    report_cuts(prepared.meta["cuts"])
    prepared.splits.facts = prepared.meta["facts"]
    for note in prepared.meta["notes"]:
        log.info("warning: data: %s", note)  # once, not on every rank
    tokenizer = reload_tokenizer(prepared.folder / "tokenizer", config.model) if recipe.has_text else None
    return Examples(prepared.splits, tokenizer, prepared.meta)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, config: Config) -> None:
    """Saves the tokenizer that encoded the examples. Ranks load it from here.

    Raises:
        ConfigError: it does not reload as the same tokenizer.
    """
    difference = save_tokenizer(tokenizer, folder, trust_remote_code=config.model.trust_remote_code)
    if difference is not None:
        raise ConfigError(
            f"The tokenizer {config.model.tokenizer or config.model.name_or_path} ({type(tokenizer).__name__}) cannot be "
            f"saved by transformers: once saved, it {difference}. Set model.tokenizer to another one."
        )


def pretrained_labels(config: Config, context: RankContext) -> tuple[str, ...] | None:
    """Collective. Returns the label names of a trained model. One rank per node reads them, perhaps from the hub."""
    names: list[str] | None = node_first(lambda: pretrained_label_names(config.model), context)
    return None if names is None else tuple(names)


def map_rows(source: Source, encode: Encode, config: Config) -> datasets.Dataset:
    """Encodes the source's rows in batches, in `data.num_proc` processes.

    A row that `encode` refuses with a DataError is a bad row. At most data.max_bad_rows of them are skipped.

    Raises:
        DataError: there are more bad rows, or no others. It names the first that is too many, and counts all.
    """
    try:
        with progress(f"{source.split}: rows tokenized", len(source.rows), processes=config.data.num_proc) as advance:
            return _encode_rows(source.rows, partial(_encode_and_count, encode, advance), config)
    except TemplateLimitError:  # trying the other rows could take as long for each
        raise
    except DataError:
        pass
    # Bad rows are rare: only if there is one, all rows are checked again, and this process reports them in order.
    faults = _encode_rows(source.rows, partial(_find_faults, encode), config, features=_FAULT)["fault"][:]
    _refuse_too_many(source, [fault for fault in faults if fault is not None], config)
    for fault in faults:
        if fault is not None:
            source.bad.add(DataError(fault))
    kept = [number for number, fault in enumerate(faults) if fault is None]
    if not kept:
        raise DataError(f"{source.origin} has no rows that can be used: a split needs at least one")
    return _encode_rows(source.rows.select(kept), encode, config)


def _encode_and_count(encode: Encode, advance: Callable[[int], None], rows: Mapping[str, Any]) -> Mapping[str, Any]:
    encoded = encode(rows)
    advance(ENCODED_ROWS)
    return encoded


def _refuse_too_many(source: Source, faults: Sequence[str], config: Config) -> None:
    """Raises DataError if more rows are bad than data.max_bad_rows allows and the message must say how many."""
    number, needed = len(source.rows), source.skipped + len(faults)
    if len(faults) == number and number > 1:
        raise DataError(
            f"{source.origin} has no rows that can be used: a split needs at least one. The first of {number}: {faults[0]}"
        )
    if needed > config.data.max_bad_rows and len(faults) > 1:
        allowed = config.data.max_bad_rows
        more = f" (data.max_bad_rows={allowed} were skipped before it)" if allowed else ""
        raise DataError(
            f"{faults[allowed - source.skipped]}{more}. In all, {len(faults)} of {number} rows cannot be used; "
            f"data.max_bad_rows={needed} skips them"
        )


_FAULT = datasets.Features({"fault": datasets.Value("string")})


def _find_faults(encode: Encode, rows: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """Returns the error message of `encode` for each row. None: no error."""
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


def _encode_rows(
    rows: datasets.Dataset, encode: Encode, config: Config, *, features: datasets.Features | None = None
) -> datasets.Dataset:
    # The result is cached under dtrain's own key, so that the library does not need to hash the function.
    return rows.map(
        encode,
        batched=True,
        batch_size=ENCODED_ROWS,
        remove_columns=rows.column_names,
        features=features,
        num_proc=config.data.num_proc if config.data.num_proc > 1 else None,
        new_fingerprint="dtrain",
        load_from_cache_file=False,
    )


def all_texts(source: Source) -> Iterator[str]:
    """Returns the text, or both texts, of every row."""
    rows = source.rows
    return chain.from_iterable(
        column_values(rows, column) for column in ("text", "text_pair") if column in rows.column_names
    )


def read_columns(rows: Split, *names: str) -> Mapping[str, Sequence[Any]]:
    """Reads some columns of a split in data order, without loading its tokens."""
    selected = select_columns(rows, *names)
    everything: Any = slice(None) if isinstance(selected, datasets.Dataset) else list(range(len(selected)))
    return selected[everything]


def select_columns(rows: Split, *names: str) -> Split:
    """Returns a view of a split that loads only these columns, if the split can leave any out."""
    selected: Any = rows.select_columns(list(names)) if isinstance(rows, datasets.Dataset) else rows
    split: Split = selected
    return split


def label_config(labels: Sequence[str]) -> dict[str, Any]:
    """Returns the values for the model's config that give each label an output."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def encode_texts(rows: Mapping[str, Any], tokenizer: Any, *, max_length: int) -> Mapping[str, Any]:
    """Encodes `text`, or `text` and `text_pair` joined by the tokenizer, truncated to max_length tokens."""
    texts = {"text": rows["text"], "text_pair": rows.get("text_pair")}
    columns, encodings = encode_all(tokenizer, texts["text"], texts["text_pair"], max_length=max_length)
    encodings = None if texts["text_pair"] is not None else encodings
    lengths = full_lengths(tokenizer, columns["input_ids"], texts, max_length=max_length, encodings=encodings)
    return {**fill_empty(columns, tokenizer), FULL_LENGTH: lengths}


def fill_empty(encoded: Mapping[str, Any], tokenizer: Any) -> Mapping[str, Any]:
    """Gives a row without tokens one token: the first that the tokenizer has of CLS, BOS, EOS, unknown and pad.

    A tokenizer that adds no special tokens has none for an empty text, and a model needs at least one to compute an answer.
    """
    if all(encoded["input_ids"]):
        return encoded
    tokens = ("cls_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id")
    token = next((number for name in tokens if (number := getattr(tokenizer, name)) is not None), None)
    if token is None:
        raise DataError("a text is empty, and the tokenizer has no special token that could stand for it")
    _say_what_stands_for_no_text(tokenizer.convert_ids_to_tokens(token))
    empty = [not ids for ids in encoded["input_ids"]]
    values = {"input_ids": token, "token_type_ids": 0, "attention_mask": 1}
    return {
        name: [
            [values[name]] if is_empty and name in values else row for row, is_empty in zip(rows, empty, strict=True)
        ]
        for name, rows in encoded.items()
    }


@cache
def _say_what_stands_for_no_text(token: str) -> None:  # once per process, not in every batch of rows
    log.info("Note: some texts are empty, and the tokenizer adds no special tokens: %s stands for an empty text", token)

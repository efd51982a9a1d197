"""The frozen part is computed once: what is read is right, what cannot be read is computed, and the plan says which."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.config.schema import NewHead
from dtrain.data.frozen_store import FrozenStore, _read_index
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError
from dtrain.models.custom_head import HeadedModel
from dtrain.models.frozen_prefix import LayersBorder, PooledBorder
from dtrain.tasks.masked_lm import MaskedLmTask
from dtrain.tasks.row_lengths import row_lengths
from dtrain.training import frozen_refusal
from dtrain.training.evaluation import evaluate_split
from tests.support import tiny, training
from tests.support.training import Setting, apart, worst

FROZEN = ("embeddings", "encoder.layer[0]")


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(freeze=FROZEN, cache="auto", cache_dir=str(tmp_path), learning_rate=0.2)


def trained(setting: Setting, module: nn.Module | None = None, learns: Any = None) -> dict[str, Any]:
    built = training.build(ONE_PROCESS, setting, module, learns)
    recorder, cache = training.Recorder(), built.prepared.frozen_cache
    built.go(recorder)
    scores = evaluate_split(built.engine, built.task, "validation", micro_batch_size=4).metrics
    return {
        "steps": recorder.steps,
        "weights": training.weights_of(built.engine),
        "cache": cache,
        "loss": scores["loss"],
        "thawed": built.state.thawed,
    }


def assert_same(one: dict[str, Any], other: dict[str, Any], limit: float = 1e-5) -> None:
    assert worst(one, other) <= limit
    assert apart(one, other) <= limit
    assert abs(one["loss"] - other["loss"]) <= limit


def folders(setting: Setting) -> list[Path]:
    return sorted((Path(str(setting.cache_dir)) / "frozen").iterdir())


def parts(setting: Setting) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for folder in folders(setting) for file in folder.glob("*.part")}


def plain(setting: Setting) -> dict[str, Any]:
    return trained(replace(setting, cache="off"))


# What is read


def test_a_second_run_reads_what_the_first_one_wrote_and_gets_every_bit_of_it(setting: Setting) -> None:
    first, before = trained(setting), parts(setting)
    second = trained(setting)

    assert parts(setting) == before
    assert len(folders(setting)) == 1
    assert_same(first, second, limit=0.0)
    assert_same(plain(setting), second)
    micro_batches = 2 * (3 + 3 + 2) + 3  # two epochs, and the evaluation
    assert (second["cache"].hits, second["cache"].misses) == (micro_batches, 0)


@pytest.mark.parametrize(
    "change", [{"micro_batch_size": 8}, {"shuffle": False}, {"global_batch_size": 5}, {"steps": 9}]
)
def test_a_run_with_other_batches_reads_the_same_rows(setting: Setting, change: dict[str, Any]) -> None:
    trained(setting)
    before = parts(setting)
    other = replace(setting, **change)

    assert_same(plain(other), trained(other))
    assert parts(setting) == before


def test_the_frozen_layers_do_not_run_again(setting: Setting) -> None:
    module, calls = tiny.bert(layers=2), list[str]()
    built = training.build(ONE_PROCESS, setting, module)
    module.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: calls.append("below"))
    module.bert.encoder.layer[1].attention.register_forward_hook(lambda *_: calls.append("above"))
    module.bert.embeddings.LayerNorm.register_forward_hook(lambda *_: calls.append("below"))
    built.go()

    assert set(calls) == {"above"}


def test_only_rows_that_are_used_are_computed(setting: Setting) -> None:
    short = replace(setting, steps=4, global_batch_size=3, cache="on", rows=30)
    trained(short)
    lengths = {len(ids) for ids in tiny.sentences(30)[list(range(30))]["input_ids"]}
    store = FrozenStore(folders(setting)[0], vector_bytes=32 * 4)
    store.load()

    assert len(lengths) > 1
    assert len(store._rows) <= 12 + 11 < 30 + 11


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_a_head_of_dtrains_reads_the_pooled_vector(setting: Setting, pooling: Any) -> None:
    def make() -> HeadedModel:
        head = NewHead(kind="linear", pooling=pooling, hidden=6, dropout=0.3)
        task_head = training.task(setting).head
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return HeadedModel(tiny.bert(layers=1).bert, head, task_head=task_head, outputs=2, width=32)

    wholly = replace(setting, freeze=("backbone",))
    cached = trained(wholly, make())

    assert isinstance(cached["cache"].border, PooledBorder)
    assert cached["cache"].misses == 0
    assert_same(trained(replace(wholly, cache="off"), make()), cached)


def test_lower_precision_keeps_vectors_of_its_own(setting: Setting) -> None:
    trained(setting)
    lower = replace(setting, precision="bf16")

    cached = trained(lower)

    assert len(folders(setting)) == 2
    assert worst(plain(lower), cached) < 2e-2
    assert cached["cache"].misses == 0


# What is not read


def test_a_row_with_another_token_is_not_found(setting: Setting) -> None:
    built = training.build(ONE_PROCESS, setting)
    cache = built.prepared.frozen_cache
    row = training.task(setting).splits["train"][[0]]["input_ids"][0]
    other = [row[0], 5 if row[1] != 5 else 6, *row[2:]]
    built.engine.module.eval()

    def found(ids: list[int]) -> tuple[int, int]:
        built.engine.module(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long())
        return cache.hits, cache.misses

    assert found(other) == (0, 1)
    types = {"token_type_ids": torch.zeros(1, len(row)).long()}
    built.engine.module(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row)).long(), **types)
    assert (cache.hits, cache.misses) == (0, 2), "BERT with types, but the task has none"
    assert found(row) == (1, 2)


def test_other_frozen_weights_have_a_store_of_their_own(setting: Setting) -> None:
    trained(setting)
    other = trained(setting, tiny.bert(seed=3, layers=2))

    assert len(folders(setting)) == 2
    assert_same(trained(replace(setting, cache="off"), tiny.bert(seed=3, layers=2)), other)


def test_a_store_of_other_weights_under_this_models_name_is_noticed_and_replaced(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    trained(setting)
    (name,) = folders(setting)
    elsewhere = replace(setting, cache_dir=f"{setting.cache_dir}/elsewhere")
    trained(elsewhere, tiny.bert(seed=3, layers=2))
    shutil.rmtree(name)
    shutil.copytree(folders(elsewhere)[0], name)

    cached = trained(setting)

    assert "has the results of another model" in caplog.text
    assert_same(plain(setting), cached)


def test_one_damaged_byte_is_noticed_and_the_rows_are_computed_again(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    first, before = trained(setting), parts(setting)
    file = next(folders(setting)[0].glob("*.part"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)

    again = trained(setting)

    assert "its bytes are not those that were written" in caplog.text
    assert parts(setting) == before
    assert_same(first, again, limit=0.0)


def test_what_a_killed_writer_left_is_completed_to_the_same_bits(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.training.frozen_fill.PART_BYTES", 4000)
    monkeypatch.setattr("dtrain.training.frozen_fill.GROUP_TOKENS", 20)
    first, before = trained(setting), parts(setting)
    assert len(before) > 5
    for file in sorted(folders(setting)[0].glob("*.part"))[::2]:
        file.rename(file.with_name(f".building-{file.stem}"))

    again = trained(setting)

    assert_same(first, again, limit=0.0)
    assert again["cache"].misses == 0


def test_a_run_that_is_started_again_reads_the_bits_that_it_read_before_whatever_another_run_added(
    setting: Setting,
) -> None:
    setting = replace(setting, rows=60, steps=9)
    small = replace(setting, rows=21)
    first, before = trained(small), parts(setting)
    trained(setting)  # its groups hold rows of the first run, too
    (folder,) = folders(setting)
    store = FrozenStore(folder, vector_bytes=32 * 4)
    store.load()
    stored = sum(len(_read_index(file, 32 * 4)[0]) for file in folder.glob("*.part"))

    assert set(parts(setting)) > set(before)
    assert stored == len(store._rows), "no row is stored twice"
    assert_same(first, trained(small), limit=0.0)


class Counted:
    """A split that counts the rows that are read from it."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.read = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: list[int]) -> Any:
        self.read += len(indices)
        return self.rows[indices]


def test_a_table_that_is_too_large_is_not_read_to_its_end_to_find_that_out(
    setting: Setting, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = replace(setting, rows=2000, steps=2, global_batch_size=1000, micro_batch_size=50, table=True, cache="on")
    lengths = training.task(setting).splits["train"]["input_ids"]
    tokens = sum(map(len, lengths))
    limited = replace(setting, cache_gb=tokens * 32 * 4 / 2**30 / 20)
    built = training.build(ONE_PROCESS, replace(limited, cache="off"))
    counted = Counted(built.task.splits["train"])
    task = training.task(limited)
    known = row_lengths(task, "train")
    monkeypatch.setattr("dtrain.training.frozen_rows.row_lengths", lambda *_: known)
    task.splits = {"train": counted}

    training.build(ONE_PROCESS, limited, learns=task)

    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "is less than the" in warning
    enough = float(warning.split("set freeze.cache_gb=")[1].split(".  ")[0].split(". ")[0])
    assert enough * 2**30 > tokens * 32 * 4
    assert counted.read < 600


@pytest.mark.parametrize("method", ["requires_grad", "no_grad"])
def test_a_thaw_moves_the_border_down_and_the_rest_is_read(setting: Setting, method: str) -> None:
    def make() -> Any:
        return tiny.bert(layers=3)

    frozen = replace(setting, freeze=("embeddings", "encoder.layer[:2]"), freeze_method=method)
    thawing = replace(frozen, thaw=((2, "encoder.layer[1]"),), steps=12)
    cached = trained(thawing, make())

    assert cached["thawed"]
    assert_same(trained(replace(thawing, cache="off"), make()), cached)
    assert isinstance(cached["cache"].border, LayersBorder)
    assert "after layer 1 of 3" in cached["cache"].border.shown


def test_a_thaw_of_all_ends_the_cache(setting: Setting) -> None:
    thawing = replace(setting, thaw=((2, "embeddings"), (2, "encoder.layer[0]")), steps=12)
    cached = trained(thawing)

    assert cached["cache"].border is None
    assert_same(plain(thawing), cached)


def test_closing_leaves_the_model_as_it_was(setting: Setting) -> None:
    for frozen in (FROZEN, ("base_model",)):
        module = tiny.bert(layers=2)
        training.build(ONE_PROCESS, replace(setting, freeze=frozen, cache="off"), module)  # model.unpad has hooks, too
        before = {name: set(vars(part)) - {"_dtrain_frozen"} for name, part in module.named_modules()}
        hooks = {name: len(part._forward_pre_hooks) for name, part in module.named_modules()}
        cache = training.build(ONE_PROCESS, replace(setting, freeze=frozen), module).prepared.frozen_cache
        assert cache.border is not None
        cache.close()

        after = {name: set(vars(part)) - {"_dtrain_frozen"} for name, part in module.named_modules()}
        assert after == before
        assert {name: len(part._forward_pre_hooks) for name, part in module.named_modules()} == hooks


# What the disk does not allow


def no_folder(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Setting:
    (Path(str(setting.cache_dir)) / "frozen").write_text("a file")
    return setting


def full_disk(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Setting:
    def write(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FrozenStore, "write", write)
    return setting


def little_room(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Setting:
    usage = shutil.disk_usage(str(setting.cache_dir))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=100))
    return setting


def small_limit(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Setting:
    return replace(setting, cache_gb=1e-6)


@pytest.mark.parametrize(
    ("obstacle", "said"),
    [
        (no_folder, "cannot be used"),
        (full_disk, "No space left on device"),
        (little_room, "GiB free"),
        (small_limit, "set freeze.cache_gb="),
    ],
)
@pytest.mark.parametrize("cache", ["auto", "on"])
def test_the_frozen_part_is_computed_in_each_step_after_one_warning(
    setting: Setting,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    obstacle: Callable[[Setting, pytest.MonkeyPatch], Setting],
    said: str,
    cache: str,
) -> None:
    found = trained(obstacle(replace(setting, cache=cache), monkeypatch))

    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert said in warnings[0]
    assert "computed in each step instead" in warnings[0]
    monkeypatch.undo()
    assert_same(plain(setting), found, limit=0.0)


# What is refused


def masked(setting: Setting) -> tuple[Setting, nn.Module, Any]:
    from transformers import BertForMaskedLM

    from dtrain.config.task import MaskedLm

    splits = {"train": tiny.sentences(21), "validation": tiny.sentences(11, seed=1)}
    task = MaskedLmTask(splits, tiny.tokenizer(), MaskedLm(name="masked_lm"), max_length=32, seed=7)
    return setting, BertForMaskedLM(tiny.bert(layers=2).config), task


REASONS: dict[str, tuple[Callable[[Setting], tuple[Setting, Any, Any]], str]] = {
    "nothing frozen": (lambda s: (replace(s, freeze=()), None, None), r"nothing is frozen. Freeze the embeddings"),
    "masks of each epoch": (masked, r"draws other inputs in each epoch \(masks\)\. Use freeze\.cache=auto\.$"),
    "only the embeddings": (
        lambda s: (replace(s, freeze=("embeddings",)), None, None),
        "no layer is frozen.* Freeze the embeddings and the first layers",
    ),
    "compile": (
        lambda s: (replace(s, compile=True), None, None),
        r"model\.compile .* Set model\.compile=false, or use freeze\.cache=auto\.$",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_on_is_an_error_where_nothing_can_be_read_and_auto_computes(setting: Setting, case: str) -> None:
    change, reason = REASONS[case]
    changed, module, task = change(replace(setting, cache="on"))
    with pytest.raises(ConfigError, match=r"freeze\.cache=on: .*" + reason):
        training.build(ONE_PROCESS, changed, module, task)

    changed, module, task = change(setting)
    assert training.build(ONE_PROCESS, changed, module, task).prepared.frozen_cache.border is None


def test_the_cure_for_a_sharded_engine_is_another_engine(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_refusal, "needs_every_rank", lambda _module: True)

    with pytest.raises(
        ConfigError, match=r"shards the model.* Use engine\.name=ddp without engine\.zero_stage, or use"
    ):
        training.build(ONE_PROCESS, replace(setting, cache="on"))


def test_auto_does_not_store_what_is_used_once_and_on_does(setting: Setting) -> None:
    once = replace(setting, steps=3)

    assert trained(once)["cache"].border is None
    assert trained(replace(once, cache="on"))["cache"].hits > 0


# Other tasks


def pieces(*, rows: int, seed: int) -> list[list[int]]:
    return [list(ids) for ids in tiny.sentences(rows, seed=seed)[list(range(rows))]["input_ids"]]


def tags(_setting: Setting) -> tuple[Any, nn.Module]:
    from transformers import BertForTokenClassification

    from dtrain.tasks.token_classification import TokenClassificationTask

    def table(rows: int, seed: int) -> tiny.Table:
        ids = pieces(rows=rows, seed=seed)
        places = [list(range(1, len(row) - 1)) for row in ids]
        labels = [[row[place] % 2 for place in some] for row, some in zip(ids, places, strict=True)]
        types = [[0] * len(row) for row in ids]
        return tiny.Table({"input_ids": ids, "token_type_ids": types, "places": places, "tags": labels})

    splits = {"train": table(21, 0), "validation": table(11, 1)}
    task = TokenClassificationTask(splits, tiny.tokenizer(), ["odd", "even"], max_length=32)
    return task, BertForTokenClassification(tiny.bert(layers=2).config)


def choices(_setting: Setting) -> tuple[Any, nn.Module]:
    from transformers import BertForMultipleChoice

    from dtrain.tasks.multiple_choice import MultipleChoiceTask

    def table(rows: int, seed: int) -> tiny.Table:
        ids = pieces(rows=2 * rows, seed=seed)
        pairs = [[ids[2 * row], ids[2 * row + 1]] for row in range(rows)]
        types = [[[0] * len(one) for one in pair] for pair in pairs]
        labels = [row % 2 for row in range(rows)]
        return tiny.Table({"input_ids": pairs, "token_type_ids": types, "label": labels})

    splits = {"train": table(21, 0), "validation": table(11, 1)}
    return MultipleChoiceTask(splits, tiny.tokenizer(), max_length=32), BertForMultipleChoice(
        tiny.bert(layers=2).config
    )


@pytest.mark.parametrize("frozen", [("base_model",), FROZEN], ids=["all but the head", "half"])
@pytest.mark.parametrize("kind", [tags, choices])
def test_tokens_and_choices_are_read_too(
    setting: Setting, kind: Callable[[Setting], tuple[Any, nn.Module]], frozen: tuple[str, ...]
) -> None:
    half = replace(setting, freeze=frozen)

    def run(changed: Setting) -> dict[str, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            task, module = kind(changed)
        return trained(changed, module, task)

    cached = run(half)

    assert (cached["cache"].hits > 0, cached["cache"].misses) == (True, 0)
    assert_same(run(replace(half, cache="off")), cached)

"""Evaluation computes logits of targets only, in chunks: equal numbers, and no tensor of tokens x vocabulary."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.config.schema import Config, Evaluation
from dtrain.config.task import MaskedLm, Seq2Seq
from dtrain.distributed.collectives import all_gather_object
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.engine.forward_only import ForwardOnly
from dtrain.errors import DataError
from dtrain.tasks import target_loss
from dtrain.tasks.causal_lm import CausalLmTask
from dtrain.tasks.chat import ChatTask
from dtrain.tasks.masked_lm import MaskedLmTask
from dtrain.tasks.protocol import IGNORED, Batch, Task
from dtrain.tasks.seq2seq import Seq2SeqTask
from dtrain.training.evaluation import evaluate
from tests.support import tiny, tiny_chat
from tests.support.multirank import run_ranks

VOCABULARY = 50
TASKS = ("causal_lm", "chat", "masked_lm", "seq2seq")
CHUNK = 4
CONFIG = Config.model_validate({"task": {"name": "causal_lm"}})


def rows(name: str, lengths: list[int]) -> Dataset:
    """Rows of different lengths. The last one of a dialogue has no target, as in a test split."""
    ids = [[3 + (7 * row + place) % 40 for place in range(length)] for row, length in enumerate(lengths)]
    columns: dict[str, Any] = {"input_ids": ids}
    if name == "chat":
        columns["is_target"] = [[int(place % 3 > 0) for place in range(len(row))] for row in ids]
        columns["is_target"][-1] = [0] * lengths[-1]
    if name == "seq2seq":
        columns |= {"labels": [row[::-1][:7] for row in ids], "reference": ["a"] * len(ids)}
    return Dataset.from_dict(columns)


def make(name: str, lengths: list[int]) -> tuple[Any, nn.Module]:
    """A task with a validation split of rows of these lengths, and a model whose last layer has been tried."""
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        GPT2Config,
        GPT2LMHeadModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    splits, tokenizer = {"validation": rows(name, lengths)}, tiny.tokenizer()
    task: Task
    module: nn.Module
    torch.manual_seed(0)
    gpt = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    match name:
        case "causal_lm":
            task = CausalLmTask(splits, tokenizer, max_length=20, is_char=False)
        case "chat":
            chat = SimpleNamespace(head_config={}, stop_ids=frozenset())
            task = ChatTask(splits, tiny_chat.tokenizer(), chat, max_length=20)  # type: ignore[arg-type]
        case "masked_lm":
            task = MaskedLmTask(splits, tokenizer, MaskedLm(name="masked_lm"), max_length=20, seed=0)
        case _:
            task = Seq2SeqTask(splits, tokenizer, Seq2Seq(name="seq2seq"), Evaluation(), max_length=20)
    if name == "masked_lm":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        module = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes))
    elif name == "seq2seq":
        module = T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
            )
        )
    else:
        module = GPT2LMHeadModel(gpt)
    target_loss.try_last_layer(module.eval(), ONE_PROCESS)
    return task, module


def complete(task: Any, module: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's summed loss and correct targets from the complete logits."""
    labels, seen = batch["labels"], {}

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        seen["logits"] = output.logits

    # The kind of a model that nobody has tried: score computes everything then, and the hook sees it.
    kind = module.__dict__.pop(target_loss.KIND_ATTRIBUTE)
    hook = module.register_forward_hook(keep)
    task.score(module, batch, lock_step=False)
    hook.remove()
    module.__dict__[target_loss.KIND_ATTRIBUTE] = kind
    logits = seen["logits"]
    assert logits.shape == (*labels.shape, VOCABULARY)
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses.double().sum(dim=1), ((logits.argmax(dim=-1) == labels) & (labels != IGNORED)).sum(dim=1)


def largest_of(call: Any, module: nn.Module) -> int:
    """Returns the number of elements of the largest tensor whose last dimension is the vocabulary, weights excluded."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                is_logits = torch.is_tensor(value) and value.dim() > 1 and value.shape[-1] == VOCABULARY
                if is_logits and value.untyped_storage().data_ptr() not in weights:
                    self.elements = max(self.elements, value.numel())
            return result

    with Largest() as largest:
        call()
    return largest.elements


@pytest.mark.parametrize("most", [2**24, CHUNK * VOCABULARY, 1])
@pytest.mark.parametrize("name", TASKS)
def test_scores_are_those_of_the_complete_logits(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    task, module = make(name, [5, 20, 12, 9])
    batch = task.collate(task.splits["validation"][[0, 1, 2, 3]], tiny.HERE._replace(example_index=(0, 1, 2, 3)))
    expected, correct = complete(task, module, batch)
    monkeypatch.setattr(target_loss, "MAX_LOGITS", most)

    scored = task.score(module, batch, lock_step=False)

    torch.testing.assert_close(scored.loss, expected, rtol=1e-6, atol=0)
    assert scored.targets.tolist() == (batch["labels"] != IGNORED).sum(dim=1).tolist()
    if scored.prediction is not None:
        assert scored.prediction[:, 0].tolist() == correct.tolist()


@pytest.mark.parametrize("name", TASKS)
def test_no_tensor_of_tokens_and_vocabulary_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, module = make(name, [5, 20, 12, 9])
    batch = task.collate(task.splits["validation"][[0, 1, 2, 3]], tiny.HERE._replace(example_index=(0, 1, 2, 3)))
    targets = int((batch["labels"] != IGNORED).sum())
    tokens = batch["labels"].numel()
    assert CHUNK < targets < tokens, "otherwise the test proves nothing"

    in_one_part = largest_of(lambda: task.score(module, batch, lock_step=False), module)
    monkeypatch.setattr(target_loss, "MAX_LOGITS", CHUNK * VOCABULARY)
    in_chunks = largest_of(lambda: task.score(module, batch, lock_step=False), module)
    monkeypatch.setattr(target_loss, "_head_kind", lambda _model: target_loss.COMPLETE)
    control = largest_of(lambda: task.score(module, batch, lock_step=False), module)

    assert (in_one_part, in_chunks) == (targets * VOCABULARY, CHUNK * VOCABULARY)
    assert control == tokens * VOCABULARY


@pytest.mark.parametrize("most", [2**24, CHUNK * VOCABULARY])
@pytest.mark.parametrize("name", TASKS)
def test_a_batch_without_targets_has_a_loss_of_zero(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_loss, "MAX_LOGITS", most)
    task, module = make(name, [5, 20])
    batch = task.collate(task.splits["validation"][[0, 1]], tiny.HERE._replace(example_index=(0, 1)))
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)

    scored = task.score(module, batch, lock_step=False)

    assert (scored.loss.tolist(), scored.targets.tolist()) == ([0.0, 0.0], [0, 0])


def evaluated(context: RankContext, name: str, lengths: list[int]) -> list[dict[str, float]]:
    torch.set_num_threads(1)
    target_loss.MAX_LOGITS = CHUNK * VOCABULARY
    task, module = make(name, lengths)
    result = evaluate(ForwardOnly(module, CONFIG, context), task, micro_batch_size=2)
    return all_gather_object(result.metrics, context)


def test_a_split_without_rows_is_named() -> None:
    task, module = make("chat", [4])
    task.splits = {"validation": task.splits["validation"].select([])}

    with pytest.raises(DataError, match="The split validation has no rows to evaluate"):
        evaluate(ForwardOnly(module, CONFIG, ONE_PROCESS), task, micro_batch_size=2)


@pytest.mark.ranks
@pytest.mark.parametrize("name", TASKS)
def test_metrics_are_equal_on_three_ranks_with_an_uneven_and_an_empty_shard(name: str) -> None:
    """5 rows in micro-batches of 2 are 3 unequal ones for 3 ranks; 3 rows leave one rank without any."""
    for lengths in ([5, 20, 12, 9, 14], [5, 20, 12]):
        (expected,) = evaluated(ONE_PROCESS, name, lengths)

        by_rank = run_ranks(evaluated, 3, name, lengths)[0]

        assert expected["loss"] > 0
        assert by_rank == [expected] * 3

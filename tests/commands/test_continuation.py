"""Prompts that are continued together: each gets the tokens that it gets alone, in the order of the file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.commands import continuation
from dtrain.commands.continuation import ALONE, EQUAL, PADDED, Continuer, Prompt, continue_batch, try_batches
from dtrain.commands.predict import run_predict
from dtrain.commands.prompts import share_of
from dtrain.config.schema import Config
from dtrain.data.seeding import seed_all
from dtrain.distributed.heartbeat import Heartbeat
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.models.tokenizer import build_char_tokenizer
from tests.support.contexts import placed
from tests.support.tiny_lm import gpt

VOCABULARY = 30
LENGTHS = [3, 9, 1, 6, 6, 12, 4, 9]
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 32),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), 2),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    "head_dim": 8,
    "sliding_window": 5,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model(name: str) -> Any:
    """A loud model, whose texts are not one token repeated."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = CONFIG_MAPPING[name]()
    sizes = {key: value for key, value in SIZES.items() if hasattr(known, key)}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**sizes)).eval()
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.3)
    return made


def config(**sections: Any) -> Config:
    generate = {"max_new_tokens": 20, **sections.pop("generate", {})}
    return Config.model_validate({"task": {"name": "causal_lm"}, "generate": generate, **sections})


def prompts() -> list[Prompt]:
    draws = torch.Generator().manual_seed(5)
    return [
        Prompt(torch.randint(3, VOCABULARY, (length,), generator=draws).tolist(), (0, "generate", number))
        for number, length in enumerate(LENGTHS)
    ]


def alone(made: Any, prompt: Prompt, settings: Config, stops: set[int]) -> list[int]:
    seed_all(*prompt.seed)
    ids = torch.tensor(prompt.ids)
    tokens: list[int] = continuation.continue_tokens(made, ids, settings, stops=stops).tolist()
    return tokens[len(ids) :]


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "opt", "bloom", "gpt_neox", "qwen3"])
def test_padded_on_the_left_each_prompt_has_the_tokens_that_it_has_alone(name: str, temperature: float) -> None:
    made, settings = model(name), config(generate={"temperature": temperature, "top_k": 9, "top_p": 0.95})
    stops, ended = {2, 5, 7}, list[int]()
    given = prompts()
    assert try_batches(made) == PADDED

    found = continue_batch(made, given, settings, stops=stops, heartbeat=Heartbeat(), done=ended.append)

    assert found == [alone(made, prompt, settings, stops) for prompt in given]
    assert sum(ended) == len(given)
    assert len({tuple(new) for new in found}) > 3, "otherwise the test proves nothing"


def test_texts_that_have_ended_are_not_computed_on() -> None:
    made, settings, given = model("gpt2"), config(generate={"temperature": 1.5}), prompts()
    rows: list[int] = []
    made.register_forward_pre_hook(lambda _m, _a, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True)

    found = continue_batch(made, given, settings, stops=set(range(2, 30, 4)), heartbeat=Heartbeat())

    lengths = [len(new) for new in found]
    assert len(set(lengths)) > 3
    assert rows == [sum(length > step for length in lengths) for step in range(max(lengths))]


class Reads(nn.Module):
    """A model without attention: `where` says what disturbs it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.where, self.embedding = where, nn.Embedding(VOCABULARY, VOCABULARY)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY))
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> Any:
        class Sums:
            def __init__(self, values: torch.Tensor) -> None:
                self.values = values

            def batch_select_indices(self, places: torch.Tensor) -> None:
                self.values = self.values[places]

        before = past_key_values.values if past_key_values is not None else 0.0
        sums = before + self.embedding(input_ids).sum(dim=1)  # padding is summed, too
        logits = sums - sums.mean(dim=0, keepdim=True) if self.where == "the other rows" and len(sums) > 1 else sums
        cache = None if self.where == "no cache" else Sums(sums)
        return SimpleNamespace(logits=logits[:, None], past_key_values=cache)


@pytest.mark.parametrize(
    ("where", "sharing"), [("padding", EQUAL), ("the other rows", ALONE), ("no cache", ALONE), ("rounding", ALONE)]
)
def test_what_a_model_reads_besides_its_prompt_decides_who_shares_a_batch(where: str, sharing: str) -> None:
    made: Any = Reads(where)
    if where == "rounding":
        made.dtype = torch.bfloat16

    assert try_batches(made) == sharing
    lengths = [4, 2, 4, 3, 2, 4]
    batches = Continuer(made, config(), stops=(), heartbeat=Heartbeat()).batches(lengths)
    expected = {EQUAL: [[1, 4], [3], [0, 2, 5]], ALONE: [[1], [4], [3], [0], [2], [5]]}
    assert batches == expected[sharing]


@pytest.mark.parametrize(
    ("evaluation", "expected"),
    [
        ({}, [[2, 0, 6, 3, 4, 1, 7, 5]]),
        ({"micro_batch_size": 3}, [[2, 0, 6], [3, 4, 1], [7, 5]]),
        ({"micro_batch_tokens": 60}, [[2, 0], [6, 3], [4, 1], [7], [5]]),  # with the 20 new tokens of each
        ({"micro_batch_tokens": 1}, [[2], [0], [6], [3], [4], [1], [7], [5]]),
    ],
)
def test_prompts_of_like_length_share_a_batch_of_bounded_size(
    evaluation: dict[str, Any], expected: list[list[int]]
) -> None:
    made = Continuer(model("gpt2"), config(evaluation=evaluation), stops=(), heartbeat=Heartbeat())

    assert made.batches(LENGTHS) == expected


def test_a_text_that_may_leave_the_positions_is_continued_alone() -> None:
    settings = config(generate={"max_new_tokens": 57})  # of 64 positions

    batches = Continuer(model("gpt2"), settings, stops=(), heartbeat=Heartbeat()).batches(LENGTHS)

    assert batches == [[2, 0, 6, 3, 4], [1], [7], [5]]


def test_a_file_of_prompts_is_answered_in_its_order_with_the_texts_of_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build_char_tokenizer(["abcdefghi "])
    tokenizer.save_pretrained(tmp_path / "model")
    gpt(positions=40, vocabulary=len(tokenizer)).save_pretrained(tmp_path / "model")
    lines = ["abcdef ghi abc", "a", "bc de", "ihg", "abcdef ghi", "b", "ee"]
    (tmp_path / "in.txt").write_text("\n".join(lines))
    sizes: list[int] = []
    real = continuation.continue_batch
    monkeypatch.setattr(
        continuation, "continue_batch", lambda *given, **how: sizes.append(len(given[1])) or real(*given, **how)
    )

    found = {}
    for size in (1, 3):
        run_predict(
            Config.model_validate(
                {
                    "run": {"name": f"by-{size}", "output_dir": str(tmp_path)},
                    "task": {"name": "causal_lm"},
                    "model": {"name_or_path": str(tmp_path / "model")},
                    "generate": {"max_new_tokens": 12, "temperature": 1.5},
                    "predict": {"file": tmp_path / "in.txt"},
                    "evaluation": {"micro_batch_size": size},
                }
            ),
            ONE_PROCESS,
        )
        text = (tmp_path / f"by-{size}" / "predictions" / "test.jsonl").read_text()
        found[size] = [json.loads(line) for line in text.splitlines()]

    assert sizes == [3, 3]
    assert found[3] == found[1]
    assert [record["text"] for record in found[3]] == lines


def test_every_batch_is_answered_by_one_rank() -> None:
    batches = [[0, 1], [2], [3, 4, 5], [6, 7, 8]]

    shares = [share_of(batches, placed(ONE_PROCESS, rank=rank, world_size=5)) for rank in range(5)]

    assert sorted(batch for share in shares for batch in share) == sorted(batches)
    assert [len(share) for share in shares] == [1, 1, 1, 1, 0]

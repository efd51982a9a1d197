"""The generate command: the cache does not change the text, and any script can be input and output."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.commands.continuation import continue_tokens, end_tokens
from dtrain.commands.generate import run_generate
from dtrain.config.schema import Config
from dtrain.data.seeding import seed_all
from dtrain.distributed.heartbeat import HEARTBEAT_BYTES, Heartbeat, Phase, read_heartbeat
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError
from dtrain.models.tokenizer import build_char_tokenizer
from tests.support.tiny_lm import gpt

CHINESE = "\u5929\u5730\u7384\u9ec4\uff0c\u5b87\u5b99\u6d2a\u8352\u3002\U00020000\n"


def config(**generate: Any) -> Config:
    return Config.model_validate({"task": {"name": "causal_lm"}, "generate": generate})


class CallCounter(torch.nn.Module):
    """Wraps a model and records the number of tokens of each call."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.lengths = model, model.config, []

    def forward(self, **inputs: Any) -> Any:
        self.lengths: list[int]
        self.lengths.append(inputs["input_ids"].shape[1])
        return self.model(**inputs)


def without_cache(model: Any, ids: torch.Tensor, settings: Config) -> list[int]:
    """Returns the same without a cache: each step computes the complete text."""
    from dtrain.commands.continuation import sample_token

    with torch.no_grad():
        for _ in range(settings.generate.max_new_tokens):
            logits = model(input_ids=ids[None, -model.config.n_positions :], use_cache=False).logits[:, -1]
            ids = torch.cat([ids, sample_token(logits, settings.generate)])
    return ids.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_the_cache_does_not_change_the_text(temperature: float) -> None:
    model, settings = gpt(positions=40), config(max_new_tokens=35, temperature=temperature, top_k=8, top_p=0.95)
    prompt = torch.tensor([3, 1, 4, 1, 5])

    seed_all(0)
    counted: Any = CallCounter(model)
    found = continue_tokens(counted, prompt, settings).tolist()
    seed_all(0)
    expected = without_cache(model, prompt, settings)

    assert found == expected
    assert len(set(found[5:])) > 3  # A text of one repeated token would prove nothing.
    assert counted.lengths == [5] + [1] * 34


def test_a_text_longer_than_the_positions_uses_a_window_without_a_cache() -> None:
    model, settings = gpt(positions=8), config(max_new_tokens=12, temperature=0.0)
    prompt = torch.tensor([3, 1, 4, 1, 5])

    counted: Any = CallCounter(model)
    found = continue_tokens(counted, prompt, settings).tolist()

    assert found == without_cache(model, prompt, settings)
    assert counted.lengths == [5, 6, 7, *[8] * 9]


def test_each_token_ticks_the_heartbeat() -> None:
    memory = mmap.mmap(-1, HEARTBEAT_BYTES)
    heartbeat = Heartbeat(memory)
    phases = []

    class Model(CallCounter):
        def forward(self, **inputs: Any) -> Any:
            phases.append((read_heartbeat(memory).phase, read_heartbeat(memory).writes))
            return super().forward(**inputs)

    counted: Any = Model(gpt(positions=40))
    continue_tokens(counted, torch.tensor([3, 1]), config(max_new_tokens=3, temperature=0.0), heartbeat=heartbeat)

    numbers = [number for _, number in phases]
    assert [phase for phase, _ in phases] == [Phase.ANSWERING] * 3
    assert numbers == sorted(set(numbers))
    assert read_heartbeat(memory).phase == Phase.STARTING, "a conversation may wait for input now"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose tokens are Chinese characters."""
    tokenizer = build_char_tokenizer([CHINESE])
    tokenizer.save_pretrained(tmp_path)
    gpt(positions=32, vocabulary=len(tokenizer)).save_pretrained(tmp_path)
    return tmp_path


def generate(folder: Path, **settings: Any) -> str:
    model = {"name_or_path": str(folder)}
    return run_generate(
        Config.model_validate({"task": {"name": "causal_lm"}, "model": model, "generate": settings}), ONE_PROCESS
    )


def test_chinese_is_read_and_written_character_by_character(folder: Path) -> None:
    prompt = CHINESE[:4]

    text = generate(folder, prompt=prompt, max_new_tokens=20, temperature=1.0)

    assert text.startswith(prompt)
    assert set(text) <= set(CHINESE)
    assert len(set(text)) > 4
    assert generate(folder, prompt=prompt, max_new_tokens=20, temperature=1.0) == text


def test_a_prompt_without_tokens_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"generate\.prompt is empty"):
        generate(folder, prompt="")


def test_a_model_may_have_several_end_tokens() -> None:
    model = gpt(positions=16)
    model.generation_config.eos_token_id = [3, 5]
    model.config.eos_token_id = 7

    assert end_tokens(model) == {3, 5, 7}


@pytest.mark.parametrize("model", [{"factory": "own:build"}, {"head": {"pooling": "last"}, "name_or_path": "x"}])
def test_a_model_that_is_not_from_transformers_is_refused(model: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="generate needs a language model of transformers"):
        run_generate(Config.model_validate({"task": {"name": "causal_lm"}, "model": model}), ONE_PROCESS)

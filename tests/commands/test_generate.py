"""Text from a model: the cache changes the time and not the text, and any script goes in and comes out."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.commands.generate import continuation, ends_of, run_generate
from dtrain.config.schema import Config
from dtrain.data.seeding import seed_all
from dtrain.distributed.heartbeat import SIZE, Heartbeat, Phase, read
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError
from dtrain.models.tokenizer import build_char_tokenizer
from tests.support.tiny_lm import gpt

CHINESE = "\u5929\u5730\u7384\u9ec4\uff0c\u5b87\u5b99\u6d2a\u8352\u3002\U00020000\n"


def config(**generate: Any) -> Config:
    return Config.model_validate({"task": {"name": "causal_lm"}, "generate": generate})


class Counts(torch.nn.Module):
    """Passes everything on to a model, and keeps how many tokens each call was given."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.given = model, model.config, []

    def forward(self, **inputs: Any) -> Any:
        self.given: list[int]
        self.given.append(inputs["input_ids"].shape[1])
        return self.model(**inputs)


def without_cache(model: Any, ids: torch.Tensor, settings: Config) -> list[int]:
    """The same through no cache: each step computes the whole text."""
    from dtrain.commands.generate import draw

    with torch.no_grad():
        for _ in range(settings.generate.max_new_tokens):
            logits = model(input_ids=ids[None, -model.config.n_positions :], use_cache=False).logits[:, -1]
            ids = torch.cat([ids, draw(logits, settings.generate)])
    return ids.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_the_cache_gives_the_text_that_is_computed_anew_for_each_token(temperature: float) -> None:
    model, settings = gpt(positions=40), config(max_new_tokens=35, temperature=temperature, top_k=8, top_p=0.95)
    prompt = torch.tensor([3, 1, 4, 1, 5])

    seed_all(0)
    watched: Any = Counts(model)
    found = continuation(watched, prompt, settings).tolist()
    seed_all(0)
    expected = without_cache(model, prompt, settings)

    assert found == expected
    assert len(set(found[5:])) > 3  # a text of one token would prove nothing
    assert watched.given == [5] + [1] * 34


def test_a_text_that_outgrows_the_positions_sees_the_last_ones_and_keeps_nothing() -> None:
    model, settings = gpt(positions=8), config(max_new_tokens=12, temperature=0.0)
    prompt = torch.tensor([3, 1, 4, 1, 5])

    watched: Any = Counts(model)
    found = continuation(watched, prompt, settings).tolist()

    assert found == without_cache(model, prompt, settings)
    assert watched.given == [5, 6, 7, *[8] * 9]


def test_each_token_is_a_beat_so_that_a_model_that_stalls_is_told_from_one_that_writes() -> None:
    memory = mmap.mmap(-1, SIZE)
    heartbeat = Heartbeat(memory)
    phases = []

    class Model(Counts):
        def forward(self, **inputs: Any) -> Any:
            phases.append((read(memory).phase, read(memory).number))
            return super().forward(**inputs)

    watched: Any = Model(gpt(positions=40))
    continuation(watched, torch.tensor([3, 1]), config(max_new_tokens=3, temperature=0.0), heartbeat=heartbeat)

    numbers = [number for _, number in phases]
    assert [phase for phase, _ in phases] == [Phase.ANSWERING] * 3
    assert numbers == sorted(set(numbers))
    assert read(memory).phase == Phase.STARTING, "a talk may wait for a person now"


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


def test_chinese_goes_in_and_comes_out_character_by_character(folder: Path) -> None:
    prompt = CHINESE[:4]

    text = generate(folder, prompt=prompt, max_new_tokens=20, temperature=1.0)

    assert text.startswith(prompt)
    assert set(text) <= set(CHINESE)
    assert len(set(text)) > 4
    assert generate(folder, prompt=prompt, max_new_tokens=20, temperature=1.0) == text


def test_a_prompt_of_no_token_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"generate\.prompt is empty"):
        generate(folder, prompt="")


def test_a_model_may_name_several_tokens_that_end_a_text() -> None:
    model = gpt(positions=16)
    model.generation_config.eos_token_id = [3, 5]
    model.config.eos_token_id = 7

    assert ends_of(model) == {3, 5, 7}


@pytest.mark.parametrize("model", [{"factory": "own:build"}, {"head": {"pooling": "last"}, "name_or_path": "x"}])
def test_a_model_that_is_not_of_transformers_is_refused(model: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="generate needs a language model of transformers"):
        run_generate(Config.model_validate({"task": {"name": "causal_lm"}, "model": model}), ONE_PROCESS)

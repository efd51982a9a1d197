"""The generate command: text from a causal language model, drawn with the run's seed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dtrain.config.commands import Generate
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.data.seeding import seed_all
from dtrain.distributed.heartbeat import Heartbeat, Phase
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.topology import device_of
from dtrain.errors import ConfigError
from dtrain.models.compatibility import longest_input
from dtrain.models.load import load_model
from dtrain.models.tokenizer import load_tokenizer
from dtrain.tasks.build import task_info
from dtrain.training.build import refuse_own_parts


def run_generate(config: Config, context: RankContext) -> str:
    """Goes on from `generate.prompt`; the same settings give the same text. Prints and returns prompt and continuation."""
    prompt = config.generate.prompt if config.generate.prompt is not None else "\n"
    writer = Writer(config, context, command="generate")
    if not writer.has_tokens(prompt):
        raise ConfigError("generate.prompt is empty for this tokenizer: give at least one token.")
    text = writer.write(prompt, number=0).whole
    log.info("%s", text)
    return text


@dataclass(frozen=True)
class Written:
    """whole: the prompt and what the model went on with, decoded together. added: the latter alone."""

    whole: str
    added: str


class Writer:
    """A language model that goes on from texts, as `generate` says.

    Raises:
        ConfigError: the settings name no language model.
    """

    def __init__(self, config: Config, context: RankContext, *, command: str) -> None:
        info = task_info(config.task)
        if info.prompt != "continue":
            raise ConfigError(
                f"{command} needs a language model (task.name=causal_lm), not task.name={config.task.name}."
            )
        refuse_own_parts(config, command)
        self._config, self._heartbeat = config, context.heartbeat
        self._tokenizer = load_tokenizer(config.model, training_texts=list)
        model = load_model(
            config.model, head=info.head, head_config={}, tokenizer=self._tokenizer, seed=config.run.seed
        )
        self._model = model.to(device_of(context.topology)).eval()

    def has_tokens(self, prompt: str) -> bool:
        """Whether the tokenizer makes a token of it at least, which a model has to go on from."""
        return bool(self._tokens(prompt))

    def write(self, prompt: str, *, number: int) -> Written:
        """The prompt's continuation, drawn with its number among several; the first one's is what `generate` gives."""
        ids = torch.tensor(self._tokens(prompt), device=self._model.device)
        seed_all(self._config.run.seed, "generate", *([number] if number else []))
        whole = continuation(self._model, ids, self._config, heartbeat=self._heartbeat)
        before, after = self._text(ids), self._text(whole)
        # Alone, the added tokens would lose the blank that they begin with.
        is_begun = after.startswith(before)
        return Written(after, after[len(before) :] if is_begun else self._text(whole[len(ids) :]))

    def _tokens(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _text(self, ids: torch.Tensor) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def ends_of(model: PreTrainedModel) -> frozenset[int]:
    """What the model's own files say ends a text: one token, several, or none."""
    found: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        ends = getattr(config, "eos_token_id", None)
        found |= {ends} if isinstance(ends, int) else set(ends or ())
    return frozenset(found)


@torch.no_grad()
def continuation(
    model: PreTrainedModel,
    ids: torch.Tensor,
    config: Config,
    *,
    stops: Collection[int] | None = None,
    heartbeat: Heartbeat | None = None,
) -> torch.Tensor:
    """The prompt and max_new_tokens more, or fewer where the text ends.

    Where all of it fits the model's positions, keys and values are kept, and each token is computed once. Beyond them
    the model sees the last ones only: the window moves, so that nothing kept would be right.

    Args:
        ids: (length,) int64.
        stops: tokens that end the text; None: those that the model's own files name. heartbeat: told of each token.
    """
    ends = ends_of(model) if stops is None else stops
    settings = config.generate
    window = longest_input(model) or 2**31
    keeps = len(ids) + settings.max_new_tokens <= window
    cache: dict[str, Any] = {}
    heartbeat = heartbeat if heartbeat is not None else Heartbeat()
    with heartbeat.within(Phase.ANSWERING):
        for _ in range(settings.max_new_tokens):
            seen = ids[-1:] if cache else ids[-window:]
            output = model(input_ids=seen[None], use_cache=keeps, **cache)
            if keeps and getattr(output, "past_key_values", None) is not None:  # recurrent models keep something else
                cache = {"past_key_values": output.past_key_values}
            ids = torch.cat([ids, draw(output.logits[:, -1].float(), settings)])
            heartbeat.tick()
            if int(ids[-1]) in ends:
                break
    return ids


def draw(logits: torch.Tensor, settings: Generate) -> torch.Tensor:
    """One token id, (1,), from logits (1, vocabulary), filtered as transformers' own generate does it."""
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    filters: list[Any] = [TemperatureLogitsWarper(float(settings.temperature))]
    if settings.top_k is not None:
        filters.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None:
        filters.append(TopPLogitsWarper(settings.top_p))
    for warp in filters:
        logits = warp(None, logits)
    return torch.multinomial(logits.softmax(dim=-1), 1)[0]

"""The generate command: text from a causal language model, sampled with the run's seed."""

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
from dtrain.models.chat_template import turn_end_tokens
from dtrain.models.compatibility import longest_input
from dtrain.models.load import load_model
from dtrain.models.tokenizer import load_tokenizer
from dtrain.tasks.build import task_info
from dtrain.training.build import refuse_custom_models


def run_generate(config: Config, context: RankContext) -> str:
    """Continues `generate.prompt`. Logs and returns the prompt with its continuation; the same settings give the same text.

    Raises:
        ConfigError: the model is not a language model, or the prompt has no tokens.
    """
    prompt = config.generate.prompt if config.generate.prompt is not None else "\n"
    generator = TextGenerator(config, context, command="generate")
    if not generator.has_tokens(prompt):
        raise ConfigError("generate.prompt is empty for this tokenizer: give at least one token.")
    text = generator.generate(prompt, number=0).full
    log.info("%s", text)
    return text


@dataclass(frozen=True)
class GeneratedText:
    """A prompt and its continuation.

    Attributes:
        full: both, decoded together.
        continuation: the continuation alone.
    """

    full: str
    continuation: str


class TextGenerator:
    """A language model that continues texts with the settings of `generate`."""

    def __init__(self, config: Config, context: RankContext, *, command: str) -> None:
        """Loads the model.

        Args:
            command: for the error message.

        Raises:
            ConfigError: the settings do not name a language model.
        """
        info = task_info(config.task)
        if info.prompt != "continue":
            raise ConfigError(
                f"{command} needs a language model (task.name=causal_lm), not task.name={config.task.name}."
            )
        refuse_custom_models(config, command)
        self._config, self._heartbeat = config, context.heartbeat
        self._tokenizer = load_tokenizer(config.model, training_texts=list)
        model = load_model(
            config.model,
            head=info.head,
            head_config={},
            tokenizer=self._tokenizer,
            seed=config.run.seed,
            is_trained=True,
        )
        self._model = model.to(device_of(context.topology)).eval()
        self._stops = end_tokens(model) | turn_end_tokens(self._tokenizer)

    def has_tokens(self, prompt: str) -> bool:
        """Returns whether the prompt has at least one token. A model cannot continue an empty prompt."""
        return bool(self._tokens(prompt))

    def generate(self, prompt: str, *, number: int) -> GeneratedText:
        """Continues a prompt.

        Args:
            number: index of the prompt among several, part of the random seed. Prompt 0 gets the text that the generate
                command returns.
        """
        ids = torch.tensor(self._tokens(prompt), device=self._model.device)
        seed_all(self._config.run.seed, "generate", *([number] if number else []))
        all_ids = continue_tokens(self._model, ids, self._config, stops=self._stops, heartbeat=self._heartbeat)
        decoded_prompt, full = self._decode(ids), self._decode(all_ids)
        # Decoded alone, the new tokens would lose the space that they begin with.
        if full.startswith(decoded_prompt):
            return GeneratedText(full, full[len(decoded_prompt) :])
        return GeneratedText(full, self._decode(all_ids[len(ids) :]))

    def _tokens(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _decode(self, ids: torch.Tensor) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Returns the tokens that end a text according to the model's config files: one, several, or none."""
    tokens: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        eos = getattr(config, "eos_token_id", None)
        tokens |= {eos} if isinstance(eos, int) else set(eos or ())
    return frozenset(tokens)


@torch.no_grad()
def continue_tokens(
    model: PreTrainedModel,
    ids: torch.Tensor,
    config: Config,
    *,
    stops: Collection[int] | None = None,
    heartbeat: Heartbeat | None = None,
) -> torch.Tensor:
    """Appends up to max_new_tokens tokens to a prompt; fewer if the text ends before.

    If the full text fits into the model's positions, keys and values are cached and each token is computed once. A longer
    text is seen through a window of the last tokens. The window moves, which would make cached values wrong, so nothing
    is cached.

    Args:
        ids: the prompt, (length,) int64.
        stops: tokens that end the text; None: those in the model's config files.
        heartbeat: gets a tick for each token.

    Returns:
        Prompt and new tokens, (length + new tokens,) int64.
    """
    stops = end_tokens(model) if stops is None else stops
    settings = config.generate
    window = longest_input(model) or 2**31
    use_cache = len(ids) + settings.max_new_tokens <= window
    cache: dict[str, Any] = {}
    heartbeat = heartbeat if heartbeat is not None else Heartbeat()
    with heartbeat.within(Phase.ANSWERING):
        for _ in range(settings.max_new_tokens):
            inputs = ids[-1:] if cache else ids[-window:]
            output = model(input_ids=inputs[None], use_cache=use_cache, **cache)
            # Recurrent models have another kind of cache, which is not used here.
            if use_cache and getattr(output, "past_key_values", None) is not None:
                cache = {"past_key_values": output.past_key_values}
            ids = torch.cat([ids, sample_token(output.logits[:, -1].float(), settings)])
            heartbeat.tick()
            if int(ids[-1]) in stops:
                break
    return ids


def sample_token(logits: torch.Tensor, settings: Generate) -> torch.Tensor:
    """Samples one token id. Filters the logits like `generate` in transformers.

    Args:
        logits: (1, vocabulary) float32.

    Returns:
        (1,) int64.
    """
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

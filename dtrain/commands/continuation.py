"""Continues prompts with a causal language model: one alone, or several of like length at a time.

A prompt gets the same tokens in either case: each has its own random draws, shorter ones are padded on the left, and a row
whose text has ended leaves the batch with its part of the cache. `Continuer` tries the model first: where it answers
differently with padding, only prompts of one length share a batch, and where it cannot be batched, none do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dtrain.config.commands import Generate
from dtrain.config.schema import Config
from dtrain.data.order import chunks
from dtrain.data.seeding import derive_seed, seed_all
from dtrain.distributed.heartbeat import Heartbeat, Phase
from dtrain.models.compatibility import longest_input
from dtrain.models.first_forward import FORWARD_ERRORS, rotates_by_length
from dtrain.training.out_of_memory import explain_in_evaluation

ALONE, EQUAL, PADDED = "alone", "equal", "padded"
"""What may share a batch: nothing, prompts of one length, prompts of any length."""

MAX_TOKENS = 8192
"""Limit of (prompt + new tokens) of a batch without evaluation.micro_batch_tokens, so that the cache stays small."""


@dataclass(frozen=True)
class Prompt:
    """A prompt to continue.

    Attributes:
        ids: its tokens, at least one.
        seed: what its random draws depend on, for `seed_all`.
    """

    ids: Sequence[int]
    seed: tuple[int | str, ...]


class Continuer:
    """Continues prompts, several at a time where that changes none of them."""

    def __init__(self, model: PreTrainedModel, config: Config, *, stops: Collection[int], heartbeat: Heartbeat) -> None:
        """
        Args:
            model: in eval mode.
            stops: tokens that end a text.
        """
        self._model, self._config, self._stops, self._heartbeat = model, config, stops, heartbeat
        self._sharing: str | None = None

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Returns which prompts share a batch, from their numbers of tokens: the shortest first, by these alone."""
        if self._sharing is None:
            self._sharing = try_batches(self._model) if len(lengths) > 1 else ALONE
        evaluation, new = self._config.evaluation, self._config.generate.max_new_tokens
        most = evaluation.micro_batch_tokens or MAX_TOKENS
        window = longest_input(self._model)
        found: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
            length, batch = lengths[index], found[-1] if found else []
            fits = (
                self._sharing != ALONE
                and len(batch) > 0
                and (evaluation.micro_batch_tokens is not None or len(batch) < evaluation.micro_batch_size)
                and (len(batch) + 1) * (length + new) <= most
                and (window is None or length + new <= window)  # else nothing can be cached
                and (self._sharing == PADDED or length == lengths[batch[-1]])
            )
            if fits:
                batch.append(index)
            else:
                found.append([index])
        return found

    def __call__(self, prompts: Sequence[Prompt], done: Callable[[int], None] = lambda _: None) -> list[list[int]]:
        """Returns the new tokens of each prompt of a batch.

        Args:
            done: called with the number of prompts whose text has ended since its last call.
        """
        if len(prompts) > 1:
            return continue_batch(
                self._model, prompts, self._config, stops=self._stops, heartbeat=self._heartbeat, done=done
            )
        (prompt,) = prompts
        seed_all(*prompt.seed)
        ids = torch.tensor(list(prompt.ids), device=self._model.device)
        tokens = continue_tokens(self._model, ids, self._config, stops=self._stops, heartbeat=self._heartbeat)
        done(1)
        new: list[int] = tokens[len(ids) :].tolist()
        return [new]


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


def sample_token(logits: torch.Tensor, settings: Generate, *, draws: torch.Generator | None = None) -> torch.Tensor:
    """Samples one token id. Filters the logits like `generate` in transformers.

    Args:
        logits: (1, vocabulary) float32.
        draws: where random numbers come from; None: torch's own generator.

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
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=draws)[0]


@torch.no_grad()
def continue_batch(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    config: Config,
    *,
    stops: Collection[int],
    heartbeat: Heartbeat,
    done: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """Returns the tokens that `continue_tokens` appends to each prompt alone. All have to fit into the model's positions."""
    device, settings = model.device, config.generate
    rows = _Rows(model, [prompt.ids for prompt in prompts])
    draws = [torch.Generator(device).manual_seed(derive_seed(*prompt.seed)) for prompt in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    left = list(range(len(prompts)))
    with heartbeat.within(Phase.ANSWERING), explain_in_evaluation({"input_ids": rows.ids}):
        for _ in range(settings.max_new_tokens):
            tokens = _sample(rows.next_logits(), settings, [draws[row] for row in left])
            heartbeat.tick()
            chosen: list[int] = tokens.tolist()
            for row, token in zip(left, chosen, strict=True):
                new[row].append(token)
            kept = [place for place, token in enumerate(chosen) if token not in stops]
            done(len(left) - len(kept))
            left = [left[place] for place in kept]
            if not left:
                return new
            rows.append(tokens, kept)
    done(len(left))
    return new


class _Rows:
    """The rows of a batch whose texts go on, with their cache. Shorter prompts are padded on the left."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        self._model = model
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        # Of the prompt, too, the logits of the last token are all that is needed.
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        longest = max(map(len, prompts))
        self.ids = torch.zeros((len(prompts), longest), dtype=torch.int64)
        self._mask = torch.zeros_like(self.ids)
        for row, prompt in enumerate(prompts):
            self.ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
            self._mask[row, longest - len(prompt) :] = 1
        self.ids, self._mask = self.ids.to(model.device), self._mask.to(model.device)
        self._is_padded = min(map(len, prompts)) < longest
        self._cache: Any = None

    def next_logits(self) -> torch.Tensor:
        """Runs the model; returns (rows, vocabulary) float32, the logits of the next token."""
        inputs: dict[str, Any] = {"input_ids": self.ids, "use_cache": True, **self._options}
        if self._cache is not None:
            inputs["past_key_values"] = self._cache
        if self._is_padded:
            inputs["attention_mask"] = self._mask
            if self._takes_positions:
                positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)
                inputs["position_ids"] = positions[:, -self.ids.shape[1] :]
        output = self._model(**inputs)
        self._cache = output.past_key_values
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def append(self, tokens: torch.Tensor, kept: Sequence[int]) -> None:
        """Appends a token to each row, and keeps some of the rows.

        Args:
            tokens: (rows,) int64.
            kept: their places, in order.
        """
        if len(kept) < len(tokens):
            places = torch.tensor(kept, device=tokens.device)
            self._cache.batch_select_indices(places)
            tokens, self._mask = tokens[places], self._mask[places]
        self.ids = tokens[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(self.ids)], dim=1)


@torch.no_grad()
def try_batches(model: PreTrainedModel) -> str:
    """Returns what may share a batch: compares the logits of small batches with those of each row alone."""
    if model.dtype not in (torch.float32, torch.float64):
        return ALONE  # rounding of another batch size could choose another token
    vocabulary = model.config.get_text_config().vocab_size
    window = longest_input(model) or 8
    if min(vocabulary, window) < 8:
        return ALONE
    numbers = torch.arange(40).mul(7).remainder(vocabulary).tolist()
    # A long prompt would change the rotary positions of those that it shares a batch with.
    padded = [] if rotates_by_length(model.config.get_text_config()) else [(PADDED, (3, 6, 5))]
    for sharing, lengths in [*padded, (EQUAL, (5, 5, 5))]:
        prompts = [row[:length] for row, length in zip(chunks(numbers, 10), lengths, strict=False)]
        try:
            if _are_alike(model, prompts, new=[[row[8]] for row in chunks(numbers, 10)[:3]]):
                return sharing
        except FORWARD_ERRORS:
            continue
    return ALONE


def _are_alike(model: PreTrainedModel, prompts: Sequence[list[int]], *, new: Sequence[list[int]]) -> bool:
    """Compares logits after the prompts, and after a further token of all rows but the first."""
    rows = _Rows(model, prompts)
    first = rows.next_logits()
    rows.append(torch.tensor([token for (token,) in new], device=model.device), range(1, len(prompts)))
    second = rows.next_logits()
    texts = [*prompts, *(prompt + token for prompt, token in zip(prompts[1:], new[1:], strict=True))]
    for found, ids in zip([*first, *second], texts, strict=True):
        expected = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float()
        if not float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max()):
            return False
    return True


def _sample(logits: torch.Tensor, settings: Generate, draws: Sequence[torch.Generator]) -> torch.Tensor:
    """Returns (rows,) int64: each row's token, drawn as `sample_token` draws it alone."""
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    return torch.cat(
        [sample_token(row[None], settings, draws=generator) for row, generator in zip(logits, draws, strict=True)]
    )

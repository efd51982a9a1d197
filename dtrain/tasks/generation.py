"""Texts from an encoder-decoder model for a batch of sources, without computing rows that have ended.

`generate` of transformers goes on with all rows until the last one ends, so a text that never ends makes the others wait for
the maximum length. Here it stops when rows that have ended were computed more often than it takes to start again, and goes
on with the other rows. A row gets the tokens that it gets alone, and `max_new_tokens` is its only limit: one that depends on
the length of the source (max_len_a of fairseq) would change its text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

MIN_ROWS = 4
"""Fewer rows are not worth a new start of `generate`."""

READS_PREFIX = "_dtrain_reads_prefix_at_once"
"""Attribute of a model that keeps the result of `_reads_a_prefix_at_once`."""

TRIED_ROWS, TRIED_TOKENS = 2, 6

TOLERANCE = 0.03
"""Largest difference of the trial, relative to the largest logit: rounding of bf16. A wrong mask makes 0.1 or more."""

COUNTS_FROM_START = (
    "min_new_tokens",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "max_time",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "guidance_scale",
    "cache_implementation",
)
"""Entries of a generation_config that count from where `generate` starts, or that need all rows."""


def generate_tokens(
    module: Any,
    inputs: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    *,
    ends: Collection[int],
    pad: int,
    lock_step: bool,
) -> torch.Tensor:
    """Returns (batch, max_new_tokens) int64: each row's new tokens, without the decoder's start token, then pad tokens.

    Args:
        inputs: `input_ids` and `attention_mask`.
        options: options of `generate`; has `max_new_tokens` and `num_beams`.
        ends: tokens after which a row's tokens do not count.
        lock_step: every rank calls the model equally often, so all rows go on with the others.
    """
    rows, most = len(inputs["input_ids"]), int(options["max_new_tokens"])
    tokens = torch.full((rows, most), pad, device=inputs["input_ids"].device)
    if lock_step or options["num_beams"] > 1 or rows < MIN_ROWS or not _can_go_on(module):
        new = module.generate(**inputs, synced_gpus=lock_step, **options)[:, 1:]
        tokens[:, : new.shape[1]] = new
        return tokens
    stops = torch.tensor(sorted({*ends, *_model_ends(module)}), device=tokens.device)
    states = module.get_encoder()(**inputs, return_dict=True)
    left, more = torch.arange(rows, device=tokens.device), dict[str, Any]()
    done = 0
    while done < most and len(left):
        states_left = type(states)(last_hidden_state=states.last_hidden_state[left])
        found = module.generate(
            **{name: tensor[left] for name, tensor in inputs.items()},
            encoder_outputs=states_left,
            stopping_criteria=StoppingCriteriaList([_TooManyEnded(stops)] if len(left) >= MIN_ROWS else []),
            synced_gpus=False,
            **{**options, "max_new_tokens": most - done},
            **more,
        )
        new = found[:, 1:]
        tokens[left, : new.shape[1]] = new
        done, is_left = new.shape[1], ~_has_ended(new, stops)
        if (
            done < most and is_left.any() and not _reads_a_prefix_at_once(module, inputs, states, found)
        ):  # at first all rows are left
            return generate_tokens(module, inputs, options, ends=ends, pad=pad, lock_step=lock_step)
        # Without their cache: what has been generated is computed again, all at once.
        left, more = left[is_left], {"decoder_input_ids": found[is_left]}
    return tokens


class _TooManyEnded(StoppingCriteria):  # type: ignore[misc]
    """Ends `generate` when it has computed more tokens of rows that had ended than a new start computes again.

    In all, no more than twice the tokens are computed that are needed, however long the rows are. It fetches nothing from the
    device.
    """

    def __init__(self, stops: torch.Tensor) -> None:
        self._stops = stops
        self._wasted = torch.zeros((), dtype=torch.int64, device=stops.device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        ended = _has_ended(input_ids[:, 1:], self._stops)
        self._wasted += ended.sum()
        again = (~ended).sum() * input_ids.shape[1] + len(ended)
        return ended | (self._wasted > again)


def _has_ended(new: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    return torch.isin(new, stops).any(dim=1)


def _can_go_on(module: Any) -> bool:
    """Returns whether `generate` gives the same tokens if it is stopped and goes on with them."""
    config = getattr(module, "generation_config", None)
    return (
        config is not None
        and hasattr(module, "get_encoder")
        and module.__dict__.get(READS_PREFIX) is not False
        and all(getattr(config, name, None) is None for name in COUNTS_FROM_START)
    )


@torch.no_grad()
def _reads_a_prefix_at_once(module: Any, inputs: Mapping[str, torch.Tensor], states: Any, prefix: torch.Tensor) -> bool:
    """Returns whether tokens that are read at once give the logits that they give one by one. Tried once for a model.

    FSMT has no causal mask for such a call, and ProphetNet's logits depend on its length.
    """
    known: bool | None = module.__dict__.get(READS_PREFIX)
    if known is not None:
        return known
    tokens, mask = prefix[:TRIED_ROWS, :TRIED_TOKENS], inputs["attention_mask"][:TRIED_ROWS]
    few_states = type(states)(last_hidden_state=states.last_hidden_state[:TRIED_ROWS])
    always: dict[str, Any] = {"encoder_outputs": few_states, "attention_mask": mask, "use_cache": True}
    at_once = module(**always, decoder_input_ids=tokens).logits[:, -1].float()
    cache: Any = None
    for place in range(tokens.shape[1]):
        output = module(**always, decoder_input_ids=tokens[:, place : place + 1], past_key_values=cache)
        cache = output.past_key_values
    one_by_one = output.logits[:, -1].float()
    is_alike = bool((at_once - one_by_one).abs().max() <= TOLERANCE * one_by_one.abs().max())
    if not is_alike or tokens.shape[1] == TRIED_TOKENS:  # fewer tokens may be alike by chance
        module.__dict__[READS_PREFIX] = is_alike
    return is_alike


def _model_ends(module: Any) -> set[int]:
    """Returns the tokens after which `generate` itself only pads."""
    end = module.generation_config.eos_token_id
    return set() if end is None else {end} if isinstance(end, int) else set(end)

"""Fills the masks of a text with the most likely tokens of a masked language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dtrain.config.schema import Config
from dtrain.distributed.cuda_devices import device_of
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError, DataError
from dtrain.models.compatibility import check_fit, longest_input
from dtrain.models.load import load_model
from dtrain.models.tokenizer import load_tokenizer
from dtrain.tasks.build import task_info
from dtrain.tasks.tensors import full_precision
from dtrain.training.build import refuse_custom_models

NUM_GUESSES = 5
"""Tokens to report per mask."""


@dataclass(frozen=True)
class FilledText:
    """A text whose masks are filled.

    Attributes:
        text: the text with the most likely token for each mask, as the tokenizer decodes it.
        masks: for each mask, in the order of the text: (token, probability) of the most likely tokens.
    """

    text: str
    masks: Sequence[Sequence[tuple[str, float]]]


class MaskFiller:
    """A masked language model that predicts the token for each mask in a text."""

    def __init__(self, config: Config, context: RankContext) -> None:
        """Loads the model.

        Raises:
            ConfigError: it is not a masked language model, or its tokenizer has no mask token.
        """
        refuse_custom_models(config, "predict", "masked language model")
        self._tokenizer = load_tokenizer(config.model, training_texts=list)
        if self._tokenizer.mask_token is None:
            raise ConfigError(
                f"task.name={config.task.name} needs a tokenizer with a mask token, and this one has none. Use the tokenizer of a "
                "masked language model."
            )
        self.token = str(self._tokenizer.mask_token)
        model = load_model(
            config.model,
            head=task_info(config.task).head,
            head_config={},
            tokenizer=self._tokenizer,
            seed=config.run.seed,
            is_trained=True,
        )
        check_fit(model, self._tokenizer, max_length=1, needs_padding=False)
        self._longest = longest_input(model)
        self._model = model.to(device_of(context.topology)).eval()

    def check(self, text: str, location: str) -> None:
        """Checks that a text can be filled.

        Args:
            location: where the text is from, for the error message.

        Raises:
            DataError: it has no mask, or more tokens than the model takes.
        """
        ids = self._tokens(text)
        if self._tokenizer.mask_token_id not in ids:
            raise DataError(
                f"{location} has no {self.token}: put this tokenizer's mask token where the model should guess, as in "
                f'"The cat {self.token} on the mat."'
            )
        if self._longest is not None and len(ids) > self._longest:
            raise DataError(f"{location}: the text has {len(ids)} tokens, but the model takes at most {self._longest}")

    @torch.no_grad()
    def fill(self, text: str) -> FilledText:
        """Fills the masks of a text that passed `check`."""
        ids = torch.tensor(self._tokens(text), device=self._model.device)
        positions = (ids == self._tokenizer.mask_token_id).nonzero()[:, 0]
        logits = full_precision(self._model(input_ids=ids[None]).logits[0, positions])
        likely = logits.softmax(dim=-1).topk(min(NUM_GUESSES, logits.shape[-1]))
        masks = [
            [(self._decode_token(token), value) for token, value in zip(*pair, strict=True)]
            for pair in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
        ]
        ids[positions] = likely.indices[:, 0]
        return FilledText(str(self._tokenizer.decode(ids, skip_special_tokens=True)), masks)

    def _tokens(self, text: str) -> list[int]:
        # Without split_special_tokens=False, a tokenizer that dtrain trained reads the mask token as plain text.
        ids: list[int] = self._tokenizer(text, split_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _decode_token(self, token: int) -> str:
        """Returns one token without surrounding spaces. A token that is only white space is returned in quotation marks."""
        text = str(self._tokenizer.decode([token]))
        return text.strip() or repr(text)

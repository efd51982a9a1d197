"""What stands behind the masks of a text: the likeliest tokens of a masked language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dtrain.config.schema import Config
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.topology import device_of
from dtrain.errors import ConfigError, DataError
from dtrain.models.compatibility import check_fit, longest_input
from dtrain.models.load import load_model
from dtrain.models.tokenizer import load_tokenizer
from dtrain.tasks.build import task_info
from dtrain.tasks.tensors import full_precision
from dtrain.training.build import refuse_own_parts

GUESSES = 5


@dataclass(frozen=True)
class Filled:
    """text: with the likeliest token in each mask's place, as the tokenizer writes it. masks: (token, probability) of
    the likeliest ones of each mask, in the order of the text."""

    text: str
    masks: Sequence[Sequence[tuple[str, float]]]


class Filler:
    """A masked language model that guesses what is behind each mask token of a text.

    Raises:
        ConfigError: the settings name no such model, or a tokenizer without a mask token.
    """

    def __init__(self, config: Config, context: RankContext) -> None:
        refuse_own_parts(config, "predict", "masked language model")
        self._tokenizer = load_tokenizer(config.model, training_texts=list)
        if self._tokenizer.mask_token is None:
            raise ConfigError(
                f"task.name={config.task.name} needs a tokenizer with a mask token, and this one has none. Use that of a model that "
                "was trained this way."
            )
        self.token = str(self._tokenizer.mask_token)
        model = load_model(
            config.model,
            head=task_info(config.task).head,
            head_config={},
            tokenizer=self._tokenizer,
            seed=config.run.seed,
        )
        check_fit(model, self._tokenizer, max_length=1, needs_padding=False)
        self._longest = longest_input(model)
        self._model = model.to(device_of(context.topology)).eval()

    def check(self, text: str, place: str) -> None:
        """Raises:
        DataError: there is nothing to fill in, or the text is longer than the model takes.
        """
        ids = self._tokens(text)
        if self._tokenizer.mask_token_id not in ids:
            raise DataError(
                f"{place} has no {self.token}: put this tokenizer's mask token where a word is to be guessed, as in "
                f'"The cat {self.token} on the mat."'
            )
        if self._longest is not None and len(ids) > self._longest:
            raise DataError(f"{place}: the text has {len(ids)} tokens, and the model takes {self._longest} at most")

    @torch.no_grad()
    def fill(self, text: str) -> Filled:
        """A text that `check` let pass."""
        ids = torch.tensor(self._tokens(text), device=self._model.device)
        places = (ids == self._tokenizer.mask_token_id).nonzero()[:, 0]
        logits = full_precision(self._model(input_ids=ids[None]).logits[0, places])
        likely = logits.softmax(dim=-1).topk(min(GUESSES, logits.shape[-1]))
        masks = [
            [(self._word(token), value) for token, value in zip(*pair, strict=True)]
            for pair in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
        ]
        ids[places] = likely.indices[:, 0]
        return Filled(str(self._tokenizer.decode(ids, skip_special_tokens=True)), masks)

    def _tokens(self, text: str) -> list[int]:
        # A tokenizer that was trained here takes the mask token for plain text otherwise.
        ids: list[int] = self._tokenizer(text, split_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _word(self, token: int) -> str:
        """A token alone, without the blank before it; a blank or line break itself in quotation marks."""
        text = str(self._tokenizer.decode([token]))
        return text.strip() or repr(text)

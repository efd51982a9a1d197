"""The generate command: text from a causal language model, sampled with the run's seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dtrain.commands.continuation import Continuer, Prompt, end_tokens
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.cuda_devices import device_of
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError
from dtrain.models.chat_template import turn_end_tokens
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
        self._seed = config.run.seed
        self._tokenizer = load_tokenizer(config.model, training_texts=list)
        model = load_model(
            config.model,
            head=info.head,
            head_config={},
            tokenizer=self._tokenizer,
            seed=config.run.seed,
            is_trained=True,
        )
        stops = end_tokens(model) | turn_end_tokens(self._tokenizer)
        model = model.to(device_of(context.topology)).eval()
        self._continue = Continuer(model, config, stops=stops, heartbeat=context.heartbeat)

    def has_tokens(self, prompt: str) -> bool:
        """Returns whether the prompt has at least one token. A model cannot continue an empty prompt."""
        return bool(self._tokens(prompt))

    def batches(self, prompts: Sequence[str]) -> list[list[int]]:
        """Returns which prompts `generate_all` should get together."""
        return self._continue.batches([len(self._tokens(prompt)) for prompt in prompts])

    def generate(self, prompt: str, *, number: int) -> GeneratedText:
        """Continues a prompt.

        Args:
            number: index of the prompt among several, part of the random seed. Prompt 0 gets the text that the generate
                command returns.
        """
        return self.generate_all([(number, prompt)])[0]

    def generate_all(
        self, prompts: Sequence[tuple[int, str]], done: Callable[[int], None] = lambda _: None
    ) -> list[GeneratedText]:
        """Continues each prompt of a batch, given with its number, as `generate` does.

        Args:
            done: called with the number of prompts whose text has ended since its last call.
        """
        given = [
            Prompt(self._tokens(text), (self._seed, "generate", *([number] if number else [])))
            for number, text in prompts
        ]
        return [self._text(prompt.ids, new) for prompt, new in zip(given, self._continue(given, done), strict=True)]

    def _text(self, ids: Sequence[int], new: Sequence[int]) -> GeneratedText:
        prompt, full = self._decode(ids), self._decode([*ids, *new])
        # Decoded alone, the new tokens would lose the space that they begin with.
        return GeneratedText(full, full[len(prompt) :] if full.startswith(prompt) else self._decode(new))

    def _tokens(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

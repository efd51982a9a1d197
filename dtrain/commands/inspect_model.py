"""The inspect command: writes a model's hidden states and attentions for single examples as safetensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.data.seeding import DataPosition
from dtrain.distributed.collectives import on_main
from dtrain.distributed.cuda_devices import device_of
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError
from dtrain.models.base import load_base
from dtrain.models.compatibility import longest_input
from dtrain.models.tokenizer import load_tokenizer
from dtrain.runs.folder import INSPECTION, write_json_atomic
from dtrain.runs.jsonl import report_write_errors
from dtrain.tasks.build import build_task
from dtrain.training import run_claim


@dataclass(frozen=True)
class InspectedExample:
    """One example as the model gets it.

    Attributes:
        name: stem of its output file.
        inputs: the model's inputs, (1, length) each.
        info: further fields of its entry in tokens.json.
    """

    name: str
    inputs: Mapping[str, torch.Tensor]
    info: Mapping[str, Any]


def run_inspect(config: Config, context: RankContext) -> Path:
    """Collective. Writes `inspection/` in the run folder on rank 0. Returns that folder.

    Raises:
        ConfigError: no example is given, or one that does not exist or is not text.
    """
    settings, model = config.inspect, config.model
    if settings.text is None and settings.split is None:
        raise ConfigError('inspect needs examples: inspect.text="..." or inspect.split and inspect.examples=[0, 5].')
    with run_claim.claimed(config, context, command="inspect"):
        if model.attn_implementation not in (None, "eager"):
            log.info("attentions are computed with model.attn_implementation=eager, not %s", model.attn_implementation)
        if settings.text is not None:
            tokenizer = load_tokenizer(model, training_texts=list)
            examples = [_text_example(settings.text, tokenizer)]
        else:
            task = build_task(config, context)
            tokenizer = task.tokenizer
            examples = list(_split_examples(config, task))
        target = config.run_dir / INSPECTION

        def work() -> None:
            body = load_base(model).to(device_of(context.topology))
            for example in examples:
                _check(example, body)
            with report_write_errors(target):
                target.mkdir(exist_ok=True)
                entries = [_write(example, body, tokenizer, target) for example in examples]
            write_json_atomic(target / "tokens.json", {"model": model.name_or_path, "examples": entries})

        on_main(work, context)
        log.info("hidden states and attentions of %d example(s): %s", len(examples), target)
        return target


def compute_states(body: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Computes hidden states and attentions of one example, fp32 in host memory.

    Args:
        inputs: `input_ids` and the inputs that accompany them, (1, length) int64 each.

    Returns:
        hidden_states: (layers + 1, length, width): the embeddings, then each layer's output, as transformers returns
            them (the last one may be normalized).
        attentions: (layers, heads, length, length), each row sums to 1; absent if the model returns none.
    """
    device = next(body.parameters()).device
    with torch.no_grad():
        on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
        outputs = body(**on_device, output_hidden_states=True, output_attentions=True)
    states = {"hidden_states": torch.cat(list(outputs.hidden_states))}
    attentions = [attention for attention in getattr(outputs, "attentions", None) or () if attention is not None]
    if attentions:
        states["attentions"] = torch.cat(attentions)
    return {name: tensor.float().cpu().contiguous() for name, tensor in states.items()}


def _text_example(text: str, tokenizer: Any) -> InspectedExample:
    # One text has one token type, which is the models' default. GPT-2 would embed explicit type ids as tokens.
    inputs = dict(tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    if inputs["input_ids"].numel() == 0:
        raise ConfigError("inspect.text is empty for this tokenizer: give at least one token.")
    return InspectedExample("text", {name: tensor.long() for name, tensor in inputs.items()}, {"text": text})


def _split_examples(config: Config, task: Any) -> Iterator[InspectedExample]:
    """Yields the examples as the task gives them to the model. Random draws are those of the first training epoch."""
    split = str(config.inspect.split)
    if split not in task.splits:
        raise ConfigError(f"inspect.split={split} is not a split of this data. It has {', '.join(task.splits)}.")
    rows = task.splits[split]
    for index in dict.fromkeys(config.inspect.examples or (0,)):
        if index >= len(rows):
            raise ConfigError(
                f"inspect.examples: {split} has {len(rows)} examples, numbered from 0; there is no {index}."
            )
        batch = task.collate(rows[[index]], DataPosition(0, (index,)))
        shape = tuple(batch["input_ids"].shape) if "input_ids" in batch else None
        if shape is None or len(shape) != 2 or shape[0] != 1:
            raise ConfigError(
                f"inspect.split: an example of task.name={config.task.name} is not one sequence of tokens (input_ids "
                f"{shape}). Give inspect.text instead."
            )
        yield InspectedExample(f"{split}-{index:06d}", batch, {"split": split, "example_index": index})


def _check(example: InspectedExample, body: nn.Module) -> None:
    """Raises ConfigError if an example has more tokens than the model has positions."""
    length, positions = example.inputs["input_ids"].shape[1], longest_input(body)
    if positions is not None and length > positions:
        raise ConfigError(f"inspect: {example.name} has {length} tokens, but the model has only {positions} positions.")


def _write(example: InspectedExample, body: nn.Module, tokenizer: Any, target: Path) -> dict[str, Any]:
    """Writes the states of one example. Returns its entry for tokens.json."""
    known = inspect.signature(body.forward).parameters
    states = compute_states(body, {name: tensor for name, tensor in example.inputs.items() if name in known})
    file = target / f"{example.name}.safetensors"
    save_file(states, file)
    file.chmod(0o644)
    ids = example.inputs["input_ids"][0].tolist()
    if "attentions" not in states:
        log.info("this model returns no attentions; %s has hidden states only", file.name)
    shapes = {name: list(tensor.shape) for name, tensor in states.items()}
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return {"file": file.name, **example.info, "input_ids": ids, "tokens": tokens, "shapes": shapes}

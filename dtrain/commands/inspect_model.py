"""The inspect command: what a model computes inside for single examples, as safetensors."""

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
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.topology import device_of
from dtrain.errors import ConfigError
from dtrain.models.base import load_base
from dtrain.models.compatibility import longest_input
from dtrain.models.tokenizer import load_tokenizer
from dtrain.runs.folder import INSPECTION, write_json_atomic
from dtrain.runs.jsonl import report_write_errors
from dtrain.tasks.build import build_task
from dtrain.training import run_claim


@dataclass(frozen=True)
class Example:
    """One example as the model gets it. name: of its file. inputs: (1, length) each. told: what tokens.json says of it."""

    name: str
    inputs: Mapping[str, torch.Tensor]
    told: Mapping[str, Any]


def run_inspect(config: Config, context: RankContext) -> Path:
    """Collective. Rank 0 computes and writes `inspection/` in the run folder; gives that folder.

    Raises:
        ConfigError: no example is named, or one that is not there or not text.
    """
    settings, model = config.inspect, config.model
    if settings.text is None and settings.split is None:
        raise ConfigError('inspect needs examples: inspect.text="..." or inspect.split and inspect.examples=[0, 5].')
    with run_claim.taken(config, context, command="inspect"):
        if model.attn_implementation not in (None, "eager"):
            log.info("attentions are computed with model.attn_implementation=eager, not %s", model.attn_implementation)
        if settings.text is not None:
            tokenizer = load_tokenizer(model, training_texts=list)
            examples = [_of_text(settings.text, tokenizer)]
        else:
            task = build_task(config, context)
            tokenizer = task.tokenizer
            examples = list(_of_split(config, task))
        target = config.run_dir / INSPECTION

        def work() -> None:
            body = load_base(model).to(device_of(context.topology))
            for example in examples:
                _check(example, body)
            with report_write_errors(target):
                target.mkdir(exist_ok=True)
                told = [_write(example, body, tokenizer, target) for example in examples]
            write_json_atomic(target / "tokens.json", {"model": model.name_or_path, "examples": told})

        on_main(work, context)
        log.info("hidden states and attentions of %d example(s): %s", len(examples), target)
        return target


def states_of(body: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model computes for one example, fp32 on the host.

    Args:
        inputs: `input_ids` and what goes with them, (1, length) int64 each.

    Returns:
        hidden_states: (layers + 1, length, width): the embeddings, then each layer's output, as transformers gives
        them (the last one may be normalised). attentions: (layers, heads, length, length), each row sums to 1; absent
        where the model has none.
    """
    device = next(body.parameters()).device
    with torch.no_grad():
        given = {name: tensor.to(device) for name, tensor in inputs.items()}
        outputs = body(**given, output_hidden_states=True, output_attentions=True)
    found = {"hidden_states": torch.cat(list(outputs.hidden_states))}
    attentions = [attention for attention in getattr(outputs, "attentions", None) or () if attention is not None]
    if attentions:
        found["attentions"] = torch.cat(attentions)
    return {name: tensor.float().cpu().contiguous() for name, tensor in found.items()}


def _of_text(text: str, tokenizer: Any) -> Example:
    # All of one text is of one type, which is what models take where nothing is said; GPT-2 would add it as a token.
    inputs = dict(tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    if inputs["input_ids"].numel() == 0:
        raise ConfigError("inspect.text is empty for this tokenizer: give at least one token.")
    return Example("text", {name: tensor.long() for name, tensor in inputs.items()}, {"text": text})


def _of_split(config: Config, task: Any) -> Iterator[Example]:
    """The examples as the task hands them to the model, in training's first epoch where it draws at random."""
    split = str(config.inspect.split)
    if split not in task.splits:
        raise ConfigError(f"inspect.split={split} is not a split of this data. It has {', '.join(task.splits)}.")
    rows = task.splits[split]
    for index in dict.fromkeys(config.inspect.examples or (0,)):
        if index >= len(rows):
            raise ConfigError(f"inspect.examples: {split} has {len(rows)} examples, from 0 on; there is no {index}.")
        batch = task.collate(rows[[index]], DataPosition(0, (index,)))
        shape = tuple(batch["input_ids"].shape) if "input_ids" in batch else None
        if shape is None or len(shape) != 2 or shape[0] != 1:
            raise ConfigError(
                f"inspect.split: an example of task.name={config.task.name} is not one sequence of tokens (input_ids "
                f"{shape}). Give inspect.text instead."
            )
        yield Example(f"{split}-{index:06d}", batch, {"split": split, "example_index": index})


def _check(example: Example, body: nn.Module) -> None:
    """Refuses what the model's embeddings cannot hold."""
    length, most = example.inputs["input_ids"].shape[1], longest_input(body)
    if most is not None and length > most:
        raise ConfigError(f"inspect: {example.name} has {length} tokens, but the model has positions for {most} only.")


def _write(example: Example, body: nn.Module, tokenizer: Any, target: Path) -> dict[str, Any]:
    known = inspect.signature(body.forward).parameters
    found = states_of(body, {name: tensor for name, tensor in example.inputs.items() if name in known})
    file = target / f"{example.name}.safetensors"
    save_file(found, file)
    file.chmod(0o644)
    ids = example.inputs["input_ids"][0].tolist()
    if "attentions" not in found:
        log.info("Note: this model gives no attentions; %s has hidden states only", file.name)
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return {"file": file.name, **example.told, "input_ids": ids, "tokens": tokens, "shapes": shapes}

"""A model as a Hugging Face folder that plain from_pretrained loads, tokenizer included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtrain.collectives import on_main
from dtrain.engine.protocol import Engine
from dtrain.run_folder import replace_folder


def export_model(engine: Engine, tokenizer: Any, target: Path) -> None:
    """Collective. Gathers the weights to rank 0, which writes them beside `target` and swaps the folder in."""
    weights = {name: value for name, value in engine.named_weights() if value is not None}

    def write() -> None:
        temporary = target.with_name(f".tmp-{target.name}")
        save(engine.module, weights, tokenizer, temporary)
        replace_folder(temporary, target)

    on_main(write, engine.topology)


def save(module: nn.Module, weights: dict[str, torch.Tensor], tokenizer: Any, folder: Path) -> None:
    """Writes config, weights and tokenizer. `weights` holds each parameter once; shared ones are named again here."""
    first_name = {id(parameter): name for name, parameter in module.named_parameters()}
    state = {name: weights[first_name[id(p)]] for name, p in module.named_parameters(remove_duplicate=False)}
    parameters = set(state)
    state.update({name: value.detach().cpu() for name, value in module.state_dict().items() if name not in parameters})
    module.save_pretrained(str(folder), state_dict=state)  # type: ignore[operator]
    tokenizer.save_pretrained(str(folder))

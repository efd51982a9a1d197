"""The built-in settings of a run without arguments. A test keeps them equal to configs/quickstart.yaml."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from dtrain.config.error_messages import KeyPath

_NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}

QUICKSTART: dict[str, dict[str, Any]] = {
    "run": {"name": "quickstart"},
    "task": {"name": "causal_lm"},
    "model": {
        "from_scratch": True,
        "tokenizer": "char",
        "config": {"model_type": "gpt2", "n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 64, **_NO_DROPOUT},
    },
    "data": {"name": "python_docs", "validation_fraction": 0.1, "max_length": 64},
    "optim": {"learning_rate": 2e-3, "weight_decay": 0.1, "betas": [0.9, 0.99]},
    "schedule": {"name": "cosine", "warmup_steps": 50},
    "train": {"max_steps": 400, "global_batch_size": 32, "micro_batch_size": 16, "eval_every": 200, "log_every": 20},
}
"""A small character-level GPT on Python's language reference (`pydoc_data.topics`)."""


def quickstart_without_replaced(pairs: Sequence[tuple[KeyPath, Any]]) -> dict[str, Any]:
    """Returns the quickstart's settings without those that belong to a part that an override replaces."""

    def is_set(section: str, *names: str) -> bool:
        return any(
            key[0] == section and (len(key) == 1 or key[1] in names) for key, value in pairs if value is not None
        )

    if is_set("task", "name"):
        return {}
    base = copy.deepcopy(QUICKSTART)
    del base["run"]  # Its name is a default, not the user's choice: see load.py.
    new_model, new_data = is_set("model", "name_or_path"), is_set("data", "name", "path")
    if new_model:
        # Learning rate and decay suit a small new model. They would destroy what a pretrained one has learned.
        for section in ("model", "optim", "schedule"):
            del base[section]
    if new_data:
        # Any single file needs a validation split, but the block length belongs to the quickstart's model.
        kept = ("validation_fraction",) if new_model else ("validation_fraction", "max_length")
        base["data"] = {name: base["data"][name] for name in kept}
    return base

"""The built-in settings of a run without arguments. A test keeps them equal to configs/quickstart.yaml."""

from __future__ import annotations

from typing import Any

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

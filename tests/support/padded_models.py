"""Tiny models of each architecture that can be computed without padding, and padded batches for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

VOCABULARY = 40
LENGTHS = (5, 9, 1, 5, 12)
"""Tokens of each row of a batch: two equal ones, a single token, no order."""

_BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_ROBERTA = {**_BERT, "max_position_embeddings": 40, "pad_token_id": 0}
_LLAMA = {**_BERT, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0}
_GEMMA = {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "albert": {**_BERT, "embedding_size": 8},
    "bert": _BERT,
    "camembert": _ROBERTA,
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "electra": {**_BERT, "embedding_size": 8},
    "ernie": _BERT,
    "modernbert": {**_BERT, "pad_token_id": 0, "local_attention": 6, "global_attn_every_n_layers": 2},
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}
DECODERS: Mapping[str, Mapping[str, Any]] = {
    "gemma3_text": {**_LLAMA, **_GEMMA},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {**_BERT, "max_position_embeddings": 64},
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 4},
    "opt": {**_BERT, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0},
    "phi3": {**_LLAMA, "sliding_window": 4},
    "qwen2": {**_LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {**_LLAMA, "head_dim": 8},
}


def make(kind: str, auto_class: Any, *, seed: int = 0, std: float = 0.3, **changes: Any) -> Any:
    """Returns a random model without dropout, with a head of `auto_class`, in eval mode.

    Args:
        std: of all weights. The usual ones are so small that a token hardly sees another one.
    """
    from transformers import AutoConfig

    options = {**ENCODERS, **DECODERS}[kind]
    config = AutoConfig.for_model(kind, **{"vocab_size": VOCABULARY, "num_labels": 3, **options})
    for name in vars(config):
        if name.endswith(("dropout", "dropout_prob", "pdrop")) and getattr(config, name) is not None:
            setattr(config, name, 0.0)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class.from_config(config, attn_implementation="sdpa")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def batch(*, side: str = "right", lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns input_ids and attention_mask, with padding on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    places = torch.arange(max(lengths))
    mask = (places < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if side == "left" else mask
    return {"input_ids": ids * mask, "attention_mask": mask}

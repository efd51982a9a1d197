"""Language models whose weights are so large that what they write depends on what they have read."""

from __future__ import annotations

from typing import Any

import torch


def gpt(*, positions: int, vocabulary: int = 11, seed: int = 0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": vocabulary, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": positions}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
        for parameter in model.parameters():  # louder, so that what is said depends on what was read
            parameter.data.mul_(6.0)
        return model


def bert(tokenizer: Any) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = BertForMaskedLM(
            BertConfig(
                vocab_size=len(tokenizer), max_position_embeddings=12, pad_token_id=tokenizer.pad_token_id, **sizes
            )
        ).eval()
        for parameter in made.parameters():
            parameter.data.mul_(5.0)
        return made

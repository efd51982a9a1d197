"""A model for dialogues whose few tokens a test names: two of them Chinese characters, two Latin ones."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u4f60", "\u597d", "\u5417", "\uff1f", "a", "b"]
CLS, SEP, NI, HAO, MA, ASKS, A, B = range(2, 10)


def tokenizer() -> Any:
    from transformers import BertTokenizerFast

    return BertTokenizerFast(vocab={token: number for number, token in enumerate(VOCABULARY)}, mask_token=None)


def gpt(*, positions: int = 16, seed: int = 0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(VOCABULARY), n_layer=1, n_head=2, n_embd=8, n_positions=positions,
        bos_token_id=CLS, eos_token_id=SEP, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)

"""Encodes many texts at once, by the tokenizers library itself where transformers only passes the texts on to it.

transformers asks for the place of every token in its text and makes lists of it. Without that it takes 0.7 of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils.generic import PaddingStrategy

FROM_TRANSFORMERS = ("__call__", "_encode_plus", "_convert_encoding", "set_truncation_and_padding")
"""What the tokenizer's class must have from transformers."""


class Encoded(NamedTuple):
    """Tokens of texts, or of pairs of texts.

    Attributes:
        columns: input_ids, and token_type_ids if the model takes them; a list for each text.
        encodings: of the tokenizers library, with the parts that were cut off; None without it. Where the call was
            passed by, a cut-off part of a pair has no reliable type_ids.
    """

    columns: dict[str, list[list[int]]]
    encodings: Sequence[Any] | None


def encode_all(
    tokenizer: Any,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    max_length: int | None = None,
    special_tokens: bool = True,
) -> Encoded:
    """Returns what the tokenizer makes of the texts, without attention masks.

    Args:
        pairs: the second text of each pair.
        max_length: of tokens; longer texts are cut. None: they are not.
    """
    options = {} if max_length is None else {"truncation": True, "max_length": max_length}
    if not _may_pass_by(tokenizer):
        encoded = tokenizer(texts, pairs, add_special_tokens=special_tokens, return_attention_mask=False, **options)
        return Encoded({**encoded}, encoded.encodings)
    if hasattr(tokenizer, "_switch_to_input_mode"):  # of several languages
        tokenizer._switch_to_input_mode()
    strategy = TruncationStrategy.DO_NOT_TRUNCATE if max_length is None else TruncationStrategy.LONGEST_FIRST
    tokenizer.set_truncation_and_padding(PaddingStrategy.DO_NOT_PAD, strategy, max_length, 0, None, None)
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = tokenizer.split_special_tokens
    inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
    encodings = backend.encode_batch_fast(inputs, add_special_tokens=special_tokens)
    columns = {"input_ids": [encoding.ids for encoding in encodings]}
    if "token_type_ids" in tokenizer.model_input_names:
        columns["token_type_ids"] = [encoding.type_ids for encoding in encodings]
    return Encoded(columns, encodings)


def _may_pass_by(tokenizer: Any) -> bool:
    """Returns whether calling the tokenizer does nothing but call the tokenizers library."""
    kind = type(tokenizer)
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in FROM_TRANSFORMERS
    )

"""Saves tokenizers, and checks that they reload as the same ones.

AutoTokenizer chooses the class from the model's config.json as well. For some model types it always uses the class that it
has registered for the type, with this class's special tokens, and perhaps with its own normalizer and pre-tokenizer
instead of those in tokenizer.json. For others it uses a general class, which knows no token types.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dtrain.models.hub_errors import LOADING_ERRORS, quiet

PROBES = (
    "The cat's dog, 1234567 times:  two   blanks.",
    "\n\n\ttab\r\n line ",
    " CAF\u00c9 caf\u00e9 e\u0301 Z\u00fcrich \u65e5\u672c\u8a9e \U0001f600",
)
"""Texts in which tokenizers differ: white space, case, contractions, digits, accents, characters without spaces."""

BATCH = 1000
"""Texts that are tokenized at once."""

SIDES = ("padding_side", "truncation_side")

IDS = ("input_ids", "token_type_ids")

SPECIALS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the SHA-256 (hexadecimal) of everything that decides how a text becomes tokens.

    It is the same in every process, before and after use, and after saving and loading. The folder, and the truncation
    and padding of the last call, are not part of it (each call sets them).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()} if backend is None else {}
    state["chat_template"] = getattr(tokenizer, "chat_template", None)
    state["special_tokens"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    state["sides"] = [tokenizer.padding_side, tokenizer.truncation_side]
    state["inputs"] = sorted(tokenizer.model_input_names)  # token types or not
    state["split_special_tokens"] = bool(getattr(tokenizer, "split_special_tokens", False))
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    if backend is not None:
        digest.update(_without_last_call(backend.to_str()).encode())
    return digest.hexdigest()


def _without_last_call(text: str) -> str:
    """Returns tokenizer.json without the truncation and the padding, which come first in it.

    The vocabulary may have megabytes. The library writes it in the order of the numbers, so it is not parsed.
    """
    for name in ("truncation", "padding"):
        key = f'"{name}":'
        start = text.find(key) + len(key)
        if start >= len(key):
            _, stop = json.JSONDecoder().raw_decode(text, start)
            text = text[:start] + "null" + text[stop:]
    return text


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, texts: Sequence[str] = (), *, trust_remote_code: bool = False
) -> str | None:
    """Saves a tokenizer into a folder, beside the model's config.json if there is one, so that it reloads as the same one.

    Args:
        texts: compared as well; what is saved does not depend on them.

    Returns:
        What differs nevertheless; see `find_difference`.
    """
    tokenizer.save_pretrained(str(folder))
    difference = find_difference(tokenizer, folder, texts, trust_remote_code=trust_remote_code)
    if difference is None or (
        texts and find_difference(tokenizer, folder, trust_remote_code=trust_remote_code) is None
    ):
        return difference
    # transformers leaves out what is the default of the saved class. The class that is loaded may have other defaults.
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for name in ("model_input_names", *SIDES):
        content[name] = getattr(tokenizer, name)
    for name in SPECIALS:
        content.setdefault(f"{name}_token", None)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return find_difference(tokenizer, folder, texts, trust_remote_code=trust_remote_code)


def find_difference(
    tokenizer: PreTrainedTokenizerBase, folder: Path, texts: Iterable[str] = (), *, trust_remote_code: bool = False
) -> str | None:
    """Loads a folder as its users will, and compares its tokens with the tokenizer's. Never contacts the hub.

    Compares the numbers of the special tokens, and the tokens of `texts`, of PROBES and of every single token.

    Args:
        folder: where the tokenizer was saved, with or without the model's config.json.
        texts: sample of the texts that the model sees.

    Returns:
        What differs, as the end of a sentence; None if nothing does.
    """
    try:
        with quiet():
            reloaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except LOADING_ERRORS as error:
        return f"cannot be loaded ({' '.join(str(error).split())[:200]})"
    loaded_as = type(reloaded).__name__
    if tokenizer.is_fast and reloaded.is_fast and fingerprint(tokenizer) == fingerprint(reloaded):
        return None  # the same backend: no text can differ
    for name in (*SIDES, "chat_template"):
        if getattr(tokenizer, name, None) != getattr(reloaded, name, None):
            return f"is loaded with another {name.replace('_', ' ')}"
    for name in SPECIALS:
        here, there = (getattr(each, f"{name}_token_id") for each in (tokenizer, reloaded))
        if here != there:
            return f"is loaded as {loaded_as}, whose {name} token is {there} instead of {here}"
    for text, here, there in _encoded(tokenizer, reloaded, texts):
        if here != there:
            return f"is loaded as {loaded_as}, which makes {_start(there)} of {text[:40]!r} instead of {_start(here)}"
    return None


def _encoded(
    tokenizer: PreTrainedTokenizerBase, reloaded: PreTrainedTokenizerBase, texts: Iterable[str]
) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    vocabulary = list(tokenizer.get_vocab())
    # In a vocabulary of bytes, a token's name is not the text that it stands for.
    written = tokenizer.batch_decode([[number] for number in tokenizer.get_vocab().values()])
    for special, group in ((True, [*PROBES, *texts]), (False, [*vocabulary, *written])):
        remaining = iter(text for text in group if text)
        while batch := list(islice(remaining, BATCH)):
            here, there = (_encode(each, batch, special=special) for each in (tokenizer, reloaded))
            yield from zip(batch, here, there, strict=True)
    pair = {"text": PROBES[0], "text_pair": PROBES[1]}
    yield PROBES[1], _ids(tokenizer(**pair)), _ids(reloaded(**pair))


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[Mapping[str, Any]]:
    try:
        encoded = tokenizer(texts, add_special_tokens=special)
    except Exception as error:  # noqa: BLE001 - tokenizers raises Exception itself, e.g. for a missing unknown token
        return [{"error": str(error)}] * len(texts)
    return [_ids({name: encoded[name][row] for name in encoded}) for row in range(len(texts))]


def _ids(encoded: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the tokens and their types. Types that are all 0 are the same as none."""
    return {name: encoded[name] for name in IDS if name == "input_ids" or any(encoded.get(name, ()))}


def _start(encoded: Mapping[str, Any]) -> str:
    if "error" in encoded:
        return f"an error ({encoded['error']})"
    ids = encoded["input_ids"]
    return f"the tokens {ids[:8]}{' ...' if len(ids) > 8 else ''}"

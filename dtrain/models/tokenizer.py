"""Loads tokenizers by name, folder or vocabulary file, or builds them from the training text (characters or BPE)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dtrain.config import schema
from dtrain.config.model import BUILT_TOKENIZERS
from dtrain.console import log
from dtrain.errors import ConfigError, DataError
from dtrain.models.added_tokens import add_tokens
from dtrain.models.architecture import check_name_or_path, read_config
from dtrain.models.foreign_files import check_growth, check_tokenizer_files
from dtrain.models.hub_errors import LOADING_ERRORS, check_reachable, explain, is_local, quiet
from dtrain.models.saved_tokenizer import save_tokenizer

UNKNOWN = "<unk>"
PAD = "<pad>"
MASK = "<mask>"
END = "<|endoftext|>"


def load_tokenizer(
    model: schema.Model, *, training_texts: Callable[[], Iterable[str]], needs_padding: bool = False
) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that `model.tokenizer` names, or else the model's own.

    Args:
        model: the model section of the config.
        training_texts: returns the texts of the training split; called only for `char` and `train-bpe`.
        needs_padding: whether the task pads. If so, `char` gets a <pad> token, and `train-bpe` a <pad> and a <mask>
            token.

    Raises:
        ConfigError: no tokenizer is named, or the named one cannot be used.
        DataError: the hub does not answer, or there is no text to build one from.
    """
    tokenizer = _load(model, training_texts, needs_padding=needs_padding)
    add_tokens(tokenizer, model)
    return tokenizer


def _load(
    model: schema.Model, training_texts: Callable[[], Iterable[str]], *, needs_padding: bool
) -> PreTrainedTokenizerBase:
    if model.tokenizer == "char":
        return build_char_tokenizer(training_texts(), pad=needs_padding)
    if model.tokenizer == "train-bpe":
        return train_bpe_tokenizer(
            training_texts(), vocab_size=model.tokenizer_vocab_size, pad=needs_padding, like=bpe_class(model)
        )
    name = model.tokenizer or model.name_or_path
    if name is None:
        check_name_or_path(model)  # without a model, that is what is missing
        raise ConfigError(
            "model.tokenizer is not set, and a model without model.name_or_path has no tokenizer of its own. "
            "Set model.tokenizer to a name, a folder, a vocabulary file (.txt), char or train-bpe."
        )
    setting = "model.tokenizer" if model.tokenizer else "model.name_or_path"
    if name.endswith(".txt"):
        return _from_vocabulary(Path(name), setting=setting)
    return _from_name(name, model, setting=setting)


def new_tokens(model: schema.Model, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the numbers of the tokens that model.add_tokens and model.pad_token added to a tokenizer from elsewhere."""
    wanted = [*model.add_tokens, *([] if model.pad_token is None else [model.pad_token])]
    if not wanted or model.from_scratch or model.tokenizer in BUILT_TOKENIZERS:
        return frozenset()
    known = _load(model, list, needs_padding=False).get_vocab()
    return frozenset(tokenizer.get_vocab()[token] for token in wanted if token not in known)


def reload_tokenizer(folder: Path, model: schema.Model) -> PreTrainedTokenizerBase:
    """Loads a tokenizer that `save_pretrained` wrote into a local folder. Never contacts the hub."""
    with quiet():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code, local_files_only=True)


def _from_name(name: str, model: schema.Model, *, setting: str) -> PreTrainedTokenizerBase:
    local_only = check_reachable(
        name, file="config.json" if name == model.name_or_path else "tokenizer_config.json", setting=setting
    )
    check_tokenizer_files(name, local_only=local_only, setting=setting)
    missing = ConfigError(
        f"{setting}={name} has no tokenizer that can be loaded (tokenizer.json, vocab.txt, ...). Set model.tokenizer "
        "to a name, a folder, a vocabulary file (.txt) or char."
    )
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                name, trust_remote_code=model.trust_remote_code, local_files_only=local_only
            )
    except (*LOADING_ERRORS, AttributeError) as error:  # such as a list where a mapping belongs
        if "Couldn't instantiate the backend tokenizer" in str(error):
            raise missing from error
        raise explain(error, name=name, setting=setting) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):  # a class of several tokenizers
        raise missing
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        check_growth(backend, name, setting=setting)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # transformers 5 silently creates an empty tokenizer for a folder without a vocabulary.
        files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
        if not any(is_local(name, file) for file in files):
            raise missing
        log.info("Note: %s=%s: this tokenizer has only special tokens, so every word becomes unknown", setting, name)
    return tokenizer


def _from_vocabulary(path: Path, *, setting: str) -> PreTrainedTokenizerBase:
    """Returns a BERT tokenizer over a vocabulary file with one token per line. Lowercases, like BertTokenizerFast."""
    if not path.is_file():
        raise ConfigError(f"{setting}={path}: there is no such vocabulary file (relative to {Path.cwd()}).")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.start} cannot be read. Save the vocabulary as UTF-8."
        ) from error
    while lines and not lines[-1].strip():
        lines.pop()
    vocabulary = {line.rstrip("\r"): number for number, line in enumerate(lines)}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]", "[PAD]") if token not in vocabulary]
    if missing:
        raise ConfigError(
            f"{setting}={path} lacks {', '.join(missing)}: a BERT vocabulary has a line for each. Append them to the file "
            "(other tokens keep their numbers), or name a tokenizer folder."
        )
    capital = sum(token != token.lower() and not token.startswith("[") for token in vocabulary)
    if capital > len(vocabulary) / 20:
        log.info(
            "Note: %s=%s: %d of %d tokens have capital letters, which a lowercasing tokenizer never produces. "
            "For a cased model, name its tokenizer folder instead",
            *(setting, path, capital, len(vocabulary)),
        )
    # Pass the vocabulary itself: transformers 5 silently ignores `vocab_file=` and then has only five tokens.
    # Without [MASK] in the file, add none: its number would be past the end of an embedding that fits the file.
    return BertTokenizerFast(vocab=vocabulary, mask_token="[MASK]" if "[MASK]" in vocabulary else None)


def build_char_tokenizer(texts: Iterable[str], *, pad: bool = False) -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one token per character (Unicode code point, including line breaks), in code point order.

    The vocabulary is <unk>, then <pad> if requested, then only the characters of the texts, so that the loss of an
    untrained model is about ln(vocabulary). It is saved and reloaded like any Hugging Face tokenizer. Decoding returns
    the encoded text exactly, except for unknown characters.

    Raises:
        DataError: the texts have no characters.
    """
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise DataError("model.tokenizer=char is built from the training text, which contains no characters.")
    specials = [UNKNOWN, PAD] if pad else [UNKNOWN]
    vocabulary = {token: number for number, token in enumerate([*specials, *sorted(characters)])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    # "." would not match line breaks.
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    # split_special_tokens: "<unk>" in a text is five characters, not a token.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNKNOWN,
        pad_token=PAD if pad else None,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def train_bpe_tokenizer(
    texts: Iterable[str], *, vocab_size: int, pad: bool = False, like: type | None = None
) -> PreTrainedTokenizerBase:
    """Trains byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; over bytes as in GPT-2).

    The same texts give the same tokenizer. The vocabulary is <|endoftext|>, then <pad> and <mask> if requested, the 256
    bytes, and merges up to `vocab_size` tokens, or fewer if the text has too few repetitions. No text is unknown, and
    decoding returns the encoded text exactly, unless `like` normalizes texts.

    Args:
        like: a tokenizer class whose normalizer and pre-tokenizer are used; see `bpe_class`. None: those of GPT-2.

    Raises:
        DataError: the texts have no characters.
    """
    texts = [text for text in texts if text]
    if not texts:
        raise DataError("model.tokenizer=train-bpe is trained on the training text, which contains no characters.")
    backend = Tokenizer(BPE())
    if like is None:
        backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    else:
        template: Tokenizer = like().backend_tokenizer
        backend.normalizer, backend.pre_tokenizer = template.normalizer, template.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    # lstrip: <mask> replaces a word, so it includes the blank before it as the word's first token does.
    mask = AddedToken(MASK, lstrip=True, normalized=False, special=True)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD, mask] if pad else [END],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # split_special_tokens: "<mask>" in a text is six characters, not a token.
    options: dict[str, Any] = {
        "bos_token": END,
        "eos_token": END,
        "unk_token": None,
        "pad_token": PAD if pad else None,
        "mask_token": mask if pad else None,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    if like is None:
        return PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    learned = json.loads(backend.to_str())["model"]
    tokenizer: PreTrainedTokenizerBase = like(
        vocab=learned["vocab"], merges=[tuple(merge) for merge in learned["merges"]], **options
    )
    return tokenizer


def bpe_class(model: schema.Model) -> type | None:
    """Returns the class that a `train-bpe` tokenizer needs so that it reloads from the model's folder as the same one.

    None: the general class does. For some model types transformers loads its own class, whatever was saved, and that class
    splits words in its own way.
    """
    if model.factory is not None or (model.name_or_path is None and "model_type" not in model.config):
        return None
    kind = model.config.get("model_type")
    return _bpe_class_of(str(kind or read_config(model, check_name_or_path(model)).model_type))


@cache
def _bpe_class_of(model_type: str) -> type | None:
    general = train_bpe_tokenizer([" it's 12 \n\n"], vocab_size=260)
    with TemporaryDirectory() as place, quiet():
        (Path(place) / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        if save_tokenizer(general, Path(place)) is None:
            return None
        try:
            loaded = type(AutoTokenizer.from_pretrained(place, local_files_only=True))
        except LOADING_ERRORS:
            return None
    return loaded if getattr(loaded, "model", None) is BPE else None


def has_characters_only(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether each token is one character of the text, so that the loss per token is a loss per character."""
    special = set(tokenizer.all_special_tokens)
    words = [token for token in tokenizer.get_vocab() if token not in special]
    # A byte-level vocabulary may have only single letters and still need several tokens for one character.
    sample = "a\u00e9\u4e2d\n"
    ids = tokenizer(sample, add_special_tokens=False)["input_ids"]
    return all(len(word) == 1 for word in words) and len(ids) == len(sample)

"""A pytorch_model.bin that holds something else than weights is named, and its code does not run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dtrain.config import schema
from dtrain.errors import CheckpointError
from dtrain.models.load import load_model
from dtrain.tasks.causal_lm import HEAD

CONFIG = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=20, bos_token_id=0, eos_token_id=0)


class Malicious:
    """Its pickle runs a command when it is loaded."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def old_format_without_its_end(file: Path) -> None:
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:-50])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda file: torch.save({"x": Malicious(f"touch {file.parent}/ran")}, file),
            r"would run code \(posix.system\)",
        ),
        (lambda file: file.write_bytes(pickle.dumps(Malicious(f"touch {file.parent}/ran"))), "damaged|would run code"),
        (half, "is damaged"),
        (old_format_without_its_end, "is damaged"),
        (lambda file: file.write_bytes(b""), "is empty"),
        (lambda file: file.write_bytes(b"<html>not found</html>" * 9), "is damaged or no file of weights"),
        (lambda file: torch.save([1, 2], file), "holds no weights"),
        (lambda file: torch.save({"a": 3}, file), "holds no weights"),
    ],
    ids=["malicious", "malicious pickle", "half", "old format", "empty", "web page", "list", "numbers"],
)
def test_a_bin_file_without_weights_is_a_checkpoint_error(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    CONFIG.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(GPT2LMHeadModel(CONFIG).state_dict(), file)
    damage(file)

    with pytest.raises(CheckpointError, match=rf"pytorch_model.bin .*({message})"):
        load_model(schema.Model(name_or_path=str(tmp_path)), head=HEAD, head_config={}, tokenizer=None, seed=0)
    assert not (tmp_path / "ran").exists()


def test_a_sound_bin_file_is_loaded(tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path)
    saved = GPT2LMHeadModel(CONFIG).state_dict()
    torch.save(saved, tmp_path / "pytorch_model.bin")

    loaded = load_model(schema.Model(name_or_path=str(tmp_path)), head=HEAD, head_config={}, tokenizer=None, seed=0)

    assert torch.equal(loaded.state_dict()["transformer.wte.weight"], saved["transformer.wte.weight"])

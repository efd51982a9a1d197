"""Trains a chat model from a vocabulary file and dialogues, and gets replies, with the command line only."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from tests.support import jobs

pytestmark = pytest.mark.commands

CHARACTERS = [chr(0x4E00 + number) for number in range(20)]


@pytest.mark.slow
def test_a_trained_chat_model_replies_to_a_pipe_and_to_a_file(tmp_path: Path) -> None:
    rng = random.Random(0)
    lines = ["\t".join(" ".join(rng.choices(CHARACTERS, k=4)) for _ in range(2)) for _ in range(40)]
    (tmp_path / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "vocab.txt").write_text("\n".join(["[CLS]", "[PAD]", "[SEP]", "[UNK]", *CHARACTERS]), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text(f"{CHARACTERS[0]}\n{lines[0]}\t{CHARACTERS[1]}\n", encoding="utf-8")
    config = ["--config", "configs/chat_zh.yaml", f"run.output_dir={tmp_path / 'runs'}"]
    trained = [*config, f"model.name_or_path={tmp_path / 'runs' / 'chat_zh' / 'model'}", "generate.max_new_tokens=8"]

    def dtrain(*arguments: str, stdin: str = "") -> str:
        command = [*jobs.python(), *arguments]
        ended = subprocess.run(command, cwd=jobs.ROOT, input=stdin.encode(), capture_output=True, timeout=jobs.LIMIT_S)
        assert ended.returncode == 0, ended.stdout.decode() + ended.stderr.decode()
        return ended.stdout.decode()

    dtrain(
        *config,
        f"data.path={tmp_path / 'train.txt'}",
        "data.splits={}",
        "data.validation_fraction=0.2",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"model.tokenizer={tmp_path / 'vocab.txt'}",
        "model.config={model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 32}",
        "data.max_length=32",
        "train.max_steps=4",
        "tracking.tensorboard=false",
    )
    piped = dtrain("chat", *trained, stdin=f"{CHARACTERS[0]}\n/reset\n{CHARACTERS[2]}\n").splitlines()
    dtrain("chat", *trained, f"talk.input={tmp_path / 'prompts.txt'}")

    replies = tmp_path / "runs" / "chat_zh-chat" / "predictions" / "replies.jsonl"
    found = [json.loads(line)["prediction"] for line in replies.read_text(encoding="utf-8").splitlines()]
    assert piped == [found[0], "(history cleared)", piped[2]]  # The same first message gets the same first reply.
    assert len(found) == 2
    assert " " not in "".join(found)
    summary = jobs.summary_of(tmp_path / "runs" / "chat_zh")
    assert {"loss", "perplexity", "accuracy"} == set(summary["eval"])
    assert jobs.exit_of(tmp_path / "runs" / "chat_zh-chat")["code"] == 0

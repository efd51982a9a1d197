"""The chat command: history, reset, dropped turns, files of dialogues, and stop tokens."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PretrainedConfig

from dtrain.commands import continuation
from dtrain.commands.chat import Reply, converse, load_chat_model, run_chat
from dtrain.commands.continuation import continue_tokens
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.heartbeat import Heartbeat
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError, DataError
from dtrain.models.chat_template import ChatMessage
from tests.support import tiny
from tests.support.contexts import placed
from tests.support.tiny_chat import CLS, HAO, NI, SEP, gpt, tokenizer


class Echo:
    """Repeats the last message, and records the messages that it got."""

    def __init__(self, drops_from: int = 99) -> None:
        self.received: list[list[str]] = []
        self.numbers: list[int] = []
        self.drops_from = drops_from

    def __call__(self, messages: Sequence[ChatMessage], number: int) -> Reply:
        self.received.append([message["content"] for message in messages])
        self.numbers.append(number)
        return Reply(f"<{messages[-1]['content']}>", max(0, len(messages) - self.drops_from))


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="dtrain")
    return caplog


def test_each_line_is_answered_with_the_history(logged: pytest.LogCaptureFixture) -> None:
    echo = Echo()

    converse(echo, iter(["a\n", " b \n", "c"]), system=None)

    assert echo.received == [["a"], ["a", "<a>", "b"], ["a", "<a>", "b", "<b>", "c"]]
    assert logged.messages == ["<a>", "<b>", "<c>"]
    assert echo.numbers == [0, 1, 2]


def test_reset_keeps_the_system_message_and_an_empty_line_ends_the_conversation() -> None:
    echo = Echo()

    converse(echo, iter(["a\n", "/reset\n", "b\n", "\n", "never\n"]), system="s")

    assert echo.received == [["s", "a"], ["s", "b"]]
    assert echo.numbers == [0, 1]  # So the same text gets a different reply the second time.


def test_dropped_turns_are_reported(logged: pytest.LogCaptureFixture) -> None:
    converse(Echo(drops_from=3), iter(["a", "b", "c"]), system=None)

    assert logged.messages == ["<a>", "<b>", "(the first 2 turns no longer fit into the model's context)", "<c>"]


# With a model


class Always(torch.nn.Module):
    """A language model that returns the tokens of a list one after the other."""

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__()
        self.tokens = list(tokens)
        self.config: Any = PretrainedConfig(max_position_embeddings=64, eos_token_id=7)
        self.begin: int | None = None

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        length = input_ids.shape[1]
        self.begin = length if self.begin is None else self.begin
        logits = torch.full((1, length, 10), -10.0)
        logits[0, -1, self.tokens[length - self.begin]] = 10.0
        return type("Output", (), {"logits": logits})()


def config(folder: Path, **sections: Any) -> Config:
    return Config.model_validate(
        {
            "task": {"name": "chat"},
            "run": {"name": "talk", "output_dir": str(folder / "runs")},
            "model": {"name_or_path": str(folder / "model")},
            "generate": {"max_new_tokens": 4},
            **sections,
        }
    )


def test_a_continuation_ends_at_a_stop_token_or_at_the_models_end_token(tmp_path: Path) -> None:
    ids, settings = torch.tensor([1, 2]), config(tmp_path, generate={"max_new_tokens": 4, "temperature": 0})

    assert continue_tokens(Always([5, 3, 7, 6]), ids, settings, stops={3}).tolist() == [1, 2, 5, 3]
    assert continue_tokens(Always([5, 3, 7, 6]), ids, settings).tolist() == [1, 2, 5, 3, 7]
    assert continue_tokens(Always([5, 3, 7, 6]), ids, settings, stops=()).tolist() == [1, 2, 5, 3, 7, 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    gpt(positions=12).save_pretrained(path / "model")
    tokenizer().save_pretrained(path / "model")
    return path


def test_the_prompt_is_encoded_as_in_training_and_fits_the_positions(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[list[int]] = []

    def fake_continue(
        _model: Any, ids: torch.Tensor, _config: Any, *, stops: frozenset[int], heartbeat: Heartbeat
    ) -> torch.Tensor:
        assert (stops, heartbeat) == ({SEP}, ONE_PROCESS.heartbeat)
        received.append(ids.tolist())
        return torch.tensor([*ids.tolist(), NI, HAO, SEP])

    monkeypatch.setattr(continuation, "continue_tokens", fake_continue)
    model = load_chat_model(config(folder), ONE_PROCESS)
    history = [{"role": role, "content": "\u4f60 \u597d"} for role in ("user", "assistant", "user")]

    assert model(history[:1], 0) == Reply("\u4f60\u597d", 0)
    assert model(history, 1) == Reply("\u4f60\u597d", 2)
    # 12 positions minus 4 for the reply are 8. The full history would need 10.
    assert received == [[CLS, NI, HAO, SEP], [CLS, NI, HAO, SEP]]


def replies(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_replies_to_a_file_are_the_same_in_a_run_folder_and_in_an_output_file(folder: Path) -> None:
    prompts = folder / "prompts.txt"
    prompts.write_text("\u4f60 \u597d\n\na\tb\t\u4f60\n", encoding="utf-8")

    run_chat(config(folder, talk={"input": str(prompts)}), ONE_PROCESS)
    run_chat(config(folder, talk={"input": str(prompts), "output": str(folder / "out.jsonl")}), ONE_PROCESS)

    found = replies(folder / "runs" / "talk" / "predictions" / "replies.jsonl")
    assert [(row["example_index"], row["line"]) for row in found] == [(0, 1), (1, 3)]
    assert [message["role"] for message in found[1]["messages"]] == ["user", "assistant", "user"]
    assert all(isinstance(row["prediction"], str) for row in found)
    assert replies(folder / "out.jsonl") == found
    summary = json.loads((folder / "runs" / "talk" / "summary.json").read_text())
    assert (summary["command"], summary["examples"]) == ("chat", 2)


def test_input_may_be_a_pipe_and_invalid_bytes_do_not_stop_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
) -> None:
    pipe = io.TextIOWrapper(io.BytesIO("\u4f60\n".encode() + b"\xff\xfe\n"), encoding="ascii")
    monkeypatch.setattr("sys.stdin", pipe)

    run_chat(config(folder), ONE_PROCESS)

    assert len(logged.messages) == 2
    assert not (folder / "runs" / "talk-none").exists()


def test_invalid_uses_of_chat_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n\n")

    with pytest.raises(ConfigError, match=r"chat needs a chat model \(task.name=chat\), not task.name=classification"):
        run_chat(config(folder, task={"name": "classification"}), ONE_PROCESS)
    with pytest.raises(DataError, match=r"none\.txt has no dialogue to answer"):
        run_chat(config(folder, talk={"input": str(tmp_path / "none.txt")}), ONE_PROCESS)
    with pytest.raises(DataError, match=r"missing\.txt cannot be read"):
        run_chat(config(folder, talk={"input": str(tmp_path / "missing.txt")}), ONE_PROCESS)
    with pytest.raises(ConfigError, match="chat runs as one process, not 2: start it with python"):
        run_chat(config(folder), placed(ONE_PROCESS, world_size=2))
    tiny.tokenizer().save_pretrained(tmp_path / "words")
    with pytest.raises(ConfigError, match="The tokenizer has tokens up to number 24"):
        run_chat(
            config(folder, model={"name_or_path": str(folder / "model"), "tokenizer": str(tmp_path / "words")}),
            ONE_PROCESS,
        )
    with pytest.raises(ValidationError, match=r"talk\.output is the file for the replies to talk.input"):
        config(folder, talk={"output": "a.jsonl"})

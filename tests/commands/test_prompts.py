"""predict for causal_lm, masked_lm and chat: one text, files of prompts, and refused prompts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.commands.chat import run_chat
from dtrain.commands.fill import MaskFiller
from dtrain.commands.generate import run_generate
from dtrain.commands.predict import run_predict
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError, DataError, DtrainError
from dtrain.models.tokenizer import build_char_tokenizer, train_bpe_tokenizer
from tests.support import tiny, tiny_chat
from tests.support.tiny_lm import bert, gpt

SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "temperature": 2.0}


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="dtrain")
    return caplog


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model for each task, by its name."""
    folder = tmp_path_factory.mktemp("models")
    characters = build_char_tokenizer(["abcdefghi "])
    trained = train_bpe_tokenizer(["the cat sleeps, the dog sleeps"] * 3, vocab_size=280, pad=True)
    strict = tiny_chat.tokenizer()
    strict.chat_template = (
        "{% for m in messages %}{% if m.content == 'b' %}{{ raise_exception('no b') }}{% endif %}{{ m.content }}"
        "{% endfor %}"
    )
    for name, model, tokenizer in (
        ("strict", tiny_chat.gpt(positions=16), strict),
        ("causal_lm", gpt(positions=16, vocabulary=len(characters)), characters),
        ("masked_lm", bert(tiny.tokenizer()), tiny.tokenizer()),
        ("trained", bert(trained), trained),
        ("chat", tiny_chat.gpt(positions=16), tiny_chat.tokenizer()),
        ("unmasked", bert(tiny_chat.tokenizer()), tiny_chat.tokenizer()),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def config(path: Path, folder: Path, task: str | None = None, **sections: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "predicted", "output_dir": str(folder)},
            "task": {"name": task or path.name},
            "model": {"name_or_path": str(path)},
            "generate": SETTINGS,
            **sections,
        }
    )


def answer_to(model: Path, folder: Path, logged: pytest.LogCaptureFixture, text: str, **more: Any) -> str:
    logged.clear()
    run_predict(config(model, folder, predict={"text": text}, **more), ONE_PROCESS)
    (line,) = logged.messages
    assert list(folder.iterdir()) == []
    return line


def written(model: Path, folder: Path, file: Path, **more: Any) -> list[dict[str, Any]]:
    run_predict(config(model, folder, predict={"file": file}, **more), ONE_PROCESS)
    summary = json.loads((folder / "predicted" / "summary.json").read_text())
    lines = (folder / "predicted" / "predictions" / "test.jsonl").read_text().splitlines()
    assert (summary["command"], summary["eval"], summary["examples"]) == ("predict", {}, len(lines))
    return [json.loads(line) for line in lines]


# A text


def test_a_text_is_continued_as_generate_does(models: Path, tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    text = answer_to(models / "causal_lm", tmp_path, logged, "ab c")

    asked = {**SETTINGS, "prompt": "ab c"}
    assert text == run_generate(config(models / "causal_lm", tmp_path, generate=asked), ONE_PROCESS)
    assert text.startswith("ab c")
    assert len(text) == 4 + SETTINGS["max_new_tokens"]
    assert answer_to(models / "causal_lm", tmp_path, logged, '{"text": "ab c"}') == text


def test_a_turn_is_answered_as_chat_does(models: Path, tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    reply = answer_to(models / "chat", tmp_path, logged, "\u4f60 \u597d")

    (tmp_path / "in.txt").write_text("\u4f60 \u597d\n", encoding="utf-8")
    talk = {"input": tmp_path / "in.txt", "output": tmp_path / "out.jsonl"}
    run_chat(config(models / "chat", tmp_path, talk=talk), ONE_PROCESS)
    assert reply == json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["prediction"]
    for file in tmp_path.iterdir():
        file.unlink()
    as_json = '{"messages": [{"role": "user", "content": "\u4f60 \u597d"}]}'
    assert answer_to(models / "chat", tmp_path, logged, as_json) == reply


def test_each_mask_has_its_five_most_likely_tokens_and_the_text_is_filled(
    models: Path, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForMaskedLM

    lines = answer_to(models / "masked_lm", tmp_path, logged, "the [MASK] sees [MASK] dog").splitlines()

    tokenizer, model = tiny.tokenizer(), AutoModelForMaskedLM.from_pretrained(models / "masked_lm")
    inputs = tokenizer("the [MASK] sees [MASK] dog", return_tensors="pt")
    with torch.no_grad():
        likely = model(**inputs).logits[0, [2, 4]].softmax(dim=-1).topk(5)
    expected, best = [], []
    for mask, (tokens, values) in enumerate(zip(likely.indices.tolist(), likely.values.tolist(), strict=True), start=1):
        words = tokenizer.convert_ids_to_tokens(tokens)
        best.append(words[0])
        pairs = zip(words, values, strict=True)
        expected.append(f"[MASK] {mask}: " + ", ".join(f"{word} {value:.4f}" for word, value in pairs))
    assert lines[1:] == expected
    assert lines[0] == f"the {best[0]} sees {best[1]} dog"
    # Otherwise the test could not tell the masks apart.
    assert expected[0].partition(":")[2] != expected[1].partition(":")[2]


def test_the_mask_token_of_a_trained_tokenizer_is_not_plain_text(models: Path, tmp_path: Path) -> None:
    filler = MaskFiller(config(models / "trained", tmp_path, "masked_lm"), ONE_PROCESS)

    filled = filler.fill("the <mask> sleeps")

    assert len(filled.masks) == 1
    assert filled.text.startswith("the")
    assert filled.text.endswith("sleeps")
    assert "<mask>" not in filled.text


# Files


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.txt", "ab c\n\nhi\r\n", [1, 3]),
        ("a.jsonl", '{"text": "ab c"}\n\n{"text": "hi"}\n', [1, 3]),
        ("a.csv", "n,text\n1,ab c\n2,hi\n", [2, 3]),
        ("a.json", '[{"text": "ab c"}, {"text": "hi"}]', [1, 2]),
    ],
)
def test_each_prompt_of_a_file_is_continued_with_its_number_in_the_seed(
    models: Path, tmp_path: Path, logged: pytest.LogCaptureFixture, name: str, content: str, lines: list[int]
) -> None:
    first, second = (answer_to(models / "causal_lm", tmp_path, logged, text) for text in ("ab c", "hi"))
    (tmp_path / name).write_text(content)

    found = written(models / "causal_lm", tmp_path, tmp_path / name)

    assert [(one["example_index"], one["line"], one["text"]) for one in found] == [
        (0, lines[0], "ab c"),
        (1, lines[1], "hi"),
    ]
    assert found[0]["text"] + found[0]["prediction"] == first
    assert found[1]["text"] + found[1]["prediction"] != second  # Another number gives another text.


def test_the_prompt_column_may_have_any_name(models: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("start;n\nab;1\n")

    found = written(
        models / "causal_lm", tmp_path, tmp_path / "a.csv", data={"columns": {"text": "start"}, "delimiter": ";"}
    )

    assert found[0]["text"] == "ab"


def test_the_masks_of_a_file_are_filled_line_by_line(
    models: Path, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    alone = answer_to(models / "masked_lm", tmp_path, logged, "the [MASK] sees")
    (tmp_path / "a.txt").write_text("a [MASK] [MASK]\nthe [MASK] sees\n")

    found = written(models / "masked_lm", tmp_path, tmp_path / "a.txt")

    assert [len(one["masks"]) for one in found] == [2, 1]
    assert found[1]["prediction"] == alone.splitlines()[0]
    assert [len(found[1]["masks"][0]), set(found[1]["masks"][0][0])] == [5, {"token", "probability"}]


def test_a_file_of_dialogues_is_answered_as_chat_does(models: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("\u4f60\n\u597d\ta\tb\n", encoding="utf-8")
    talk = {"input": tmp_path / "in.txt", "output": tmp_path / "out.jsonl", "system": "a"}

    found = written(models / "chat", tmp_path, tmp_path / "in.txt", talk=talk)

    run_chat(config(models / "chat", tmp_path, talk=talk), ONE_PROCESS)
    assert found == [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(found) == 2


# Refusals


@pytest.mark.parametrize(
    ("model", "text", "kind", "message"),
    [
        ("masked_lm", "the cat", DataError, r"^predict\.text has no \[MASK\]: put this tokenizer's mask token where"),
        ("masked_lm", "the [MASK]" + " cat" * 20, DataError,
         r"^predict\.text: the text has 24 tokens, but the model takes at most 12"),
        ("masked_lm", '{"foo": "the [MASK]"}', DataError, r"^predict\.text has no column with a usual name for text"),
        ("causal_lm", '{"text": ""}', DataError, r"^predict\.text: the text is empty for this tokenizer"),
        ("causal_lm", '{"text": 3}', DataError, r"^predict\.text: text must be text, found 3"),
        ("causal_lm", "{ab", ConfigError, "predict.text starts with { and is therefore read as JSON"),
        ("chat", " ", DataError, r"^predict\.text, turn 1: an empty turn"),
        ("chat", '{"messages": [{"role": "assistant", "content": "a"}]}', DataError,
         r"^predict\.text: the last turn is the assistant's"),
    ],
)  # fmt: skip
def test_a_text_that_cannot_be_answered_is_refused(
    models: Path, tmp_path: Path, model: str, text: str, kind: type[DtrainError], message: str
) -> None:
    with pytest.raises(kind, match=message) as raised:
        run_predict(config(models / model, tmp_path, predict={"text": text}), ONE_PROCESS)

    assert "dtrain-predict-" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "name", "content", "message"),
    [
        ("causal_lm", "a.txt", None, r"predict\.file=.*a\.txt: there is no such file \(working folder: "),
        ("causal_lm", "a.txt", "\n\n", r"a\.txt has no prompt: each line of text is one prompt"),
        ("causal_lm", "a.jsonl", "\n\n", r"a\.jsonl has no rows"),
        ("causal_lm", "a.jsonl", '{"text": "a"}\n{"text": ""}\n', r"a\.jsonl, line 2: the text is empty for this"),
        ("causal_lm", "a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("causal_lm", "a.csv", "foo\na\n", r"a\.csv has no column with a usual name for text"),
        ("causal_lm", "a.xlsx", "a", r"a\.xlsx: \.xlsx is not a supported format"),
        ("masked_lm", "a.txt", "the [MASK]\nthe\n", r"a\.txt, line 2 has no \[MASK\]"),
        ("masked_lm", "a.json", '[{"text": "a"}]', r"a\.json, row 1 has no \[MASK\]"),
        ("chat", "a.txt", "\n", r"a\.txt has no prompt"),
    ],
)
def test_a_file_with_an_invalid_prompt_is_refused_before_any_prompt_is_answered(
    models: Path, tmp_path: Path, model: str, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)

    with pytest.raises(DataError, match=message):
        run_predict(config(models / model, tmp_path, predict={"file": tmp_path / name}), ONE_PROCESS)

    assert not (tmp_path / "predicted" / "predictions").exists()


def test_a_dialogue_that_the_chat_template_refuses_is_named_before_any_prompt_is_answered(
    models: Path, tmp_path: Path
) -> None:
    (tmp_path / "in.txt").write_text("a\nb\n")
    asked = {"predict": {"file": tmp_path / "in.txt"}, "talk": {"input": tmp_path / "in.txt"}}
    settings = config(models / "strict", tmp_path, "chat", **asked)

    for command in (run_predict, run_chat):
        with pytest.raises(DataError, match=r"in\.txt, line 2: the tokenizer's chat template rejects .*: no b"):
            command(settings, ONE_PROCESS)

    assert not list(tmp_path.rglob("*.jsonl"))
    with pytest.raises(DataError, match=r"^predict\.text: the tokenizer's chat template rejects"):
        run_predict(config(models / "strict", tmp_path, "chat", predict={"text": "b"}), ONE_PROCESS)


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm", "chat"])
def test_a_prompt_is_required(models: Path, tmp_path: Path, task: str) -> None:
    with pytest.raises(ConfigError, match=f"task.name={task}: the rows of a split have no answers"):
        run_predict(config(models / task, tmp_path), ONE_PROCESS)


def test_a_tokenizer_without_a_mask_token_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a tokenizer with a mask token, and this one has none"):
        run_predict(config(models / "unmasked", tmp_path, "masked_lm", predict={"text": "a [MASK]"}), ONE_PROCESS)


@pytest.mark.parametrize(
    ("task", "kind"), [("causal_lm", "a language model"), ("masked_lm", "a masked language model")]
)
def test_a_model_that_is_not_from_transformers_is_refused(models: Path, tmp_path: Path, task: str, kind: str) -> None:
    model = {"name_or_path": str(models / task), "head": {"pooling": "mean"}}

    with pytest.raises(ConfigError, match=f"predict needs {kind} of transformers, not model.factory or model.head"):
        run_predict(config(models / task, tmp_path, model=model, predict={"text": "a"}), ONE_PROCESS)

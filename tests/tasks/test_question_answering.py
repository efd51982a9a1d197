"""Question answering: windows and what is labelled in them, sums by hand, the best span, SQuAD's files and judgement."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from dtrain.config.schema import Config, Data
from dtrain.config.task import QuestionAnswering
from dtrain.data.questions import questions
from dtrain.data.sources import Source, load_sources
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.answers import best_spans, exact_match, f1, squad2_scores, squad_scores
from dtrain.tasks.protocol import Targets
from dtrain.tasks.question_answering import (
    QuestionAnsweringTask,
    encode_windows,
    prepare_question_answering,
    report_lost_answers,
    token_positions,
)
from tests.support import tiny
from tests.support.tiny import Table

CONTEXT = "the cat sees a dog near the old bird"  # 9 tokens; "a dog" is characters 13 to 18


def encoded(
    contexts: Sequence[str] = (CONTEXT,), answers: Sequence[tuple[str, int] | None] = (("a dog", 13),), **options: int
) -> dict[str, Any]:
    """Rows of the task: the question is "cat", so that 9 tokens leave 5 to the context."""
    rows = {
        "question": ["cat"] * len(contexts),
        "context": list(contexts),
        "id": [None] * len(contexts),
        "answers": [None if answer is None else [answer[0]] for answer in answers],
        "answer_starts": [None if answer is None else [answer[1]] for answer in answers],
    }
    places = [f"train.json, row {number + 1}" for number in range(len(contexts))]
    return encode_windows(rows, tiny.tokenizer(), places, **{"max_length": 9, "doc_stride": 2, **options})


def task(rows: Mapping[str, Any] | None = None, **settings: Any) -> QuestionAnsweringTask:
    table = Table(dict(rows or encoded()))
    options = QuestionAnswering(name="question_answering", **settings)
    return QuestionAnsweringTask({"train": table, "validation": table}, tiny.tokenizer(), options, max_length=9)


def batch(rows: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
    return task().collate(rows or encoded(), tiny.HERE)


class Says(nn.Module):
    """Answers with these logits, (windows, length) each, and takes nothing but what a model takes."""

    def __init__(self, start: torch.Tensor, end: torch.Tensor) -> None:
        super().__init__()
        self.start, self.end = start, end

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> Any:
        return SimpleNamespace(start_logits=self.start, end_logits=self.end)


def unpadded(logits: torch.Tensor, made: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Those logits with no chance for padding."""
    return logits.masked_fill(made["attention_mask"] == 0, -1e30)


def logits(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nll(row: torch.Tensor, label: int) -> float:
    return math.log(sum(math.exp(value) for value in row.tolist())) - float(row[label])


# Windows


def test_a_long_context_becomes_windows_that_share_doc_stride_tokens() -> None:
    rows = encoded()

    words = {word: 5 + number for number, word in enumerate(tiny.WORDS)}
    context = [words[word] for word in CONTEXT.split()]
    head = [2, words["cat"], 3]
    assert rows["input_ids"] == [[[*head, *context[:5], 3], [*head, *context[3:8], 3], [*head, *context[6:], 3]]]
    assert rows["offset_starts"][0][0] == [-1, -1, -1, 0, 4, 8, 13, 15, -1]
    assert rows["offset_ends"][0][0] == [-1, -1, -1, 3, 7, 12, 14, 18, -1]
    assert rows["token_type_ids"][0][2] == [0, 0, 0, 1, 1, 1, 1]


def test_each_window_is_labeled_with_the_answer_or_the_first_token() -> None:
    rows = encoded()

    # "a dog": tokens 6 and 7 of the first window, 3 and 4 of the second, not in the third.
    assert rows["start_positions"] == [[6, 3, 0]]
    assert rows["end_positions"] == [[7, 4, 0]]


def test_an_answer_cut_by_every_window_is_in_no_window() -> None:
    rows = encoded(answers=[("cat sees a dog near the", 4)])

    assert rows["start_positions"] == [[0, 0, 0]]
    assert rows["end_positions"] == [[0, 0, 0]]


def test_answers_that_no_window_holds_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    cut, whole = ("cat sees a dog near the", 4), ("a dog", 13)

    report_lost_answers("train", Table(encoded([CONTEXT] * 3, [cut, whole, None])), max_length=9)
    report_lost_answers("validation", Table(encoded([CONTEXT] * 2, [whole, None])), max_length=9)

    (message,) = caplog.messages
    assert "train: 1 of 3 questions have an answer that no window of data.max_length=9 tokens holds" in message


def test_windows_are_labeled_by_the_first_answer_or_not_at_all() -> None:
    rows = encoded([CONTEXT, "a dog"], [None, ("dog", 2)])

    assert rows["start_positions"] == [[None, None, None], [4]]
    assert rows["answers"] == [None, ["dog"]]


@pytest.mark.parametrize(
    ("begin", "stop", "expected"),
    [
        (4, 7, (2, 2)),
        (5, 6, (2, 2)),  # within a token
        (3, 7, (2, 2)),  # the blank before a token is none of the token before it
        (4, 12, (2, 4)),  # a character of two tokens (an emoji in bytes) takes both
        (10, 12, (3, 4)),
        (0, 12, (1, 4)),
        (3, 4, (0, 0)),  # nothing but a blank
        (0, 13, (0, 0)),  # goes on behind the window
    ],
)
def test_positions_are_the_tokens_that_share_a_character_with_the_answer(
    begin: int, stop: int, expected: tuple[int, int]
) -> None:
    offsets = [(-1, -1), (0, 3), (4, 7), (10, 12), (10, 12), (-1, -1)]

    assert token_positions(offsets, begin, stop) == expected


def test_a_window_that_starts_within_the_answer_does_not_contain_it() -> None:
    assert token_positions([(-1, -1), (4, 7), (8, 9)], 2, 7) == (0, 0)
    assert token_positions([(-1, -1), (-1, -1)], 0, 1) == (0, 0)


def test_a_question_that_leaves_no_room_for_the_context_is_named() -> None:
    with pytest.raises(DataError, match=r"train.json, row 1: the question has 1 tokens, expected at most 0: data.max"):
        encoded(max_length=6)

    assert len(encoded(max_length=7)["input_ids"][0]) == 7


# Batches and sums


def test_a_batch_has_all_windows_and_their_examples() -> None:
    made = batch(encoded(["a dog", CONTEXT, "the cat"], [("dog", 2), ("a dog", 13), None]))

    assert made["input_ids"].shape == made["attention_mask"].shape == (5, 9)
    assert made["offsets"].shape == (5, 9, 2)
    assert made["example"].tolist() == [0, 1, 1, 1, 2]
    assert made["start_positions"].tolist() == [4, 6, 3, 0, -100]
    assert made["offsets"][0, :7].tolist() == [[-1, -1]] * 3 + [[0, 1], [2, 5], [-1, -1], [-1, -1]]
    assert task().targets(made) == Targets(4.0, 4)


def test_padding_is_on_the_right() -> None:
    left = task()
    left.tokenizer.padding_side = "left"

    made = left.collate(encoded(["a dog", CONTEXT], [("dog", 2), ("a dog", 13)]), tiny.HERE)

    assert made["input_ids"][0, :2].tolist() == [2, 7]
    assert made["attention_mask"][0].tolist() == [1] * 6 + [0] * 3


def test_the_loss_is_summed_over_windows_half_for_the_start_and_half_for_the_end() -> None:
    made, start, end = batch(), logits(3, 9, seed=0), logits(3, 9, seed=1)

    loss = task().loss(Says(start, end), made)

    start, end = unpadded(start, made), unpadded(end, made)
    expected = sum(
        (nll(start[w], first) + nll(end[w], last)) / 2 for w, first, last in [(0, 6, 7), (1, 3, 4), (2, 0, 0)]
    )
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert task().targets(made) == Targets(3.0, 3)


def test_scores_are_per_question_not_per_window() -> None:
    rows = encoded(["a dog", CONTEXT, "the cat"], [("dog", 2), ("a dog", 13), None])
    start, end = logits(5, 9, seed=2), logits(5, 9, seed=3)

    made = batch(rows)
    scored = task().score(Says(start, end), made, lock_step=False)

    start, end = unpadded(start, made), unpadded(end, made)
    one = (nll(start[0], 4) + nll(end[0], 4)) / 2
    rest = sum((nll(start[w], a) + nll(end[w], b)) / 2 for w, a, b in [(1, 6, 7), (2, 3, 4), (3, 0, 0)])
    assert scored.loss.dtype == torch.float64
    assert scored.loss.tolist() == pytest.approx([one, rest, 0.0], rel=1e-6)
    assert scored.targets.tolist() == [1, 3, 0]
    assert scored.prediction is not None
    assert scored.prediction.shape == (3, 2)


def test_the_loss_of_a_question_does_not_depend_on_longer_windows_in_the_batch() -> None:
    alone, beside = (
        batch(encoded(["a dog"], [("dog", 2)])),
        batch(encoded(["a dog", CONTEXT], [("dog", 2), ("a dog", 13)])),
    )
    short, long = alone["input_ids"].shape[1], beside["input_ids"].shape[1]
    start, end = logits(4, long, seed=4), logits(4, long, seed=5)

    by_itself = task().score(Says(start[:1, :short], end[:1, :short]), alone, lock_step=False)
    in_company = task().score(Says(start, end), beside, lock_step=False)

    assert short < long
    assert float(in_company.loss[0]) == pytest.approx(float(by_itself.loss[0]), rel=1e-6)


def test_bf16_logits_are_summed_in_float32() -> None:
    start, end = logits(3, 9, seed=0).bfloat16(), logits(3, 9, seed=1).bfloat16()

    assert task().loss(Says(start, end), batch()).dtype == torch.float32


def test_a_head_without_a_start_and_an_end_for_each_token_is_refused() -> None:
    class Searches(nn.Module):
        def forward(self, **_inputs: torch.Tensor) -> Any:
            return SimpleNamespace(start_top_index=torch.zeros(1))

    with pytest.raises(ConfigError, match="Searches has no start and end logits for each token"):
        task().loss(Searches(), batch())


# The best span


def spans(start: list[list[float]], end: list[list[float]], windows: Sequence[int] = (1,), **limits: int) -> Any:
    """Tokens 1 to 4 of each window are the context, at characters 10 * token + window."""
    number = len(start)
    offsets = torch.tensor(
        [[[-1, -1], *([10 * token + w, 10 * token + w + 5] for token in range(1, 5)), [-1, -1]] for w in range(number)]
    )
    options = {"n_best": 20, "max_answer_length": 30, **limits}
    return best_spans(torch.tensor(start), torch.tensor(end), offsets, windows, **options).tolist()


def test_the_best_span_is_inside_the_context_and_does_not_end_before_it_starts() -> None:
    # Alone the best start is 3, the best end 1; the [CLS] and the last token are outside.
    assert spans([[9.0, 0, 1, 5, 0, 9]], [[9.0, 5, 1, 0, 2, 9]]) == [[30, 45]]


def test_an_answer_is_no_longer_than_allowed() -> None:
    start, end = [[0.0, 5, 0, 0, 0, 0]], [[0.0, 0, 0, 1, 5, 0]]

    assert spans(start, end) == [[10, 45]]
    assert spans(start, end, max_answer_length=3) == [[10, 35]]
    assert spans(start, end, max_answer_length=1) == [[10, 15]]


def test_the_best_window_of_a_question_wins_and_the_first_of_equal_ones() -> None:
    low, high = [0.0, 1, 0, 0, 0, 0], [0.0, 0, 3, 0, 0, 0]

    assert spans([low, high, low, low, low], [low, high, low, low, low], [3, 2]) == [[21, 26], [13, 18]]


def test_only_the_n_best_starts_and_ends_are_candidates() -> None:
    # The one best start is behind the one best end.
    assert spans([[0.0, 0, 0, 5, 0, 0]], [[0.0, 5, 0, 0, 0, 0]], n_best=1) == [[-1, -1]]
    offsets = torch.full((1, 3, 2), -1)
    found = best_spans(torch.ones(1, 3), torch.ones(1, 3), offsets, [1], n_best=20, max_answer_length=30)
    assert found.tolist() == [[-1, -1]]


def test_the_best_span_is_the_best_of_all_allowed_pairs() -> None:
    start, end = logits(4, 6, seed=4), logits(4, 6, seed=5)

    found = spans(start.tolist(), end.tolist(), [1, 3], max_answer_length=2)

    expected = []
    for windows in ([0], [1, 2, 3]):
        pairs = [(w, i, j) for w in windows for i in range(1, 5) for j in range(i, min(i + 2, 5))]
        w, i, j = max(pairs, key=lambda pair: float(start[pair[0], pair[1]] + end[pair[0], pair[2]]))
        expected.append([10 * i + w, 10 * j + w + 5])
    assert found == expected


def test_no_answer_is_predicted_where_the_first_token_beats_every_span_in_every_window() -> None:
    low, high, null = [0.0, 1, 0, 0, 0, 0], [0.0, 0, 3, 0, 0, 0], [2.0, 0, 0, 0, 0, 0]

    # A question of each kind: the span wins; token 0 wins; a window without the answer does not hide it in the other one.
    windows = [low, null, null, high]
    found = spans(windows, windows, [1, 1, 2], no_answer_threshold=0.0)

    assert found == [[10, 15], [-1, -1], [23, 28]]
    assert spans([null], [null], [1], no_answer_threshold=4.0) == [[10, 15]]  # 4 is not above 0 by more than 4
    assert spans([null], [null], [1], no_answer_threshold=3.9) == [[-1, -1]]
    assert spans([null], [null], [1]) == [[10, 15]]


# Judgement


@pytest.mark.parametrize(
    ("found", "answer", "exact", "overlap"),
    [
        ("the Cat.", "cat", 1.0, 1.0),
        ("a  black\tcat!", "Black cat", 1.0, 1.0),
        ("theatre", "atre", 0.0, 0.0),  # articles are words
        ("big black cat", "black cat", 0.0, 0.8),  # 2 of 3 words found, 2 of 2 wanted
        ("cat cat", "cat", 0.0, 2 / 3),  # a word counts as often as it occurs
        ("dog", "cat", 0.0, 0.0),
        ("", "cat", 0.0, 0.0),
        ("the", "a", 1.0, 0.0),  # as the script of SQuAD 1.1 has it
        ("\u00c9cole", "\u00e9cole", 1.0, 1.0),
        ("\u201ccat\u201d", "cat", 0.0, 0.0),  # ASCII punctuation only
    ],
)
def test_answers_are_compared_as_squad_does(found: str, answer: str, exact: float, overlap: float) -> None:
    assert exact_match(found, answer) == exact
    assert f1(found, answer) == pytest.approx(overlap, abs=1e-12)


def test_scores_are_percentages_of_the_best_fitting_answers() -> None:
    found = squad_scores(["big black cat", "dog"], [["cat", "black cat"], ["a dog"]])

    assert found == pytest.approx({"exact_match": 50.0, "f1": 100 * (0.8 + 1) / 2}, abs=1e-12)


def test_squad_2_counts_an_empty_prediction_as_right_where_there_is_no_answer() -> None:
    found = squad2_scores(["big black cat", "", "", "dog", "the"], [["black cat"], ["a dog"], [], [], ["a", "cat"]])

    # The last question: "a" has no word and does not count as an answer, so "cat" is the only one.
    assert found == pytest.approx(
        {
            "exact_match": 100 * 1 / 5,
            "f1": 100 * (0.8 + 1) / 5,
            "has_answer_exact_match": 0.0,
            "has_answer_f1": 100 * 0.8 / 3,
            "no_answer_exact_match": 50.0,
            "no_answer_f1": 50.0,
        },
        abs=1e-12,
    )


def test_figures_of_questions_that_do_not_occur_are_nan() -> None:
    found = squad2_scores(["cat"], [["cat"]])

    assert (found["f1"], found["has_answer_f1"]) == (100.0, 100.0)
    assert math.isnan(found["no_answer_f1"])


def test_predictions_are_spans_of_the_context_and_unlabeled_ones_are_not_in_the_metrics() -> None:
    made = task(encoded(["\u00e9\U0001f600 cat!", CONTEXT, "the"], [("cat", 3), ("a dog", 13), None]))

    assert made.records("validation", [[3, 6], [15, 18], [-1, -1]]) == [
        {"prediction": "cat", "reference": ["cat"]},
        {"prediction": "dog", "reference": ["a dog"]},
        {"prediction": "", "reference": None},
    ]
    assert made.metrics("validation", loss=0.0, predictions=[[3, 7], [8, 18], [0, 3]]) == pytest.approx(
        {"exact_match": 50.0, "f1": 100 * (1 + 2 / 3) / 2}, abs=1e-12
    )
    alone = task(encoded(["the"], [None]))
    assert alone.metrics("validation", loss=0.0, predictions=[[0, 3]]) == {}


# From files


def squad(*contexts: tuple[str, list[dict[str, Any]]]) -> str:
    paragraphs = [{"context": context, "qas": questions} for context, questions in contexts]
    return json.dumps(
        {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs[:1]}, {"paragraphs": paragraphs[1:]}]}
    )


def question(text: Any, start: Any, number: int = 0) -> dict[str, Any]:
    return {"id": f"q{number}", "question": "what", "answers": [{"text": text, "answer_start": start}]}


def write(folder: Path, **splits: str) -> Path:
    for split, text in splits.items():
        (folder / f"{split}.json").write_text(text, encoding="utf-8")
    return folder


def load(folder: Path, **data: Any) -> dict[str, Source]:
    return load_sources(Data.model_validate({"path": str(folder), **data}), questions(allows_none=False))


def test_squads_articles_become_a_row_for_each_question(tmp_path: Path) -> None:
    content = squad(("a dog", [question("dog", 2, 1), question("a", 0, 2)]), (CONTEXT, [question("cat", 4, 3)]))

    rows = load(write(tmp_path, train=content))["train"].rows

    assert rows["id"][:] == ["q1", "q2", "q3"]
    assert rows["context"][:] == ["a dog", "a dog", CONTEXT]
    assert rows["answers"][:] == [["dog"], ["a"], ["cat"]]
    assert rows["answer_starts"][:] == [[2], [0], [4]]
    assert rows["line"][:] == [1, 2, 3]
    assert len(load(tmp_path, limit=2)["train"].rows) == 2  # questions, not articles


@pytest.mark.parametrize(
    "answers", [{"text": ["dog", "a dog"], "answer_start": [2, 0]}, [question("dog", 2)["answers"][0]]]
)
def test_a_row_for_each_question_is_read_as_well(tmp_path: Path, answers: Any) -> None:
    row = {"id": 7, "passage": "a dog", "question": "what", "answers": answers}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))

    found = load(tmp_path, columns={"context": "passage"})["train"].rows[0]

    assert (found["id"], found["answers"][0], found["answer_starts"][0]) == ("7", "dog", 2)


def test_rows_of_a_saved_data_set_are_read(tmp_path: Path) -> None:
    answers = [{"text": ["dog"], "answer_start": [2]}]
    Dataset.from_dict({"id": ["x"], "context": ["a dog"], "question": ["what"], "answers": answers}).save_to_disk(
        tmp_path / "saved"
    )

    assert load(tmp_path / "saved")["train"].rows[0]["answer_starts"] == [2]


def test_characters_are_counted_not_bytes(tmp_path: Path) -> None:
    context = "\u00e9\u00e9 \U0001f600 \u732b"
    rows = load(write(tmp_path, train=squad((context, [question("\u732b", 5)]))))["train"].rows

    assert rows[0]["answers"] == ["\u732b"]
    with pytest.raises(DataError, match=r"answer_start=13 does not fit.*it is at 5\). answer_start counts characters"):
        load(write(tmp_path, train=squad((context, [question("\u732b", 13)]))))


@pytest.mark.parametrize(
    ("questions", "said"),
    [
        ([question("a", 0), question("dog", 3)], r"train.json, row 2: answer_start=3 does not fit: expected 'dog' there, "
         r"found 'og' \(it is at 2\)"),
        ([question("bird", 0)], r"row 1: answer_start=0 does not fit: expected 'bird' there, found 'a do' \(it is not in"),
        ([question("a", -5)], r"answer_start=-5 does not fit: expected 'a' there, found ''"),
        ([question("a", "0")], r"row 1: answer_start of 'a' must be a number of characters, found '0'"),
        ([question("", 0)], r"row 1: the text of an answer is empty"),
        ([question(None, 0)], r"row 1: the text of an answer must be text, found None"),
        ([{"question": "what", "answers": [], "is_impossible": True}], r"row 1: the question has no answer. If .*set task.no_answer=true"),
        ([{"question": "what", "answers": "a"}], r"row 1: expected answers such as .*found 'a'. CSV and TSV do not support this"),
        ([{"question": "what", "answers": {"text": ["a"], "answer_start": []}}], r"1 text but 0 answer_start"),
        ([{"question": 3, "answers": []}], r"row 1: question must be text, found 3"),
        ([{"answers": []}], r"train.json has no column question. A question has context"),
        (["what"], r"article 1, paragraph 1: expected a question with its answers, found 'what'"),
        ([], r"article 1, paragraph 1: expected a context and a list qas of questions"),
    ],
)  # fmt: skip
def test_faults_in_a_file_are_named(tmp_path: Path, questions: list[Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load(write(tmp_path, train=squad(("a dog", questions))))


def test_with_no_answer_an_empty_list_is_a_label_whose_target_is_the_first_token(tmp_path: Path) -> None:
    none = {"id": "n", "question": "cat", "answers": [], "is_impossible": True}
    write(tmp_path, train=squad((CONTEXT, [question("a dog", 13, 1), none])))

    made = prepare(tmp_path, task={"no_answer": True})

    rows = made.splits["train"][[0, 1]]
    assert any(position > 0 for position in rows["start_positions"][0])
    assert len(rows["start_positions"][1]) > 1
    assert set(rows["start_positions"][1]) == set(rows["end_positions"][1]) == {0}
    assert made.records("train", [[13, 18], [-1, -1]]) == [
        {"prediction": "a dog", "reference": ["a dog"], "id": "q1"},
        {"prediction": "", "reference": [], "id": "n"},
    ]
    metrics = made.metrics("train", loss=0.0, predictions=[[13, 18], [-1, -1]])
    assert set(metrics.values()) == {100.0}
    assert set(metrics) == set(made.metric_names)


def test_bad_questions_can_be_skipped(tmp_path: Path) -> None:
    found = load(write(tmp_path, train=squad(("a dog", [question("cat", 0), question("dog", 2, 1)]))), max_bad_rows=1)[
        "train"
    ]

    assert (found.rows["id"][:], found.skipped) == (["q1"], 1)


def config(folder: Path, **sections: Any) -> Config:
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text('{"model_type": "bert"}')
    data = {"path": str(folder), "cache_dir": str(folder / "cache"), "max_length": 9, **sections.pop("data", {})}
    return Config.model_validate(
        {
            "task": {"name": "question_answering", "doc_stride": 2, **sections.pop("task", {})},
            "data": data,
            "model": {"name_or_path": str(folder / "model"), "from_scratch": True},
        }
    )


def prepare(folder: Path, **sections: Any) -> QuestionAnsweringTask:
    settings = config(folder, **sections)
    assert isinstance(settings.task, QuestionAnswering)
    return prepare_question_answering(settings, settings.task, ONE_PROCESS)


def test_files_become_windows_and_a_test_split_needs_no_answers(tmp_path: Path) -> None:
    unanswered = squad(
        (CONTEXT, [{"id": "x", "question": "cat"}]), ("a", [{"id": "y", "question": "cat", "answers": []}])
    )
    write(tmp_path, train=squad((CONTEXT, [question("a dog", 13)])), test=unanswered)

    made = prepare(tmp_path, data={"splits": {"train": "train.json", "test": "test.json"}})

    assert made.splits["train"][[0]]["start_positions"] == [[6, 3, 0]]
    assert made.targets(made.collate(made.splits["test"][[0, 1]], tiny.HERE)) == Targets(0.0, 0)
    assert made.records("test", [[0, 3], [0, 1]]) == [
        {"prediction": "the", "reference": None, "id": "x"},
        {"prediction": "a", "reference": None, "id": "y"},
    ]


def test_the_default_window_has_384_tokens() -> None:
    made = Config.model_validate({"task": {"name": "question_answering"}, "data": {"name": "x"}})

    assert made.max_length == 384


def test_windows_that_share_all_tokens_are_refused(tmp_path: Path) -> None:
    write(tmp_path, train=squad((CONTEXT, [question("a dog", 13)])))

    with pytest.raises(ConfigError, match=r"task.doc_stride=6 leaves no room in data.max_length=9"):
        prepare(tmp_path, task={"doc_stride": 6})


def test_a_tokenizer_without_offsets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, train=squad((CONTEXT, [question("a dog", 13)])))
    monkeypatch.setattr(type(tiny.tokenizer()), "is_fast", False)

    with pytest.raises(ConfigError, match=r"does not map tokens to characters"):
        prepare(tmp_path)


def test_a_question_that_leaves_no_room_is_a_bad_row(tmp_path: Path) -> None:
    asked = [question("a", 0), question("dog", 2)]
    asked[0]["question"] = "a cat " * 9
    write(tmp_path, train=squad(("a dog", asked)))

    found = prepare(tmp_path, data={"max_bad_rows": 1})

    assert len(found.splits["train"]) == 1
    with pytest.raises(DataError, match=r"row 1: the question has 18 tokens, expected .* data\.max_bad_rows"):
        prepare(tmp_path)

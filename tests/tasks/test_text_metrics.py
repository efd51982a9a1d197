"""Metrics of generated texts: those of sacrebleu and rouge-score, called directly on the same texts."""

from __future__ import annotations

import logging
import math

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from dtrain.tasks.text_metrics import TextMetrics

TEXTS = ["the cat sees a big bird .", "", "a dog runs", "old birds sleep near the red dog", "\u0219i c\u00e2ine"]
REFERENCES = [
    "the cat sees a bird .",
    "never",
    "a dog runs",
    "the old bird sleeps near a red dog",
    "\u0219i c\u00e2ini ",
]
LENGTHS = [8, 1, 4, 8, 3]


def test_translations_have_the_values_of_sacrebleu() -> None:
    found = TextMetrics("translation")(TEXTS, REFERENCES, LENGTHS)

    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(TEXTS, [REFERENCES]).score, abs=1e-12)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(TEXTS, [REFERENCES]).score, abs=1e-12)
    assert found["exact_match"] == pytest.approx(1 / 5, abs=1e-12)
    assert found["generated_length"] == pytest.approx(24 / 5, abs=1e-12)
    assert 1.0 < found["bleu"] < 99.0  # a figure that could be wrong


def test_bleu_is_computed_on_the_corpus_not_averaged_over_sentences() -> None:
    found = TextMetrics("translation")(TEXTS, REFERENCES, LENGTHS)["bleu"]

    sentences = [
        sacrebleu.sentence_bleu(text, [reference]).score for text, reference in zip(TEXTS, REFERENCES, strict=True)
    ]
    assert abs(found - math.fsum(sentences) / 5) > 0.1


def test_summaries_have_the_values_of_rouge_score() -> None:
    texts = ["a dog runs\nthe cat sees a bird", *TEXTS[:4]]
    references = ["the cat sees the bird\na dog runs", *REFERENCES[:4]]

    found = TextMetrics("summarization")(texts, references, [9, *LENGTHS[:4]])

    names = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL", "rouge_lsum": "rougeLsum"}
    scorer = RougeScorer(list(names.values()), use_stemmer=True)
    scores = [scorer.score(reference, text) for reference, text in zip(references, texts, strict=True)]
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(math.fsum(s[theirs].fmeasure for s in scores) / 5, abs=1e-12)
    assert found["rouge_lsum"] > found["rouge_l"]  # lines are its sentences
    assert set(found) == {*names, "exact_match", "generated_length"}


@pytest.mark.parametrize("kind", ["translation", "summarization"])
def test_the_names_are_known_before_the_first_text(kind: str) -> None:
    judge = TextMetrics(kind)  # type: ignore[arg-type]

    assert set(judge.names) == set(judge(TEXTS, REFERENCES, LENGTHS))


@pytest.mark.parametrize("kind", ["translation", "summarization"])
def test_texts_without_a_reference_are_left_out(kind: str) -> None:
    judge = TextMetrics(kind)  # type: ignore[arg-type]

    assert judge(["a", "b"], [None, None], [1, 1]) == {}
    assert judge(["the", *TEXTS], [None, *REFERENCES], [1, *LENGTHS]) == judge(TEXTS, REFERENCES, LENGTHS)


@pytest.mark.parametrize("kind", ["translation", "summarization"])
@pytest.mark.parametrize(("texts", "references"), [([""], ["a"]), (["a"], [""]), ([""], [""]), (["a"], ["a"])])
def test_degenerate_texts_have_metrics(kind: str, texts: list[str], references: list[str]) -> None:
    found = TextMetrics(kind)(texts, references, [1])  # type: ignore[arg-type]

    assert all(math.isfinite(value) for value in found.values())
    assert found["exact_match"] == float(texts == references)


def test_the_signature_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    judge = TextMetrics("translation")

    with caplog.at_level(logging.INFO, logger="dtrain"):
        judge(TEXTS, REFERENCES, LENGTHS)
        judge(TEXTS, REFERENCES, LENGTHS)

    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "tok:13a" in said[0]
    assert f"version:{sacrebleu.__version__}" in said[0]

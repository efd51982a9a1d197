"""Metrics of generated texts from the reference libraries: sacrebleu for translations, rouge-score for summaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from dtrain.console import log

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL", "rouge_lsum": "rougeLsum"}
"""Metric names of dtrain and of rouge-score."""


class TextMetrics:
    """Metrics of all texts of a split. Logs once how they are computed.

    translation: bleu and chrf in [0, 100], with sacrebleu's defaults (13a tokenizer, mixed case, no smoothing across the
    corpus). summarization: rouge_* in [0, 1], F measures with stemming, averaged over the examples; rouge_lsum takes the
    lines of a text as its sentences. Both: exact_match (share of texts that equal the reference) and generated_length
    (mean number of tokens, including the end token).
    """

    def __init__(self, kind: Literal["translation", "summarization"]) -> None:
        self._kind = kind
        of_kind = ("bleu", "chrf") if kind == "translation" else tuple(ROUGE)
        self.names: Sequence[str] = (*of_kind, "exact_match", "generated_length")
        self._is_explained = False

    def __call__(
        self, texts: Sequence[str], references: Sequence[str | None], lengths: Sequence[int]
    ) -> dict[str, float]:
        """Returns the metrics by name, or nothing if no example has a reference.

        Args:
            texts: Generated texts in data order.
            references: None for an example without a reference. The metrics leave it out.
            lengths: Tokens of each text.
        """
        complete = [
            (text, reference, length)
            for text, reference, length in zip(texts, references, lengths, strict=True)
            if reference is not None
        ]
        if not complete:
            return {}
        texts, expected, sizes = zip(*complete, strict=True)
        scores, explanation = (
            _bleu_and_chrf(texts, expected) if self._kind == "translation" else _rouge(texts, expected)
        )
        if not self._is_explained:
            log.info("%s", explanation)
            self._is_explained = True
        return {
            **scores,
            "exact_match": sum(text == reference.strip() for text, reference in zip(texts, expected, strict=True))
            / len(texts),
            "generated_length": sum(sizes) / len(sizes),
        }


def _bleu_and_chrf(texts: Sequence[str], references: Sequence[str]) -> tuple[dict[str, float], str]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleu, chrf = BLEU(), CHRF()
    scores = {
        "bleu": float(bleu.corpus_score(texts, [references]).score),
        "chrf": float(chrf.corpus_score(texts, [references]).score),
    }
    return scores, f"bleu: sacrebleu {bleu.get_signature()}; chrf: {chrf.get_signature()}"


def _rouge(texts: Sequence[str], references: Sequence[str]) -> tuple[dict[str, float], str]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE.values()), use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    means = {
        name: math.fsum(score[library_name].fmeasure for score in scores) / len(scores)
        for name, library_name in ROUGE.items()
    }
    return means, "rouge: rouge-score, F measure with stemming, mean over the examples; lines are the sentences of lsum"

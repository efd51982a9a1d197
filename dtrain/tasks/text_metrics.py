"""Generated texts judged by the reference libraries: sacrebleu for translations, rouge-score for summaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from dtrain.console import log

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL", "rouge_lsum": "rougeLsum"}
"""Our names and rouge-score's."""


class TextMetrics:
    """Metrics of whole splits; says once how it computes them.

    translation: bleu and chrf in [0, 100], sacrebleu's defaults (13a, mixed case, no smoothing across the corpus).
    summarization: rouge_* in [0, 1], F measures with stemming, averaged over the examples; rouge_lsum takes the lines
    of a text for its sentences. Both: exact_match (share of texts that are the reference) and generated_length (mean
    number of tokens, the end token included).
    """

    def __init__(self, kind: Literal["translation", "summarization"]) -> None:
        self._kind = kind
        own = ("bleu", "chrf") if kind == "translation" else tuple(ROUGE)
        self.names: Sequence[str] = (*own, "exact_match", "generated_length")
        self._is_explained = False

    def __call__(
        self, texts: Sequence[str], references: Sequence[str | None], lengths: Sequence[int]
    ) -> dict[str, float]:
        """
        Args:
            texts: generated, in data order.
            references: None for an example that has none, which is not judged.
            lengths: tokens of each text.
        """
        judged = [
            (text, reference, length)
            for text, reference, length in zip(texts, references, lengths, strict=True)
            if reference is not None
        ]
        if not judged:
            return {}
        found, wanted, sizes = zip(*judged, strict=True)
        own = _bleu_and_chrf(found, wanted) if self._kind == "translation" else _rouge(found, wanted)
        if not self._is_explained:
            log.info("%s", own[1])
            self._is_explained = True
        return {
            **own[0],
            "exact_match": sum(text == reference.strip() for text, reference in zip(found, wanted, strict=True))
            / len(found),
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
        ours: math.fsum(score[theirs].fmeasure for score in scores) / len(scores) for ours, theirs in ROUGE.items()
    }
    return means, "rouge: rouge-score, F measure with stemming, mean over the examples; sentences of lsum are lines"

"""Answers that are spans of a text: the best span over several windows, and SQuAD 1.1's metrics (Rajpurkar et al. 2016)."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

import torch

NOT_IN_CONTEXT = -1
"""The offset of a token or span that is not in the context."""


def best_spans(
    start: torch.Tensor,
    end: torch.Tensor,
    offsets: torch.Tensor,
    windows: Sequence[int],
    *,
    n_best: int,
    max_answer_length: int,
) -> torch.Tensor:
    """Returns each example's span with the highest start + end logit over all of its windows. The first one wins a tie.

    A span begins and ends at tokens of the context, at one of the n_best most likely starts and ends of its window. Its
    end is not before its start, and it has at most max_answer_length tokens.

    Args:
        start: (all windows, length) logits of the start.
        end: (all windows, length) logits of the end.
        offsets: (all windows, length, 2) first character of each token in the context and the one after its last, or
            NOT_IN_CONTEXT.
        windows: Number of windows of each example, in order.

    Returns:
        (examples, 2) int64: first character of the span in the context and the one after its last. NOT_IN_CONTEXT if no
        span is possible.
    """
    outside = offsets[..., 0] == NOT_IN_CONTEXT
    number = min(n_best, start.shape[1])
    starts = start.masked_fill(outside, -math.inf).topk(number)
    ends = end.masked_fill(outside, -math.inf).topk(number)
    lengths = ends.indices[:, None, :] - starts.indices[:, :, None] + 1
    sums = starts.values[:, :, None] + ends.values[:, None, :]
    sums = sums.masked_fill((lengths < 1) | (lengths > max_answer_length), -math.inf)
    best, pair = sums.flatten(1).max(dim=1)
    first = starts.indices.gather(1, (pair // number)[:, None])
    last = ends.indices.gather(1, (pair % number)[:, None])
    spans = torch.cat([offsets[..., 0].gather(1, first), offsets[..., 1].gather(1, last)], dim=1)
    spans[best == -math.inf] = NOT_IN_CONTEXT
    by_example = zip(torch.split(best, list(windows)), torch.split(spans, list(windows)), strict=True)
    return torch.stack([candidates[scores.argmax()] for scores, candidates in by_example])


def exact_match(prediction: str, answer: str) -> float:
    """Returns 1 if both are the same text but for case, punctuation, articles and white space, else 0."""
    return float(_normalize(prediction) == _normalize(answer))


def f1(prediction: str, answer: str) -> float:
    """Returns the harmonic mean of precision and recall over words. A repeated word counts as often as it occurs."""
    predicted, expected = _normalize(prediction).split(), _normalize(answer).split()
    common = sum((Counter(predicted) & Counter(expected)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def squad_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns exact_match and f1 in percent, as SQuAD's script does: of several answers the best match counts."""
    pairs = list(zip(predictions, answers, strict=True))
    return {
        score.__name__: 100.0
        * math.fsum(max(score(prediction, answer) for answer in accepted) for prediction, accepted in pairs)
        / len(pairs)
        for score in (exact_match, f1)
    }


def _normalize(text: str) -> str:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

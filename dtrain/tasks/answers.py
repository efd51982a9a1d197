"""Answers that are spans of a text: the best one among windows, and how SQuAD 1.1 judges it (Rajpurkar et al. 2016)."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

import torch

NOWHERE = -1
"""The offset of what is no place in the context."""


def best_spans(
    start: torch.Tensor,
    end: torch.Tensor,
    offsets: torch.Tensor,
    windows: Sequence[int],
    *,
    n_best: int,
    max_answer_length: int,
) -> torch.Tensor:
    """The span of the highest start + end logit of each example, over all of its windows; of equals the first.

    Only tokens of the context count, the n_best likeliest starts and ends of each window among them, of which the end
    does not stand before the start and not max_answer_length tokens or more behind it.

    Args:
        start: (all windows, length). end: likewise.
        offsets: (all windows, length, 2) first character of each token in the context and the one behind it, or NOWHERE.
        windows: how many each example has, in order.

    Returns:
        (examples, 2) int64: first character of the span in the context and the one behind it; NOWHERE where none is.
    """
    outside = offsets[..., 0] == NOWHERE
    number = min(n_best, start.shape[1])
    starts = start.masked_fill(outside, -math.inf).topk(number)
    ends = end.masked_fill(outside, -math.inf).topk(number)
    lengths = ends.indices[:, None, :] - starts.indices[:, :, None] + 1
    sums = starts.values[:, :, None] + ends.values[:, None, :]
    sums = sums.masked_fill((lengths < 1) | (lengths > max_answer_length), -math.inf)
    best, place = sums.flatten(1).max(dim=1)
    first = starts.indices.gather(1, (place // number)[:, None])
    last = ends.indices.gather(1, (place % number)[:, None])
    spans = torch.cat([offsets[..., 0].gather(1, first), offsets[..., 1].gather(1, last)], dim=1)
    spans[best == -math.inf] = NOWHERE
    pairs = zip(torch.split(best, list(windows)), torch.split(spans, list(windows)), strict=True)
    return torch.stack([found[scores.argmax()] for scores, found in pairs])


def exact_match(found: str, answer: str) -> float:
    """1 where both are the same text, case, punctuation, articles and white space apart, else 0."""
    return float(_normalised(found) == _normalised(answer))


def f1(found: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the answer's words, each as often as it occurs."""
    words, wanted = _normalised(found).split(), _normalised(answer).split()
    same = sum((Counter(words) & Counter(wanted)).values())
    if not same:
        return 0.0
    precision, recall = same / len(words), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def squad_scores(found: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """exact_match and f1 in percent, as SQuAD's own script: of several answers the one that fits best counts."""
    pairs = list(zip(found, answers, strict=True))
    return {
        score.__name__: 100.0
        * math.fsum(max(score(text, answer) for answer in given) for text, given in pairs)
        / len(pairs)
        for score in (exact_match, f1)
    }


def _normalised(text: str) -> str:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

"""Answers that are spans of a text: the best span over several windows, and SQuAD's metrics.

SQuAD 1.1: Rajpurkar et al. 2016. SQuAD 2, with questions that the text does not answer: Rajpurkar et al. 2018.
"""

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
    no_answer_threshold: float | None = None,
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
        no_answer_threshold: An example has no answer if the start + end logit of token 0, in the window where it is lowest,
            is above that of the best span by more than this. None: every example has an answer.

    Returns:
        (examples, 2) int64: first character of the span in the context and the one after its last. NOT_IN_CONTEXT if no
        span is possible, or if there is no answer.
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
    if no_answer_threshold is not None:
        # As in BERT's run_squad.py: a window without the answer says nothing about the others, so the lowest score counts.
        null = torch.stack([part.min() for part in torch.split(start[:, 0] + end[:, 0], list(windows))])
        highest = torch.stack([part.max() for part in torch.split(best, list(windows))])
        has_none = null - highest > no_answer_threshold
        spans[has_none.repeat_interleave(torch.tensor(windows, device=spans.device))] = NOT_IN_CONTEXT
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


def squad2_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns SQuAD 2's figures in percent: of all questions, of those with an answer and of those without.

    A question without an answer is right, by both scores, if the prediction is empty. nan: there is no such question.
    """
    exact: list[float] = []
    overlap: list[float] = []
    for prediction, accepted in zip(predictions, answers, strict=True):
        known = [answer for answer in accepted if _normalize(answer)] or [""]
        exact.append(max(exact_match(prediction, answer) for answer in known))
        overlap.append(max(_f1_or_both_empty(prediction, answer) for answer in known))
    has_answer = [any(_normalize(answer) for answer in accepted) for accepted in answers]
    figures: dict[str, float] = {}
    for prefix, selected in (
        ("", [True] * len(answers)),
        ("has_answer_", has_answer),
        ("no_answer_", [not has for has in has_answer]),
    ):
        for name, scores in (("exact_match", exact), ("f1", overlap)):
            values = [score for score, is_selected in zip(scores, selected, strict=True) if is_selected]
            figures[f"{prefix}{name}"] = 100.0 * math.fsum(values) / len(values) if values else math.nan
    return figures


def _f1_or_both_empty(prediction: str, answer: str) -> float:
    """Returns F1 as SQuAD 2's script does: 1 if both texts have no word, 0 if one of them has none."""
    predicted, expected = _normalize(prediction), _normalize(answer)
    return f1(prediction, answer) if predicted and expected else float(predicted == expected)


def _normalize(text: str) -> str:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

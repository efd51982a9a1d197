"""Rows of tokens are found by their real tokens alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dtrain.models.token_rows import TokenRows, ranges, token_rows


def call(*rows: list[int], length: int, types: list[list[int]] | None = None, **more: Any) -> dict[str, Any]:
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    made: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **more}
    if types is not None:
        made["token_type_ids"] = torch.tensor([row + [0] * (length - len(row)) for row in types])
    return made


def known(inputs: dict[str, Any]) -> TokenRows:
    rows = token_rows(inputs)
    assert rows is not None
    return rows


def test_a_row_has_the_same_key_in_any_batch_and_at_any_padded_length() -> None:
    one, other = known(call([5, 6, 7], [8], length=3)), known(call([8], [9, 9], [5, 6, 7], length=6))

    assert one.keys()[0] == other.keys()[2]
    assert one.keys()[1] == other.keys()[0]


def test_another_token_or_another_type_or_a_longer_row_has_another_key() -> None:
    keys = [
        *known(call([5, 6, 7], [5, 6, 8], [5, 6], [5, 6, 7, 0], length=4)).keys(),
        *known(call([5, 6, 7], [5, 6, 7], length=4, types=[[0, 0, 1], [0, 0, 0]])).keys(),
    ]

    assert len(set(keys)) == len(keys)


def test_the_places_of_real_tokens_are_those_of_the_flattened_call() -> None:
    rows = known(call([5, 6], [7], [8, 9, 9], length=4))

    assert rows.places().tolist() == [0, 1, 4, 8, 9, 10]
    assert ranges(np.array([3, 9]), np.array([0, 2])).tolist() == [9, 10]


@pytest.mark.parametrize(
    "more",
    [
        {"position_ids": torch.zeros(1, 3)},
        {"past_key_values": object()},
        {"use_cache": True},
        {"output_hidden_states": True},
        {"return_dict": False},
        {"inputs_embeds": torch.zeros(1, 3, 4)},
    ],
)
def test_a_call_that_depends_on_more_than_its_tokens_has_no_rows(more: dict[str, Any]) -> None:
    assert token_rows(call([5, 6, 7], length=3)) is not None
    assert token_rows(call([5, 6, 7], length=3, **more)) is None


def test_padding_on_the_left_or_in_the_middle_has_no_rows() -> None:
    for mask in ([0, 1, 1], [1, 0, 1]):
        assert token_rows({"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.tensor([mask])}) is None

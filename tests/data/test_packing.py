"""Blocks, windows and packed rows: each token but the first is scored once, with the promised context."""

from __future__ import annotations

import pytest

from dtrain.data.packing import Segment, pack_segments, split_into_segments


@pytest.mark.parametrize("max_length", [2, 4, 7])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 8, 9, 13, 14, 15, 16, 17])
def test_in_blocks_every_token_but_the_first_is_a_target_once_and_in_order(max_length: int, count: int) -> None:
    ids = list(range(count))

    blocks = list(split_into_segments(ids, max_length=max_length, stride=max_length))

    assert [token for block in blocks for token in block.ids[1:]] == ids[1:]  # targets
    assert [token for block in blocks for token in block.ids[:-1]] == ids[:-1]  # inputs
    assert all(block.scored == len(block.ids) - 1 for block in blocks)
    assert all(len(block.ids) == max_length + 1 for block in blocks[:-1])
    assert len(blocks) == -(-(count - 1) // max_length)


@pytest.mark.parametrize(("max_length", "stride"), [(4, 1), (4, 2), (4, 3), (4, 4), (7, 2), (7, 5), (2, 1)])
@pytest.mark.parametrize("count", [2, 3, 5, 6, 8, 9, 10, 13, 14, 17, 30])
def test_in_windows_every_token_but_the_first_is_scored_once_with_its_context(
    max_length: int, stride: int, count: int
) -> None:
    ids = list(range(count))

    windows = list(split_into_segments(ids, max_length=max_length, stride=stride))

    scored = [token for window in windows for token in window.ids[len(window.ids) - window.scored :]]
    assert scored == ids[1:]
    for window in windows:
        assert 2 <= len(window.ids) <= max_length + 1
        assert window.scored >= 1
        for token in window.ids[len(window.ids) - window.scored :]:
            context = token - window.ids[0]  # token ids are positions here
            assert context >= min(token, max_length - stride + 1)


@pytest.mark.parametrize("ids", [[], [7]])
def test_fewer_than_two_tokens_give_no_segment(ids: list[int]) -> None:
    assert list(split_into_segments(ids, max_length=4, stride=2)) == []


def test_segments_share_a_row_in_order_as_long_as_they_fit() -> None:
    segments = [
        Segment([1, 2, 3], 2),
        Segment([4, 5], 1),
        Segment([6, 7, 8], 1),
        Segment([9, 10, 11, 12, 13], 4),
        Segment([1, 2], 1),
    ]

    rows = pack_segments(segments, row_length=4)

    assert rows == {
        "input_ids": [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12, 13], [1, 2]],
        "lengths": [[3, 2], [3], [5], [2]],
        "scored": [[2, 1], [1], [4], [1]],
    }


def test_without_a_row_length_each_segment_is_a_row() -> None:
    assert pack_segments([Segment([1, 2], 1), Segment([3, 4], 1)], row_length=None)["input_ids"] == [[1, 2], [3, 4]]

"""Laws 2 and 3: which examples a step takes, and which rank runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.data.batches import evaluation_batches, step_batches
from dtrain.data.order import StepPlan, assign_micro_batches, permutation
from dtrain.data.seeding import DataPosition
from dtrain.distributed.topology import SINGLE
from dtrain.errors import DataError
from tests.support.tiny import Table


def test_an_epoch_has_every_example_once_without_padding() -> None:
    plan = StepPlan(num_examples=130, global_batch_size=32, micro_batch_size=5, seed=7, shuffle=True)

    seen = [index for step in range(plan.steps_per_epoch) for index in plan.indices(step)]

    assert plan.steps_per_epoch == 5
    assert sorted(seen) == list(range(130))
    assert len(plan.indices(4)) == 2


def test_epochs_and_seeds_have_different_orders_and_without_shuffling_it_is_file_order() -> None:
    shuffled = StepPlan(100, 100, 8, seed=7, shuffle=True)
    plain = StepPlan(100, 100, 8, seed=7, shuffle=False)

    assert shuffled.indices(0) != shuffled.indices(1)
    assert shuffled.indices(0) != StepPlan(100, 100, 8, seed=8, shuffle=True).indices(0)
    assert plain.indices(0) == plain.indices(1) == list(range(100))


def test_the_order_is_fixed_so_that_an_old_run_can_resume_with_a_new_version() -> None:
    # By hand from the definition: indices sorted by SplitMix64(derive_seed(seed, "order", epoch) + index).
    from dtrain.data.seeding import derive_seed

    def hashed(index: int) -> int:
        mask = 2**64 - 1
        key = ((index + derive_seed(3, "order", 2)) & mask) * 0x9E3779B97F4A7C15 & mask
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & mask
        key = (key ^ key >> 27) * 0x94D049BB133111EB & mask
        return key ^ key >> 31

    assert permutation(3, 2, 50).tolist() == sorted(range(50), key=hashed)


def test_positions_of_an_example_are_spread_evenly_over_epochs() -> None:
    places = [permutation(0, epoch, 64).tolist().index(0) for epoch in range(400)]

    assert 24 < sum(places) / len(places) < 39  # 31.5 expected, standard error 0.9
    assert len(set(places)) > 50


def test_the_list_of_micro_batches_ends_with_a_short_one() -> None:
    plan = StepPlan(num_examples=11, global_batch_size=7, micro_batch_size=3, seed=0, shuffle=False)

    assert plan.micro_batches(0) == [[0, 1, 2], [3, 4, 5], [6]]
    assert plan.micro_batches(1) == [[7, 8, 9], [10]]
    assert plan.epoch_of(1) == 0
    assert plan.epoch_of(2) == 1


@pytest.mark.parametrize("lock_step", [False, True])
@pytest.mark.parametrize("number", [1, 3, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_micro_batch_is_counted_by_exactly_one_rank(number: int, world_size: int, lock_step: bool) -> None:
    shares = [
        assign_micro_batches(number, rank=rank, world_size=world_size, lock_step=lock_step)
        for rank in range(world_size)
    ]

    counted = sorted(assignment.micro_batch for share in shares for assignment in share if assignment.counted)
    assert counted == list(range(number))
    assert all(assignment.micro_batch == 0 for share in shares for assignment in share if not assignment.counted)
    assert all(len(share) >= 1 for share in shares)
    if lock_step:
        assert len({len(share) for share in shares}) == 1


# What collating is told


def test_collate_gets_the_epoch_and_each_rows_index() -> None:
    plan = StepPlan(num_examples=5, global_batch_size=4, micro_batch_size=2, seed=3, shuffle=True)
    table = Table({"row": list(range(5))})
    told: list[tuple[int, list[int]]] = []

    def collate(rows: Any, position: DataPosition) -> dict[str, torch.Tensor]:
        assert rows["row"] == list(position.example_index)
        told.append((position.epoch, list(position.example_index)))
        return {"labels": torch.zeros(len(position.example_index))}

    for _ in step_batches(plan, table, collate, SINGLE, lock_step=False, start=1, stop=4, workers=0):
        pass

    order = [permutation(3, epoch, 5).tolist() for epoch in (0, 1)]
    assert told == [(0, order[0][4:]), (1, order[1][:2]), (1, order[1][2:4]), (1, order[1][4:])]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_collated_raises_the_same_error_with_and_without_workers(workers: int) -> None:
    def collate(_rows: Any, position: DataPosition) -> dict[str, torch.Tensor]:
        raise DataError(f"row {position.example_index[0]} is torn")

    batches = evaluation_batches(
        Table({"row": [1]}), collate, SINGLE, micro_batch_size=1, lock_step=False, workers=workers
    )

    with pytest.raises(DataError, match=r"^row 0 is torn$"):
        next(batches)


def test_a_stuck_worker_does_not_keep_its_process_from_exiting() -> None:
    """It ignores SIGTERM, which Python and torch send to end it."""
    code = """if True:
        import os, time
        from dtrain.data.batches import evaluation_batches
        from dtrain.distributed.topology import SINGLE

        hears, says = os.pipe()

        class Rows:
            def __len__(self):
                return 1
            def __getitem__(self, indices):
                print("stuck", flush=True)
                os.write(says, b"!")
                time.sleep(1000)

        batches = evaluation_batches(Rows(), None, SINGLE, micro_batch_size=1, lock_step=False, workers=1)
        import threading
        threading.Thread(target=next, args=(batches,), daemon=True).start()
        os.read(hears, 1)
    """

    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=45, cwd=Path(__file__).parents[2]
    )

    assert found.stdout == "stuck\n", found.stderr
    assert found.returncode == 0, found.stderr

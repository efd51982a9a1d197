"""RAW: a plain PyTorch loop with fused AdamW and dynamic padding. The limit that a trainer can reach, or nearly so."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import Any

from tests.benchmarks.suite.contestants import rows
from tests.benchmarks.suite.gate import Gate
from tests.benchmarks.suite.spec import LOSSES, Spec


def train(spec: Spec, gate: Gate) -> list[float]:
    """Trains; returns the loss of each step."""
    import torch
    from torch.nn.utils import clip_grad_norm_

    model: Any = rows.model(spec)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches = _batches(spec)
    if spec.ranks > 1:
        torch.distributed.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(
        rows.parameter_groups(model), lr=spec.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / spec.steps)
    validation = _validation(spec) if spec.eval_every else None
    model.train()
    losses: list[float] = []
    for step, batch in enumerate(batches):
        loss = model(**batch).loss
        loss.backward()
        clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step < LOSSES or step % LOSSES == 0:
            losses.append(loss.item())
        if spec.eval_every and (step + 1) % spec.eval_every == 0:
            evaluate(model, validation)
        gate.after_step()
    if spec.ranks > 1:
        torch.distributed.destroy_process_group()
    return losses


def _batches(spec: Spec) -> Iterable[dict[str, Any]]:
    """This rank's batches: made before the loop, or by a DataLoader in it, as people write it."""
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding

    data = rows.dataset(spec, "train")
    rank, size, starts = int(os.environ.get("RANK", "0")), spec.workload.batch, _starts(spec)
    mine = [range(start, stop)[rank * size : (rank + 1) * size] for start, stop in itertools.pairwise(starts)]
    loader: Any = DataLoader(data, batch_sampler=mine, collate_fn=DataCollatorWithPadding(rows.tokenizer(spec)))
    return loader if spec.contestant.options.get("collate_in_loop") else list(loader)


def _starts(spec: Spec) -> list[int]:
    return [0, *itertools.accumulate(len(indices) for indices in spec.order())]


def _validation(spec: Spec) -> Any:
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding

    data = rows.dataset(spec, "validation")
    return DataLoader(data, batch_size=32, collate_fn=DataCollatorWithPadding(rows.tokenizer(spec)))


def evaluate(model: Any, batches: Any) -> float:
    """Returns the accuracy of one process, batches in file order, as people write it."""
    import torch

    model.eval()
    right = count = 0
    with torch.no_grad():
        for batch in batches:
            predicted = model(**batch).logits.argmax(-1)
            right += int((predicted == batch["labels"]).sum())
            count += len(predicted)
    model.train()
    return right / count

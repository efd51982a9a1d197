"""Accelerate: the loop of its documentation, with fused AdamW."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.suite.contestants import rows
from tests.benchmarks.suite.gate import Gate
from tests.benchmarks.suite.spec import LOSSES, Spec


def train(spec: Spec, gate: Gate) -> list[float]:
    """Trains; returns the loss of the logged steps."""
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding

    accelerator = Accelerator(cpu=True)
    loaded = rows.model(spec)
    optimizer = torch.optim.AdamW(rows.parameter_groups(loaded), lr=spec.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / spec.steps)
    collate = DataCollatorWithPadding(rows.tokenizer(spec))
    data = rows.dataset(spec, "train")
    loader: Any = DataLoader(data, batch_size=spec.workload.batch, collate_fn=collate)
    model, optimizer, loader, schedule = accelerator.prepare(loaded, optimizer, loader, schedule)
    model.train()
    losses: list[float] = []
    for step, batch in enumerate(loader):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step < LOSSES or step % LOSSES == 0:
            losses.append(loss.item())
        gate.after_step()
    return losses

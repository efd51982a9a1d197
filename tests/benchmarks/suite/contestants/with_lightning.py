"""Lightning's Trainer, without progress bar, logger and checkpoints."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.suite.contestants import rows
from tests.benchmarks.suite.gate import Gate
from tests.benchmarks.suite.spec import LOSSES, Spec


def train(spec: Spec, gate: Gate) -> list[float]:
    """Trains; returns the loss of the first steps."""
    import lightning
    import torch
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding

    losses: list[float] = []

    class Module(lightning.LightningModule):  # type: ignore[misc]  # not always installed
        def __init__(self) -> None:
            super().__init__()
            self.model = rows.model(spec).train()

        def training_step(self, batch: dict[str, Any], _index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            if len(losses) < LOSSES:
                losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            # Lightning clips by itself only optimizers that are not fused: see on_before_optimizer_step.
            optimizer = torch.optim.AdamW(rows.parameter_groups(self.model), lr=spec.learning_rate, fused=True)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / spec.steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def on_before_optimizer_step(self, _optimizer: Any) -> None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

        def on_train_batch_end(self, *_: Any) -> None:
            gate.after_step()

    data = rows.dataset(spec, "train")
    collate = DataCollatorWithPadding(rows.tokenizer(spec))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=spec.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(spec.output),
    )
    trainer.fit(Module(), DataLoader(data, batch_size=spec.workload.batch, collate_fn=collate))
    return losses

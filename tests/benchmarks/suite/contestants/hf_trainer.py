"""Hugging Face's Trainer with its best documented flags.

`model_accepts_loss_kwargs=False` takes out its scaling of a BERT classifier's loss by ranks and accumulation
(docs/faq.md), so that losses compare. `logging_nan_inf_filter=False` spares it two reads of the loss in each step.
"""

from __future__ import annotations

from typing import Any

from tests.benchmarks.suite.contestants import rows
from tests.benchmarks.suite.gate import Gate
from tests.benchmarks.suite.spec import LOSSES, Spec


def train(spec: Spec, gate: Gate) -> list[float]:
    """Trains; returns the mean loss of the first steps."""
    from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

    class AtTheGate(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
        """Called at the end of each step, and of its evaluation where there is one."""

        def on_step_end(self, _arguments: Any, state: Any, *_: Any, **__: Any) -> None:
            if not spec.eval_every or state.global_step % spec.eval_every:
                gate.after_step()

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            gate.after_step()

    options = spec.contestant.options
    if options.get("from_csv"):
        data = rows.mapped_dataset(spec)
    else:
        data = rows.dataset(spec, "train", pad_to=options.get("pad_to"))
    arguments = TrainingArguments(
        output_dir=str(spec.output / "hf"),
        per_device_train_batch_size=spec.workload.batch,
        per_device_eval_batch_size=32,
        max_steps=spec.steps,
        train_sampling_strategy="random" if options.get("from_csv") else "sequential",
        optim="adamw_torch_fused",
        learning_rate=spec.learning_rate,
        weight_decay=0.01,
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        logging_steps=LOSSES,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if spec.eval_every else "no",
        eval_steps=spec.eval_every,
        save_strategy="steps" if spec.save_every else "no",
        save_steps=spec.save_every or 500,
        save_total_limit=1,
        dataloader_pin_memory=spec.gpu,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not spec.gpu,
        **options.get("arguments", {}),
    )
    trainer = Trainer(
        model=rows.model(spec),
        args=arguments,
        train_dataset=data,
        eval_dataset=rows.dataset(spec, "validation") if spec.eval_every else None,
        data_collator=DataCollatorWithPadding(rows.tokenizer(spec)),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=lambda logits, _labels: logits.argmax(-1),
        callbacks=[AtTheGate()],
    )
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    # Trainer tells only the mean of the steps between two log lines.
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][:1]


def metrics(evaluated: Any) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    pair = evaluated.label_ids, evaluated.predictions
    return {
        "accuracy": accuracy_score(*pair),
        "f1": f1_score(*pair, zero_division=0.0),
        "matthews_correlation": matthews_corrcoef(*pair),
    }

"""HF Trainer on CoLA as its examples do it: python -m ... DATA MODEL OUTPUT SEED EPOCHS BATCH. Writes OUTPUT/result.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.suite.contestants.hf_trainer import metrics


def main() -> None:
    from datasets import Dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    data, model, output = map(Path, sys.argv[1:4])
    seed, epochs, batch = map(int, sys.argv[4:])
    tokenizer = AutoTokenizer.from_pretrained(model)

    def split(name: str) -> Any:
        lines = [line.split("\t") for line in (data / name).read_text(encoding="utf-8").splitlines()]
        rows = Dataset.from_dict({"text": [line[3] for line in lines], "labels": [int(line[1]) for line in lines]})
        return rows.map(
            lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True, remove_columns="text"
        )

    arguments = TrainingArguments(
        output_dir=str(output / "hf"),
        seed=seed,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=32,
        num_train_epochs=epochs,
        optim="adamw_torch_fused",
        learning_rate=5e-5,
        weight_decay=0.01,
        logging_steps=10,
        logging_nan_inf_filter=False,
        eval_strategy="epoch",
        save_strategy="no",
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(model),
        args=arguments,
        train_dataset=split("train.tsv"),
        eval_dataset=split("dev.tsv"),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=lambda logits, _labels: logits.argmax(-1),
    )
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    trainer.save_model(str(output / "model"))
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    evaluated = {key.removeprefix("eval_"): value for key, value in found.items()}
    (output / "result.json").write_text(json.dumps({"eval": evaluated}), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The peers' data: the workload's rows, tokenized, in the order in which dtrain takes them."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.suite.spec import Spec
from tests.benchmarks.suite.workloads import read_csv

MAX_LENGTH = 128


def tokenizer(spec: Spec) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(spec.folder / "model")


def dataset(spec: Spec, split: str, *, pad_to: int | None = None) -> Any:
    """Returns a `datasets.Dataset` with input_ids, token_type_ids, attention_mask and labels.

    Training rows are those of all steps one after the other.

    Args:
        pad_to: pads every row to that length.
    """
    from datasets import Dataset

    texts, labels = read_csv(spec.folder / f"{split}.csv")
    padding: dict[str, Any] = {"padding": "max_length", "max_length": pad_to} if pad_to else {"max_length": MAX_LENGTH}
    columns = dict(tokenizer(spec)(texts, truncation=True, **padding))
    columns["labels"] = labels
    if split == "train":
        rows = [index for indices in spec.order() for index in indices]
        columns = {name: [values[row] for row in rows] for name, values in columns.items()}
    return Dataset.from_dict(columns)


def mapped_dataset(spec: Spec) -> Any:
    """Returns the training rows as the documentation of transformers reads them: `load_dataset`, then `map` in batches."""
    from datasets import load_dataset

    words = tokenizer(spec)
    cache = str(spec.cache_folder)
    loaded = load_dataset("csv", data_files={"train": str(spec.folder / "train.csv")}, cache_dir=cache)["train"]
    mapped = loaded.map(lambda rows: words(rows["text"], truncation=True, max_length=MAX_LENGTH), batched=True)
    return mapped.rename_column("label", "labels").remove_columns("text")


def model(spec: Spec) -> Any:
    """Returns the workload's model with the spec's modules frozen: no gradients, but dropout as it is."""
    from transformers import AutoModelForSequenceClassification

    loaded = AutoModelForSequenceClassification.from_pretrained(spec.folder / "model")
    base = loaded.base_model
    for path in spec.freeze:
        for module in frozen_modules(base, path):
            module.requires_grad_(False)
    return loaded


def frozen_modules(base: Any, path: str) -> list[Any]:
    """Returns the modules of a path: `embeddings`, or `encoder.layer[:3]`."""
    name, _, end = path.removesuffix("]").partition("[:")
    module = base.get_submodule(name)
    return list(module[: int(end)]) if end else [module]


def parameter_groups(loaded: Any, *, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Returns two groups, as Trainer and dtrain make them: biases and norm layers do not decay."""
    decays: list[Any] = []
    rest: list[Any] = []
    for name, parameter in loaded.named_parameters():
        if parameter.requires_grad:
            (rest if name.endswith("bias") or "LayerNorm" in name else decays).append(parameter)
    return [{"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]

"""The names that other trainers use (Hugging Face's TrainingArguments and example scripts, and some of Lightning's).

Each has a setting of dtrain and a converted value, or a reason why there is none. See foreign_names.py for the messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

SAME_AS = {
    **dict.fromkeys(("lr", "peak_lr", "base_lr", "init_lr"), "learning_rate"),
    **dict.fromkeys(("wd", "l2"), "weight_decay"),
    **dict.fromkeys(("gradient_clip_val", "grad_clip", "clip_grad", "clip_grad_norm"), "max_grad_norm"),
    **dict.fromkeys(("adam_eps", "optimizer_eps"), "adam_epsilon"),
    **dict.fromkeys(("optimizer", "optim_type"), "optim"),
    **dict.fromkeys(("num_epochs", "max_epochs", "n_epochs", "epochs", "epoch"), "num_train_epochs"),
    **dict.fromkeys(("train_steps", "num_train_steps", "total_steps", "max_train_steps"), "max_steps"),
    **dict.fromkeys(
        ("per_gpu_train_batch_size", "train_batch_size", "batch_size", "per_device_batch_size"),
        "per_device_train_batch_size",
    ),
    **dict.fromkeys(
        ("grad_accum_steps", "accumulate_grad_batches", "accumulation_steps"), "gradient_accumulation_steps"
    ),
    **dict.fromkeys(("per_gpu_eval_batch_size", "eval_batch_size", "val_batch_size"), "per_device_eval_batch_size"),
    "num_warmup_steps": "warmup_steps",
    **dict.fromkeys(("lr_scheduler", "scheduler", "scheduler_type", "lr_schedule"), "lr_scheduler_type"),
    **dict.fromkeys(("random_seed", "data_seed"), "seed"),
    "evaluation_strategy": "eval_strategy",
    "save_every": "save_steps",
    **dict.fromkeys(("log_interval", "log_steps", "log_every_n_steps"), "logging_steps"),
    **dict.fromkeys(("resume", "resume_from", "ckpt_path"), "resume_from_checkpoint"),
    **dict.fromkeys(("num_workers", "dataloader_workers"), "dataloader_num_workers"),
    **dict.fromkeys(("num_proc", "dataset_num_proc"), "preprocessing_num_workers"),
    **dict.fromkeys(
        ("max_length", "max_seq_len", "max_source_length", "model_max_length", "block_size")
        + ("cutoff_len", "sequence_len", "seq_len", "seq_length", "context_length"),
        "max_seq_length",
    ),
    **dict.fromkeys(("model_name", "base_model", "model_path", "model_id"), "model_name_or_path"),
    **dict.fromkeys(("pretrained_model_name_or_path", "model"), "model_name_or_path"),
    **dict.fromkeys(("tokenizer", "tokenizer_name_or_path"), "tokenizer_name"),
    **dict.fromkeys(("train_data", "train_data_file", "train_path"), "train_file"),
    **dict.fromkeys(("eval_file", "val_file", "eval_data_file", "dev_file"), "validation_file"),
    **dict.fromkeys(("dataset", "dataset_path"), "dataset_name"),
    "dataset_config": "dataset_config_name",
    "deepspeed_config": "deepspeed",
    **dict.fromkeys(("dtype", "mixed_precision", "precision"), "torch_dtype"),
    "compile": "torch_compile",
    **dict.fromkeys(("devices", "gpus", "n_gpu", "num_gpus", "num_processes"), "nproc_per_node"),
    **dict.fromkeys(("num_nodes", "num_machines"), "nnodes"),
    **dict.fromkeys(("use_cpu", "cpu"), "no_cuda"),
    **dict.fromkeys(("max_eval_samples", "max_predict_samples", "max_samples"), "max_train_samples"),
    "early_stopping": "early_stopping_patience",
    "label_smoothing": "label_smoothing_factor",
    "val_max_target_length": "generation_max_length",
    "num_beams": "generation_num_beams",
    **dict.fromkeys(("hub_model_id", "hub_token", "hub_strategy", "hub_private_repo"), "push_to_hub"),
    **dict.fromkeys(("fsdp_config", "use_fsdp"), "fsdp"),
}
"""Other spellings -> the name below."""

RENAMED = {
    "learning_rate": "optim.learning_rate",
    "group_by_length": "train.sort_by_length",
    "weight_decay": "optim.weight_decay",
    "adam_epsilon": "optim.eps",
    "momentum": "optim.momentum",
    "per_device_eval_batch_size": "evaluation.micro_batch_size",
    "warmup_ratio": "schedule.warmup_ratio",
    "seed": "run.seed",
    "run_name": "run.name",
    "overwrite_output_dir": "run.overwrite",
    "logging_steps": "train.log_every",
    "save_total_limit": "checkpoint.keep",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "torch_compile": "model.compile",
    "attn_implementation": "model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code",
    "model_name_or_path": "model.name_or_path",
    "tokenizer_name": "model.tokenizer",
    "lora_r": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target_modules": "model.lora.targets",
    "dataloader_num_workers": "data.workers",
    "preprocessing_num_workers": "data.num_proc",
    "max_seq_length": "data.max_length",
    "max_train_samples": "data.limit",
    "cache_dir": "data.cache_dir",
    "dataset_name": "data.name",
    "dataset_config_name": "data.config",
    "dataset_text_field": "data.columns.text",
    "text_column": "data.columns.text",
    "text_column_name": "data.columns.text",
    "label_column_name": "data.columns.label",
    "label_column": "data.columns.label",
    "label_smoothing_factor": "task.label_smoothing",
    "source_prefix": "task.prefix",
    "max_target_length": "task.max_target_length",
    "doc_stride": "task.doc_stride",
    "n_best_size": "task.n_best",
    "max_answer_length": "task.max_answer_length",
    "version_2_with_negative": "task.no_answer",
    "null_score_diff_threshold": "task.no_answer_threshold",
    "mlm_probability": "task.mask_probability",
    "predict_with_generate": "evaluation.generate",
    "generation_num_beams": "evaluation.num_beams",
    "generation_max_length": "evaluation.max_new_tokens",
    "ddp_find_unused_parameters": "engine.find_unused",
    "ddp_bucket_cap_mb": "engine.bucket_mb",
    "ddp_timeout": "train.hang_timeout",
    "zero_stage": "engine.zero_stage",
}
"""Names whose value needs no conversion -> the setting."""

WITHOUT_SETTING = {
    "do_train": "train is the default command",
    "do_eval": "a training run evaluates as well; to only evaluate a trained model, use the command evaluate",
    "do_predict": "use the command predict after the training",
    "push_to_hub": "nothing is uploaded: `dtrain export` writes the model and its card to a folder, for `hf upload`",
    "auto_find_batch_size": "if memory runs out, the error names train.micro_batch_size, which does not change the results",
    "local_rank": "the launcher sets it: torchrun --nproc-per-node N dtrain/main.py",
    "nproc_per_node": "it is the launcher's: torchrun --nproc-per-node N dtrain/main.py",
    "nnodes": "it is the launcher's: launch/torchrun.sh HOSTFILE",
    "no_cuda": "set CUDA_VISIBLE_DEVICES= (empty) before the command to use the CPU",
    "tf32": "set NVIDIA_TF32_OVERRIDE=1 (or 0) before the command; the default is torch's",
    "dataloader_pin_memory": "it changes no result",
    "dataloader_drop_last": "an epoch uses every row",
    "remove_unused_columns": "only the columns of data.columns are read",
    "use_fast_tokenizer": "a fast tokenizer is used where there is one",
    "low_cpu_mem_usage": "it changes no result",
    "disable_tqdm": "there is a progress bar only on a terminal",
    "logging_dir": "event files are in tensorboard/ of the run folder",
    "logging_first_step": "the first step is always logged",
    "save_safetensors": "weights are always saved as safetensors",
    "ddp_backend": "NCCL on GPUs and gloo on CPUs",
    "save_only_model": "the model of the last or best step is in model/ of the run folder",
    "load_in_8bit": "quantized training is not supported; model.lora trains adapters",
    "load_in_4bit": "quantized training is not supported; model.lora trains adapters",
}
"""Names without a setting -> the reason, or what to do instead."""

FLAGS = {
    *("do_train", "do_eval", "do_predict", "push_to_hub", "group_by_length", "auto_find_batch_size", "no_cuda", "tf32"),
    *("fp16", "bf16", "gradient_checkpointing", "torch_compile", "trust_remote_code", "overwrite_output_dir"),
    *("load_best_model_at_end", "greater_is_better", "predict_with_generate", "version_2_with_negative"),
    *("ddp_find_unused_parameters", "low_cpu_mem_usage", "disable_tqdm", "load_in_8bit", "load_in_4bit"),
    *("logging_first_step", "remove_unused_columns", "dataloader_pin_memory", "resume_from_checkpoint"),
}
"""Names that stand alone on a command line, for true."""

_GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")  # each has a file in configs/
_TRUE, _FALSE = ("true", "yes", "1", "none"), ("false", "no", "0")
_PLACEHOLDER = "VALUE"  # stands for a value that the user left out


class Translation(NamedTuple):
    """What to write in dtrain instead."""

    settings: dict[str, Any]
    """Dotted name (or option) -> value; empty if there is no such setting."""
    note: str = ""
    """Why, or what the value was computed from. No full stop."""


def translate(name: str, given: Mapping[str, Any]) -> Translation | None:
    """Returns what a name of another trainer is here; None for any other name.

    Args:
        name: as the user wrote it, without leading dashes.
        given: all values by name, as text or as YAML gives them; some names need those of others. A value of None is
            one that the user left out.
    """
    values = {canonical(key): value for key, value in given.items()}
    name = canonical(name)
    value = values.setdefault(name, None)
    if name in WITHOUT_SETTING:
        return Translation({}, WITHOUT_SETTING[name])
    if name in RENAMED:
        return Translation({RENAMED[name]: _bool(value) if name in FLAGS else _or_placeholder(value)})
    return _training(name, value, values) or _evaluation(name, value, values) or _data_and_files(name, value, values)


def _training(name: str, value: Any, values: Mapping[str, Any]) -> Translation | None:
    match name:
        case "per_device_train_batch_size" | "gradient_accumulation_steps":
            return _batches(values)
        case "num_train_epochs" if (epochs := _number(value)) is not None and epochs % 1:
            return Translation({}, "train.epochs is a whole number; for a part of an epoch set train.max_steps")
        case "num_train_epochs":
            return Translation({"train.epochs": _whole(value)})
        case "max_steps" if (steps := _number(value)) is not None and steps <= 0:
            return Translation({}, "without train.max_steps, train.epochs gives the length")
        case "max_steps":
            return Translation({"train.max_steps": _whole(value)})
        case "max_grad_norm":
            return Translation({"optim.max_grad_norm": None if _number(value) == 0 else _or_placeholder(value)})
        case "adam_beta1" | "adam_beta2":
            betas = [_number(values.get("adam_beta1")), _number(values.get("adam_beta2"))]
            return Translation(
                {"optim.betas": [given or usual for given, usual in zip(betas, (0.9, 0.999), strict=True)]}
            )
        case "optim":
            names = [known for known in ("adamw", "adafactor", "sgd") if str(value).lower().startswith(known)]
            if not names or "bit" in str(value):
                return Translation({}, "optim.name is adamw, sgd or adafactor")
            return Translation({"optim.name": names[0]})
        case "warmup_steps":
            share = _number(value)
            is_share = share is not None and 0 < share < 1
            return Translation(
                {f"schedule.warmup_{'ratio' if is_share else 'steps'}": value if is_share else _whole(value)}
            )
        case "lr_scheduler_type":
            return _schedule(str(_or_placeholder(value)))
        case "fp16" | "bf16" | "torch_dtype":
            return _precision(name, value)
        case "deepspeed" | "fsdp":
            note = "1 shards the optimizer's state, 2 also gradients, 3 also parameters"
            stage = 3 if name == "fsdp" else 2
            return Translation({"engine.zero_stage": stage}, f"{note}; other keys of DeepSpeed go to engine.deepspeed")
        case _:
            return None


def _batches(values: Mapping[str, Any]) -> Translation:
    """Returns the batch sizes of one process, because the number of processes is not known here."""
    micro = _number(values.get("per_device_train_batch_size", 8))
    accumulated = _number(values.get("gradient_accumulation_steps", 1))
    if micro is None or accumulated is None:
        return Translation({"train.micro_batch_size": _PLACEHOLDER, "train.global_batch_size": _PLACEHOLDER})
    total = int(micro * accumulated)
    return Translation(
        {"train.micro_batch_size": int(micro), "train.global_batch_size": total},
        f"{micro:g} per process x {accumulated:g} accumulated = {total} per step on one process; on N processes write N times "
        f"{total} as train.global_batch_size to take the same steps",
    )


def _schedule(name: str) -> Translation:
    known = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
    if name in (*known, "inverse_sqrt", "warmup_stable_decay", _PLACEHOLDER):
        return Translation({"schedule.name": name})
    if name == "cosine_with_min_lr":
        return Translation(
            {"schedule.name": "cosine", "schedule.min_ratio": 0.1}, "min_ratio is the last share of the peak"
        )
    return Translation({}, f"schedule.name is one of {', '.join(known)}, inverse_sqrt, warmup_stable_decay")


def _precision(name: str, value: Any) -> Translation:
    text = name if name != "torch_dtype" and _bool(value) else str(value).lower()
    precision = "bf16" if "bf" in text else "fp16" if "16" in text else "fp32"
    return Translation({"engine.precision": precision}, "the weights stay in fp32")


def _evaluation(name: str, value: Any, values: Mapping[str, Any]) -> Translation | None:
    match name:
        case "eval_strategy":
            steps = values.get("eval_steps") or values.get("logging_steps") or 500
            every = {"no": "never", "False": "never", "epoch": "epoch"}.get(str(value), _whole(steps))
            return Translation({"train.eval_every": every})
        case "eval_steps" if 0 < (_number(value) or 0) < 1:
            return Translation({}, "train.eval_every is a number of steps, epoch or never")
        case "eval_steps":
            return Translation({"train.eval_every": _whole(value)})
        case "logging_strategy":
            return Translation({}, "train.log_every is the number of steps between two log lines")
        case "save_strategy" if str(value) in ("no", "False"):
            return Translation({"checkpoint.every": None})
        case "save_strategy" if str(value) == "epoch":
            return Translation({"checkpoint.every": "epoch"})
        case "save_strategy":
            return Translation({}, "checkpoint.every is the number of steps between two checkpoints")
        case "save_steps" if 0 < (_number(value) or 0) < 1:
            return Translation({}, "checkpoint.every is a number of steps")
        case "save_steps":
            return Translation({"checkpoint.every": _whole(value)})
        case "resume_from_checkpoint":
            resume = {True: "auto", False: "never"}.get(_bool(value)) if is_bool(value) else value
            return Translation({"checkpoint.resume": resume})
        case "load_best_model_at_end" if not _bool(value):
            return Translation({}, "without evaluation.best, the model of the last step is kept")
        case "load_best_model_at_end" | "metric_for_best_model" | "greater_is_better" | "early_stopping_patience":
            metric = str(values.get("metric_for_best_model") or "loss").removeprefix("eval_")
            best: dict[str, Any] = {"metric": metric}
            if "greater_is_better" in values:
                best["mode"] = "max" if _bool(values["greater_is_better"]) else "min"
            patience = {"train.early_stopping": _whole(value)} if name == "early_stopping_patience" else {}
            return Translation({"evaluation.best": best, **patience})
        case _:
            return None


def _data_and_files(name: str, value: Any, values: Mapping[str, Any]) -> Translation | None:
    match name:
        case "train_file" | "validation_file" | "test_file":
            return _files(values)
        case "validation_split_percentage":
            percent = _number(value)
            return Translation({"data.validation_fraction": _PLACEHOLDER if percent is None else percent / 100})
        case "task_name" if str(value).lower() in _GLUE:
            return Translation(
                {"--config": f"configs/{str(value).lower()}.yaml"}, "it has the settings of this GLUE task"
            )
        case "task_name":
            return Translation({"data.name": _or_placeholder(value)})
        case "output_dir" if value is not None:
            folder = Path(str(value))
            note = "run.output_dir has a folder for each run, called run.name"
            return Translation({"run.output_dir": str(folder.parent), "run.name": folder.name or "run"}, note)
        case "output_dir":
            return Translation({"run.output_dir": _PLACEHOLDER, "run.name": _PLACEHOLDER})
        case "report_to":
            trackers = [str(tracker) for tracker in value] if isinstance(value, list) else [str(value)]
            is_on = any(tracker in ("tensorboard", "all") for tracker in trackers)
            other = [name for name in trackers if name not in ("tensorboard", "all", "none", "None")]
            note = f"{' and '.join(other)} can read metrics.jsonl of the run folder" if other else ""
            return Translation({"tracking.tensorboard": is_on}, note)
        case _:
            return None


def _files(values: Mapping[str, Any]) -> Translation:
    """Returns data.path for one file, and the folder and the file of each split for several."""
    names = {"train": "train_file", "validation": "validation_file", "test": "test_file"}
    files = {split: Path(str(_or_placeholder(values[name]))) for split, name in names.items() if name in values}
    if list(files) == ["train"]:
        return Translation({"data.path": str(files["train"])})
    folder = next(iter(files.values())).parent
    splits = {
        split: file.name if file.parent == folder else str(file.expanduser().absolute())
        for split, file in files.items()
    }
    note = "" if "train" in splits else "data.splits.train is needed as well"
    return Translation({"data.path": str(folder), **{f"data.splits.{s}": file for s, file in splits.items()}}, note)


def canonical(name: str) -> str:
    plain = name.replace("-", "_")
    return SAME_AS.get(plain, plain)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _whole(value: Any) -> Any:
    number = _number(value)
    return int(number) if number is not None and number % 1 == 0 else _or_placeholder(value)


def is_bool(value: Any) -> bool:
    return str(value).lower() in (*_TRUE, *_FALSE)


def _bool(value: Any) -> bool:
    """A name without a value is true."""
    return str(value).lower() not in _FALSE


def _or_placeholder(value: Any) -> Any:
    return _PLACEHOLDER if value is None else value

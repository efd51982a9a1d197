"""A run on sharded weights: a signal within generate, a model of the caller's, and 200 steps in which nothing grows."""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dtrain.commands.train import run_train
from dtrain.config.load import load_config
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.signals import interruptible
from dtrain.errors import Preempted
from dtrain.runs.jsonl import read_metrics
from dtrain.tasks.seq2seq import Seq2SeqTask
from dtrain.training.monitors.protocol import Decision, StepRecord
from tests.support import resuming, tiny, tiny_seq2seq
from tests.support.memory import own_memory
from tests.support.multirank import run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

STEPS, EVERY = 4, 2


def settings(folder: Path, name: str) -> list[str]:
    values = {
        "run.output_dir": folder / "runs",
        "run.name": name,
        "engine.name": "fsdp",
        "task.name": "seq2seq",
        "task.max_target_length": 12,
        "model.name_or_path": folder / "model",
        "data.path": folder / "data",
        "data.cache_dir": folder / "cache",
        "data.max_length": 16,
        "train.epochs": "null",
        "train.max_steps": STEPS,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 2,
        "train.log_every": 1,
        "train.eval_every": EVERY,
        "checkpoint.every": EVERY,
        "evaluation.generate": True,
        "evaluation.max_new_tokens": 6,
        "evaluation.micro_batch_size": 2,
        "tracking.tensorboard": False,
    }
    return [f"{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def folder(memory_path: Callable[[str], Path]) -> Path:
    made = memory_path("fsdp-life")
    (made / "data").mkdir()
    tiny_seq2seq.write_tsv(made / "data" / "train.tsv", 21, seed=0)
    tiny_seq2seq.write_tsv(made / "data" / "validation.tsv", 7, seed=1)
    tiny_seq2seq.t5(dropout=0.1, loud=1.0).save_pretrained(made / "model")
    tiny.tokenizer().save_pretrained(made / "model")
    return made


def start(context: RankContext, folder: str, name: str, signal_in: int | None) -> str:
    """Collective. One start. A signal arrives on rank 1 within the n-th call of generate, after its first token."""
    if signal_in is not None and context.rank == 1:
        real, calls = Seq2SeqTask._generate, 0

        def interrupted(self: Seq2SeqTask, module: Any, *arguments: Any, **more: Any) -> Any:
            nonlocal calls
            calls, tokens = calls + 1, 0

            def second_token(*_: Any) -> None:
                nonlocal tokens
                tokens += 1
                if calls == signal_in and tokens == 2:
                    os.kill(os.getpid(), signal.SIGTERM)

            handle = module.register_forward_pre_hook(second_token)
            try:
                return real(self, module, *arguments, **more)
            finally:
                handle.remove()

        Seq2SeqTask._generate = interrupted  # type: ignore[method-assign]
    with interruptible(grace_s=60.0, before_exit=print):
        try:
            run_train(load_config(None, settings(Path(folder), name)), context)
        except Preempted as stop:
            return str(stop).partition(" after step")[0]
    return "done"


def result(folder: Path, name: str) -> list[Any]:
    run = folder / "runs" / name
    events = read_metrics(run / "metrics.jsonl")
    found = [(e["step"], e.get("loss"), e.get("metrics")) for e in events if e["event"] in ("train", "eval")]
    return [sorted(map(str, found)), (run / "model" / "model.safetensors").read_bytes()]


def test_a_run_that_is_stopped_within_generate_goes_on_to_the_same_end(folder: Path) -> None:
    assert run_ranks(start, 2, str(folder), "steady", None) == ["done"] * 2
    assert run_ranks(start, 2, str(folder), "stopped", 1) == ["Stopped"] * 2
    assert run_ranks(start, 2, str(folder), "stopped", None) == ["done"] * 2

    assert result(folder, "stopped") == result(folder, "steady")


class Watch:
    """Notes what the process holds after a step."""

    def __init__(self) -> None:
        self.memory: dict[int, int] = {}
        self.handles: dict[int, tuple[int, ...]] = {}

    def after_step(self, record: StepRecord) -> Decision:
        if record.step % 50 == 0:
            gc.collect()
            groups = len(dist.distributed_c10d._world.pg_map)
            files, threads = (len(list(Path("/proc/self", kind).iterdir())) for kind in ("fd", "task"))
            self.handles[record.step] = (groups, files, threads)
            self.memory[record.step] = own_memory()
        return Decision.CONTINUE


def many_steps(context: RankContext, folder: str) -> dict[str, Any]:
    """Collective. 200 steps of the caller's model, with evaluations and checkpoints."""
    lines: list[str] = []
    log = logging.getLogger("dtrain")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    changes = {"engine.name": "fsdp", "train.max_steps": 200, "train.epochs": "null", "train.eval_every": 20}
    changes |= {"checkpoint.every": 20, "train.global_batch_size": 8}
    watch = Watch()
    config = load_config(None, resuming.settings(Path(folder), "many", changes))
    run_train(config, context, model=tiny.bert(), monitors=[watch])
    return {
        "memory": watch.memory,
        "handles": watch.handles,
        "told": [line for line in lines if "this rank's part" in line],
    }


def test_nothing_grows_in_200_steps_and_the_callers_model_is_told_to_be_a_part(
    memory_path: Callable[[str], Path],
) -> None:
    folder = resuming.material(memory_path("fsdp-steps"))

    for rank in run_ranks(many_steps, 2, str(folder)):
        assert rank["handles"]["200"] == rank["handles"]["50"]
        assert rank["memory"]["200"] - rank["memory"]["100"] < 4e6, "more than the gradients of this model in each step"
        assert len(rank["told"]) == 1

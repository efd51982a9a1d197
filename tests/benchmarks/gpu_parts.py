"""The parts of `python -m tests.benchmarks.gpu`, each in a process of its own: NAME, device and folders in, one row out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.benchmarks import gpu_same
from tests.benchmarks.gpu_same import Setup
from tests.benchmarks.suite import machine, race
from tests.benchmarks.suite.contestants import own
from tests.benchmarks.suite.options import Options
from tests.benchmarks.suite.race import Lane
from tests.benchmarks.suite.result import RowResult, ratio
from tests.benchmarks.suite.spec import DTRAIN, HF, Spec
from tests.benchmarks.suite.workloads import COUNTED, T1, ModelShape, Workload

BERT_BASE = ModelShape(30522, 768, 12, 12, 3072)
TARGET_SPEED, TARGET_UTILIZATION = 3.0, 0.5
BF16 = {"engine.precision": "bf16"}
TIMES = {"wall ms a step": ("wall_s", 1e3, 2), "CPU ms a step": ("cpu_s", 1e3, 2)}

LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""1.24B parameters: the shape of Llama 3.2 1B."""

LOG_EVERY, WINDOW = 10, (12, 18)
"""Steps between log points, and the steps after whose ends the count of syncs begins and ends: no log point is between."""


def bert(setup: Setup) -> RowResult:
    """BERT-base in bf16 on rows of unequal length, with enough of them to keep the device busy."""
    workload = Workload(BERT_BASE, rows=8192, batch=256)
    text = "BERT-base (110M parameters), bf16, 256 rows of D_glue a step; all contestants take the same batches."
    return _race(setup, "bert", "a step of BERT-base in bf16", text, workload, warm=10, block=10, rounds=5)


def launch_bound(setup: Setup) -> RowResult:
    """T1 with 8 rows: the device waits for the host, so that the loop is what counts."""
    workload = Workload(T1, rows=4096, batch=8)
    text = "T1 (5.4M parameters), bf16, 8 rows of D_glue a step."
    return _race(setup, "launch_bound", "a step that is bound by launches", text, workload, warm=20, block=40, rounds=7)


def _race(
    setup: Setup, name: str, title: str, text: str, workload: Workload, *, warm: int, block: int, rounds: int
) -> RowResult:
    if setup.tiny:
        workload, warm, block, rounds = replace(workload, shape=COUNTED, rows=64, batch=8), 2, 2, 2
    arguments = {"bf16": True, "dataloader_num_workers": 4 if setup.on_gpu else 0}
    contestants = [
        DTRAIN.with_settings(**BF16),
        replace(DTRAIN.with_settings(**BF16, **{"model.unpad": "off"}), name="dtrain, model.unpad=off"),
        replace(HF, options={"arguments": arguments}),
    ]
    options = Options(setup.scratch)
    specs = [
        replace(options.spec(name, one, workload, steps=0), core=None, gpu=setup.on_gpu, warm=warm, block=block)
        for one in contestants
    ]
    result = RowResult(name, title, text, race.race(specs, rounds=rounds), dict(TIMES))
    ours, theirs = result.lane(DTRAIN.name), result.lane(HF.name)
    found = ratio(theirs, ours, "wall_s") if ours is not None and theirs is not None else None
    result.checks[f"dtrain is {TARGET_SPEED:g} times faster than HF Trainer"] = (
        found is not None and found >= TARGET_SPEED
    )
    return result


def llama(setup: Setup) -> RowResult:
    """A causal language model in bf16, blocks of 2,048 tokens: model FLOP utilization."""
    return _llama(setup, "llama", {})


def llama_compiled(setup: Setup) -> RowResult:
    """The same language model with model.compile=true."""
    return _llama(setup, "llama_compiled", {"compile": True})


def _llama(setup: Setup, name: str, options: dict[str, Any]) -> RowResult:
    import torch

    from dtrain.training.model_flops import peak_flops

    shape, length, batch, warm, timed = dict(LLAMA), 2048, 8, 8, 24
    if setup.tiny:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape, length, batch, warm, timed = {**shape, **sizes, "num_key_value_heads": 2, "vocab_size": 64}, 16, 2, 2, 2
    config = _language_config(setup, shape, length=length, batch=batch, steps=warm + timed + 1)
    config["model"] |= options
    ends: dict[int, float] = {}
    figures: dict[str, Any] = {}

    def at_step(step: int, optimizer: Any) -> None:
        if step not in (warm, warm + timed):
            return
        machine.wait_for_device()
        ends[step] = time.perf_counter()
        if step == warm + timed:
            parameters = sum(part.numel() for group in optimizer.param_groups for part in group["params"])
            figures.update(_utilization(shape, parameters, length, batch * length * timed / (ends[step] - ends[warm])))
            raise _MeasuredError  # what follows, a last checkpoint of 15 GB, is not measured

    _fit(setup, config, at_step)
    peak = peak_flops(torch.cuda.get_device_name()) if setup.on_gpu else None
    if peak is not None:
        for key in ("utilization", "utilization_with_attention"):
            figures[key] = figures[f"{key}_flops"] / peak
    if setup.on_gpu:
        figures["memory_bytes"] = torch.cuda.max_memory_allocated()
    result = RowResult(
        name,
        "a causal language model of 1.2B parameters" + "".join(f", model.{key}=true" for key in options),
        f"{figures['parameters'] / 1e9:.2f}B parameters, Llama's shape, random weights, bf16, {batch} blocks of {length:,} "
        "tokens a step. Model FLOPs are 6 per parameter and token; with attention, its causal half is added.",
        [Lane("dtrain", figures=figures)],
        {
            "tokens per second": ("tokens_per_second", 1.0, 0),
            "utilization %": ("utilization", 100.0, 1),
            "with attention %": ("utilization_with_attention", 100.0, 1),
            "peak GB": ("memory_bytes", 1e-9, 1),
        },
    )
    check = f"model FLOP utilization is at least {TARGET_UTILIZATION:.0%}"
    result.checks[check] = figures.get("utilization_with_attention", 0.0) >= TARGET_UTILIZATION
    return result


def _utilization(shape: dict[str, Any], parameters: int, length: int, tokens_per_second: float) -> dict[str, float]:
    # Scores and values: 12 per layer, width and visible token, forward and backward. A token sees half of them.
    attention = 6 * shape["num_hidden_layers"] * shape["hidden_size"] * length
    return {
        "parameters": parameters,
        "tokens_per_second": tokens_per_second,
        "utilization_flops": 6 * parameters * tokens_per_second,
        "utilization_with_attention_flops": (6 * parameters + attention) * tokens_per_second,
    }


def _language_config(setup: Setup, shape: dict[str, Any], *, length: int, batch: int, steps: int) -> dict[str, Any]:
    import numpy as np
    from transformers import BertTokenizerFast

    folder = setup.scratch / "llama"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [f"w{number}" for number in range(shape["vocab_size"] - len(special))]
    BertTokenizerFast(vocab={word: number for number, word in enumerate([*special, *words])}).save_pretrained(
        folder / "tokenizer"
    )
    drawn = np.random.default_rng(0).integers(0, len(words), 16 * batch * length)
    (folder / "text.txt").write_text(" ".join(words[number] for number in drawn) + "\n", encoding="utf-8")
    return {
        "run": {"name": "llama", "output_dir": str(folder)},
        "task": {"name": "causal_lm"},
        "model": {"from_scratch": True, "tokenizer": str(folder / "tokenizer"), "config": shape},
        "data": {
            "path": str(folder / "text.txt"),
            "validation_fraction": 0.1,
            "max_length": length,
            "cache_dir": str(folder / "cache"),
        },
        "train": {
            "global_batch_size": batch,
            "micro_batch_size": batch,
            "max_steps": steps,
            "eval_every": "never",
            "log_every": LOG_EVERY,
        },
        "checkpoint": {"every": None},
        "engine": {"precision": "bf16"},
        "tracking": {"tensorboard": False},
    }


def syncs(setup: Setup) -> RowResult:
    """How often the host waits for the device between two log points."""
    import torch

    workload = Workload(COUNTED if setup.tiny else T1, rows=512, batch=8)
    contestant = DTRAIN.with_settings(**BF16)
    spec: Spec = replace(
        Options(setup.scratch).spec("syncs", contestant, workload, steps=WINDOW[1] + 2), gpu=setup.on_gpu
    )
    found: Counter[str] = Counter()

    def note(message: Any, *_: Any) -> None:
        if "synchroniz" in str(message):
            frames = [frame for frame in traceback.extract_stack() if f"{os.sep}dtrain{os.sep}" in frame.filename]
            place = frames[-1] if frames else traceback.extract_stack()[-2]
            found[f"{Path(place.filename).name}:{place.lineno} in {place.name}"] += 1

    def at_step(step: int, _optimizer: Any) -> None:
        if step in WINDOW and setup.on_gpu:
            torch.cuda.set_sync_debug_mode("warn" if step == WINDOW[0] else "default")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # restored at the end of the block
        _fit(setup, own.config_of(spec), at_step)
    steps = WINDOW[1] - WINDOW[0]
    lane = Lane("dtrain", figures={"syncs": sum(found.values()), "syncs_per_step": sum(found.values()) / steps})
    result = RowResult(
        "syncs",
        "synchronizing calls between log points",
        f"T1, bf16, 8 rows of D_glue a step: calls that torch.cuda.set_sync_debug_mode reports in {steps} steps.",
        [lane],
        {"calls": ("syncs", 1.0, 0), "a step": ("syncs_per_step", 1.0, 2)},
        checks={"the host never waits for the device between two log points": not found and setup.on_gpu},
    )
    result.notes += [f"{count} from {place}" for place, count in found.most_common(12)]
    return result


class _MeasuredError(Exception):
    """Ends a run whose figures are complete."""


def _fit(setup: Setup, config: dict[str, Any], at_step: Callable[[int, Any], None]) -> None:
    """Runs dtrain.fit, and calls `at_step` after each step of the optimizer, counted from 1."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import dtrain

    path = setup.scratch / f"{config['run']['name']}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(config["run"]["output_dir"]).mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    steps = 0

    def count(optimizer: Any, _args: Any, _kwargs: Any) -> None:
        nonlocal steps
        steps += 1
        at_step(steps, optimizer)

    handle = register_optimizer_step_post_hook(count)
    try:
        dtrain.fit(dtrain.load_config(path, []))
    except _MeasuredError:
        pass
    finally:
        handle.remove()


def nccl(setup: Setup) -> RowResult:
    """A process group of one rank: collectives, and a step in DistributedDataParallel with the plain step's gradients."""
    import torch
    import torch.distributed as dist

    backend = "nccl" if setup.on_gpu else "gloo"
    device = torch.device(setup.device, *([0] if setup.on_gpu else []))
    store = dist.FileStore(str(setup.scratch / "store"), 1)
    begin = time.perf_counter()
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        value = torch.arange(4.0, device=device)
        dist.all_reduce(value)
        gathered = [torch.empty_like(value)]
        dist.all_gather(gathered, value)
        dist.barrier()
        torch.manual_seed(0)
        plain = torch.nn.Linear(64, 64, device=device)
        inputs = torch.randn(8, 64, device=device)
        plain(inputs).square().mean().backward()
        expected = [parameter.grad.clone() for parameter in plain.parameters() if parameter.grad is not None]
        plain.zero_grad()
        wrapped = torch.nn.parallel.DistributedDataParallel(plain)
        wrapped(inputs).square().mean().backward()
        gradients = [parameter.grad for parameter in plain.parameters()]
        machine.wait_for_device()
        seconds = time.perf_counter() - begin
    finally:
        dist.destroy_process_group()
    return RowResult(
        "nccl",
        f"a {backend} process group of one rank",
        "all_reduce, all_gather, barrier, and one step in DistributedDataParallel.",
        [Lane("torch", figures={"seconds": seconds})],
        {"seconds": ("seconds", 1.0, 2)},
        checks={
            "collectives return what one rank has": torch.equal(value.cpu(), torch.arange(4.0))
            and torch.equal(gathered[0].cpu(), torch.arange(4.0)),
            "the gradients are those of the plain step": all(
                one is not None and torch.equal(one, other) for one, other in zip(gradients, expected, strict=True)
            ),
        },
    )


def gpu_tests(setup: Setup) -> RowResult:
    """`pytest -m gpu`."""
    files = ["tests/models/test_host_copy.py"] if setup.tiny else ["tests"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=False)
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    figures = {name: counts.get(name, 0) for name in ("passed", "failed", "skipped", "error")}
    result = RowResult(
        "gpu_tests",
        "tests that need a GPU",
        f"`pytest -m gpu {' '.join(files)}`",
        [Lane("pytest", figures=figures)],
        {name: (name, 1.0, 0) for name in figures},
        checks={"every test that needs a GPU passes": done.returncode == 0 and figures["passed"] > 0},
    )
    result.notes += re.findall(r"^(?:FAILED|ERROR) .*$", done.stdout, re.MULTILINE)[:20]
    return result


PARTS: dict[str, Callable[[Setup], RowResult]] = {
    "nccl": nccl,
    "gpu_tests": gpu_tests,
    "same_answer": gpu_same.same_answer,
    "bitwise": gpu_same.bitwise,
    "syncs": syncs,
    "bert": bert,
    "launch_bound": launch_bound,
    "llama": llama,
    "llama_compiled": llama_compiled,
}
"""What must be right, then what should be fast."""


def run(name: str, setup: Setup) -> None:
    """Runs a part in this process, and writes its row to NAME.json in the scratch folder."""
    began = time.monotonic()
    result = PARTS[name](setup)
    result.seconds = time.monotonic() - began
    (setup.scratch / f"{name}.json").write_text(json.dumps(asdict(result)), encoding="utf-8")


def read(name: str, setup: Setup) -> RowResult:
    """Returns the row that a part has written."""
    data = json.loads((setup.scratch / f"{name}.json").read_text(encoding="utf-8"))
    return RowResult(**{**data, "lanes": [Lane(**lane) for lane in data["lanes"]]})

"""nanoGPT's CPU recipe through dtrain and through a plain PyTorch loop: the same loss, and what dtrain costs in time.

    .venv/bin/python tests/benchmarks/char_gpt.py --text ../shared/data/wikitext-2/valid.txt --steps 2000

Trains configs/char_gpt.yaml on the text, then the same model on the same characters in the loop below, which knows
nothing of dtrain but the order of the blocks. Prints the validation loss per character of both after so many steps, and
the seconds of training and of evaluation apart. Exit 1 if the losses differ by more than 1 %.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from dtrain.config.load import load_config
from dtrain.config.option_parser import OptionParser
from dtrain.config.schema import Config
from dtrain.data.order import StepPlan

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "char_gpt.yaml"


def through_dtrain(text: Path, steps: int, threads: int, folder: Path) -> tuple[float, float]:
    """Validation loss per character in nats, and seconds from the first step's batch to the last step."""
    command = [
        sys.executable,
        str(ROOT / "dtrain/main.py"),
        "--config",
        str(CONFIG),
        f"data.path={text}",
        f"data.cache_dir={folder / 'cache'}",
        f"run.output_dir={folder}",
        f"train.max_steps={steps}",
        f"train.eval_every={steps}",
        f"train.log_every={steps}",
        "tracking.tensorboard=false",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nexit {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    run = folder / "char_gpt"
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    first = next(event for event in events if event["event"] == "start")
    last = next(event for event in events if event["event"] == "train" and event["step"] == steps)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return summary["eval"]["loss"], last["monotonic_s"] - first["monotonic_s"]


def plain_loop(text: Path, steps: int, config: Config) -> tuple[float, float]:
    """The same by hand, in this process."""
    characters = text.read_text(encoding="utf-8")
    fraction = config.data.validation_fraction
    assert fraction is not None
    cut = int(len(characters) * (1 - fraction))
    numbers = {character: number for number, character in enumerate(sorted(set(characters[:cut])), start=1)}
    ids = torch.tensor([numbers.get(character, 0) for character in characters])  # 0: never seen in training
    length, optim = config.max_length, config.optim
    train, validation = (
        [part[start : start + length + 1] for start in range(0, len(part) - 1, length)]
        for part in (ids[:cut], ids[cut:])
    )
    sizes = {key: value for key, value in config.model.config.items() if key != "model_type"}
    torch.manual_seed(config.run.seed)
    model = GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=len(numbers) + 1, bos_token_id=None, eos_token_id=None))
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=optim.learning_rate, betas=optim.betas, eps=optim.eps)
    batch_size, warmup = config.train.global_batch_size, config.schedule.warmup_steps or 0
    plan = StepPlan(len(train), batch_size, batch_size, config.run.seed, shuffle=True)
    begin = time.monotonic()
    for step in range(steps):
        progress = (step - warmup) / max(1, steps - warmup)
        factor = step / warmup if step < warmup else 0.5 * (1.0 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate * factor
        loss, count = loss_sum(model, [train[index] for index in plan.indices(step)])
        (loss / count).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.monotonic() - begin
    model.eval()
    with torch.no_grad():
        sums = [loss_sum(model, validation[start : start + 32]) for start in range(0, len(validation), 32)]
    return sum(float(loss) for loss, _ in sums) / sum(count for _, count in sums), seconds


def loss_sum(model: GPT2LMHeadModel, blocks: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Summed nats and number of the targets; a short block is padded behind its end, where nothing counts."""
    padded = torch.nn.utils.rnn.pad_sequence(blocks, batch_first=True, padding_value=-100)
    inputs, labels = padded[:, :-1].clamp(min=0), padded[:, 1:]
    logits = model(input_ids=inputs, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return loss, int((labels != -100).sum())


def main() -> int:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, type=Path, help="a UTF-8 file")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1, help="of both, so that the times can be compared")
    arguments = parser.parse_args()
    text = arguments.text.resolve()
    with tempfile.TemporaryDirectory() as folder:
        found, seconds = through_dtrain(text, arguments.steps, arguments.threads, Path(folder))
    torch.set_num_threads(arguments.threads)
    config = load_config(CONFIG, [f"train.max_steps={arguments.steps}"])
    expected, plain_seconds = plain_loop(text, arguments.steps, config)
    print(f"after {arguments.steps} steps, {arguments.threads} thread(s), loss in nats per character")
    print(f"{'dtrain':12s} loss {found:.6f}  {seconds:.1f} s")
    print(f"{'plain loop':12s} loss {expected:.6f}  {plain_seconds:.1f} s")
    print(f"off by {abs(found - expected) / expected:.1e}; dtrain takes {seconds / plain_seconds:.2f} times as long")
    return 1 if abs(found - expected) > 0.01 * expected else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.support.script import run_script

    run_script(main)

"""What slow links cost, and what each way around them gives: plain ddp, bf16 on the wire, PowerSGD, local steps; and engine.bitwise.

    torchrun --nnodes 3 --nproc-per-node 1 --node-rank K --rdzv-backend c10d --rdzv-endpoint NODE1:29500 \\
        tests/benchmarks/slow_link.py --width 384 --layers 6 --steps 100

Started on every rank, by any launcher that dtrain knows. It trains a character GPT from nothing on text that every Python
carries, once in each way with the same examples, in one process group, and rank 0 prints one table: speed, collectives and
bytes of a step as dtrain counts them, bytes that really left (of TCP's own count of each socket, without headers; and of
the network interfaces, with them) against the ring's bound 2(N-1)/N x gradient bytes, and the final losses.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dtrain import console
from dtrain.config.load import load_config
from dtrain.config.option_parser import OptionParser
from dtrain.distributed.collectives import all_gather_object
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.topology import Topology
from dtrain.training.monitors.protocol import Decision, StepRecord

BYTES_SENT, BYTES_RESENT = 200, 208
"""Where Linux has them in struct tcp_info (since 4.19)."""

SETTLED = 4
"""Steps before the measurement: buckets are made, connections are at their speed. Under PowerSGD those with whole gradients."""


def sent_by_sockets() -> int:
    """Bytes that this process's TCP connections have sent, each counted once, without headers."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
                    continue
                told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed meanwhile
            continue
        sent, again = (int.from_bytes(told[at : at + 8], "little") for at in (BYTES_SENT, BYTES_RESENT))
        total += sent - again
    return total


def sent_by_interfaces() -> int:
    """Bytes that this node's interfaces have sent, the loopback among them, with headers."""
    lines = Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines()[2:]
    return sum(int(line.partition(":")[2].split()[8]) for line in lines)


class Meter:
    """Notes time and bytes after a step, and after the last one. No evaluation may come between."""

    def __init__(self, begin_after: int) -> None:
        self._begin_after = begin_after
        self.steps: list[StepRecord] = []
        self.begin: tuple[float, int, int] | None = None
        self.end: tuple[float, int, int] | None = None

    def after_step(self, record: StepRecord) -> Decision:
        self.steps.append(record)
        if record.step == self._begin_after or record.is_last:
            now = (time.monotonic(), sent_by_sockets(), sent_by_interfaces())
            self.begin, self.end = (now, None) if record.step == self._begin_after else (self.begin, now)
        return Decision.CONTINUE


def layouts(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """By name, the settings of each way."""
    squeezed = f"{{rank: {arguments.rank}, start_step: {max(2, arguments.steps // 10)}}}"
    return {
        "plain ddp": [],
        "bf16 wire": ["engine.gradient_wire=bf16"],
        f"PowerSGD, rank {arguments.rank}": [f"engine.powersgd={squeezed}"],
        f"local steps, {arguments.local_steps}": [f"train.local_steps={arguments.local_steps}"],
        "bitwise": ["engine.bitwise=true"],
    }


def settings(arguments: argparse.Namespace, world_size: int) -> list[str]:
    """Of every layout."""
    model = {"n_layer": arguments.layers, "n_head": 4, "n_embd": arguments.width, "n_positions": 64}
    dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    config = ", ".join(f"{key}: {value}" for key, value in {"model_type": "gpt2", **model, **dropout}.items())
    return [
        f"run.output_dir={arguments.folder}",
        "run.overwrite=true",
        "task.name=causal_lm",
        "model.from_scratch=true",
        "model.tokenizer=char",
        f"model.config={{{config}}}",
        "data.name=python_docs",
        "data.validation_fraction=0.02",
        "data.max_length=64",
        "optim.learning_rate=1e-3",
        "schedule.name=cosine",
        f"schedule.warmup_steps={arguments.steps // 10}",
        f"train.max_steps={arguments.steps}",
        f"train.global_batch_size={arguments.micro_batch_size * arguments.accumulation * world_size}",
        f"train.micro_batch_size={arguments.micro_batch_size}",
        f"train.log_every={arguments.steps}",
        "train.eval_every=never",
        "tracking.tensorboard=false",
        *arguments.more,
    ]


def measure(arguments: argparse.Namespace, context: RankContext, name: str, own: list[str]) -> dict[str, Any]:
    """Collective. One layout from start to end."""
    from dtrain.commands.evaluate import run_evaluate
    from dtrain.commands.train import run_train

    run = "".join(c if c.isalnum() else "-" for c in name)
    common = settings(arguments, context.world_size)
    config = load_config(None, [*common, *own, f"run.name={run}"])
    powersgd = config.engine.powersgd
    begin_after = SETTLED if powersgd is None else max(SETTLED, powersgd.start_step)
    meter = Meter(begin_after)
    run_train(config, context, monitors=[meter])
    trained = [f"model.name_or_path={config.run_dir / 'model'}", "model.from_scratch=false", "model.tokenizer=null"]
    result = run_evaluate(
        load_config(None, [*common, *trained, "model.config={}", f"run.name={run}-evaluated"]), context
    )
    assert meter.begin is not None
    assert meter.end is not None
    seconds, sockets, interfaces = (after - before for before, after in zip(meter.begin, meter.end, strict=True))
    everyones = all_gather_object([sockets, interfaces if context.is_node_main else 0], context)
    steps, last = meter.steps[begin_after:], meter.steps[-max(1, arguments.steps // 10) :]
    sent = [step.traffic for step in steps if step.traffic is not None]
    per_rank = context.world_size * len(steps)
    return {
        "name": name,
        "steps_per_second": len(steps) / seconds,
        "collectives": sum(one.collectives for one in sent) / len(steps),
        "payload": sum(one.payload_bytes for one in sent) / len(steps),
        "sockets": sum(one for one, _ in everyones) / per_rank,
        "interfaces": sum(other for _, other in everyones) / per_rank,
        "train_loss": sum(step.loss for step in last) / len(last),
        "eval_loss": result.metrics["loss"],
    }


def table(found: list[dict[str, Any]], world_size: int) -> str:
    """One line for each layout. The gradient's bytes are those that plain ddp gives to its collectives."""
    bound = 2 * (world_size - 1) / world_size * found[0]["payload"]
    head = [
        "",
        "steps/s",
        "speed",
        "coll./step",
        "MB/step",
        "sockets/bound",
        "interfaces/bound",
        "train loss",
        "eval loss",
    ]
    rows = [
        [
            row["name"],
            f"{row['steps_per_second']:.3f}",
            f"{row['steps_per_second'] / found[0]['steps_per_second']:.2f}x",
            f"{row['collectives']:.2f}",
            f"{row['payload'] / 1e6:.3f}",
            f"{row['sockets'] / bound:.4f}",
            f"{row['interfaces'] / bound:.4f}",
            f"{row['train_loss']:.4f}",
            f"{row['eval_loss']:.4f}",
        ]
        for row in found
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [[f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)] for row in [head, *rows]]
    return "\n".join("  ".join([line[0].strip().ljust(widths[0]), *line[1:]]) for line in lines)


def main() -> int:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--width", type=int, default=256, help="of the model; the gradient has 48 x layers x width^2 bytes"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches of each rank in a step")
    parser.add_argument("--rank", type=int, default=4, help="of PowerSGD's factors")
    parser.add_argument("--local-steps", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/dtrain-slow-link"), help="of the runs, on each node")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the layouts, from 0; 0 is always there")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher gives it
    parser.add_argument("more", nargs="*", help="further settings, section.key=value")
    arguments = parser.parse_args()
    topology = Topology.from_env(os.environ)
    if topology.world_size < 2:
        parser.error("one process sends nothing: start this by torchrun, deepspeed, mpirun or srun")
    console.configure_logging(rank=topology.rank, world_size=topology.world_size)
    from dtrain.job.session import session

    ways = {
        name: own
        for number, (name, own) in enumerate(layouts(arguments).items())
        if not arguments.only or number in (0, *arguments.only)
    }
    with session(load_config(None, settings(arguments, topology.world_size)), topology, os.environ) as job:
        found = [measure(arguments, job.context, name, own) for name, own in ways.items()]
        if job.context.is_main:
            print(table(found, job.context.world_size), flush=True)
        if job.context.is_node_main:
            shutil.rmtree(arguments.folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

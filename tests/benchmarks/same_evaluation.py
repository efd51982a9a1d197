"""The same evaluation, digit for digit, at every world size, for a real model on the real CoLA data.

    .venv/bin/python tests/benchmarks/same_evaluation.py --model MODEL_FOLDER --data ../shared/data/CoLA

Runs `evaluate` on all dev rows and on the first 3 (fewer than ranks) at W = 1, 2, 3, 5, and sharded by ZeRO 3 at W = 2.
Exit 1 if any number differs (ZeRO 3: by more than 1e-6).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from dtrain.config.option_parser import OptionParser

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS: list[tuple[str, int, list[str]]] = [
    *((f"W={world}", world, []) for world in (1, 2, 3, 5)),
    ("ZeRO 3 W=2", 2, ["engine.zero_stage=3"]),
]


def evaluate(
    folder: Path, name: str, world: int, settings: list[str], arguments: argparse.Namespace
) -> dict[str, float]:
    """All metrics of one evaluation."""
    start = [sys.executable]
    if world > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [
        *start,
        str(ROOT / "dtrain/main.py"),
        "evaluate",
        f"run.output_dir={folder}",
        f"run.name={name}",
        "task.name=classification",
        f"model.name_or_path={arguments.model}",
        "data.name=cola",
        f"data.path={arguments.data}",
        *settings,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nexit {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    metrics: dict[str, float] = json.loads((folder / name / "summary.json").read_text(encoding="utf-8"))["eval"]
    return metrics


def main() -> int:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a BERT-family folder or name")
    parser.add_argument("--data", required=True, type=Path, help="a folder in CoLA's format")
    arguments = parser.parse_args()
    arguments.data = arguments.data.resolve()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for rows, limit in (("all rows", []), ("3 rows", ["data.limit=3"])):
            reference: dict[str, float] = {}
            for label, world, settings in LAYOUTS:
                name = f"{rows}-{label}".replace(" ", "-").replace("=", "")
                found = evaluate(Path(folder), name, world, [*settings, *limit], arguments)
                reference = reference or found
                off = max(abs(found[metric] - value) for metric, value in reference.items())
                failed |= found.keys() != reference.keys() or off > (1e-6 if "ZeRO" in label else 0)
                verdict = "the same digits" if found == reference else f"off by {off:.1e}"
                print(f"{rows:8s} {label:11s} {verdict:16s} {json.dumps(found)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.support.script import run_script

    run_script(main)

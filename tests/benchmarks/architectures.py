"""A hundred pairs of task and architecture, trained tiny from scratch: the same numbers on one process and on two ranks.

    .venv/bin/python tests/benchmarks/architectures.py
    .venv/bin/python tests/benchmarks/architectures.py classification:xlnet causal_lm

Each pair is trained for three steps. Columns of the table: the largest relative difference of a step's loss between one
process and two ranks (at most 1e-6); whether `evaluate` of the saved folder repeats the run's own metrics, every digit;
the largest difference of an example's loss and prediction between a batch of its own and one with longer rows, with a
tokenizer that pads on the right and one that pads on the left (at most 1e-5). A pair that dtrain refuses shows why, in
one line. Anything else is a failure, and the exit code is 1. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dtrain.config.option_parser import OptionParser  # noqa: E402
from dtrain.distributed.rank_context import RankContext  # noqa: E402
from dtrain.errors import DtrainError  # noqa: E402
from tests.support import tiny  # noqa: E402
from tests.support.multirank import run_ranks  # noqa: E402
from tests.support.whole_runs import commands  # noqa: E402

TRAIN, DEV, STEPS = 18, 7, 3
"""Rows and steps: two ranks do not divide the rows into equal micro-batches."""

LOSS, ALONE = 1e-6, 1e-5
"""Largest differences: of a step's loss at another number of ranks, and of a row's loss in another batch."""

WIDE: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
}
"""Sizes by the names that most configs use."""

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GROUPED = {**WIDE, "num_key_value_heads": 2}
HEADED = {**GROUPED, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
T5 = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2}
XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}

SIZES: Mapping[str, Mapping[str, Any]] = {
    "albert": {**WIDE, "embedding_size": 16},
    "electra": {**WIDE, "embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    "deberta-v2": {**WIDE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deberta": {**WIDE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": {**WIDE, "layer_types": ["sliding_attention", "full_attention"]},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "bart": SEQ2SEQ,
    "mbart": SEQ2SEQ,
    "marian": SEQ2SEQ,
    "pegasus": SEQ2SEQ,
    "blenderbot": SEQ2SEQ,
    "m2m_100": SEQ2SEQ,
    "led": {
        **{name: value for name, value in SEQ2SEQ.items() if name != "max_position_embeddings"},
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
        "attention_window": 8,
    },
    "prophetnet": {
        "hidden_size": 32,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
    },
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "codegen": {**GPT, "rotary_dim": 4, "n_ctx": 64},
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 64},
    "gemma": HEADED,
    "gemma2": HEADED,
    "gemma3_text": {**HEADED, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3": HEADED,
    "glm": HEADED,
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen2_moe": {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**GROUPED, **EXPERTS},
    "funnel": {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1, 1]},
    "convbert": {**WIDE, "embedding_size": 32},
    "squeezebert": {**WIDE, "embedding_size": 32},
    "mobilebert": {**WIDE, "embedding_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 2},
    "fnet": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 64},
    "rembert": {**WIDE, "input_embedding_size": 32, "output_embedding_size": 32},
    "roformer": {**WIDE, "embedding_size": 32},
    "longformer": {**WIDE, "attention_window": 8},
    "luke": {**WIDE, "entity_emb_size": 16},
    "canine": {**WIDE, "num_hash_buckets": 64, "num_hash_functions": 4},
    "t5": T5,
    "mt5": T5,
    "umt5": T5,
    "longt5": {**T5, "local_radius": 8},
    "xlm": XLM,
    "flaubert": XLM,
    "esm": {**WIDE, "position_embedding_type": "rotary"},
    "llama": GROUPED,
    "qwen2": GROUPED,
    "mistral": GROUPED,
    "phi3": GROUPED,
    "phi": WIDE,
    "granite": GROUPED,
    "cohere": GROUPED,
    "olmo2": GROUPED,
    "starcoder2": GROUPED,
    "smollm3": GROUPED,
    "stablelm": GROUPED,
}
"""Settings of `model.config` by model type; WIDE for others."""

OF_TASK: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("masked_lm", "esm"): {"mask_token_id": 4},
}
"""Further settings of `model.config`."""

PAIRS: Mapping[str, str] = {
    "classification": (
        "bert roberta xlm-roberta albert electra distilbert deberta deberta-v2 modernbert mpnet xlnet bart gpt2 opt bloom "
        "llama qwen2 qwen3 mistral gemma gemma2 gemma3_text phi3 gpt_neox camembert ernie roformer longformer big_bird "
        "funnel convbert squeezebert mobilebert fnet rembert esm luke canine t5 mt5 nystromformer xlm flaubert ibert "
        "data2vec-text megatron-bert mamba smollm3"
    ),
    "causal_lm": (
        "gpt2 opt bloom llama qwen2 qwen3 mistral gemma gemma2 gemma3_text phi phi3 gpt_neox gptj falcon mixtral qwen2_moe "
        "qwen3_moe mamba granite cohere olmo2 starcoder2 glm smollm3 stablelm gpt_bigcode codegen xglm"
    ),
    "masked_lm": ("bert roberta distilbert albert electra deberta-v2 modernbert mpnet xlm-roberta convbert big_bird"),
    "seq2seq": "t5 mt5 bart mbart marian pegasus blenderbot m2m_100 umt5 led longt5 prophetnet",
}


@dataclass(frozen=True)
class Pair:
    """A task and the model type that is trained for it."""

    task: str
    kind: str

    def __str__(self) -> str:
        return f"{self.task}:{self.kind}"

    def settings(self, home: Path) -> list[str]:
        """Settings of a training run with new weights."""
        config = {"model_type": self.kind, **SIZES.get(self.kind, WIDE), **OF_TASK.get((self.task, self.kind), {})}
        return [
            f"task.name={self.task}",
            "model.from_scratch=true",
            f"model.config={json.dumps(config)}",
            f"model.tokenizer={home / 'right'}",
            *self.data(home),
            f"train.max_steps={STEPS}",
            "train.global_batch_size=6",
            "train.micro_batch_size=2",
            "optim.learning_rate=1e-3",
            "checkpoint.every=null",
            "train.log_every=1",
        ]

    def data(self, home: Path) -> list[str]:
        """Settings of the data."""
        more = []
        if self.task == "seq2seq":
            more = ["task.max_target_length=16", "evaluation.generate=true", "evaluation.max_new_tokens=8"]
        return [*more, f"data.path={home / self.task}", f"data.cache_dir={home / 'cache'}", "data.max_length=24"]


@dataclass
class Found:
    """What a pair showed. error: why it was refused, or how it failed."""

    differences: dict[str, float] = field(default_factory=dict)
    same_digits: bool | None = None
    error: str = ""
    refused: bool = False
    seconds: float = 0.0

    @property
    def held(self) -> bool:
        """Whether every promise held."""
        limits = {"ranks": LOSS, "right": ALONE, "left": ALONE}
        return bool(self.same_digits) and all(self.differences.get(name, 9.9) <= limits[name] for name in limits)


def write_data(home: Path) -> None:
    """One folder of rows for each task, and a tokenizer for each padding side."""
    rng = random.Random(0)
    for split, rows in (("train", TRAIN), ("validation", DEV)):
        texts = [" ".join(rng.choices(tiny.WORDS, k=rng.randint(1, 20))) for _ in range(rows)]
        for task in PAIRS:
            lines = [row_of(task, text) for text in texts]
            file = home / task / f"{split}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for side in ("right", "left"):
        tokenizer = tiny.tokenizer()
        tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side = side  # only arguments are saved
        tokenizer.save_pretrained(home / side)


def row_of(task: str, text: str) -> dict[str, Any]:
    """The row of a task with this text."""
    words = text.split()
    match task:
        case "classification":
            return {"text": text, "label": "yes" if words[0] < "m" else "no"}
        case "seq2seq":
            return {"source": text, "target": " ".join(reversed(words[:6]))}
    return {"text": text}


def try_pairs(context: RankContext, pairs: Sequence[tuple[str, str]], folder: str) -> list[dict[str, Any]]:
    """Collective. Trains each pair and, on one process, evaluates what it saved in other batches."""
    home = Path(folder)
    results = []
    for task, kind in pairs:
        pair, begin = Pair(task, kind), time.monotonic()
        out = home / f"runs-{context.world_size}"
        name = f"{task}-{kind}"
        result: dict[str, Any] = {"pair": (task, kind)}
        try:
            settings = [*pair.settings(home), f"run.output_dir={out}", f"run.name={name}"]
            (result["train"],) = commands(context, [("train", settings)])
            if context.world_size == 1:
                for label, side, size in (
                    ("saved", None, 32),
                    ("right", "right", 1),
                    ("left", "left", 1),
                    ("lefts", "left", 32),
                ):
                    again = [
                        f"task.name={task}",
                        f"model.name_or_path={out / name / 'model'}",
                        *pair.data(home),
                        *([f"model.tokenizer={home / side}"] if side else []),
                        f"evaluation.micro_batch_size={size}",
                        f"run.output_dir={out}",
                        f"run.name={name}-{label}",
                    ]
                    (result[label],) = commands(context, [("evaluate", again)])
        except DtrainError as error:
            result["error"], result["refused"] = " ".join(str(error).split()), True
        except Exception as error:  # noqa: BLE001 - whatever a model raises is a row of the table
            result["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        result["seconds"] = time.monotonic() - begin
        if context.is_main:
            shutil.rmtree(out / name, ignore_errors=True)
            print(f"  {context.world_size} rank(s)  {pair}  {result.get('error', 'done')[:100]}", flush=True)
        results.append(result)
    return results


def relative(ones: Sequence[float], others: Sequence[float]) -> float:
    """Largest relative difference; 9.9 where they are not equally many."""
    if len(ones) != len(others) or not ones:
        return 9.9
    return max(abs(one - other) / max(abs(one), 1e-12) for one, other in zip(ones, others, strict=True))


def rows_differ(alone: Mapping[str, Any], together: Mapping[str, Any]) -> float:
    """Largest relative difference of an example's loss; 9.9 where a prediction differs."""
    pairs = list(zip(alone["predictions"], together["predictions"], strict=True))
    if any(one["prediction"] != other["prediction"] for one, other in pairs):
        return 9.9
    return relative([one["loss"] for one, _ in pairs], [other["loss"] for _, other in pairs])


def judge(one: Mapping[str, Any], two: Mapping[str, Any] | None) -> Found:
    """What the results at one process and at two ranks show."""
    found = Found(seconds=one["seconds"] + (two["seconds"] if two else 0.0))
    for result in (one, two or {}):
        if "error" in result:
            found.error, found.refused = result["error"], result.get("refused", False)
            return found
    assert two is not None
    found.same_digits = one["train"]["metrics"] == one["saved"]["metrics"]
    found.differences = {
        "ranks": relative(one["train"]["losses"], two["train"]["losses"]),
        "right": rows_differ(one["right"], one["saved"]),
        "left": max(rows_differ(one["left"], one["lefts"]), rows_differ(one["right"], one["lefts"])),
    }
    return found


def line_of(pair: str, found: Found) -> str:
    """The pair's row of the table."""
    if found.error:
        return f"{pair:32}  {'refused' if found.refused else 'FAILED'}: {found.error}"
    numbers = "  ".join(f"{found.differences[name]:9.1e}" for name in ("ranks", "right", "left"))
    return f"{pair:32}  {numbers}  {'yes' if found.same_digits else 'NO ':9}  {'ok' if found.held else 'FAILED'}"


def main() -> int:
    """Runs the pairs and prints the table."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="parts of names such as classification:bert; none: all pairs")
    only = parser.parse_args().only
    pairs = [(task, kind) for task, kinds in PAIRS.items() for kind in kinds.split()]
    pairs = [pair for pair in pairs if not only or any(part in ":".join(pair) for part in only)]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="architectures-") as folder:
        write_data(Path(folder))
        (ones,) = run_ranks(try_pairs, 1, pairs, folder, timeout_s=1800.0)
        well = [tuple(result["pair"]) for result in ones if "error" not in result]
        twos = run_ranks(try_pairs, 2, well, folder, timeout_s=1800.0)[0] if well else []
    by_pair = {tuple(result["pair"]): result for result in twos}
    table = {":".join(one["pair"]): judge(one, by_pair.get(tuple(one["pair"]))) for one in ones}
    print(f"\n{'pair':32}  {'2 ranks':>9}  {'right':>9}  {'left':>9}  same bits")
    for pair, found in table.items():
        print(line_of(pair, found))
    held = sum(found.held for found in table.values())
    refused = sum(found.refused for found in table.values())
    failed, seconds = len(table) - held - refused, time.monotonic() - begin
    print(f"\n{len(table)} pairs: {held} hold, {refused} refused in one line, {failed} failed; {seconds:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    from tests.support.script import run_script

    run_script(main)

"""Texts of a batch of sources: each row gets the tokens that it gets alone, and rows that have ended are not computed on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dtrain.tasks import generation
from dtrain.tasks.generation import READS_PREFIX, TRIED_ROWS, TRIED_TOKENS, generate_tokens

VOCABULARY, MOST, PAD = 40, 60, 0
OPTIONS = {
    "max_new_tokens": MOST,
    "max_length": None,
    "num_beams": 1,
    "do_sample": False,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
}
ENDS = list(range(2, VOCABULARY, 3))
"""So many tokens end a text that the random models end some of theirs, each at another place."""


def model(name: str, **generation_config: Any) -> Any:
    """A model with a loud decoder, several end tokens, so that rows end at different places, and a count of its tokens."""
    from transformers import AutoModelForSeq2SeqLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    sizes: dict[str, Any] = {"d_model": 16, "vocab_size": VOCABULARY, "decoder_start_token_id": 2, "pad_token_id": PAD}
    if name == "t5":
        sizes |= {"d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    else:
        both = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
        sizes |= {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in both.items()}
        sizes |= {"max_position_embeddings": 80}
    with torch.random.fork_rng():
        made = AutoModelForSeq2SeqLM.from_config(CONFIG_MAPPING[name](**sizes)).eval()
        torch.manual_seed(3)
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 1.0 if name == "t5" else 0.6)
    made.generation_config.update(
        **{"decoder_start_token_id": 2, "pad_token_id": PAD, "eos_token_id": ENDS, **generation_config}
    )
    made.computed = []
    made.register_forward_hook(
        lambda _module, _args, given, _output: made.computed.append(given["decoder_input_ids"].numel()),
        with_kwargs=True,
    )
    return made


def sources(rows: int = 16) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (rows, 11), generator=torch.Generator().manual_seed(1))
    lengths = torch.arange(rows) % 9 + 3
    mask = (torch.arange(11) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def found(made: Any, *, ends: set[int] | None = None, **options: Any) -> torch.Tensor:
    made.computed.clear()
    with torch.no_grad():
        lock_step = bool(options.pop("lock_step", False))
        return generate_tokens(made, sources(), {**OPTIONS, **options}, ends=ends or {2}, pad=PAD, lock_step=lock_step)


def alone(made: Any, row: int) -> list[int]:
    given = sources()
    length = int(given["attention_mask"][row].sum())
    with torch.no_grad():
        tokens = made.generate(**{name: part[row : row + 1, :length] for name, part in given.items()}, **OPTIONS)
    new: list[int] = tokens[0, 1:].tolist()
    return new + [PAD] * (MOST - len(new))


def lengths_of(tokens: torch.Tensor, ends: list[int]) -> list[int]:
    is_end = torch.isin(tokens, torch.tensor(ends))
    return [int(row.int().argmax()) + 1 if row.any() else MOST for row in is_end]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("t5", {}),
        ("t5", {"no_repeat_ngram_size": 3, "repetition_penalty": 1.2, "min_length": 6}),
        ("bart", {}),
        ("bart", {"forced_bos_token_id": 7, "forced_eos_token_id": 2}),
        ("marian", {}),
    ],
)
def test_each_row_has_the_tokens_that_it_has_alone_and_few_are_computed_in_vain(
    name: str, more: dict[str, Any]
) -> None:
    made = model(name, **more)

    tokens = found(made)

    computed, lengths = sum(made.computed), lengths_of(tokens, made.generation_config.eos_token_id)
    assert len(set(lengths)) > 2, lengths
    assert min(lengths) < MOST / 4
    assert tokens.tolist() == [alone(made, row) for row in range(16)]
    assert computed <= 2 * sum(lengths) + 16 * 4 + 2 * TRIED_ROWS * TRIED_TOKENS
    with torch.no_grad():
        made.computed.clear()
        plain = made.generate(**sources(), **OPTIONS)[:, 1:]
    assert tokens[:, : plain.shape[1]].tolist() == plain.tolist()
    if max(lengths) == MOST and sum(lengths) < 8 * MOST:
        assert computed < 0.8 * sum(made.computed)


def test_a_row_that_never_ends_does_not_take_the_others_along() -> None:
    made = model("t5", eos_token_id=2)

    class Ends(nn.Module):
        """All rows but the last end after 4 tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.head = made.lm_head

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            logits = self.head(hidden) * 0
            logits[..., 7] = 1.0
            ended = made.widths[0] >= 4
            logits[: len(logits) - 1, -1, 2] = 2.0 if ended else 0.0
            return logits

    made.__dict__[READS_PREFIX] = True  # its logits depend on the number of calls
    made.widths = [0]
    made.register_forward_hook(lambda *_: made.widths.__setitem__(0, made.widths[0] + 1))
    made.lm_head = Ends()

    tokens = found(made)

    assert lengths_of(tokens, [2]) == [5] * 15 + [MOST]
    assert sum(made.computed) < 16 * 8 + MOST, "without it: 16 rows of all tokens"


def test_what_counts_from_the_start_beams_and_lock_step_run_in_one_piece() -> None:
    made = model("t5")

    for settings, options in (
        ({"min_new_tokens": 8}, {}),
        ({"begin_suppress_tokens": [7]}, {}),
        ({}, {"num_beams": 2}),
    ):
        made = model("t5", **settings)
        tokens = found(made, **options)
        with torch.no_grad():
            plain = made.generate(**sources(), **{**OPTIONS, **options})[:, 1:]
        assert tokens[:, : plain.shape[1]].tolist() == plain.tolist()
        assert len(tokens[0]) == MOST
    made = model("t5")
    starts: list[Any] = []
    real = made.generate
    made.generate = lambda **given: starts.append(given["synced_gpus"]) or real(**{**given, "synced_gpus": False})
    found(made, lock_step=True)
    assert starts == [True]


def test_few_rows_are_not_worth_a_new_start(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model("t5")
    monkeypatch.setattr(generation, "MIN_ROWS", 17)

    tokens = found(made)

    assert set(made.computed) == {16}
    assert tokens.tolist() == [alone(made, row) for row in range(16)]


@pytest.mark.parametrize("name", ["fsmt", "prophetnet"])
def test_a_model_that_reads_a_prefix_in_another_way_runs_in_one_piece(name: str) -> None:
    """FSMT has no causal mask for several tokens at once; ProphetNet's logits depend on their number."""
    from transformers import FSMTConfig, FSMTForConditionalGeneration, ProphetNetConfig
    from transformers import ProphetNetForConditionalGeneration as ProphetNet

    ends = list(range(3, VOCABULARY, 4))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if name == "fsmt":
            sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 80}
            sizes |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
            sizes |= {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
            langs = {"langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY}
            made: Any = FSMTForConditionalGeneration(FSMTConfig(**langs, **sizes)).eval()
        else:
            sizes = {"hidden_size": 16, "max_position_embeddings": 80, "vocab_size": VOCABULARY, "pad_token_id": 0}
            sizes |= {f"num_{side}_layers": 2 for side in ("encoder", "decoder")}
            sizes |= {f"num_{side}_attention_heads": 2 for side in ("encoder", "decoder")}
            sizes |= {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
            tokens = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
            made = ProphetNet(ProphetNetConfig(**sizes, **tokens)).eval()
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.3)
    pad = made.config.pad_token_id
    made.generation_config.eos_token_id = ends
    given = sources()
    given["input_ids"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, pad)
    options = {**OPTIONS, "max_new_tokens": 30, "no_repeat_ngram_size": 2}

    def rows(part: slice) -> list[list[int]]:
        few = {key: tensor[part] for key, tensor in given.items()}
        with torch.no_grad():
            tokens = generate_tokens(made, few, options, ends=ends, pad=pad, lock_step=False).tolist()
        return [row[: next((at + 1 for at, token in enumerate(row) if token in ends), len(row))] for row in tokens]

    assert rows(slice(None)) == [rows(slice(row, row + 1))[0] for row in range(16)]
    assert made.__dict__[READS_PREFIX] is False

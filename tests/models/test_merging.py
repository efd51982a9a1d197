"""Merged adapters give the same outputs for every set of target layers, tied ones included.

Not a quick unit test, because peft takes seconds to import.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dtrain.commands.export import run_export
from dtrain.config import schema
from dtrain.config.load import load_config
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError
from dtrain.models import merging
from dtrain.models.compatibility import check_fit
from dtrain.models.load import load_model
from dtrain.training.export import save
from tests.support import tiny
from tests.support.heads import HEADS

pytestmark = pytest.mark.ranks

IDS = torch.tensor([[2, 7, 11, 9, 3]])

LLAMA = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
BERT = {**LLAMA, "max_position_embeddings": 32}
T5 = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}

CASES = [
    ("llama", {**LLAMA, "tie_word_embeddings": True}, "causal_lm", ["q_proj", "v_proj", "lm_head"]),
    ("llama", {**LLAMA, "tie_word_embeddings": True}, "causal_lm", ["embed_tokens"]),
    ("llama", {**LLAMA, "tie_word_embeddings": True}, "causal_lm", ["embed_tokens", "lm_head"]),
    ("llama", {**LLAMA, "tie_word_embeddings": False}, "causal_lm", ["embed_tokens", "lm_head"]),
    ("gpt2", GPT2, "causal_lm", ["c_attn", "wte", "wpe", "lm_head"]),
    ("modernbert", LLAMA, "masked_lm", ["Wqkv", "decoder"]),
    ("modernbert", LLAMA, "masked_lm", ["tok_embeddings"]),
    ("bert", BERT, "masked_lm", ["query", "decoder"]),
    ("roberta", BERT, "masked_lm", ["word_embeddings", "decoder"]),
    ("bert", BERT, "sequence_classification", ["word_embeddings", "position_embeddings", "query"]),
    ("t5", T5, "seq2seq_lm", ["q", "lm_head"]),
    ("bart", {"d_model": 16, "max_position_embeddings": 32}, "seq2seq_lm", ["q_proj", "lm_head"]),
]


def outputs(module: Any) -> torch.Tensor:
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if module.config.is_encoder_decoder else {})}
    with torch.no_grad():
        found: torch.Tensor = module.eval()(**inputs).logits
    return found


def load(task: str, **model: Any) -> Any:
    return load_model(
        schema.Model(**model), head=HEADS[task], head_config={"num_labels": 3}, tokenizer=tiny.tokenizer(), seed=0
    ).eval()


def adapted(folder: Path, kind: str, sizes: dict[str, Any], task: str, targets: list[str], **more: Any) -> Any:
    """Returns a model with adapters that have an effect, and saves it in folder / "adapters"."""
    config = {"model_type": kind, "vocab_size": len(tiny.tokenizer()), **sizes}
    plain = load(task, from_scratch=True, config=config)
    plain.save_pretrained(folder / "base")
    lora = schema.Lora(r=2, alpha=4, targets=tuple(targets))
    module = load(task, name_or_path=str(folder / "base"), lora=lora, **more)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    save(module, weights, tiny.tokenizer(), folder / "adapters")
    return module


def export(folder: Path, *more: str) -> None:
    settings = [
        f"model.name_or_path={folder / 'adapters'}",
        f"export.to={folder / 'plain'}",
        "export.merge=true",
        *more,
    ]
    run_export(load_config(None, settings, command="export"), ONE_PROCESS)


@pytest.mark.parametrize(("kind", "sizes", "head", "targets"), CASES, ids=lambda value: str(value)[:30])
def test_the_merged_model_gives_the_outputs_of_the_adapters(
    kind: str, sizes: dict[str, Any], head: str, targets: list[str], tmp_path: Path
) -> None:
    module = adapted(tmp_path, kind, sizes, head, targets)
    check_fit(module, tiny.tokenizer(), max_length=8, needs_padding=False)
    expected = outputs(module)
    again = load(head, name_or_path=str(tmp_path / "adapters"))
    assert torch.equal(outputs(again), expected)

    export(tmp_path)

    plain = HEADS[head].auto_class.from_pretrained(tmp_path / "plain")
    assert torch.allclose(outputs(plain), expected, atol=1e-4 * float(expected.abs().max()))


def test_a_model_whose_config_cannot_say_that_its_weights_are_separate_is_not_merged(tmp_path: Path) -> None:
    adapted(tmp_path, "t5", T5, "seq2seq_lm", ["shared"])

    with pytest.raises(ConfigError, match=r"cannot be merged, .* a t5 model with other .* weights of shared are tied"):
        export(tmp_path)

    assert not (tmp_path / "plain").exists()


def test_peft_loads_adapters_of_an_embedding(tmp_path: Path) -> None:
    from peft import PeftModel

    module = adapted(tmp_path, "llama", {**LLAMA, "tie_word_embeddings": False}, "causal_lm", ["embed_tokens"])

    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapters")

    assert torch.allclose(outputs(theirs), outputs(module), atol=1e-5)


def test_a_merge_that_changes_the_outputs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(tmp_path, "llama", {**LLAMA, "tie_word_embeddings": True}, "causal_lm", ["lm_head"])
    monkeypatch.setattr(merging, "Counter", lambda _names: _OneUseEach())

    with pytest.raises(ConfigError, match=r"cannot be merged, .* a llama model with other outputs"):
        export(tmp_path)

    assert not (tmp_path / "plain").exists()


class _OneUseEach(dict[int, int]):
    """Says of every parameter that it has one use, as before the fix."""

    def __missing__(self, key: int) -> int:
        return 1


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_adapters_with_a_head_of_ours_are_merged(tmp_path: Path, pooling: Any) -> None:
    head = schema.NewHead(pooling=pooling, hidden=5)
    module = adapted(tmp_path, "bert", BERT, "sequence_classification", ["query"], head=head)

    export(tmp_path)

    again = load("sequence_classification", name_or_path=str(tmp_path / "plain"))
    assert not any(".lora_" in name for name, _ in again.named_parameters())
    assert torch.allclose(outputs(again), outputs(module), atol=1e-5)


def test_a_base_that_moved_is_named_and_can_be_set(tmp_path: Path) -> None:
    expected = outputs(adapted(tmp_path, "bert", BERT, "sequence_classification", ["query"]))
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    folder = str(tmp_path / "adapters")

    with pytest.raises(ConfigError, match=rf"{folder} holds adapters for the base model .*base, .*set model.lora_base"):
        load("sequence_classification", name_or_path=folder)
    with pytest.raises(ConfigError, match=r"set model.lora_base"):
        export(tmp_path)
    assert torch.equal(outputs(load("sequence_classification", name_or_path=folder, lora_base=str(moved))), expected)
    export(tmp_path, f"model.lora_base={moved}")
    assert (tmp_path / "plain" / "model.safetensors").is_file()


def test_a_folder_of_adapters_cannot_make_a_library_import_modules(tmp_path: Path) -> None:
    adapted(tmp_path, "bert", BERT, "sequence_classification", ["query"])
    folder = tmp_path / "adapters"
    settings, config = folder / "adapter_config.json", folder / "config.json"
    before = settings.read_text(), config.read_text()
    settings.write_text(json.dumps({**json.loads(before[0]), "megatron_config": {}, "megatron_core": "theirs"}))
    with pytest.raises(ConfigError, match="has megatron_config, which makes peft import theirs"):
        load("sequence_classification", name_or_path=str(folder))

    settings.write_text(before[0])
    for content in (
        {"auto_map": {"AutoConfig": "theirs.Theirs"}, "model_type": "theirs"},
        {"architectures": ["Trainer"]},
    ):
        config.write_text(json.dumps({**json.loads(before[1]), **content}))
        with pytest.raises(ConfigError, match=r"contains Python code|does not name the model class"):
            export(tmp_path)


@pytest.mark.parametrize("head", [None, {"pooling": "mean"}], ids=["transformers' head", "model.head"])
def test_another_number_of_labels_is_named_as_the_cause_with_a_cure_that_works(
    head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = {"model_type": "bert", "vocab_size": len(tiny.tokenizer()), **BERT}
    load("sequence_classification", from_scratch=True, config=config).base_model.save_pretrained("bare")
    extra = {} if head is None else {"head": schema.NewHead(**head)}
    lora = schema.Lora(r=2, alpha=4, targets=("query",))
    module = load("sequence_classification", name_or_path="bare", lora=lora, **extra)
    save(module, {n: p.detach() for n, p in module.named_parameters()}, tiny.tokenizer(), Path("adapters"))

    def with_five_labels(**model: Any) -> Any:
        return load_model(
            schema.Model(**model),
            head=HEADS["sequence_classification"],
            head_config={"num_labels": 5},
            tokenizer=tiny.tokenizer(),
            seed=0,
        )

    cause = r"another number of labels \(classifier.bias is \(3,\)" if head is None else "with 3 outputs; .* with 5"
    with pytest.raises(ConfigError, match=cause) as refused:
        with_five_labels(name_or_path="adapters")

    command, code = re.findall(r"dtrain (export [^&]*) && python -c \"(.*?)\"", str(refused.value))[0]
    run_export(load_config(None, command.split()[1:], command="export"), ONE_PROCESS)
    exec(code, {})
    (folder,) = re.findall(r"model.name_or_path=([A-Z]+) model.tokenizer=MERGED", str(refused.value))
    assert with_five_labels(name_or_path=folder, lora=lora, **extra).config.num_labels == 5

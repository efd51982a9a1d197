"""Chat templates in the style of well-known model families, and tokenizers over them, with the truth by construction.

Each template is written here, with its family's conventions: the marks, what it does to blanks and to earlier reasoning.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel, WordPiece
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>", "<turn>", "</turn>",
    "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|User|>", "<|Assistant|>", "<think>", "</think>",
]  # fmt: skip

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ '<|begin|>' }}{% for m in messages %}"
    "{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
QWEN = (  # drops the reasoning of all replies but the last, and writes an empty block where there is none
    "{% for m in messages %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' + text }}"
    "{% else %}{{ text if m.role == 'assistant' else m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
OPENS_THINKING = CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")
GEMMA = (
    "{{ '<s>' }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<turn>' + role + '\n' + m.content | trim + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
PHI = (  # writes the text's end only when nothing follows
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '</s>' }}{% endif %}"
)
DEEPSEEK = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)

PLAIN = {  # template, its end mark, what it writes before a reply's content that the prompt does not supply
    "chatml": (CHATML, "<|im_end|>", ""),
    "chatml-marked": (CHATML_MARKED, "<|im_end|>", ""),
    "llama": (LLAMA, "<|eot|>", ""),
    "gemma": (GEMMA, "</turn>", ""),
    "mistral": (MISTRAL, "</s>", " "),
    "phi": (PHI, "<|end|>", ""),
    "deepseek": (DEEPSEEK, "</s>", ""),
}

TEXTS = [
    "where is the cat?",
    "the cat is here",
    "user assistant model system",
    "\u4f60\u597d\u5417",
    "ok!",
    "\U0001f600",
]


def _finish(backend: Tokenizer, template: str) -> Any:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def byte_bpe(template: str, *, trim_offsets: bool) -> Any:
    """Byte-level BPE. An emoji is several tokens."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS[:3], trainer)
    return _finish(backend, template)


def word_piece(template: str) -> Any:
    """Words, and parts of words. Blanks and line breaks have no token."""
    words = [
        "[UNK]",
        "the",
        "cat",
        "is",
        "here",
        "where",
        "a",
        "s",
        "##s",
        "t",
        "o",
        "##k",
        "\u4f60",
        "\u597d",
        "\u5417",
        "?",
        "!",
    ]
    backend = Tokenizer(WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _finish(backend, template)


def characters(template: str) -> Any:
    """A token for each character."""
    letters = sorted(set("".join(TEXTS)) | {"\n", "|", "<", ">"})
    backend = Tokenizer(WordLevel({text: number for number, text in enumerate(["[UNK]", *letters])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return _finish(backend, template)


TOKENIZERS = {
    "byte-bpe": lambda template: byte_bpe(template, trim_offsets=False),
    "byte-bpe-trimmed": lambda template: byte_bpe(template, trim_offsets=True),
    "word-piece": word_piece,
    "characters": characters,
}

"""Writes a made-up language to translate, for configs/translation_from_scratch.yaml.

    python tests/benchmarks/translation.py --make data/translation
    python dtrain/main.py --config configs/translation_from_scratch.yaml

Each of 25 words has one translation, and the order of a sentence is reversed: nothing that a model can do by copying.
Sentences of the validation split are not among those of the training split.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from dtrain.config.option_parser import OptionParser

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = 25


def pairs(rows: int, *, seed: int = 0, longest: int = 6) -> list[tuple[str, str]]:
    """Different sentences of 1 to `longest` words w0 .. w24, and their translations: v(7i + 3 mod 25), reversed."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < rows:
        words = [rng.randrange(WORDS) for _ in range(rng.randint(1, longest))]
        found[" ".join(f"w{word}" for word in words)] = " ".join(
            f"v{(7 * word + 3) % WORDS}" for word in reversed(words)
        )
    shuffled = list(found.items())
    rng.shuffle(shuffled)  # the few sentences of one word are all found early, and belong in both splits
    return shuffled


def make(folder: Path, *, train: int = 2000, validation: int = 200, seed: int = 0) -> Path:
    """train.tsv, validation.tsv and vocab.txt in that folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = pairs(train + validation, seed=seed)
    for split, part in (("train", rows[:train]), ("validation", rows[train:])):
        lines = ["source\ttarget", *(f"{source}\t{target}" for source, target in part)]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = [*SPECIAL, *(f"{letter}{number}" for letter in "wv" for number in range(WORDS))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, required=True, metavar="FOLDER")
    print(make(parser.parse_args().make))


if __name__ == "__main__":
    main()

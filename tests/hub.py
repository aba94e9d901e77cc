"""Data sets as the hub lays them out, with a few made-up rows: a folder a configuration, parquet files, a card."""

from __future__ import annotations

import random
from pathlib import Path

import datasets


def save_hub_set(folder: Path, sets: dict[str, dict[str, datasets.Dataset]]) -> Path:
    """Writes configuration → split → rows, and the card that names the files."""
    card = ["---", "configs:"]
    for config, splits in sets.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            (folder / config).mkdir(parents=True, exist_ok=True)
            rows.to_parquet(folder / config / f"{split}-0.parquet")
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")
    return folder


def save_xnli(folder: Path, languages: list[str]) -> Path:
    """XNLI's columns and labels: 24 pairs to train on, 9 to validate and 9 to test, in each language."""
    names = ["entailment", "neutral", "contradiction"]
    features = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "label": datasets.ClassLabel(names=names),
        }
    )
    rng = random.Random(0)

    def rows(count: int) -> datasets.Dataset:
        pairs = [
            {"premise": f"w{20 * (n % 3)} w{rng.randrange(60)}", "hypothesis": f"w{rng.randrange(60)}", "label": n % 3}
            for n in range(count)
        ]
        return datasets.Dataset.from_list(pairs, features=features)

    splits = {"train": 24, "validation": 9, "test": 9}
    return save_hub_set(folder, {tag: {name: rows(n) for name, n in splits.items()} for tag in languages})

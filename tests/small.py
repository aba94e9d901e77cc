"""Small runs for the tests: a tiny model in a folder, text that can be learned from, recipes over both.

Texts are words "w0" … "w59" of the tiny tokenizer. The label follows from the words: red has w0 … w19, blue w20 … w39,
green w40 … w59.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForMaskedLM

from graftlm.adapters.bottleneck import BottleneckConfig
from graftlm.evaluation.result import Result
from graftlm.folder import load
from graftlm.recipe import Recipe, load_recipe
from graftlm.run import run_recipe

COLOURS = ("red", "blue", "green")

RECIPE = """\
name: small
model: ./model
source: eng
data:
  train: train.jsonl
  dev: dev.jsonl
  test: {eng: test.eng.jsonl, deu: test.deu.jsonl}
training: {epochs: 4, batch_size: 8, learning_rate: 3e-2, max_length: 32}
"""


def save_model(folder: Path, architecture: str = "bert", **config: Any) -> Path:
    """A tiny pretrained model without a task's head, with its tokenizer."""
    tiny_model(architecture, "base", **config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_language_adapter(folder: Path, base: Path, *, seed: int = 1, size: int = 6, **config: Any) -> Path:
    """A bottleneck adapter with drawn weights for a saved masked language model."""
    model = AutoModelForMaskedLM.from_pretrained(base)
    adapter = get_peft_model(model, BottleneckConfig(bottleneck_size=size, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if ".default." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapter.save_pretrained(folder)
    return folder


def words(rng: random.Random, colour: str, count: int) -> list[str]:
    first = 20 * COLOURS.index(colour)
    return [f"w{first + rng.randrange(20)}" for _ in range(count)]


def classification_rows(count: int, seed: int, colours: tuple[str, ...] = COLOURS[:2]) -> list[dict]:
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        colour = rng.choice(colours)
        rows.append({"id": f"{seed}-{number}", "text": " ".join(words(rng, colour, 6)), "label": colour})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def small_folder(folder: Path, *, train: int = 64, architecture: str = "bert", **config: Any) -> Path:
    """Model, four splits and recipe.yaml for classification; returns the folder."""
    save_model(folder / "model", architecture, **config)
    for seed, (name, count) in enumerate({"train": train, "dev": 24, "test.eng": 30, "test.deu": 30}.items()):
        write_rows(folder / f"{name}.jsonl", classification_rows(count, seed))
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


def small_recipe(folder: Path, *overrides: str) -> Recipe:
    """The folder's recipe; its runs go into the same folder."""
    return load_recipe(folder / "recipe.yaml", [f"output.folder={json.dumps(str(folder / 'runs'))}", *overrides])


def run(recipe: Recipe) -> Result:
    return run_recipe(recipe, progress=False)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def predicted(folder: Path) -> list[tuple]:
    return [(row["language"], row["id"], row["prediction"]) for row in read_rows(folder / "predictions.jsonl")]


def by_hand(folder: Path, texts: list[str]) -> list[str]:
    """Predictions one text at a time, without Trainer, collator or decoding of ours."""
    model, tokenizer = load(folder, tokenizer=True)
    with torch.no_grad():
        best = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    return [model.config.id2label[number] for number in best]

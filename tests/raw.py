"""Raw text for the tests of language modelling: chains of words that a tiny model can learn, and their tokenizers."""

from __future__ import annotations

import json
import random
from pathlib import Path

from small import write_rows
from tiny import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graftlm.recipe import Recipe, load_recipe


def chain(count: int, seed: int, *, first: int = 0, words: int = 30, longest: int = 40) -> list[str]:
    """Documents in which each word mostly follows from the one before; the last one is of the greatest length."""
    rng = random.Random(seed)
    texts = []
    for number in range(count):
        word, text = rng.randrange(words), []
        for _ in range(longest if number == count - 1 else rng.randint(2, longest)):
            text.append(f"w{first + word}")
            word = (word + rng.choice((1, 1, 1, 2))) % words
        texts.append(" ".join(text))
    return texts


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, as GPT-2's vocabulary without its merges: nothing is added around a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {letter: number + 1 for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


RECIPE = """\
name: {task}
model: ./model
task: {task}
source: dan
data:
  train: train.jsonl
  dev: dev.jsonl
  test: {{dan: test.dan.jsonl, eng: test.eng.jsonl}}
  old: [eng]
training: {{epochs: 3, batch_size: 8, learning_rate: 1e-2, max_length: 24, stride: 8}}
references: []
"""


def raw_folder(folder: Path, task: str, architecture: str, **config: object) -> Path:
    """A tiny language model, raw text in a new and an old language, and recipe.yaml; returns the folder."""
    tiny_model(architecture, task, **config).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for seed, (name, count) in enumerate({"train": 60, "dev": 8, "test.dan": 10}.items()):
        write_rows(folder / f"{name}.jsonl", [{"text": text} for text in chain(count, seed)])
    write_rows(folder / "test.eng.jsonl", [{"text": text} for text in chain(10, 9, first=30)])
    (folder / "recipe.yaml").write_text(RECIPE.format(task=task), encoding="utf-8")
    return folder


def raw_recipe(folder: Path, *overrides: str) -> Recipe:
    """The folder's recipe; its runs go into the same folder."""
    return load_recipe(folder / "recipe.yaml", [f"output.folder={json.dumps(str(folder / 'runs'))}", *overrides])

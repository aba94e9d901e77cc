"""Tiny language models with texts and a tokenizer, for the tests of guided dropout."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tiny import ARCHITECTURES, DECODERS, ENCODER_DECODERS, VOCABULARY, tiny_model, tiny_tokenizer
from torch import nn
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForSequenceClassification

from graftlm.training.dropout.texts import batches

NATIVE = (*(a for a in ARCHITECTURES if a not in DECODERS), "gpt2", "electra")
ADAPTED = tuple(a for a in DECODERS if a != "gpt2")
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(4))


def task_of(architecture: str) -> str:
    if architecture in DECODERS:
        return "causal_lm"
    return "seq2seq_lm" if architecture in ENCODER_DECODERS else "masked_lm"


def lm(architecture: str, **config) -> nn.Module:
    if architecture == "electra":
        return _electra(ElectraForMaskedLM, **config)
    return tiny_model(architecture, task_of(architecture), **config)


def classifier(architecture: str, **config) -> nn.Module:
    if architecture == "electra":
        return _electra(ElectraForSequenceClassification, **config)
    return tiny_model(architecture, **config)


def pair(architecture: str, **config) -> tuple[nn.Module, nn.Module]:
    """A language model, and a classifier on the same backbone."""
    one, other = lm(architecture, **config), classifier(architecture, **config)
    theirs = dict(one.base_model.named_parameters())
    with torch.no_grad():
        for name, parameter in other.base_model.named_parameters():
            if name in theirs:  # BERT's pooler is the classifier's
                parameter.copy_(theirs[name])
    return one, other


def tokenizer():
    return tiny_tokenizer(SENTINELS)


def texts(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(60)}" for _ in range(rng.randint(3, longest))) for _ in range(count)]


def fitted(model, some, task="masked_lm", steps=60):
    """A model that has learned which words its texts are made of, and more."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for step in range(steps):
        for _, batch in batches(some, tokenizer(), task, batch_size=len(some), max_length=24, seed=step):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def save_language_model(folder: Path, some: list[str], architecture: str = "bert", **config) -> Path:
    """A tiny model that was trained on `some` texts, with its language-model head and tokenizer."""
    fitted(lm(architecture, dropout=0.0, **config), some, task_of(architecture)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _electra(kind, *, num_layers: int = 3, dropout: float = 0.1, seed: int = 0) -> nn.Module:
    config = ElectraConfig(
        vocab_size=VOCABULARY,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
        num_labels=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.train()

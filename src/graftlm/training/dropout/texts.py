"""Texts as examples of a model's pretraining task: masked, shifted or with corrupted spans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graftlm.errors import DataError, ModelError, SetupError
from graftlm.measure.likelihood import IGNORED

MASKED, REPLACED, KEPT = 0.15, 0.1, 0.1
NOISE, SPAN = 0.15, 3.0
_WINDOW = 8  # batches that are sorted by length together, so that little is padded
_TASK_OF_CLASS = {
    "ForMaskedLM": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForConditionalGeneration": "seq2seq_lm",
}


@dataclass(frozen=True)
class Example:
    """One text as the model reads it: `ids` (input), `labels` (−100: not predicted), `text` (its ids unchanged)."""

    index: int
    ids: list[int]
    labels: list[int]
    text: list[int]


def pretraining_task(model: nn.Module) -> str:
    """``masked_lm``, ``causal_lm`` or ``seq2seq_lm`` (span corruption), from the class of the model.

    Raises:
        ModelError: the model has no language-model head.
    """
    names = [type(module).__name__ for module in model.modules()]
    if "ElectraForPreTraining" in names:
        raise discriminator("ElectraForPreTraining")
    if "BertForPreTraining" in names:  # its first output is that of the masked LM
        return "masked_lm"
    for name in names:
        for ending, task in _TASK_OF_CLASS.items():
            if name.endswith(ending):
                return task
    raise ModelError(
        "the Fisher information of a pretraining loss needs the model with its language-model head",
        found=names[0],
        allowed="…ForMaskedLM, …ForCausalLM, …LMHeadModel, …ForConditionalGeneration, BertForPreTraining",
        fix="AutoModelForMaskedLM.from_pretrained(…), or AutoModelForCausalLM, or AutoModelForSeq2SeqLM",
    )


Batch = tuple[list[Example], dict[str, Tensor]]


def discriminator(found: str) -> ModelError:
    """ELECTRA's discriminator was pretrained to find replaced tokens, which is no language modelling."""
    return ModelError(
        "rates come from a language model's loss, and ELECTRA's discriminator has none: it finds replaced tokens",
        found=found,
        allowed="ELECTRA's generator (ElectraForMaskedLM), whose rates fit models on the generator's backbone only",
        fix="a checkpoint whose name ends in -generator; or another encoder, such as BERT, RoBERTa or DistilBERT",
    )


def windows(
    texts: Iterable[str],
    tokenizer,
    task: str,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    max_examples: int | None = None,
) -> Iterator[list[Batch]]:
    """Streams texts as padded batches; what is masked in a text depends on `seed` and its position alone.

    A window is the batches of the next few texts of the stream, sorted by length. Who stops early has to stop behind a
    whole window: what comes first in it are its shortest texts. Texts with nothing to predict (no token but special
    ones; a single one for causal LM and span corruption) are left out, and do not count in `max_examples`.

    Raises:
        DataError: a text that is not a string, or a single string in place of texts.
        ModelError: the tokenizer has no mask token (masked LM) or no sentinels (span corruption).
    """
    if isinstance(texts, str | bytes | Mapping):
        raise DataError("texts is one string or a mapping, not many strings", found=type(texts).__name__, fix="[text]")
    make = _Maker(tokenizer, task, max_length, seed)
    examples = (example for index, text in enumerate(texts) if (example := make(index, text)) is not None)
    stream = islice(examples, max_examples)
    while window := list(islice(stream, _WINDOW * batch_size)):
        window.sort(key=lambda example: (len(example.ids), len(example.labels)))
        parts = [window[start : start + batch_size] for start in range(0, len(window), batch_size)]
        yield [(part, _collate(part, make.pad)) for part in parts]


def pretraining_windows(
    model: Any,
    texts: Iterable[str],
    tokenizer,
    task: str,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    max_examples: int | None,
) -> Iterator[list[Batch]]:
    """`windows` for a model: no longer than its table of positions.

    Raises:
        SetupError: a number that is none or too small.
    """
    for what, value, least in (
        ("max_examples", max_examples, 2),
        ("batch_size", batch_size, 1),
        ("max_length", max_length, 4),
        ("seed", seed, 0),
    ):
        if what == "max_examples" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SetupError(f"{what} is a number of at least {least}", found=repr(value), fix=f"{what}={least}")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and task != "seq2seq_lm":
        max_length = min(max_length, positions - 2)  # RoBERTa counts positions from 2
    return windows(
        texts,
        tokenizer,
        task,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        max_examples=max_examples,
    )


def batches(texts: Iterable[str], tokenizer, task: str, **how) -> Iterator[Batch]:
    """All batches of all `windows`."""
    return chain.from_iterable(windows(texts, tokenizer, task, **how))


class _Maker:
    def __init__(self, tokenizer, task: str, max_length: int, seed: int):
        self._tokenizer, self._task, self._max_length, self._seed = tokenizer, task, max_length, seed
        self._special = set(tokenizer.all_special_ids)
        self._ordinary = [i for i in range(len(tokenizer)) if i not in self._special]
        pad = tokenizer.pad_token_id
        self.pad = next(i for i in (pad, tokenizer.eos_token_id, 0) if i is not None)
        if task == "masked_lm" and tokenizer.mask_token_id is None:
            raise ModelError("the tokenizer has no mask token, which masked LM needs", found=type(tokenizer).__name__)
        self._sentinels = _sentinels(tokenizer) if task == "seq2seq_lm" else []

    def __call__(self, index: int, text: str) -> Example | None:
        if not isinstance(text, str):
            raise DataError("a text is not a string", found=f"text {index}: {type(text).__name__}")
        rng = np.random.default_rng([self._seed, index])
        if self._task == "seq2seq_lm":
            ids = self._tokenizer(text, add_special_tokens=False, truncation=True, max_length=self._max_length - 1)
            return self._span_corruption(index, list(ids["input_ids"]), rng)
        ids = list(self._tokenizer(text, truncation=True, max_length=self._max_length)["input_ids"])
        if self._task == "causal_lm":
            return Example(index, ids, ids, ids) if len(ids) > 1 and set(ids) - self._special else None
        return self._masked(index, ids, rng)

    def _masked(self, index: int, ids: list[int], rng: np.random.Generator) -> Example | None:
        """BERT's rule: 15 % of the tokens, at least one; of these 80 % masked, 10 % replaced, 10 % kept."""
        ordinary = [i for i, token in enumerate(ids) if token not in self._special or token == self._unknown]
        if not ordinary:
            return None
        chosen = rng.choice(ordinary, max(1, round(MASKED * len(ordinary))), replace=False)
        given, labels = list(ids), [IGNORED] * len(ids)
        for position in sorted(chosen.tolist()):
            labels[position] = ids[position]
            draw = rng.random()
            if draw < 1 - REPLACED - KEPT:
                given[position] = self._tokenizer.mask_token_id
            elif draw < 1 - KEPT:
                given[position] = self._ordinary[rng.integers(len(self._ordinary))]
        return Example(index, given, labels, ids)

    @property
    def _unknown(self) -> int | None:
        return self._tokenizer.unk_token_id

    def _span_corruption(self, index: int, ids: list[int], rng: np.random.Generator) -> Example | None:
        """T5's rule: 15 % of the tokens in spans of 3 on average become one sentinel each, and are the target."""
        if len(ids) < 2:
            return None
        noisy = min(max(1, round(NOISE * len(ids))), len(ids) - 1)
        spans = min(max(1, round(noisy / SPAN)), noisy, len(ids) - noisy, len(self._sentinels))
        kept, lost = _parts(len(ids) - noisy, spans, rng), _parts(noisy, spans, rng)
        given: list[int] = []
        target: list[int] = []
        position = 0
        for sentinel, keep, lose in zip(self._sentinels, kept, lost, strict=False):
            given += [*ids[position : position + keep], sentinel]
            target += [sentinel, *ids[position + keep : position + keep + lose]]
            position += keep + lose
        end = [self._tokenizer.eos_token_id] if self._tokenizer.eos_token_id is not None else []
        return Example(index, given + end, target + end, ids)


def _parts(total: int, count: int, rng: np.random.Generator) -> list[int]:
    """`total` cut into `count` random lengths of at least 1."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff([0, *cuts, total]).tolist()


def _sentinels(tokenizer) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    for form in ("<extra_id_{}>", "▁<extra_id_{}>"):  # T5's and mT5's
        found = [vocabulary[form.format(i)] for i in range(100) if form.format(i) in vocabulary]
        if found:
            return found
    raise ModelError(
        "the tokenizer has no sentinels, which span corruption replaces spans with",
        found=type(tokenizer).__name__,
        allowed="a vocabulary with <extra_id_0>, <extra_id_1>, … as T5's and mT5's",
    )


def _collate(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    width = max(len(example.ids) for example in examples)
    target = max(len(example.labels) for example in examples)
    if len(examples) in (width, target) and len(examples) > 1:
        # as many rows as columns look like a table of positions to the gradient hooks, which then take a slow way
        width, target = width + (len(examples) == width), target + (len(examples) == target)
    ids = torch.full((len(examples), width), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(examples), target), IGNORED)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = 1
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}

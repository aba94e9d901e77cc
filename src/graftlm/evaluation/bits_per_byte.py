r"""Held-out text: how many bits a language model needs for a byte of it.

A causal model scores every token once, given the text before it (strided windows). A masked model fills in the same
seeded gaps on every call: a pseudo-likelihood, comparable between masked models only.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graftlm.errors import DataError, ModelError, SetupError
from graftlm.evaluation.result import Interval
from graftlm.evaluation.transfer import score
from graftlm.measure.likelihood import IGNORED

LANGUAGE_MODELLING = ("causal_lm", "masked_lm")
MASKED = 0.15  # share of the tokens of a held-out text that a masked model fills in
# what looks like a special token in raw text is text; and a long document is no reason for a warning
AS_TEXT = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
_SEED = 20_260  # of the gaps in held-out text: the same for every recipe and seed, so that runs are comparable


@dataclass(frozen=True)
class Marks:
    """The special tokens that stand before and after a text, or each piece of one."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def room(self, length: int, least: int = 2) -> int:
        """Tokens of text that fit between the marks.

        Raises:
            SetupError: fewer than `least`.
        """
        room = length - len(self.before) - len(self.after)
        if room < least:
            raise SetupError(
                "no room for text in a model input",
                found=f"max_length {length}, {length - room} of it special tokens",
                allowed=f"at least {length - room + least}",
            )
        return room


@dataclass(frozen=True)
class Window:
    """A part of a held-out document as a model reads it.

    Attributes:
        owner: position of the document.
        ids: model input.
        labels: the tokens that are scored here, `IGNORED` elsewhere; aligned with `ids`.
        bytes: UTF-8 bytes of the document that the scored tokens stand for.
        tokens: how many tokens are scored.
    """

    owner: int
    ids: list[int]
    labels: list[int]
    bytes: int
    tokens: int


def marks(tokenizer: Any, task: str) -> Marks:
    """What this tokenizer puts around a text; a causal model reads at least one token before the first of a text.

    Where the tokenizer adds nothing (GPT-2, Qwen), that is its beginning-of-text token, or else its end-of-text token,
    which ends the text before.

    Raises:
        ModelError: no such token (causal LM), or no mask token (masked LM).
    """
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    text = [position for position, one in enumerate(special) if not one]
    first, last = (text[0], text[-1] + 1) if text else (len(ids), len(ids))
    before, after = tuple(ids[:first]), tuple(ids[last:])
    if task == "masked_lm":
        if tokenizer.mask_token_id is None:
            raise ModelError(
                "the tokenizer has no mask token, which masked language modelling needs",
                found=type(tokenizer).__name__,
                fix="task: causal_lm, if this is a causal language model",
            )
        return Marks(before, after)
    if not before:
        start = next((one for one in (tokenizer.bos_token_id, tokenizer.eos_token_id) if one is not None), None)
        if start is None:
            raise ModelError(
                "the tokenizer has neither a beginning-of-text nor an end-of-text token to put before a text",
                found=type(tokenizer).__name__,
            )
        before = (start,)
    return Marks(before, () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))


def token_bytes(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """UTF-8 bytes of each token, from the end of the token before to its own end; together all bytes of the text.

    >>> token_bytes("né 1 ", [(0, 2), (3, 4)]).tolist()             # "né" and " 1 "
    [3, 3]
    """
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    lengths = 1 + (codes > 0x7F) + (codes > 0x7FF).astype(int) + (codes > 0xFFFF)
    total = np.concatenate([[0], np.cumsum(lengths)])
    ends = np.maximum.accumulate([end for _, end in offsets])
    ends[-1] = len(text)
    return np.diff(total[ends], prepend=0)


def causal_pieces(count: int, room: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(first token given, first token scored, end) of the pieces of a text; each of `count` tokens is scored once.

    >>> list(causal_pieces(10, room=6, context=2))
    [(0, 0, 6), (4, 6, 10)]
    """
    start = 0
    while start < count:
        given = max(0, start - context)
        end = min(count, given + room)
        yield given, start, end
        start = end


def windows(
    texts: Iterable[str],
    tokenizer: Any,
    task: str,
    *,
    max_length: int,
    stride: int,
    origin: str = "texts",
    first: int = 0,
) -> Iterator[Window]:
    """Held-out documents as model inputs.

    Args:
        texts: the documents.
        tokenizer: a fast one (offsets).
        task: ``causal_lm`` or ``masked_lm``.
        max_length: tokens of a window, special ones included.
        stride: causal LM: tokens before the scored ones that a window repeats as context.
        origin: what errors call the texts.
        first: position of the first of them in its data set, which the gaps depend on.

    Raises:
        DataError: a document of fewer than two tokens.
        SetupError: a stride that leaves less than half of a window to score.
        ModelError: see `marks`.
    """
    around = marks(tokenizer, task)
    causal = task == "causal_lm"
    before, after = list(around.before), [] if causal else list(around.after)
    room = Marks(around.before, tuple(after)).room(max_length)
    if causal and stride > min(max_length // 2, room - 1):
        raise SetupError(
            "training.stride must leave about half of a window to score",
            found=f"stride {stride}, max_length {max_length}",
            fix=f"training.stride={max_length // 4}",
        )
    for owner, text in enumerate(texts, start=first):
        encoded = tokenizer(text, return_offsets_mapping=True, **AS_TEXT)
        ids = encoded["input_ids"]
        check_document(ids, f"{origin}, row {owner + 1}")
        sizes = token_bytes(text, encoded["offset_mapping"])
        for given, start, end in causal_pieces(len(ids), room, stride if causal else 0):
            scored = np.arange(start, end)
            row, labels = ids[given:end], [IGNORED] * (end - given)
            if not causal:
                rng = np.random.default_rng([_SEED, owner, start])
                scored = start + gaps(rng, end - start, MASKED)
            for position in scored:
                labels[position - given] = ids[position]
                if not causal:
                    row[position - given] = tokenizer.mask_token_id
            marked = [*([IGNORED] * len(before)), *labels, *([IGNORED] * len(after))]
            yield Window(owner, [*before, *row, *after], marked, int(sizes[scored].sum()), len(scored))


def check_document(ids: Sequence[int], place: str) -> None:
    """Raises for a document in which there is nothing to learn or to score."""
    if len(ids) < 2:
        raise DataError(
            f"{place}: a document of fewer than two tokens",
            found=f"{len(ids)} tokens",
            fix="delete it, or join it to the one before it",
        )


def gaps(rng: np.random.Generator, count: int, share: float) -> np.ndarray:
    """Positions that are masked, of `count` tokens: the nearest whole number to the share, at least one."""
    return np.sort(rng.choice(count, max(1, round(share * count)), replace=False))


def token_losses(task: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of each scored token, and the row it is in; only scored positions become float32.

    Args:
        task: ``causal_lm``: position i predicts token i + 1; ``masked_lm``: itself.
        logits: (rows, tokens, vocabulary).
        labels: (rows, tokens).
    """
    if task == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    mask = labels != IGNORED
    found = logits[mask]
    found = found if found.dtype == torch.float64 else found.float()
    return nn.functional.cross_entropy(found, labels[mask], reduction="none"), mask.nonzero()[:, 0]


def row_nats(task: str, logits: Tensor, labels: Tensor) -> Tensor:
    """−Σ log p of the scored tokens of each row; see `token_losses`."""
    losses, rows = token_losses(task, logits, labels)
    return torch.zeros(len(labels), dtype=losses.dtype, device=losses.device).index_add(0, rows, losses)


def totals(scored: Sequence[Window], nats: Sequence[float], documents: int) -> list[list[float]]:
    """[nats, bytes, tokens] of each document, from those of its windows."""
    table = np.zeros((documents, 3))
    for window, value in zip(scored, nats, strict=True):
        table[window.owner] += value, window.bytes, window.tokens
    return [[float(nats), int(size), int(tokens)] for nats, size, tokens in table]


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    task: str = "causal_lm",
    max_length: int = 128,
    stride: int = 32,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Interval]:
    r"""Bits that a language model needs for a byte of held-out text, with a bootstrap interval over documents.

    Causal LM, each token of each document d once, the first one given the token that begins a text:

    .. math:: \mathrm{bpb} = \frac{\sum_d \sum_i -\log_2 p(x_{di} \mid x_{d,<i})}{\sum_d \mathrm{bytes}(d)}

    A token is given at least `stride` tokens of its document before it, all of them where the document fits into a
    window. Bytes are those of the text in UTF-8, so models with other tokenizers are comparable, as long as neither
    loses text: a lower-casing tokenizer, or one with unknown tokens, is scored on less than the text.

    Masked LM: 15 % of the tokens, drawn once for all models with this tokenizer, are masked at the same time;
    ``masked_bits_per_byte`` is their bits by their bytes. It is no likelihood of the text: comparable between masked
    models only.

    Args:
        model: on the device where it is to run; its mode is restored.
        tokenizer: a fast one.
        texts: documents of two tokens or more.
        task: ``causal_lm`` or ``masked_lm``.
        max_length: tokens of a window.
        stride: tokens that a window repeats as context.
        batch_size: windows in a forward pass.
        seed: of the bootstrap.

    Returns:
        ``bits_per_byte`` and ``nats_per_token``, or ``masked_bits_per_byte`` and ``nats_per_masked_token``.

    Raises:
        DataError: no text, or one of fewer than two tokens.
        ModelError, SetupError: a tokenizer without the tokens that this needs; a window without room.

    Source: Gao et al., *The Pile* (arXiv 2101.00027), Section 3.1, for bits per byte; Salazar et al., *Masked Language
    Model Scoring* (arXiv 1910.14659), equation 1, for the pseudo-log-likelihood. *Differs from the paper in*: masked
    tokens are masked together, 15 % at a time and once, not each alone; windows overlap.
    """
    if task not in LANGUAGE_MODELLING:
        raise SetupError("not a language modelling task", found=task, allowed=LANGUAGE_MODELLING)
    if isinstance(texts, str) or not len(texts):
        raise DataError("texts is a list of documents", found=repr(texts)[:80], fix="[text]")
    scored = list(windows(texts, tokenizer, task, max_length=max_length, stride=stride))
    device, was_training = next(model.parameters()).device, model.training
    nats: list[float] = []
    model.eval()
    try:
        for start in range(0, len(scored), batch_size):
            batch = collate([vars(window) for window in scored[start : start + batch_size]], tokenizer)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            nats += row_nats(task, model(**batch).logits, labels).tolist()
    finally:
        model.train(was_training)
    found = totals(scored, nats, len(texts))
    return score(task, [len(text.encode()) for text in texts], found, seed=seed)


def collate(rows: Sequence[Any], tokenizer: Any) -> dict[str, Tensor]:
    """Rows with `ids` (or `input_ids`) and `labels` as a batch, padded on the right."""
    given = [row["ids"] if "ids" in row else row["input_ids"] for row in rows]
    width = max(map(len, given))
    pad = next(one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if one is not None)
    batch = {
        "input_ids": torch.full((len(rows), width), pad),
        "attention_mask": torch.zeros((len(rows), width), dtype=torch.long),
        "labels": torch.full((len(rows), width), IGNORED),
    }
    for number, (ids, row) in enumerate(zip(given, rows, strict=True)):
        batch["input_ids"][number, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][number, : len(ids)] = 1
        batch["labels"][number, : len(ids)] = torch.tensor(row["labels"])
    return batch

"""The measurement behind guided dropout: one row of squared gradients a text, until the ranking is settled."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from graftlm.errors import DataError, ModelError, SetupError
from graftlm.measure.fisher import undisturbed
from graftlm.measure.likelihood import IGNORED
from graftlm.measure.pretraining import squared_gradients
from graftlm.training.dropout.heads import check_head as check_lm_head
from graftlm.training.dropout.rates import rank_error
from graftlm.training.dropout.sites import Block, canonical
from graftlm.training.dropout.texts import Example, pretraining_task, pretraining_windows

_FEWEST, _GROWTH = 64, 1.15


@dataclass(frozen=True)
class TensorScore:
    """The mean over texts of the mean squared gradient of a tensor's elements, its standard error, and their number."""

    score: float
    standard_error: float
    elements: int


@dataclass(frozen=True)
class Settled:
    """How a measurement ended.

    Attributes:
        examples: texts that were used.
        tokens: predicted tokens.
        loss: mean cross-entropy a predicted token, in nats.
        rank_error: the bootstrap's standard deviation of r / R, averaged over blocks.
        early: whether it stopped because the ranking was settled, before the texts came to their end.
    """

    examples: int
    tokens: int
    loss: float
    rank_error: float
    early: bool

    def __str__(self) -> str:
        how = "ranking settled" if self.early else "all texts used"
        return f"{self.examples} texts, {how}, ranks certain to ±{100 * self.rank_error:.1f} % of their range"


def estimate_scores(
    model: nn.Module,
    backbone: nn.Module,
    texts: Iterable[str],
    tokenizer,
    *,
    names: Sequence[str],
    ranked: Sequence[Block],
    max_examples: int | None,
    tolerance: float,
    max_length: int,
    batch_size: int,
    seed: int,
    check_head: bool,
    progress: bool,
) -> tuple[dict[str, TensorScore], str, Settled]:
    """Scores of the named tensors, the task, and how the measurement ended; see `graftlm.GuidedDropout.estimate`."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < 1:
        raise SetupError(
            "tolerance is a share of the ranks' range",
            found=repr(tolerance),
            allowed="from 0 (use all texts) to below 1",
            fix="tolerance=0.02",
        )
    task = pretraining_task(model)
    by_name = {canonical(name): parameter for name, parameter in backbone.named_parameters()}
    parameters = {name: by_name[name] for name in names}
    mixing = _mixing(parameters, ranked)
    device = next(iter(parameters.values())).device
    run = _Run(check_head, model)

    rows: list[np.ndarray] = []
    error, early, check_at = math.inf, False, _FEWEST
    total = max_examples or (len(texts) if isinstance(texts, Sized) else None)
    stream = pretraining_windows(
        backbone,
        texts,
        tokenizer,
        task,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        max_examples=max_examples,
    )
    with (
        undisturbed(model, {"measured": list(parameters.values())}),
        tqdm(total=total, desc="Fisher information", unit="text", disable=not progress) as bar,
    ):
        for window in stream:
            for examples, batch in window:
                losses, squares = squared_gradients(
                    model, {name: value.to(device) for name, value in batch.items()}, parameters, task=task
                )
                _check_finite(examples, losses, squares, list(parameters))
                run.add(examples, losses, task)
                rows.append(squares.numpy())
                bar.update(len(examples))
            if run.examples >= check_at:  # between windows only: inside one the shortest texts come first
                run.check()
                error = rank_error(np.concatenate(rows) @ mixing)
                bar.set_postfix_str(f"ranks ±{100 * error:.1f} %")
                check_at = math.ceil(run.examples * _GROWTH)
                early = 0 < tolerance >= error
                if early:
                    break
        if not rows:
            raise DataError("no text has anything to predict", found="texts", fix="give texts of two words and more")
        if run.examples < 2:
            raise DataError(
                "one text cannot show how certain a ranking is",
                found="1 text with anything to predict",
                allowed="2 and more",
                fix="give two texts of two words and more",
            )
        run.check()
        if not early:
            error = rank_error(np.concatenate(rows) @ mixing)
        settled = Settled(run.examples, run.tokens, run.loss, error, early)
        bar.set_postfix_str("")
        if progress:
            tqdm.write(str(settled), file=sys.stderr)
    values = np.concatenate(rows)
    return _scores(values, parameters), task, settled


def _check_finite(
    examples: Sequence[Example], losses: torch.Tensor, squares: torch.Tensor, names: Sequence[str]
) -> None:
    """NaN and infinity would be ranked like any number."""
    broken = ~(losses.isfinite() & squares.isfinite().all(1))
    if not broken.any():
        return
    row = int(broken.nonzero()[0])
    bad = (~squares[row].isfinite()).nonzero()
    where = f", squared gradient of {names[int(bad[0])]}: {float(squares[row][bad[0]])}" if len(bad) else ""
    raise ModelError(
        "the model's loss or its gradient is not a finite number",
        found=f"text {examples[row].index}: loss {float(losses[row])}{where}",
        allowed="weights without NaN, in a precision that holds the gradients",
        fix="load the checkpoint again, in dtype=torch.float32",
    )


def _scores(values: np.ndarray, parameters: dict[str, nn.Parameter]) -> dict[str, TensorScore]:
    spread = values.std(axis=0, ddof=1) / math.sqrt(len(values))
    return {
        name: TensorScore(float(values[:, i].mean()), float(spread[i]), parameters[name].numel())
        for i, name in enumerate(parameters)
    }


def _mixing(parameters: dict[str, nn.Parameter], blocks: Sequence[Block]) -> np.ndarray:
    """(tensors, blocks): a block's score is the unweighted mean over its tensors."""
    columns = {name: i for i, name in enumerate(parameters)}
    mixing = np.zeros((len(columns), len(blocks)))
    for column, block in enumerate(blocks):
        mixing[[columns[name] for name in block.tensors], column] = 1 / len(block.tensors)
    return mixing


class _Run:
    """Counts examples, tokens and losses, and looks at the head once there are enough of them."""

    def __init__(self, check_head: bool, model: nn.Module):
        self.examples = self.tokens = 0
        self._nats = 0.0
        self._targets: Counter[int] = Counter()
        self._text: Counter[int] = Counter()
        self._unchecked, self._model = check_head, model

    @property
    def loss(self) -> float:
        return self._nats / max(self.tokens, 1)

    def add(self, examples: Sequence[Example], losses: torch.Tensor, task: str) -> None:
        for example, loss in zip(examples, losses.tolist(), strict=True):
            targets = [label for label in example.labels[1 if task == "causal_lm" else 0 :] if label != IGNORED]
            self.examples += 1
            self.tokens += len(targets)
            self._nats += loss * len(targets)
            self._targets.update(targets)
            self._text.update(example.text)
            if task == "seq2seq_lm":  # sentinels and the end are predicted, but stand in no text
                self._text.update(target for target in targets if target not in set(example.text))

    def check(self) -> None:
        if self._unchecked:
            self._unchecked = False
            check_lm_head(self._model, self.loss, self._targets, self._text)

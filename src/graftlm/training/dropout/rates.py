"""From block scores to dropout rates: the paper's schedule, its options, and the controls of a fair comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graftlm.errors import SetupError

SCHEDULES = ("guided", "uniform", "shuffled", "reversed", "type")
LINEAR_IN = ("rank", "score")
NOISE = ("bernoulli", "gaussian")


@dataclass(frozen=True)
class Schedule:
    r"""How scores become rates.

    .. math:: p_r = p_\text{upper} + (p_\text{lower} - p_\text{upper}) \, r / R

    with r = 0 … R the rank of a block by its score, ascending: the block that holds the least information gets the
    highest rate, the one that holds the most gets the lowest.

    Attributes:
        name: ``guided``; or a control on it: ``uniform`` (the guided mean everywhere), ``shuffled`` (the guided rates
            in a random order), ``reversed`` (the most for the most informative; with ``linear_in="score"`` its mean is
            another, so hold `mean` for both), ``type`` (each block gets the guided mean of its type, so that depth says
            nothing).
        upper, lower: the highest and the lowest rate.
        linear_in: ``rank``, or ``score``: r / R is then (s − min s) / (max s − min s).
        within_type: rank the blocks of each type among themselves.
        mean: scale all rates so that their mean is this; None: as they come.
        seed: of ``shuffled``.
        noise: ``bernoulli`` (dropout), or ``gaussian``: multiplicative noise of the same variance p / (1 − p).

    Raises:
        SetupError: an unknown name, rates outside [0, 1), or a mean that would need one.

    Source: arXiv 2406.14005, Section 4: linear in rank, p_upper = 0.10, p_lower = 0.

    Differs from the paper in: blocks of equal score keep the order of the model; a single block gets p_upper.
    """

    name: str = "guided"
    upper: float = 0.10
    lower: float = 0.0
    linear_in: str = "rank"
    within_type: bool = False
    mean: float | None = None
    seed: int = 0
    noise: str = "bernoulli"

    def __post_init__(self):
        for what, value, allowed in (
            ("schedule", self.name, SCHEDULES),
            ("linear_in", self.linear_in, LINEAR_IN),
            ("noise", self.noise, NOISE),
        ):
            if value not in allowed:
                raise SetupError(f"unknown {what} of guided dropout", found=repr(value), allowed=allowed)
        for what in ("upper", "lower", "mean"):
            value = getattr(self, what)
            if value is not None and not (isinstance(value, int | float) and 0 <= value < 1):
                raise SetupError(f"{what} is a dropout rate", found=repr(value), allowed="0 ≤ rate < 1")
        if self.lower > self.upper:
            raise SetupError(
                "the lowest rate is above the highest",
                found=f"lower={self.lower}, upper={self.upper}",
                fix="schedule='reversed' gives the most informative blocks the most dropout",
            )

    def rates(self, scores: Sequence[float], kinds: Sequence[str]) -> list[float]:
        """One rate a block, in the order of `scores`."""
        rates = self._guided(np.asarray(scores, dtype=float), kinds)
        if self.name == "uniform":
            rates = np.full(len(rates), rates.mean())
        elif self.name == "shuffled":
            rates = np.random.default_rng(self.seed).permutation(rates)
        elif self.name == "type":
            rates = np.array([rates[np.array(kinds) == kind].mean() for kind in kinds])
        return rates.tolist()

    def _guided(self, scores: np.ndarray, kinds: Sequence[str]) -> np.ndarray:
        groups = np.asarray(kinds) if self.within_type else np.zeros(len(scores))
        share = np.zeros(len(scores))
        for group in dict.fromkeys(groups.tolist()):
            inside = groups == group
            share[inside] = self._share(scores[inside])
        if self.name == "reversed":
            share = 1 - share
        rates = self.upper + (self.lower - self.upper) * share
        return rates if self.mean is None else self._with_mean(rates)

    def _share(self, scores: np.ndarray) -> np.ndarray:
        """0 for the block with the least information, 1 for the one with the most."""
        if self.linear_in == "rank":
            return ranks(scores) / max(len(scores) - 1, 1)
        width = np.ptp(scores)
        return (scores - scores.min()) / width if width > 0 else np.zeros(len(scores))

    def _with_mean(self, rates: np.ndarray) -> np.ndarray:
        if self.mean == 0 or rates.mean() == 0:
            if self.mean:
                raise SetupError("all rates are 0, so no scale gives them this mean", found=f"mean={self.mean}")
            return np.zeros(len(rates))
        scaled = rates * (self.mean / rates.mean())
        if scaled.max() >= 1:
            raise SetupError(
                "with this mean a block would lose all of its signal",
                found=f"mean={self.mean}, highest rate {scaled.max():.3f}",
                allowed=f"mean < {rates.mean() / rates.max():.3f}",
            )
        return scaled


def ranks(scores: np.ndarray) -> np.ndarray:
    """0 for the smallest; equal scores in the order in which they come."""
    found = np.empty(len(scores), dtype=int)
    found[np.argsort(scores, kind="stable")] = np.arange(len(scores))
    return found


def rank_error(scores: np.ndarray, resamples: int = 100, seed: int = 0) -> float:
    """How far from settled a ranking of blocks is: the bootstrap's standard deviation of r / R, averaged over blocks.

    Args:
        scores: (examples, blocks); a block's score is its mean over the examples.
    """
    examples, blocks = scores.shape
    if examples < 2 or blocks < 2:
        return math.inf if examples < 2 else 0.0
    counts = np.random.default_rng(seed).multinomial(examples, np.full(examples, 1 / examples), size=resamples)
    drawn = np.array([ranks(row) for row in counts @ scores])
    return float(drawn.std(axis=0).mean() / (blocks - 1))

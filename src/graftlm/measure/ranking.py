"""How good a ranking of source tasks is, once it is known how each of them turned out."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from graftlm.errors import DataError


def regret_at_k(
    scores: Float[np.ndarray, " scores"],
    outcomes: Float[np.ndarray, " outcomes"],
    k: int,
    *,
    without_transfer: float | None = None,
) -> float:
    r"""What is lost by trying the k best-scored sources only, in percent of the best outcome.

    .. math:: 100 \cdot \frac{o^* - \max_{i \in \text{top } k} o_i}{o^*}

    Args:
        scores: of the ranking; higher is better. Equal scores stay in the order in which they come.
        outcomes: o, the target metric after transfer from each source; higher is better.
        k: how many sources are tried.
        without_transfer: the outcome without any source; :math:`o^*` is then the best of all of them and it.

    Raises:
        DataError: no source, scores and outcomes of different lengths or not finite, a best outcome that is not
            positive, or k outside 1 … sources.

    Source: arXiv 2410.15148, Section 5 (regret@k).

    >>> regret_at_k(np.array([3.0, 2.0, 1.0]), np.array([0.6, 0.8, 0.7]), k=1)
    25.0
    """
    _check(scores, outcomes)
    if not 1 <= k <= len(scores):
        raise DataError("k counts sources of the ranking", found=k, allowed=f"1 to {len(scores)}")
    best = max(float(outcomes.max()), -np.inf if without_transfer is None else without_transfer)
    if best <= 0:
        raise DataError("regret is a share of the best outcome, which is not positive", found=best)
    tried = outcomes[_order(scores)[:k]]
    return float(round(100 * (best - tried.max()) / best, 12))


def ndcg(scores: Float[np.ndarray, " scores"], outcomes: Float[np.ndarray, " outcomes"]) -> float:
    r"""Normalised discounted cumulative gain of the whole ranking, at most 1.

    .. math:: \frac{\sum_r g_{\pi(r)} / \log_2(r + 1)}{\sum_r g_{(r)} / \log_2(r + 1)}, \qquad g = 2^{100\,o} - 1

    with π the order by score and (r) that by outcome. The gain doubles with each point of the outcome, so the measure
    is decided by where the very best sources stand.

    Args:
        scores: of the ranking; higher is better. Equal scores stay in the order in which they come.
        outcomes: o, between 0 and 1.

    Raises:
        DataError: no source, scores and outcomes of different lengths or not finite, outcomes outside 0 … 1, or all 0.

    Source: arXiv 2410.15148, Section 5, and its released code (the gain).

    >>> round(ndcg(np.array([1.0, 2.0]), np.array([0.02, 0.01])), 4)
    0.7967
    """
    _check(scores, outcomes)
    if outcomes.min() < 0 or outcomes.max() > 1 or outcomes.max() == 0:
        raise DataError(
            "outcomes lie between 0 and 1, and one is above 0", found=f"{outcomes.min()} to {outcomes.max()}"
        )
    gains = 2.0 ** (100 * outcomes) - 1
    discount = 1 / np.log2(np.arange(len(scores)) + 2)
    return float((gains[_order(scores)] @ discount) / (np.sort(gains)[::-1] @ discount))


def _order(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, kind="stable")


def _check(scores: np.ndarray, outcomes: np.ndarray) -> None:
    if len(scores) != len(outcomes) or not len(scores):
        raise DataError("there is one outcome for each score", found=f"{len(scores)} scores, {len(outcomes)} outcomes")
    if not (np.isfinite(scores).all() and np.isfinite(outcomes).all()):
        raise DataError("scores and outcomes are finite", found="NaN or infinity")

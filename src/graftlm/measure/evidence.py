r"""The evidence of Bayesian linear regression, maximised: what LogME is the mean of.

For a target column y and features F (n × d), :math:`y \sim N(0,\ I/\beta + FF^\top/\alpha)`. With
:math:`t = \alpha/\beta` the best noise precision is :math:`\beta = n / R(t)`, which leaves one unknown:

.. math:: \log p = \tfrac12 \Big[ h(t) + n \log n - n - n \log 2\pi \Big], \qquad
          h(t) = -n \log R(t) - \log\det(I + FF^\top/t), \qquad R(t) = y^\top (I + FF^\top/t)^{-1} y

Written so, no term depends on which of n and d is larger, and no rank has to be decided on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float
from numpy.polynomial.chebyshev import chebvander

FLOOR, CEILING = 1e-12, 1e5  # of t, in units of the largest eigenvalue of FFᵀ
_STEP = 1.7  # of the grid in log t, at most: h is made of logistic curves in log t, each about 4 wide
# Between grid points h is interpolated at Chebyshev nodes: its singularities lie at t = −σ, π away in log t, so that
# twelve nodes over two steps leave 4⁻¹² of it, and only where the peak is depends on that, not its height.
_NODES = np.cos(np.pi * (np.arange(12) + 0.5) / 12)
_FINE = np.linspace(-1, 1, 401)
_INTERPOLATE = chebvander(_FINE, 11) @ np.linalg.inv(chebvander(_NODES, 11))

Profile = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Evidence:
    """Maximised log evidence a row, in nats.

    Attributes:
        columns: of each target column.
        ratios: α/β of each column; infinite where the features say nothing of it.
        lost: bound on the relative rounding error, in units of the machine epsilon of the arithmetic.
    """

    columns: Float[np.ndarray, " targets"]
    ratios: Float[np.ndarray, " targets"]
    lost: float = 0.0

    @property
    def score(self) -> float:
        """The mean over the columns."""
        return float(self.columns.mean())


def grid_of(lowest: float, largest: float) -> Float[np.ndarray, " points"]:
    """Values of log t, up to the ceiling over the largest eigenvalue."""
    low, high = np.log(lowest), np.log(CEILING * largest)
    return np.linspace(low, high, 1 + int(np.ceil((high - low) / _STEP)))


def climb(
    profile: Profile, grid: Float[np.ndarray, " points"], values: Float[np.ndarray, " points"]
) -> tuple[float, float]:
    """log t and h at the highest point, every peak of the grid refined.

    Args:
        profile: h of many log t.
        grid: from `grid_of`.
        values: h on it.
    """
    best = int(values.argmax())
    where, highest = float(grid[best]), float(values[best])
    middle = values[1:-1]
    for peak in (1 + np.flatnonzero((middle >= values[:-2]) & (middle >= values[2:]))).tolist():
        half = (grid[peak + 1] - grid[peak - 1]) / 2
        fine = _INTERPOLATE @ profile(grid[peak] + half * _NODES)
        top = min(max(int(fine.argmax()), 1), len(fine) - 2)
        left, centre, right = fine[top - 1 : top + 2]
        bend = left - 2 * centre + right
        shift = 0.5 * (left - right) / bend if bend < 0 else 0.0
        at = grid[peak] + half * (_FINE[top] + np.clip(shift, -1, 1) * (_FINE[1] - _FINE[0]))
        height = float(profile(np.array([at]))[0])
        if height > highest:
            where, highest = float(at), height
    return where, highest


def per_row(h: Float[np.ndarray, " targets"], rows: int) -> Float[np.ndarray, " targets"]:
    """log p / n from h."""
    return 0.5 * (h / rows + np.log(rows) - 1 - np.log(2 * np.pi))


def by_svd(features: Float[np.ndarray, "n d"], targets: Float[np.ndarray, "n targets"]) -> Evidence:
    """From the singular values of the features: the slow form, which loses no digits."""
    rows = len(features)
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    values = singular**2
    total = (targets**2).sum(axis=0)
    silent = -rows * np.log(total)  # h for t → ∞
    heights, ratios = silent.copy(), np.full(len(total), np.inf)
    if not np.isfinite(values).all():
        return Evidence(np.full(len(total), np.nan), ratios)
    if not values.any():
        return Evidence(per_row(silent, rows), ratios)
    projected = left.T @ targets
    outside = ((targets - left @ projected) ** 2).sum(axis=0)
    grid = grid_of(FLOOR * float(values[0]), float(values[0]))
    for column, (square, rest) in enumerate(zip((projected**2).T, outside, strict=True)):
        profile = partial(_height, values, square, float(rest), rows)
        where, highest = climb(profile, grid, profile(grid))
        if highest > silent[column]:
            heights[column], ratios[column] = highest, np.exp(where)
    return Evidence(per_row(heights, rows), ratios)


def _height(
    values: np.ndarray, square: np.ndarray, rest: float, rows: int, at: Float[np.ndarray, " points"]
) -> Float[np.ndarray, " points"]:
    """h at many log t, from eigenvalues and what of the column lies in their directions and outside."""
    t = np.exp(at)[:, None]
    residual = (t * square / (t + values)).sum(axis=1) + rest
    return -rows * np.log(residual) - np.log1p(values / t).sum(axis=1)

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
GRAM_FLOOR = 1e-7  # where FFᵀ or FᵀF was formed: below it, it has lost what the evidence depends on
STEP = 1.7  # of the grid in log t, at most: h is made of logistic curves in log t, each about 4 wide
# Between grid points h is interpolated at Chebyshev nodes: its singularities lie at t = −σ, π away in log t, so that
# twelve nodes over two steps leave 4⁻¹² of it, and only where the peak is depends on that, not its height.
NODES = np.cos(np.pi * (np.arange(12) + 0.5) / 12)
FINE = np.linspace(-1, 1, 401)
INTERPOLATE = chebvander(FINE, 11) @ np.linalg.inv(chebvander(NODES, 11))

# h and R at many log t: at each of the column named for it, (points, 1); where none is named, of all, (points, targets)
Profile = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
ALL = np.empty(0, np.intp)


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
    return np.linspace(low, high, 1 + int(np.ceil((high - low) / STEP)))


def climb(
    profile: Profile,
    grid: Float[np.ndarray, " points"],
    values: Float[np.ndarray, "points targets"],
    residuals: Float[np.ndarray, "points targets"],
) -> tuple[Float[np.ndarray, " targets"], Float[np.ndarray, " targets"], Float[np.ndarray, " targets"]]:
    """log t, h and R at the highest point of each column, every peak of the grid refined.

    Two more profiles are taken: of all columns around each point of the grid where one of them peaks, and of each
    column at its peaks.

    Args:
        profile: h and R.
        grid: from `grid_of`.
        values: h on it.
        residuals: R on it.
    """
    top = values.argmax(axis=0)
    where, highest, residual = grid[top], values.max(axis=0), residuals[top, np.arange(len(top))]
    middle = values[1:-1]
    peaks, columns = np.nonzero((middle >= values[:-2]) & (middle >= values[2:]))
    if not len(peaks):
        return where, highest, residual
    step = grid[1] - grid[0]
    points, point_of = np.unique(peaks, return_inverse=True)
    centres = grid[1 + points]
    near, _ = profile((centres[:, None] + step * NODES).ravel(), ALL)
    curves = near.reshape(len(points), len(NODES), -1)[point_of, :, columns] @ INTERPOLATE.T
    tops = np.clip(curves.argmax(axis=1), 1, len(FINE) - 2)
    left, centre, right = (curves[np.arange(len(tops)), tops + side] for side in (-1, 0, 1))
    bend = left - 2 * centre + right
    shift = np.divide(0.5 * (left - right), bend, out=np.zeros(len(tops)), where=bend < 0)
    at = centres[point_of] + step * (FINE[tops] + np.clip(shift, -1, 1) * (FINE[1] - FINE[0]))
    heights, found = profile(at, columns)
    for number in np.argsort(heights[:, 0]):  # the highest last
        if heights[number, 0] > highest[columns[number]]:
            column = columns[number]
            where[column], highest[column], residual[column] = at[number], heights[number, 0], found[number, 0]
    return where, highest, residual


def per_row(h: Float[np.ndarray, "*maps targets"], rows: int) -> Float[np.ndarray, "*maps targets"]:
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
    profile = partial(_heights, values, projected**2, outside, rows)
    grid = grid_of(FLOOR * float(values[0]), float(values[0]))
    where, highest, _ = climb(profile, grid, *profile(grid, ALL))
    better = highest > silent
    heights[better], ratios[better] = highest[better], np.exp(where[better])
    return Evidence(per_row(heights, rows), ratios)


def _heights(
    values: np.ndarray, squares: np.ndarray, outside: np.ndarray, rows: int, at: np.ndarray, which: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """h and R from eigenvalues, and what of each column lies in their directions and outside."""
    t = np.exp(at)[:, None]
    shares = t / (t + values)
    if len(which):
        residual = (shares * squares.T[which]).sum(axis=1, keepdims=True) + outside[which][:, None]
    else:
        residual = shares @ squares + outside
    return -rows * np.log(residual) - np.log1p(values / t).sum(axis=1)[:, None], residual

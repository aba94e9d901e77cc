r"""The evidence without eigenvalues: a Gram matrix made tridiagonal once, then O(d) work for each t.

With :math:`M = FF^\top` (n ≤ d, m = n) or :math:`M = F^\top F` (n > d, m = d):

.. math:: \log\det(I + FF^\top/t) = \log\det(M + t) - m \log t, \qquad
          R(t) = t\, y^\top (M + t)^{-1} y \quad\text{or}\quad \lVert y \rVert^2 - c^\top (M + t)^{-1} c,\ c = F^\top y

M is kept as a diagonal or tridiagonal matrix plus :math:`U C U^\top` of low rank: the means of the features, which are
often so much larger than the rest that they would eat up its digits, and whatever a low-rank map adds.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from jaxtyping import Float
from scipy.linalg import lapack

from graftlm.measure.evidence import Evidence, climb, grid_of, per_row

_FLOOR = 1e-7  # of t: below it a Gram matrix has lost what the evidence depends on


class Shifted:
    """M + t for many t.

    Args:
        diagonal: (m,) of the tridiagonal part.
        beside: (m − 1,) next to it; None: the part is diagonal.
        columns: (m, targets), right-hand sides in the same basis.
        update: (m, r), U in the same basis.
        core: (r, r), C; symmetric, may be singular or indefinite.
    """

    def __init__(
        self,
        diagonal: Float[np.ndarray, " m"],
        beside: Float[np.ndarray, " between"] | None,
        columns: Float[np.ndarray, "m targets"],
        update: Float[np.ndarray, "m r"],
        core: Float[np.ndarray, "r r"],
    ):
        self.size = len(diagonal)
        self._diagonal, self._beside, self._core = diagonal, beside, core
        self._columns, self._update = columns, update
        wide = np.abs(beside) if beside is not None else np.zeros(max(self.size - 1, 0))
        bound = (diagonal + np.append(wide, 0) + np.append(0, wide)).max()  # Gershgorin
        self.largest = float(max(bound, 0.0))  # of the part without the update, whose digits are those of the part
        self.scale = self.largest + float(np.abs(core * (update.T @ update)).sum())

    def at(self, t: np.ndarray, target: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """log det(M + t), (T,), and c·(M + t)⁻¹c of all columns or of one, (T, targets), for many t.

        NaN where rounding has left M + t without a positive determinant.
        """
        columns = self._columns if target is None else self._columns[:, target : target + 1]
        solve = self._through_pivots if self._beside is not None else self._through_eigenvalues
        determinant, quadratic, across, inner = solve(t, columns)
        if not inner.shape[1]:
            return determinant, quadratic
        inner = self._core @ inner
        inner[:, np.arange(len(self._core)), np.arange(len(self._core))] += 1
        sign, more = np.linalg.slogdet(inner)
        good = sign > 0
        inner[~good] = np.eye(len(self._core))
        taken = (across * np.linalg.solve(inner, self._core @ across)).sum(axis=1)
        return np.where(good, determinant + more, np.nan), np.where(good[:, None], quadratic - taken, np.nan)

    def _through_eigenvalues(self, t: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, ...]:
        """log det, and cᵀ(D + t)⁻¹c, Uᵀ(D + t)⁻¹c, Uᵀ(D + t)⁻¹U, of the diagonal part."""
        shifted = self._diagonal + t[:, None]
        weights, ranks = 1 / shifted, self._update.shape[1]
        across = weights @ (self._update[:, :, None] * columns[:, None, :]).reshape(self.size, -1)
        inner = np.empty((len(t), ranks, ranks))
        rows, others = self._pairs
        inner[:, rows, others] = inner[:, others, rows] = weights @ self._products
        return np.log(shifted).sum(axis=1), weights @ columns**2, across.reshape(len(t), ranks, -1), inner

    @cached_property
    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        return np.tril_indices(self._update.shape[1])

    @cached_property
    def _products(self) -> np.ndarray:
        rows, others = self._pairs
        return self._update[:, rows] * self._update[:, others]

    def _through_pivots(self, t: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, ...]:
        """The same of the tridiagonal part."""
        count, ranks = columns.shape[1], self._update.shape[1]
        sides = np.asfortranarray(np.concatenate([columns, self._update], axis=1))
        update = np.ascontiguousarray(self._update.T)
        determinant, quadratic = np.empty(len(t)), np.empty((len(t), count))
        against = np.empty((len(t), ranks, count + ranks))
        for number, one in enumerate(t):
            pivots, factor, failed = lapack.dpttrf(self._diagonal + one, self._beside)
            if failed:
                determinant[number] = quadratic[number] = against[number] = np.nan
                continue
            solved, _ = lapack.dpttrs(pivots, factor, sides)
            determinant[number] = np.log(pivots).sum()
            quadratic[number] = np.einsum("ij,ij->j", columns, solved[:, :count])
            against[number] = update @ solved
        return determinant, quadratic, against[:, :, :count], against[:, :, count:]


def maximised(shifted: Shifted, squares: Float[np.ndarray, " targets"], rows: int, *, dual: bool) -> Evidence:
    """The evidence of each column, and how many digits the Gram form cost.

    Args:
        squares: ‖y‖² of each column.
        rows: n.
        dual: M is FFᵀ, and the columns are y; else FᵀF and c.
    """
    silent = -rows * np.log(squares)
    heights, ratios = silent.copy(), np.full(len(squares), np.inf)
    if not 0 < shifted.largest <= shifted.scale < np.inf:
        return Evidence(per_row(heights, rows), ratios, np.inf)
    grid = grid_of(_FLOOR * shifted.largest, shifted.scale)
    values = _heights(shifted, squares, rows, dual, grid, None)[0]
    if not np.isfinite(values).all() or (values[0] >= values[1]).any():
        return Evidence(per_row(heights, rows), ratios, np.inf)  # a peak below the floor
    where, highest = climb(lambda at, column: _heights(shifted, squares, rows, dual, at, column)[0], grid, values)
    lost, share = 0.0, shifted.size / rows  # of the sum over eigenvalues in what is a mean over rows
    for column in np.flatnonzero(highest > silent).tolist():
        t = float(np.exp(where[column]))
        heights[column], ratios[column] = highest[column], t
        residual = _heights(shifted, squares, rows, dual, where[[column]], column)[1].item()
        lost = max(lost, share * shifted.largest / t + squares[column] / max(residual, np.finfo(float).tiny))
    return Evidence(per_row(heights, rows), ratios, lost)


def _heights(
    shifted: Shifted, squares: np.ndarray, rows: int, dual: bool, at: np.ndarray, column: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """h and R of all columns, or of one, at many log t: (points, targets) each."""
    t = np.exp(at)
    chosen = squares if column is None else squares[[column]]
    determinant, quadratic = shifted.at(t, column)
    residual = t[:, None] * quadratic if dual else chosen - quadratic
    least = np.finfo(float).eps * chosen  # what is smaller has no digit left, and `lost` says so
    fit = -rows * np.log(np.maximum(residual, least))
    return fit - (determinant - shifted.size * at)[:, None], residual

r"""The evidence without eigenvalues: a Gram matrix made tridiagonal once, then O(d) work for each t.

With :math:`M = FF^\top` (n ≤ d, m = n) or :math:`M = F^\top F` (n > d, m = d):

.. math:: \log\det(I + FF^\top/t) = \log\det(M + t) - m \log t, \qquad
          R(t) = t\, y^\top (M + t)^{-1} y \quad\text{or}\quad \lVert y \rVert^2 - c^\top (M + t)^{-1} c,\ c = F^\top y

M is kept as a diagonal or tridiagonal matrix plus :math:`U C U^\top` of low rank: the means of the features, which are
often so much larger than the rest that they would eat up its digits, and whatever a low-rank map adds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

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
        self._diagonal, self._beside, self._core = diagonal, beside, core
        self.targets = columns.shape[1]
        self._sides = np.asfortranarray(np.concatenate([columns, update], axis=1))
        single = [np.asfortranarray(np.concatenate([column[:, None], update], axis=1)) for column in columns.T]
        self._single = single
        self.size = len(diagonal)
        wide = np.abs(beside) if beside is not None else np.zeros(max(self.size - 1, 0))
        bound = (diagonal + np.append(wide, 0) + np.append(0, wide)).max() if self.size else 0.0  # Gershgorin
        self.largest = float(max(bound, 0.0))  # of the part without the update, whose digits are those of the part
        self.scale = self.largest + float(np.abs(core * (update.T @ update)).sum())

    def at(self, t: float, target: int | None = None) -> tuple[float, Float[np.ndarray, " some"]]:
        """log det(M + t), and c·(M + t)⁻¹c of all columns or of one."""
        sides = self._sides if target is None else self._single[target]
        count = self.targets if target is None else 1
        if self._beside is None:
            pivots = self._diagonal + t
            solved = sides / pivots[:, None]
        else:
            pivots, factor, failed = lapack.dpttrf(self._diagonal + t, self._beside)
            if failed:
                return np.nan, np.full(count, np.nan)
            solved, _ = lapack.dpttrs(pivots, factor, sides)
        determinant = float(np.log(pivots).sum())
        own, update = sides[:, :count], sides[:, count:]
        quadratic = np.einsum("ij,ij->j", own, solved[:, :count])
        if update.shape[1]:
            inner = np.eye(update.shape[1]) + self._core @ (update.T @ solved[:, count:])
            across = update.T @ solved[:, :count]
            sign, more = np.linalg.slogdet(inner)
            if sign <= 0:
                return np.nan, np.full(count, np.nan)
            determinant += more
            quadratic = quadratic - np.einsum("ij,ij->j", across, np.linalg.solve(inner, self._core @ across))
        return determinant, quadratic


def tridiagonal(
    matrix: Float[np.ndarray, "m m"], sides: Float[np.ndarray, "m k"]
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " between"], Float[np.ndarray, "m k"]]:
    """T and Qᵀ·sides with matrix = QTQᵀ, in the precision of `matrix` (overwritten); returned in float64."""
    if len(matrix) < 3:
        return np.diagonal(matrix).astype(float), np.diagonal(matrix, 1).astype(float), sides.astype(float)
    single = matrix.dtype == np.float32
    reduce, query, rotate = (
        (lapack.ssytrd, lapack.ssytrd_lwork, lapack.sormqr)
        if single
        else (lapack.dsytrd, lapack.dsytrd_lwork, lapack.dormqr)
    )
    work, _ = query(len(matrix), lower=1)
    reflectors, diagonal, beside, tau, _ = reduce(matrix.T, lower=1, lwork=int(work), overwrite_a=1)
    rotated = np.array(sides, dtype=float, order="F")
    below = np.asfortranarray(reflectors[1:, :-1])
    lower = np.asfortranarray(sides[1:], dtype=matrix.dtype)
    rotated[1:], _, _ = rotate("L", "T", below, tau, lower, 64 * max(lower.shape[1], 1))
    return diagonal.astype(float), beside.astype(float), rotated


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
    values = np.array([_heights(shifted, squares, rows, dual, None, at)[0] for at in grid]).T
    lost = 0.0
    for column, square in enumerate(squares):
        if not np.isfinite(values[column]).all() or values[column, 0] >= values[column, 1]:
            return Evidence(per_row(heights, rows), ratios, np.inf)  # a peak below the floor
        profile = partial(_height, shifted, square, rows, dual, column)
        where, highest = climb(profile, grid, values[column])
        if highest > silent[column]:
            t = float(np.exp(where))
            heights[column], ratios[column] = highest, t
            residual = _heights(shifted, square, rows, dual, column, where)[1][0]
            lost = max(lost, shifted.largest / t + square / max(residual, np.finfo(float).tiny))
    return Evidence(per_row(heights, rows), ratios, lost)


def _heights(shifted: Shifted, square: Any, rows: int, dual: bool, column: int | None, at: float) -> Any:
    """h and R of all columns, or of one, at log t."""
    t = float(np.exp(at))
    determinant, quadratic = shifted.at(t, column)
    residual = t * quadratic if dual else square - quadratic
    least = np.finfo(float).eps * square  # what is smaller has no digit left, and `lost` says so
    return -rows * np.log(np.maximum(residual, least)) - determinant + shifted.size * at, residual


def _height(shifted: Shifted, square: float, rows: int, dual: bool, column: int, at: float) -> float:
    return float(_heights(shifted, square, rows, dual, column, at)[0][0])

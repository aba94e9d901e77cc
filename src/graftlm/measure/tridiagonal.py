r"""The evidence without eigenvalues: a Gram matrix made tridiagonal once, then O(d) work for each t.

With :math:`M = FF^\top` (n ≤ d, m = n) or :math:`M = F^\top F` (n > d, m = d):

.. math:: \log\det(I + FF^\top/t) = \log\det(M + t) - m \log t, \qquad
          R(t) = t\, y^\top (M + t)^{-1} y \quad\text{or}\quad \lVert y \rVert^2 - c^\top (M + t)^{-1} c,\ c = F^\top y

M is kept as a diagonal or tridiagonal matrix plus :math:`U C U^\top` of low rank: the means of the features, which are
often so much larger than the rest that they would eat up its digits, and whatever a low-rank map adds.
"""

from __future__ import annotations

import functools
from functools import cached_property

import numpy as np
from jaxtyping import Float
from scipy.linalg import lapack

from graftlm.measure.compiled import compiled_recurrences
from graftlm.measure.evidence import Evidence, climb, grid_of, per_row

_FLOOR = 1e-7  # of t: below it a Gram matrix has lost what the evidence depends on


class Shifted:
    """M + t for many t.

    Args:
        diagonal: (m,) of the tridiagonal part.
        beside: (m − 1,) next to it; None: the part is diagonal.
        columns: (m, targets), right-hand sides in the same basis.
        update: (m, r), U in the same basis, r ≥ 1.
        core: (r, r), C; symmetric, may be singular or indefinite.
        share: (r, targets), K: the right-hand sides are columns + UK. What they have of a large U is kept apart, since
            it would cost the rest its digits.
    """

    def __init__(
        self,
        diagonal: Float[np.ndarray, " m"],
        beside: Float[np.ndarray, " between"] | None,
        columns: Float[np.ndarray, "m targets"],
        update: Float[np.ndarray, "m r"],
        core: Float[np.ndarray, "r r"],
        share: Float[np.ndarray, "r targets"] | None = None,
    ):
        self.size = len(diagonal)
        self._diagonal, self._core, self._share = diagonal, core, share
        self._beside = beside if self.size > 1 else None
        self._columns, self._update = columns, update
        wide = np.abs(beside) if beside is not None else np.zeros(self.size - 1)
        bound = (diagonal + np.append(wide, 0) + np.append(0, wide)).max()  # Gershgorin
        self.largest = float(max(bound, 0.0))  # of the part without the update, whose digits are those of the part
        self.scale = self.largest + float(np.abs(core * (update.T @ update)).sum())

    def at(self, t: np.ndarray, which: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        r"""log det(M + t), (T,), and c·(M + t)⁻¹c for many t.

        Of all right-hand sides: (T, targets); or at each t of the one that `which` says, (T, 1). NaN where rounding has
        left M + t without a positive determinant.

        With :math:`S` the inverse of the part, :math:`G = U^\top SU`, :math:`b = U^\top Sc`, :math:`N = I + CG`:
        :math:`(c + UK)^\top (M + t)^{-1} (c + UK) = c^\top Sc - b^\top N^{-1}Cb + (2b + GK)^\top N^{-1}K`.
        """
        solve = self._through_eigenvalues if self._beside is None else self._through_pivots
        determinant, quadratic, across, inner = solve(t, which)
        changed = self._core @ inner
        changed[:, np.arange(len(self._core)), np.arange(len(self._core))] += 1
        sign, more = np.linalg.slogdet(changed)
        good = sign > 0
        changed[~good] = np.eye(len(self._core))
        right = self._core @ across
        if self._share is None:
            quadratic -= (across * np.linalg.solve(changed, right)).sum(axis=1)
        else:
            share = self._share if which is None else self._share.T[which][:, :, None]
            share = np.broadcast_to(share, across.shape)
            solved = np.linalg.solve(changed, np.concatenate([right, share], axis=2))
            count = across.shape[2]
            quadratic -= (across * solved[:, :, :count]).sum(axis=1)
            quadratic += ((2 * across + inner @ share) * solved[:, :, count:]).sum(axis=1)
        return np.where(good, determinant + more, np.nan), np.where(good[:, None], quadratic, np.nan)

    def _through_eigenvalues(self, t: np.ndarray, which: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """log det, and cᵀ(D + t)⁻¹c, Uᵀ(D + t)⁻¹c, Uᵀ(D + t)⁻¹U, of the diagonal part."""
        shifted = self._diagonal + t[:, None]
        weights, (update, columns) = 1 / shifted, self._rows
        inner = (weights @ self._products.T)[:, _places(len(update))]
        if which is None:
            across = (weights @ self._products_with_columns.T).reshape(len(t), len(update), -1)
            quadratic = weights @ (columns**2).T
        else:
            mine = weights * columns[which]
            across = (mine @ update.T)[:, :, None]
            quadratic = (mine * columns[which]).sum(axis=1, keepdims=True)
        return np.log(shifted).sum(axis=1), quadratic, across, inner

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Uᵀ and cᵀ, for products along contiguous memory."""
        return np.ascontiguousarray(self._update.T), np.ascontiguousarray(self._columns.T)

    @cached_property
    def _products(self) -> np.ndarray:
        """Of each pair of columns of U; row `_places[i, j]` holds that of i and j."""
        update, _ = self._rows
        return np.concatenate([row * update[number:] for number, row in enumerate(update)])

    @cached_property
    def _products_with_columns(self) -> np.ndarray:
        update, columns = self._rows
        return (update[:, None] * columns).reshape(-1, self.size)

    def _through_pivots(self, t: np.ndarray, which: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """The same of the tridiagonal part."""
        sides = np.ascontiguousarray(self._columns if which is None else self._columns[:, which])
        update = np.ascontiguousarray(self._update)
        if recurrences := compiled_recurrences():
            found = recurrences(self._diagonal, self._beside, sides, update, t, which is not None)
            determinant, quadratic, across, inner = (np.ascontiguousarray(np.moveaxis(one, -1, 0)) for one in found)
            return determinant, quadratic, across, inner
        count, ranks = (sides.shape[1] if which is None else 1), update.shape[1]
        determinant, quadratic = np.empty(len(t)), np.empty((len(t), count))
        against = np.empty((len(t), ranks, count + ranks))
        for number, one in enumerate(t):
            columns = sides if which is None else sides[:, [number]]
            pivots, factor, failed = lapack.dpttrf(self._diagonal + one, self._beside)
            if failed:
                determinant[number] = quadratic[number] = against[number] = np.nan
                continue
            solved, _ = lapack.dpttrs(pivots, factor, np.column_stack([columns, update]))
            determinant[number] = np.log(pivots).sum()
            quadratic[number] = np.einsum("ij,ij->j", columns, solved[:, :count])
            against[number] = update.T @ solved
        return determinant, quadratic, against[:, :, :count], against[:, :, count:]


@functools.cache
def _places(ranks: int) -> np.ndarray:
    rows, others = np.triu_indices(ranks)
    places = np.empty((ranks, ranks), int)
    places[rows, others] = places[others, rows] = np.arange(len(rows))
    return places


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
    profile = functools.partial(_heights, shifted, squares, rows, dual)
    values, residuals = profile(grid, None)
    if not np.isfinite(values).all() or (values[0] >= values[1]).any():
        return Evidence(per_row(heights, rows), ratios, np.inf)  # a peak below the floor
    where, highest, residual = climb(profile, grid, values, residuals)
    better = highest > silent
    if not better.any():
        return Evidence(per_row(heights, rows), ratios)
    heights[better], ratios[better] = highest[better], np.exp(where[better])
    share = shifted.size / rows  # of the sum over eigenvalues in what is a mean over rows
    lost = share * shifted.largest / ratios + squares / np.maximum(residual, np.finfo(float).tiny)
    return Evidence(per_row(heights, rows), ratios, float(lost[better].max()))


def _heights(
    shifted: Shifted, squares: np.ndarray, rows: int, dual: bool, at: np.ndarray, which: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """h and R at many log t: of all columns, or at each of one."""
    t = np.exp(at)
    chosen = squares if which is None else squares[which][:, None]
    determinant, quadratic = shifted.at(t, which)
    residual = t[:, None] * quadratic if dual else chosen - quadratic
    least = np.finfo(float).eps * chosen  # what is smaller has no digit left, and `lost` says so
    fit = -rows * np.log(np.maximum(residual, least))
    return fit - (determinant - shifted.size * at)[:, None], residual

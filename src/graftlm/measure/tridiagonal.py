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

from graftlm.measure.compiled import kernels
from graftlm.measure.evidence import ALL, GRAM_FLOOR, Evidence, climb, grid_of, per_row


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
        self._diagonal, self._core = diagonal, core
        self._share = np.empty((len(core), 0)) if share is None else np.ascontiguousarray(share)
        self._beside = beside if self.size > 1 else None
        self._columns, self._update = columns, update
        wide = np.abs(beside) if beside is not None else np.zeros(self.size - 1)
        bound = (diagonal + np.append(wide, 0) + np.append(0, wide)).max()  # Gershgorin
        self.largest = float(max(bound, 0.0))  # of the part without the update, whose digits are those of the part
        self.scale = self.largest + float(np.abs(core * (update.T @ update)).sum())

    def at(self, t: np.ndarray, which: np.ndarray = ALL) -> tuple[np.ndarray, np.ndarray]:
        r"""log det(M + t), (T,), and c·(M + t)⁻¹c for many t.

        Of all right-hand sides: (T, targets); or at each t of the one that `which` says, (T, 1). NaN where rounding has
        left M + t without a positive determinant.

        With :math:`S` the inverse of the part, :math:`G = U^\top SU`, :math:`b = U^\top Sc`, :math:`N = I + CG`:
        :math:`(c + UK)^\top (M + t)^{-1} (c + UK) = c^\top Sc - b^\top N^{-1}Cb + (2b + GK)^\top N^{-1}K`.
        """
        solve = self._through_eigenvalues if self._beside is None else self._through_pivots
        which = np.ascontiguousarray(which)
        determinant, quadratic, across, inner = solve(t, which)
        update = compiled.updated if (compiled := kernels()) else _updated
        more, added = update(self._core, self._share, across, inner, which)
        return determinant + more, quadratic + added

    def _through_eigenvalues(self, t: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, ...]:
        """log det, and cᵀ(D + t)⁻¹c, Uᵀ(D + t)⁻¹c, Uᵀ(D + t)⁻¹U, of the diagonal part."""
        update, columns = self._rows
        if compiled := kernels():
            return compiled.through_eigenvalues(self._diagonal, update, columns, self._products, t, which)
        shifted = self._diagonal + t[:, None]
        weights, places = 1 / shifted, _places(len(update))
        pairs = places[-1, -1] + 1
        inner = (weights @ self._products[:pairs].T)[:, places]
        if len(which):
            mine = weights * columns[which]
            across = (mine @ update.T)[:, :, None]
            quadratic = (mine * columns[which]).sum(axis=1, keepdims=True)
        else:
            across = (weights @ self._products[pairs:].T).reshape(len(t), len(update), -1)
            quadratic = weights @ (columns**2).T
        return np.log(shifted).sum(axis=1), quadratic, across, inner

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Uᵀ and cᵀ, for products along contiguous memory."""
        return np.ascontiguousarray(self._update.T), np.ascontiguousarray(self._columns.T)

    @cached_property
    def _products(self) -> np.ndarray:
        """Of each pair of columns of U, where row `_places[i, j]` holds that of i and j; and of each with each of c."""
        update, columns = self._rows
        if compiled := kernels():
            return compiled.products(update, columns)
        pairs = [row * update[number:] for number, row in enumerate(update)]
        return np.concatenate([*pairs, *(row * columns for row in update)])

    def _through_pivots(self, t: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, ...]:
        """The same of the tridiagonal part."""
        columns, update = np.ascontiguousarray(self._columns), np.ascontiguousarray(self._update)
        if compiled := kernels():
            return compiled.through_pivots(self._diagonal, self._beside, update, columns, t, which)
        count, ranks = (1 if len(which) else columns.shape[1]), update.shape[1]
        determinant, quadratic = np.empty(len(t)), np.empty((len(t), count))
        against = np.empty((len(t), ranks, count + ranks))
        for number, one in enumerate(t):
            sides = columns[:, which[[number]]] if len(which) else columns
            pivots, factor, failed = lapack.dpttrf(self._diagonal + one, self._beside)
            if failed:
                determinant[number] = quadratic[number] = against[number] = np.nan
                continue
            solved, _ = lapack.dpttrs(pivots, factor, np.column_stack([sides, update]))
            determinant[number] = np.log(pivots).sum()
            quadratic[number] = np.einsum("ij,ij->j", sides, solved[:, :count])
            against[number] = update.T @ solved
        return determinant, quadratic, against[:, :, :count], against[:, :, count:]


@functools.cache
def _places(ranks: int) -> np.ndarray:
    rows, others = np.triu_indices(ranks)
    places = np.empty((ranks, ranks), int)
    places[rows, others] = places[others, rows] = np.arange(len(rows))
    return places


def _updated(
    core: np.ndarray, share: np.ndarray, across: np.ndarray, inner: np.ndarray, which: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`compiled.updated` without numba."""
    changed = core @ inner
    changed[:, np.arange(len(core)), np.arange(len(core))] += 1
    sign, determinant = np.linalg.slogdet(changed)
    good, count = sign > 0, across.shape[2]
    changed[~good] = np.eye(len(core))
    right = core @ across
    if share.shape[1]:
        share = np.broadcast_to(share.T[which][:, :, None] if len(which) else share, across.shape)
        right = np.concatenate([right, share], axis=2)
    solved = np.linalg.solve(changed, right)
    added = -(across * solved[:, :, :count]).sum(axis=1)
    if share.shape[1]:
        added += ((2 * across + inner @ share) * solved[:, :, count:]).sum(axis=1)
    return np.where(good, determinant, np.nan), np.where(good[:, None], added, np.nan)


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
    grid = grid_of(GRAM_FLOOR * shifted.largest, shifted.scale)
    profile = functools.partial(_heights, shifted, squares, rows, dual)
    values, residuals = profile(grid, ALL)
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
    shifted: Shifted, squares: np.ndarray, rows: int, dual: bool, at: np.ndarray, which: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """h and R at many log t: of all columns, or at each of one."""
    t = np.exp(at)
    chosen = squares[which][:, None] if len(which) else squares
    determinant, quadratic = shifted.at(t, which)
    residual = t[:, None] * quadratic if dual else chosen - quadratic
    least = np.finfo(float).eps * chosen  # what is smaller has no digit left, and `lost` says so
    fit = -rows * np.log(np.maximum(residual, least))
    return fit - (determinant - shifted.size * at)[:, None], residual

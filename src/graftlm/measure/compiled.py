"""The loop over rows that numpy cannot take at once, compiled by numba (the extra ``[fast]``) and run without the GIL.

`graftlm.measure.tridiagonal` does the same with LAPACK, one t after the other, where numba is not installed. Compiling
takes some seconds, once: numba keeps the result beside this file, or where ``NUMBA_CACHE_DIR`` says.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable

import numpy as np


@functools.cache
def compiled_recurrences() -> Callable[..., tuple[np.ndarray, ...]] | None:
    """`recurrences` in machine code, which numba keeps on disk; None without numba."""
    try:
        from numba import njit

        # unwrapped: what checks types while tests run cannot be compiled
        return njit(nogil=True, cache=True)(inspect.unwrap(recurrences))
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
    except (ImportError, RuntimeError) as error:  # a numpy that this numba does not take; no folder for its cache
        warnings.warn(f"numba cannot be used, so that scores take longer: {error}", RuntimeWarning, stacklevel=2)
    return None


def recurrences(
    diagonal: np.ndarray, beside: np.ndarray, sides: np.ndarray, update: np.ndarray, t: np.ndarray, paired: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """log det(T + t), and cᵀ(T + t)⁻¹c, Uᵀ(T + t)⁻¹c, Uᵀ(T + t)⁻¹U, from one pass over T + t = LDLᵀ.

    The forward substitution is enough, since each of them is Σ (L⁻¹a)ᵢ(L⁻¹b)ᵢ/Dᵢ. All t go together: they are the
    innermost loop, where the processor takes several at once. NaN where a pivot is not positive.

    Args:
        diagonal: (m,).
        beside: (m − 1,).
        sides: (m, targets), or (m, T) if `paired`: a column for each t.
        update: (m, r).
        t: (T,).

    Returns:
        (T,), (targets, T), (r, targets, T), (r, r, T); `paired`: targets = 1.
    """
    points, ranks = len(t), update.shape[1]
    count = 1 if paired else sides.shape[1]
    determinant, good = np.zeros(points), np.ones(points)
    quadratic, across = np.zeros((count, points)), np.zeros((ranks, count, points))
    inner = np.zeros((ranks, ranks, points))
    solved, changed = np.zeros((count, points)), np.zeros((ranks, points))
    scaled, inverse, factor = np.empty((ranks, points)), np.empty(points), np.zeros(points)
    for row in range(len(diagonal)):
        for k in range(points):
            pivot = diagonal[row] + t[k]
            if row > 0:
                factor[k] = beside[row - 1] * inverse[k]
                pivot -= factor[k] * beside[row - 1]
            if not pivot > 0:
                good[k] = np.nan
                pivot = 1.0
            inverse[k] = 1 / pivot
            determinant[k] += np.log(pivot)
        for rank in range(ranks):
            for k in range(points):
                changed[rank, k] = update[row, rank] - factor[k] * changed[rank, k]
                scaled[rank, k] = changed[rank, k] * inverse[k]
            for other in range(rank + 1):
                for k in range(points):
                    inner[rank, other, k] += scaled[rank, k] * changed[other, k]
        for column in range(count):
            for k in range(points):
                side = sides[row, k] if paired else sides[row, column]
                solved[column, k] = side - factor[k] * solved[column, k]
                quadratic[column, k] += solved[column, k] * solved[column, k] * inverse[k]
            for rank in range(ranks):
                for k in range(points):
                    across[rank, column, k] += scaled[rank, k] * solved[column, k]
    for rank in range(ranks):
        for other in range(rank):
            inner[other, rank] = inner[rank, other]
    return determinant * good, quadratic * good, across * good, inner * good

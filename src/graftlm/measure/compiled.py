"""The numerics of `graftlm.measure.tridiagonal` in loops, compiled by numba (the extra ``[fast]``), without the GIL.

Where numba is not installed, numpy and LAPACK do the same: more slowly, and with the GIL between any two of their
calls, so that threads wait for each other. Compiling takes 5 to 20 seconds, once: numba keeps the result beside this
file, or where ``NUMBA_CACHE_DIR`` says. Arrays are in C's order, since each other order would be compiled anew.

Everywhere ``which`` names the right-hand side that goes with each t; where it is empty, all go with each t. T is the
number of t, r that of columns of U.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np

_CHUNK = 8  # factors of a determinant between two logarithms; each is below 1e38, as t is not smaller than 1e-38 of it


@functools.cache
def kernels() -> Any:
    """The functions below in machine code; None without numba."""
    try:
        from numba import njit

        compile_ = njit(nogil=True, cache=True, error_model="numpy")
        functions = (products, through_eigenvalues, through_pivots, updated)
        # unwrapped: what checks types while tests run cannot be compiled
        return SimpleNamespace(**{function.__name__: compile_(inspect.unwrap(function)) for function in functions})
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
    except (ImportError, RuntimeError) as error:  # a numpy that this numba does not take; no folder for its cache
        warnings.warn(f"numba cannot be used, so that scores take longer: {error}", RuntimeWarning, stacklevel=2)
    return None


def products(update: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Of each pair of rows of `update`, (r, m), then of each with each of `columns`, (targets, m)."""
    ranks, size = update.shape
    made = np.empty((ranks * (ranks + 1) // 2 + ranks * len(columns), size))
    number = 0
    for rank in range(ranks):
        for other in range(rank, ranks):
            for row in range(size):
                made[number, row] = update[rank, row] * update[other, row]
            number += 1
    for rank in range(ranks):
        for column in range(len(columns)):
            for row in range(size):
                made[number, row] = update[rank, row] * columns[column, row]
            number += 1
    return made


def through_eigenvalues(
    diagonal: np.ndarray,
    update: np.ndarray,
    columns: np.ndarray,
    made: np.ndarray,
    t: np.ndarray,
    which: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """log det(D + t), and cᵀ(D + t)⁻¹c, Uᵀ(D + t)⁻¹c, Uᵀ(D + t)⁻¹U.

    Args:
        diagonal: (m,), not negative.
        update: (r, m), by rows.
        columns: (targets, m), by rows.
        made: their `products`.
        t: (T,).
        which: (T,) or empty.

    Returns:
        (T,), (T, targets), (T, r, targets), (T, r, r); with `which`, targets = 1.
    """
    points, (ranks, size) = len(t), update.shape
    weights, determinant = np.empty((points, size)), np.empty(points)
    for k in range(points):
        total = size * np.log(t[k])
        for start in range(0, size, _CHUNK):
            chunk = 1.0
            for row in range(start, min(start + _CHUNK, size)):
                chunk *= 1 + diagonal[row] / t[k]
            total += np.log(chunk)
        determinant[k] = total
        for row in range(size):
            weights[k, row] = 1 / (diagonal[row] + t[k])
    pairs = ranks * (ranks + 1) // 2
    inner = np.empty((points, ranks, ranks))
    if len(which):
        mine = np.empty((points, size))
        quadratic = np.zeros((points, 1))
        for k in range(points):
            for row in range(size):
                mine[k, row] = weights[k, row] * columns[which[k], row]
                quadratic[k, 0] += mine[k, row] * columns[which[k], row]
        across = np.dot(mine, update.T).reshape(points, ranks, 1)
        found = np.dot(weights, made[:pairs].T)
    else:
        found = np.dot(weights, made.T)
        across = found[:, pairs:].copy().reshape(points, ranks, len(columns))
        quadratic = np.dot(weights, (columns * columns).T)
    number = 0
    for rank in range(ranks):
        for other in range(rank, ranks):
            for k in range(points):
                inner[k, rank, other] = inner[k, other, rank] = found[k, number]
            number += 1
    return determinant, quadratic, across, inner


def through_pivots(
    diagonal: np.ndarray, beside: np.ndarray, update: np.ndarray, columns: np.ndarray, t: np.ndarray, which: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The same of a tridiagonal matrix, from one pass over T + t = LDLᵀ; NaN where a pivot is not positive.

    The forward substitution is enough, since each product is Σ (L⁻¹a)ᵢ(L⁻¹b)ᵢ/Dᵢ. All t go together: they are the
    innermost loop, where the processor takes several at once.

    Args:
        diagonal: (m,).
        beside: (m − 1,).
        update: (m, r), by columns.
        columns: (m, targets), by columns.
        t: (T,).
        which: (T,) or empty.
    """
    points, ranks = len(t), update.shape[1]
    count = 1 if len(which) else columns.shape[1]
    determinant, good = np.zeros(points), np.ones(points)
    quadratic, across = np.zeros((count, points)), np.zeros((ranks, count, points))
    inner = np.zeros((ranks, ranks, points))
    solved, changed = np.zeros((count, points)), np.zeros((ranks, points))
    scaled, inverse, factor, side = np.empty((ranks, points)), np.empty(points), np.zeros(points), np.empty(points)
    for row in range(len(diagonal)):
        for k in range(points):
            if row > 0:
                factor[k] = beside[row - 1] * inverse[k]
                pivot = diagonal[row] + t[k] - factor[k] * beside[row - 1]
            else:
                pivot = diagonal[row] + t[k]
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
                side[k] = columns[row, which[k]] if len(which) else columns[row, column]
            for k in range(points):
                solved[column, k] = side[k] - factor[k] * solved[column, k]
                quadratic[column, k] += solved[column, k] * solved[column, k] * inverse[k]
            for rank in range(ranks):
                for k in range(points):
                    across[rank, column, k] += scaled[rank, k] * solved[column, k]
    quadratics, acrosses = np.empty((points, count)), np.empty((points, ranks, count))
    inners = np.empty((points, ranks, ranks))
    for k in range(points):
        determinant[k] *= good[k]
        for column in range(count):
            quadratics[k, column] = quadratic[column, k] * good[k]
            for rank in range(ranks):
                acrosses[k, rank, column] = across[rank, column, k] * good[k]
        for rank in range(ranks):
            for other in range(rank + 1):
                inners[k, rank, other] = inners[k, other, rank] = inner[rank, other, k] * good[k]
    return determinant, quadratics, acrosses, inners


def updated(
    core: np.ndarray, share: np.ndarray, across: np.ndarray, inner: np.ndarray, which: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """log det N and (2b + GK)ᵀN⁻¹K − bᵀN⁻¹Cb, N = I + CG, of each t, by one elimination with pivots.

    Args:
        core: C, (r, r).
        share: K, (r, targets), or (r, 0) for none.
        across: b, (T, r, targets).
        inner: G, (T, r, r).
        which: (T,) or empty.

    Returns:
        (T,) and (T, targets); NaN where the determinant is not positive.
    """
    points, ranks, count = across.shape
    width = ranks + count + (count if share.shape[1] else 0)
    determinant, added = np.zeros(points), np.zeros((points, count))
    work = np.empty((ranks, width))
    for k in range(points):
        for row in range(ranks):
            for column in range(width):
                work[row, column] = 0.0
            for other in range(ranks):
                weight = core[row, other]
                if weight != 0:
                    for column in range(ranks):
                        work[row, column] += weight * inner[k, other, column]
                    for column in range(count):
                        work[row, ranks + column] -= weight * across[k, other, column]
            work[row, row] += 1.0
            for column in range(width - ranks - count):
                work[row, ranks + count + column] = share[row, which[k] if len(which) else column]
        sign = 1.0
        for step in range(ranks):
            best = step
            for row in range(step + 1, ranks):
                if abs(work[row, step]) > abs(work[best, step]):
                    best = row
            if best != step:
                sign = -sign
                for column in range(step, width):
                    work[step, column], work[best, column] = work[best, column], work[step, column]
            pivot = work[step, step]
            sign *= np.sign(pivot)
            if not abs(sign) > 0:  # zero, or NaN
                break
            determinant[k] += np.log(abs(pivot))
            for row in range(step + 1, ranks):
                part = work[row, step] / pivot
                for column in range(step + 1, width):
                    work[row, column] -= part * work[step, column]
        if not sign > 0:
            determinant[k] = np.nan
            for column in range(count):
                added[k, column] = np.nan
            continue
        for row in range(ranks - 1, -1, -1):
            for other in range(row + 1, ranks):
                part = work[row, other]
                for column in range(ranks, width):
                    work[row, column] -= part * work[other, column]
            for column in range(ranks, width):
                work[row, column] /= work[row, row]
            for column in range(count):
                added[k, column] += across[k, row, column] * work[row, ranks + column]
        for row in range(ranks if share.shape[1] else 0):
            for column in range(count):
                left = 2 * across[k, row, column]
                for other in range(ranks):
                    left += inner[k, row, other] * share[other, which[k] if len(which) else column]
                added[k, column] += left * work[row, ranks + count + column]
    return determinant, added

"""The evidence of many linear maps of the same features, each at a cost that does not depend on the number of rows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from graftlm.errors import SetupError
from graftlm.measure.evidence import Evidence, by_svd
from graftlm.measure.lapack import Workspace, gram, multiply_lower, tridiagonal
from graftlm.measure.tridiagonal import Shifted, maximised

_Made = TypeVar("_Made")
PRECISIONS = ("float64", "float32")
# Digits that may be lost, in units of the machine epsilon; beyond it the next better form is taken. The error of a
# score is far below the bound: 1e6 · 2e-16 stands for about 1e-11, 2e4 · 6e-8 for about 1e-5.
LIMIT = {"float64": 1e6, "float32": 2e4}


class MappedEvidence:
    r"""Scores :math:`F = XW^\top + 1b^\top` for one X and many W, b.

    X is centred once, :math:`X_0 = X - 1\bar x^\top`, and factored once: :math:`X_0 = QL^\top`. Then
    :math:`F^\top F = BB^\top + n\,\mu\mu^\top` with :math:`B = WL,\ \mu = W\bar x + b`; where n ≤ d,
    :math:`FF^\top = F_0F_0^\top + 1g^\top + g1^\top + \lVert\mu\rVert^2 11^\top` with :math:`F_0 = X_0W^\top`,
    :math:`g = F_0\mu`. A map :math:`I + UV^\top` of rank r leaves the eigenvectors of :math:`X_0^\top X_0` (or of
    :math:`X_0X_0^\top`) in use and adds an update of rank 2r.

    Args:
        features: X.
        targets: one column a target, none of them all zero.
        precision: of the O(d³) work: ``float64``, or ``float32``, which is faster. What comes after it, the means
            included, is in float64 in both. Where a form would lose too many digits, the next better one is taken:
            float32, float64, the singular values.
    """

    def __init__(
        self,
        features: Float[np.ndarray, "n d"],
        targets: Float[np.ndarray, "n targets"],
        precision: str = "float64",
    ):
        if precision not in PRECISIONS:
            raise SetupError("unknown precision", found=repr(precision), allowed=PRECISIONS)
        self.rows, self.width = features.shape
        self.precision, self._targets = precision, targets
        self.mean = features.mean(axis=0, dtype=np.float64)
        self._centred = features - self.mean
        self._squares = (targets**2).sum(axis=0)
        self._sums = targets.sum(axis=0)
        self._dual = self.rows <= self.width
        self._moments = self._centred.T @ targets  # X₀ᵀY
        self._work = Workspace()
        self._lock, self._shared = threading.RLock(), dict[str, Any]()
        self.fallbacks = 0  # maps that were scored by a slower form than asked for

    def _once(self, make: Callable[[], _Made]) -> _Made:
        """What all maps share is made by the first thread that wants it."""
        with self._lock:
            if make.__name__ not in self._shared:
                self._shared[make.__name__] = make()
            return self._shared[make.__name__]

    def _factor(self) -> Float[np.ndarray, "d d"]:
        return np.asfortranarray(np.transpose(np.linalg.qr(self._centred, mode="r")))

    def _single_factor(self) -> Float[np.ndarray, "rows d"]:
        return (self._centred if self._dual else self._once(self._factor)).astype(np.float32)

    def _eigen(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Eigenvalues, what turns rows of the width into their basis, and there the rows X₀ᵀY, or Y and ones."""
        values, vectors = np.linalg.eigh(
            self._centred @ self._centred.T if self._dual else self._centred.T @ self._centred
        )
        if self._dual:
            turn, sides = self._centred.T @ vectors, np.column_stack([self._targets, np.ones(self.rows)])
        else:
            turn, sides = vectors, self._moments
        return np.maximum(values, 0.0), turn, sides.T @ vectors

    def identity(self) -> Evidence:
        """The evidence of the features as they are."""
        nothing = np.zeros((self.width, 0))
        return self._checked(self._low_rank(nothing, nothing, np.zeros(self.width)), self._unmapped)

    def linear(self, weight: Float[np.ndarray, "out d"], bias: Float[np.ndarray, " out"]) -> Evidence:
        """The evidence of XWᵀ + 1bᵀ."""
        found = self._linear(weight, bias, self.precision)
        if self.precision == "float32":
            if found.lost <= LIMIT["float32"]:
                return found
            self.fallbacks += 1
            found = self._linear(weight, bias, "float64")
        return self._checked(found, lambda: (self._unmapped() @ weight.T.astype(float)) + bias)

    def low_rank(
        self,
        up: Float[np.ndarray, "d r"],
        down: Float[np.ndarray, "d r"],
        bias: Float[np.ndarray, " d"],
        *,
        identity: bool,
    ) -> Evidence:
        """The evidence of X(I + UVᵀ)ᵀ + 1bᵀ, or of X(UVᵀ)ᵀ + 1bᵀ."""
        up, down, bias = up.astype(float), down.astype(float), bias.astype(float)
        if not identity:
            # the features lie in r + 1 directions, and so do their singular values
            inside = np.transpose(np.linalg.qr(np.column_stack([up, up @ (down.T @ self.mean) + bias]), mode="r"))
            return by_svd(np.column_stack([self._centred @ down, np.ones(self.rows)]) @ inside, self._targets)
        mapped = self._low_rank(up, down, bias)
        return self._checked(mapped, lambda: self._unmapped() + (self._unmapped() @ down) @ up.T + bias)

    def _unmapped(self) -> Float[np.ndarray, "n d"]:
        return self._centred + self.mean

    def _checked(self, found: Evidence, features) -> Evidence:
        if found.lost <= LIMIT["float64"]:
            return found
        self.fallbacks += 1
        return by_svd(features(), self._targets)

    def _linear(self, weight: np.ndarray, bias: np.ndarray, precision: str) -> Evidence:
        single, size, rows = precision == "float32", len(weight), self.rows
        exact = self._work.array("exact", (self.width, size), np.float64)  # Wᵀ
        np.copyto(exact.T, weight)
        same = self._work.array("same", exact.shape, np.float32) if single else exact
        if single:
            np.copyto(same.T, weight, casting="same_kind")
        mean = self.mean @ exact + bias
        if self._dual:
            mapped = self._work.array("mapped", (size, rows), same.dtype)
            np.matmul(self._once(self._single_factor) if single else self._centred, same, out=mapped.T)
            sides = np.column_stack([self._targets, np.ones(rows), self._centred @ (exact @ mean)])
            core, share = np.array([[mean @ mean, 1.0], [1.0, 0.0]]), None
        else:
            sides = np.column_stack([exact.T @ self._moments, mean])
            core, share = np.array([[float(rows)]]), self._sums[None]
            mapped = same
            multiply_lower(self._once(self._single_factor if single else self._factor), mapped)  # LᵀWᵀ
        square = self._work.array("square", (mapped.shape[1], mapped.shape[1]), mapped.dtype)
        gram(mapped, square)
        return self._maximised(*tridiagonal(square, sides), core, share)

    def _low_rank(self, up: np.ndarray, down: np.ndarray, bias: np.ndarray) -> Evidence:
        values, turn, sides = self._once(self._eigen)
        mean = self.mean + up @ (down.T @ self.mean) + bias
        rank = up.shape[1]
        turned = np.vstack([up.T, down.T, mean]) @ turn
        turned_up, turned_down, turned_mean = turned[:rank], turned[rank : 2 * rank], turned[2 * rank :]
        core = np.zeros((2 * rank + 2, 2 * rank + 2) if self._dual else (2 * rank + 1, 2 * rank + 1))
        share = None
        core[:rank, rank : 2 * rank] = core[rank : 2 * rank, :rank] = np.eye(rank)
        if self._dual:
            core[rank : 2 * rank, rank : 2 * rank] = up.T @ up
            core[2 * rank :, 2 * rank :] = [[mean @ mean, 1.0], [1.0, 0.0]]
            mapped_mean = turned_mean + (mean @ up) @ turned_down
            sides = np.vstack([sides[:-1], turned_up, turned_down, sides[-1], mapped_mean])
        else:
            scaled = values * turned_down
            core[:rank, :rank] = scaled @ turned_down.T
            core[-1, -1] = self.rows
            share = np.vstack([down.T @ self._moments, np.zeros((rank, len(sides))), self._sums])
            sides = np.vstack([sides, turned_up, scaled, turned_mean])
        return self._maximised(values, None, sides.T, core, share)

    def _maximised(
        self,
        diagonal: np.ndarray,
        beside: np.ndarray | None,
        sides: np.ndarray,
        core: np.ndarray,
        share: np.ndarray | None,
    ) -> Evidence:
        count = self._targets.shape[1]
        shifted = Shifted(diagonal, beside, sides[:, :count], sides[:, count:], core, share)
        return maximised(shifted, self._squares, self.rows, dual=self._dual)

"""The evidence of many linear maps of the same features, a batch of maps at once: for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from graftlm.errors import SetupError
from graftlm.measure.banded import BLOCK, Band, to_band
from graftlm.measure.evidence import CEILING, FINE, GRAM_FLOOR, INTERPOLATE, NODES, STEP, Evidence, per_row
from graftlm.measure.mapped import LIMIT, PRECISIONS, MappedEvidence

_MOST = 256  # maps in a batch: with more, starting the work is no longer a notable part of it
_SHARE = 0.6  # of the free memory that a batch may take
_UNKNOWN = 2 << 30  # bytes that are taken to be free where the device does not say
_EPSILON, _TINY = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny
_POINTS = 80  # of the grid, at most: means a million times the spread need 50

# h of all columns at many log t: (maps, T, targets); of all maps, or of those of these numbers
_Profile = Callable[[Tensor, Tensor], Tensor]


class BatchedEvidence:
    r"""Scores :math:`F_s = XW_s^\top + 1b_s^\top` for one X and a batch of maps s, in torch.

    The quantities are those of `graftlm.measure.mapped.MappedEvidence`: X is centred and factored once, and the mean
    enters as an update of rank one (n > d) or two (n ≤ d). All maps of a batch take each step together:
    :math:`M_s` is a batched product; it is made banded, M = QBQᵀ, with b = 32 reflections at a time (LAPACK's
    tridiagonal form has no counterpart in torch, and goes through the whole matrix for every column); h is evaluated
    for all maps, columns and grid points of log t by a block Cholesky factor of :math:`B + t`, then at Chebyshev nodes
    around each peak, then at the peaks. Maps are scaled to :math:`\operatorname{tr} M_s = 1` first, which leaves the
    evidence as it is.

    Args:
        features: X.
        targets: one column a target, none of them all zero.
        precision: of the O(d³) work, as in `MappedEvidence`; its products are never rounded to TF32 or bfloat16.
        device: where the work is done; it must have float64.

    Differs from `MappedEvidence` in: the errors' bound is in units of the Frobenius norm of M, no smaller than its
    largest eigenvalue. Maps that lose too many digits are scored again in float64 as a batch, and those that lose too
    many in it by `MappedEvidence` on the processor, one by one. Maps of low rank are multiplied out.
    """

    def __init__(
        self,
        features: Float[np.ndarray, "n d"],
        targets: Float[np.ndarray, "n targets"],
        precision: str = "float64",
        device: torch.device | str = "cpu",
    ):
        if precision not in PRECISIONS:
            raise SetupError("unknown precision", found=repr(precision), allowed=PRECISIONS)
        self.rows, self.width = features.shape
        self.precision, self.device = precision, torch.device(device)
        self.fallbacks = 0  # maps that were scored by a slower form than asked for
        self._given = features, targets
        self._dual = self.rows <= self.width
        whole = torch.tensor(features, dtype=torch.float64, device=self.device)
        self._targets = torch.tensor(targets, dtype=torch.float64, device=self.device)
        self._mean = whole.mean(dim=0)
        self._centred = whole - self._mean
        # X₀ = QLᵀ: one of the same Gram matrix takes the place of X₀ where that is smaller
        self._factor = self._centred if self._dual else torch.linalg.qr(self._centred, mode="r").R
        self._squares = self._targets.square().sum(dim=0)
        self._moments, self._sums = self._centred.mT @ self._targets, self._targets.sum(dim=0)

    @property
    def most(self) -> int:
        """Maps that one batch may hold, by the memory that is free on the device."""
        return int(min(max(_SHARE * _free(self.device) // self.bytes_a_map, 1), _MOST))

    @property
    def bytes_a_map(self) -> int:
        """Memory that a map of the features' width takes in a batch, in float64, at most."""
        size, targets = min(self.rows, self.width), self._targets.shape[1]
        matrices = 3 * self.width**2 + size * self.width + 4 * size**2
        shifted = max(_POINTS // 2, targets) * BLOCK * (4 * BLOCK + 3 * (targets + 2))
        return 8 * (matrices + shifted)

    @cached_property
    def _one_by_one(self) -> MappedEvidence:
        return MappedEvidence(*self._given)

    def linear(self, weights: Float[Tensor, "maps out d"], biases: Float[Tensor, "maps out"]) -> list[Evidence]:
        """The evidence of XWᵀ + 1bᵀ of each map.

        Args:
            weights: float32 or float64, on the device.
            biases: the same.

        Raises:
            SetupError: the device has too little memory for a single map; where it has too little for a batch, the
                batch is divided.
        """
        try:
            with _full_precision(self.device), torch.inference_mode():
                return self._linear(weights, biases, self.precision)
        except torch.OutOfMemoryError as error:
            if len(weights) == 1:
                raise SetupError(
                    "the device has too little memory to score a map", found=self.device, fix="device='cpu'"
                ) from error
        middle = len(weights) // 2
        return [*self.linear(weights[:middle], biases[:middle]), *self.linear(weights[middle:], biases[middle:])]

    def _linear(self, weights: Tensor, biases: Tensor, precision: str) -> list[Evidence]:
        band, norms = self._band(weights, biases, precision)
        h, t, bounds = self._maximised(band, self.rows if self._dual else biases.shape[1])
        parts = torch.cat([h, t * norms.square(), bounds], dim=1).cpu().numpy()
        heights, ratios, lost = np.split(parts, np.cumsum([self._targets.shape[1]] * 2), axis=1)
        found = list(map(Evidence, per_row(heights, self.rows), ratios, lost[:, 0].tolist()))
        again = np.flatnonzero(~(lost[:, 0] <= LIMIT[precision]))
        self.fallbacks += len(again)
        if len(again) and precision == "float32":
            chosen = torch.as_tensor(again, device=self.device)
            better = self._linear(weights[chosen], biases[chosen], "float64")
        else:
            better = [self._alone(weights[one].cpu().numpy(), biases[one].cpu().numpy()) for one in again]
        for one, evidence in zip(again.tolist(), better, strict=True):
            found[one] = evidence
        return found

    def _alone(self, weight: np.ndarray, bias: np.ndarray) -> Evidence:
        try:
            return self._one_by_one.linear(weight, bias)
        except np.linalg.LinAlgError:  # of features that are not finite
            unknown = np.full(self._targets.shape[1], np.nan)
            return Evidence(unknown, unknown)

    def _band(self, weights: Tensor, biases: Tensor, precision: str) -> tuple[Band, Tensor]:
        """FᵀF or FFᵀ of each map, its mean apart, and what stands beside it; and what F was divided by."""
        kind, targets = getattr(torch, precision), self._targets.shape[1]
        exact = weights.double()
        means = exact @ self._mean + biases.double()
        mapped = self._factor.to(kind) @ weights.to(kind).mT  # X₀Wᵀ, or of the same Gram matrix
        norms = torch.linalg.vector_norm(mapped, dim=(1, 2))
        mapped /= norms[:, None, None]
        scales = norms.double()[:, None]
        means = means / scales
        if self._dual:
            matrices = mapped @ mapped.mT
            across = ((means[:, None] @ exact).squeeze(1) / scales) @ self._centred.mT
            ones = torch.ones_like(across)
            sides = torch.cat([self._targets.expand(len(weights), -1, -1), ones[..., None], across[..., None]], dim=2)
            one = torch.ones_like(means[:, 0])
            share = self._sums.new_zeros(2, targets)
            core = torch.stack([means.square().sum(1), one, one, torch.zeros_like(one)], dim=1).unflatten(1, (2, 2))
        else:
            matrices = mapped.mT @ mapped
            sides, share = (
                torch.cat([exact @ self._moments / scales[..., None], means[..., None]], dim=2),
                self._sums[None],
            )
            core = torch.full_like(means[:, :1, None], self.rows)
        diagonal, below, turned = to_band(matrices, sides)
        band = Band(diagonal.double(), below.double(), turned[..., :targets], turned[..., targets:], core, share)
        return band, scales

    def _maximised(self, band: Band, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """h at its maximum and t there, (maps, targets), and the digits that were lost, (maps, 1)."""
        largest, scale = band.largest(), band.scale()
        low, high = (GRAM_FLOOR * largest).log(), (CEILING * scale).log()
        steps = ((high - low) / STEP).ceil()
        good = (largest > 0) & scale.isfinite() & (steps < _POINTS)
        count = int(steps.where(good, 2).max()) + 1
        low, step = low.where(good, 0), ((high - low) / (count - 1)).where(good, 1)
        grid = low[:, None] + step[:, None] * torch.arange(count, device=self.device)

        def profile(at: Tensor, maps: Tensor) -> Tensor:
            return self._heights(band.select(maps), at)[0]

        values = self._heights(band, grid)[0]
        good &= values.isfinite().all(2).all(1) & (values[:, 0] < values[:, 1]).all(1)  # else a peak below the floor
        where = _climb(profile, grid, step, values)
        found, residuals = (part.squeeze(2) for part in self._heights(band, where, own=True))
        silent = -self.rows * self._squares.log()  # h for t → ∞
        better, t = found > silent, where.exp()
        bounds = size / self.rows * largest[:, None] / t + self._squares / residuals.clamp(min=_TINY)
        good &= found.isfinite().all(1)
        lost = bounds.where(better, 0).amax(1).where(good, torch.inf)
        return found.where(better, silent), t.where(better, torch.inf), lost[:, None]

    def _heights(self, band: Band, at: Tensor, *, own: bool = False) -> tuple[Tensor, Tensor]:
        """h and R of all columns at many log t, (maps, T, targets), or of each at its own, (maps, targets, 1)."""
        t, squares = at.exp(), self._squares[:, None] if own else self._squares
        determinant, quadratic = band.at(t, own=own)
        residual = t[..., None] * quadratic if self._dual else squares - quadratic
        fit = -self.rows * residual.clamp(min=_EPSILON * squares).log()  # what is smaller has no digit left
        return fit - (determinant - band.size * at)[..., None], residual


def _climb(
    profile: _Profile, grid: Float[Tensor, "maps T"], step: Float[Tensor, " maps"], values: Float[Tensor, "maps T k"]
) -> Float[Tensor, "maps k"]:
    """log t at the highest point of each column, every peak of the grid refined: `evidence.climb` for many maps."""
    nodes, fine, interpolate = (torch.as_tensor(part, device=grid.device) for part in (NODES, FINE, INTERPOLATE))
    highest, place = values.max(dim=1)
    where = grid.gather(1, place)
    middle = values[:, 1:-1]
    peaks = (middle >= values[:, :-2]) & (middle >= values[:, 2:])
    anywhere = peaks.any(dim=2)
    number = anywhere.cumsum(dim=1) * anywhere  # which of its map's peaks a grid point is, from 1
    for which in range(1, int(number.max()) + 1):
        maps, points = (number == which).nonzero(as_tuple=True)
        centres = grid[maps, points + 1][:, None]
        curves = interpolate @ profile(centres + step[maps, None] * nodes, maps)
        top = curves.argmax(dim=1).clamp(1, len(fine) - 2)
        left, centre, right = (curves.gather(1, top[:, None] + shift).squeeze(1) for shift in (-1, 0, 1))
        bend = left - 2 * centre + right
        shift = (0.5 * (left - right) / bend).where(bend < 0, 0).clamp(-1, 1)
        height = centre - 0.25 * (left - right) * shift
        better = peaks[maps, points] & (height > highest[maps])
        at = centres + step[maps, None] * (fine[top] + shift * (fine[1] - fine[0]))
        where[maps], highest[maps] = at.where(better, where[maps]), height.where(better, highest[maps])
    return where


def _free(device: torch.device) -> int:
    """Bytes that torch can still have."""
    if device.type != "cuda":
        return _UNKNOWN
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices in float32, whatever the caller has set for a model's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)

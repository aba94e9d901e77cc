r"""Many symmetric matrices at once, made banded by orthogonal transformations, then factored for many shifts.

What `graftlm.measure.tridiagonal` is for one matrix and a processor's core. A tridiagonal form reads a whole matrix for
every column; a band of b takes the same O(m³) work in products of matrices, which a GPU is made for, and
:math:`M + t` is factored in m/b steps of b × b blocks, all matrices and all t in each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 32  # b


def to_band(
    matrices: Float[Tensor, "maps m m"], sides: Float[Tensor, "maps m k"]
) -> tuple[Float[Tensor, "maps blocks b b"], Float[Tensor, "maps between b b"], Float[Tensor, "maps blocks b k"]]:
    r"""Blocks on the diagonal and below it of :math:`Q^\top MQ`, and :math:`Q^\top` · sides.

    Householder reflections, b at a time as :math:`Q = I - VTV^\top`. Only the products with whole matrices are in the
    precision of the matrices: T and what else is thin are in float64, or Q would not be orthogonal to float32's last
    digit, and the errors ten times as large. Sizes that b does not divide are filled up with
    zeros: each such row adds log t to log det(M + t), and nothing to a quadratic form.

    Args:
        matrices: symmetric, float32 or float64, of a norm of about 1; overwritten where b divides m.
        sides: what is turned along; float64.
    """
    filled = -matrices.shape[1] % BLOCK
    if filled:
        matrices = pad(matrices, (0, filled, 0, filled))
    sides = pad(sides, (0, 0, 0, filled))  # a copy, too
    below = []
    for start in range(BLOCK, matrices.shape[1], BLOCK):
        vectors, triangle = _reflections(matrices[:, start:, start - BLOCK : start])
        below.append(triangle)
        rest, turned = matrices[:, start:, start:], sides[:, start:]
        exact = vectors.double()
        inverse = (exact.mT @ exact).triu()  # T⁻¹, but for its diagonal, which is half of this one
        squares = inverse.diagonal(dim1=1, dim2=2)
        squares.copy_(torch.where(squares > 0, 0.5 * squares, 1.0))
        moved = torch.linalg.solve_triangular(inverse, (rest @ vectors).double(), upper=True, left=False)
        both = exact.mT @ torch.cat([moved, turned], dim=2)
        both = torch.linalg.solve_triangular(inverse.mT, both, upper=False)
        moved.baddbmm_(exact, both[:, :, :BLOCK], alpha=-0.5)
        turned.baddbmm_(exact, both[:, :, BLOCK:], alpha=-1)
        moved = moved.to(rest.dtype)
        rest.baddbmm_(torch.cat([moved, vectors], dim=2), torch.cat([vectors, moved], dim=2).mT, alpha=-1)
    blocks = matrices.unflatten(1, (-1, BLOCK)).unflatten(3, (-1, BLOCK))
    diagonal = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()
    between = torch.stack(below, dim=1) if below else diagonal[:, :0]
    return diagonal, between, sides.unflatten(1, (-1, BLOCK))


def _reflections(panel: Float[Tensor, "maps rows b"]) -> tuple[Float[Tensor, "maps rows b"], Float[Tensor, "maps b b"]]:
    """V and R of a QR decomposition by reflections I − vvᵀ; v = 0 where a column is zero already. The panel is lost."""
    vectors, corners = torch.zeros_like(panel), []
    least = 1e3 * torch.finfo(panel.dtype).tiny ** 0.5  # where a square begins to lose digits; the matrix is about 1
    for place in range(panel.shape[2]):
        column, vector = panel[:, place:, place], vectors[:, place:, place]
        norm = torch.linalg.vector_norm(column, dim=1, keepdim=True)
        corner = torch.copysign(norm, column[:, :1])
        scale = torch.where(norm > least, (corner * (corner + column[:, :1])).rsqrt(), 0.0)
        vector.copy_(column * scale)
        vector[:, :1].addcmul_(corner, scale)
        rest = panel[:, place:, place + 1 :]
        rest.baddbmm_(vector[:, :, None], vector[:, None] @ rest, alpha=-1)
        corners.append(-corner)
    return vectors, panel[:, : panel.shape[2]].triu(1) + torch.cat(corners, dim=1).diag_embed()


@dataclass(frozen=True)
class Band:
    """M + t for many M and t, M being a banded matrix plus UCUᵀ of low rank.

    Attributes:
        diagonal: blocks on the diagonal.
        below: blocks below it.
        columns: right-hand sides in the same basis.
        update: U in the same basis.
        core: C; symmetric, may be singular or indefinite.
        share: K: the right-hand sides are columns + UK, of which a large UK would cost the rest its digits.
    """

    diagonal: Float[Tensor, "maps blocks b b"]
    below: Float[Tensor, "maps between b b"]
    columns: Float[Tensor, "maps blocks b targets"]
    update: Float[Tensor, "maps blocks b r"]
    core: Float[Tensor, "maps r r"]
    share: Float[Tensor, "r targets"]

    @property
    def size(self) -> int:
        """m, filled up to a multiple of b."""
        return self.diagonal.shape[1] * self.diagonal.shape[2]

    def largest(self) -> Float[Tensor, " maps"]:
        """Frobenius norms of the banded parts: no eigenvalue is larger, and rounding errors are in units of them."""
        squares = [self.diagonal.square().sum((1, 2, 3)), 2 * self.below.square().sum((1, 2, 3))]
        return (squares[0] + squares[1]).sqrt()

    def scale(self) -> Float[Tensor, " maps"]:
        """A bound on the eigenvalues of M."""
        update = self.update.flatten(1, 2)
        return self.largest() + (self.core * (update.mT @ update)).abs().sum((1, 2))

    def select(self, maps: Tensor) -> Band:
        """The matrices of these numbers."""
        names = ("diagonal", "below", "columns", "update", "core")
        return replace(self, **{name: getattr(self, name)[maps] for name in names})

    def at(
        self, t: Float[Tensor, "maps T"], *, own: bool = False
    ) -> tuple[Float[Tensor, "maps T"], Float[Tensor, "maps T targets"]]:
        """log det(M + t) and c·(M + t)⁻¹c, for many t a matrix; NaN where M + t has no positive determinant.

        The update is taken in as in `graftlm.measure.tridiagonal.Shifted.at`.

        Args:
            t: in any order.
            own: there is one t for each column, and no column is solved for the t of another; (maps, targets, 1) then.
        """
        maps, points = t.shape
        wide, ranks = 1 if own else self.columns.shape[3], self.update.shape[3]
        eye = torch.eye(BLOCK, dtype=t.dtype, device=t.device)
        determinant, failed = torch.zeros_like(t), torch.zeros_like(t, dtype=torch.bool)
        quadratic, against = t.new_zeros(maps, points, wide), t.new_zeros(maps, points, ranks, wide + ranks)
        solved = factor = t.new_zeros(maps, points, BLOCK, 0)  # of the block above
        for number in range(self.diagonal.shape[1]):
            columns = self.columns[:, number]
            known = [
                columns.mT[..., None] if own else columns[:, None].expand(-1, points, -1, -1),
                self.update[:, number, None].expand(-1, points, -1, -1),
            ]
            if number < self.below.shape[1]:
                known.append(self.below[:, number, None].mT.expand(-1, points, -1, -1))
            sides, shifted = torch.cat(known, dim=3), self.diagonal[:, number, None] + t[..., None, None] * eye
            if number:
                sides[..., : wide + ranks] -= factor.mT @ solved
                shifted -= factor.mT @ factor
            root, info = torch.linalg.cholesky_ex(shifted)
            failed |= info != 0
            determinant += 2 * root.diagonal(dim1=2, dim2=3).log().sum(2)
            sides = torch.linalg.solve_triangular(root, sides, upper=False)
            solved, factor = sides[..., : wide + ranks], sides[..., wide + ranks :]
            quadratic += solved[..., :wide].square().sum(2)
            against += solved[..., wide:].mT @ solved
        across, inner = against[..., :wide], against[..., wide:]
        core, share = self.core[:, None], self.share.mT[..., None] if own else self.share
        share = share.expand_as(across)
        changed = core @ inner + torch.eye(ranks, dtype=t.dtype, device=t.device)
        sign, more = torch.linalg.slogdet(changed)
        taken, given = torch.linalg.solve_ex(changed, torch.cat([core @ across, share], dim=3)).result.split(
            wide, dim=3
        )
        quadratic += ((2 * across + inner @ share) * given - across * taken).sum(2)
        failed |= ~(sign > 0)
        return (determinant + more).masked_fill(failed, torch.nan), quadratic.masked_fill(failed[..., None], torch.nan)

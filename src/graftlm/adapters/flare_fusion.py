"""FLARE inside one projection: which source token belongs to a target token, and how the two are fused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

# A new function is a line here. Both arguments: the bottleneck, (batch, target length, rank), the source aligned.
FUSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda source, target: source + target,
    "mul": lambda source, target: source * target,
    "add_relu": lambda source, target: source.relu() + target.relu(),
    "mul_relu": lambda source, target: source.relu() * target.relu(),
    "cross_attention": lambda source, target: source,  # what the target's queries have read
}
ALIGNMENTS = ("position", "relative", "pooled", "attention")


@dataclass(frozen=True)
class Source:
    """What one call of the model fuses.

    Attributes:
        states: what queries and values of each layer read from the source, bottom first, (batch, source length, width);
            last what the top layer gives. Zero at padding.
        mask: (batch, source length), True at tokens.
        target: (batch, target length), True at the target tokens that are fused.
        span: first column of `target` that this call computes, and the one after the last; what is before it is in the
            cache, what is after it comes later. None = all.
    """

    states: tuple[Tensor, ...]
    mask: Tensor
    target: Tensor
    span: tuple[int, int] | None = None
    _places: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, length) of the target tokens that this call computes."""
        rows, length = self.target.shape
        start, stop = self.span or (0, length)
        return rows, stop - start

    def repeated(self, times: int) -> Source:
        """Every row `times` times in succession, as beams are."""
        tensors = [tensor.repeat_interleave(times, 0) for tensor in (*self.states, self.mask, self.target)]
        return Source(tuple(tensors[:-2]), tensors[-2], tensors[-1], self.span)

    def places(self, how: str) -> tuple[Tensor, Tensor]:
        """Which source token each target token is fused with.

        Args:
            how: "position" or "relative"; with the others only the second answer has a meaning.

        Returns:
            The column of the source token and whether there is one, both (batch, target length).
        """
        if how not in self._places:  # all projections of a call ask the same
            self._places[how] = self._find(how)
        return self._places[how]

    def _find(self, how: str) -> tuple[Tensor, Tensor]:
        rank = self.target.long().cumsum(1) - 1
        tokens = self.mask.sum(1, keepdim=True)
        if how == "relative":
            rank = (2 * rank + 1) * tokens // (2 * self.target.sum(1, keepdim=True).clamp(min=1))
        there = self.target & ((rank < tokens) if how in ("position", "relative") else (tokens > 0))
        columns = self.mask.long().argsort(dim=1, descending=True, stable=True)  # the k-th token, wherever the padding
        index = columns.gather(1, rank.clamp(0, columns.shape[1] - 1))
        now = slice(*(self.span or (0, None)))
        return index[:, now], there[:, now]


def aligned(source: Tensor, queries: Tensor, keys: Tensor, values: Tensor, record: Source, how: str):
    """The source in the target's length, and where it has something to say.

    Args:
        source: A x_S, (batch, source length, rank).
        queries: of the target, (batch, target length, rank); used where `how` is "attention".
        keys: of the source, (batch, source length, rank).
        values: of the source, (batch, source length, rank).
        record: lengths and masks of both.
        how: one of `ALIGNMENTS`.

    Returns:
        (batch, target length, rank) and (batch, target length).
    """
    index, there, mask = (tensor.to(source.device) for tensor in (*record.places(how), record.mask))
    rank = source.shape[-1]
    if how == "pooled":
        weights = mask.to(source.dtype)
        mean = (source * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
        return mean[:, None].expand(-1, index.shape[1], -1), there
    if how == "attention":
        scores = queries @ keys.transpose(1, 2) / math.sqrt(rank)
        scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        return functional.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype) @ values, there
    return source.gather(1, index[..., None].expand(-1, -1, rank)), there

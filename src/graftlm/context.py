"""What belongs to one forward pass and is no argument of the model: the domain of each sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ORIGINAL, NEW = 0, 1


@dataclass(frozen=True)
class Batch:
    """What is said of a batch beside the call: see `domain`."""

    domains: Tensor | Sequence[int]
    targets: Tensor | None = None
    items: Tensor | int | None = None


_BATCH: ContextVar[Batch | None] = ContextVar("graftlm_domain", default=None)


@contextmanager
def domain(
    domains: Tensor | Sequence[int], *, targets: Tensor | None = None, items: Tensor | int | None = None
) -> Iterator[None]:
    """Say which domain the sequences of the forward passes inside belong to, where the batch does not carry it.

    Only the forward passes need to be inside, not `backward`. A batch with a column ``domain`` says the same:
    ``model(**batch)``; both at once are an error.

    Args:
        domains: shape (batch,): 0 for a sequence of the original domain, on which the adapter is to stay silent, 1 for
            one of the new domain.
        targets: the labels, where the model does not get them because its loss is computed outside; see
            `graftlm.with_penalty`.
        items: how many labels that loss is a mean over, where it is not this batch's own mean: Trainer's
            ``num_items_in_batch``.

    Example:
        >>> from graftlm.context import current_batch
        >>> with domain([0, 1]):
        ...     current_batch().domains
        [0, 1]
        >>> print(current_batch())
        None
    """
    before = _BATCH.set(Batch(domains, targets, items))
    try:
        yield
    finally:
        _BATCH.reset(before)


def current_batch() -> Batch | None:
    """What the innermost `domain` around the caller says."""
    return _BATCH.get()

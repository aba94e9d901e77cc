"""Domain mixing: sequences of a new domain with a fixed share of the original one among them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from graftlm.context import NEW, ORIGINAL
from graftlm.errors import DataError, SetupError


class Rows(Protocol):
    """A data set of rows that can be asked for by number, such as a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class DomainMix(Dataset):
    r"""The sequences of a whole run: a share p of them from the original domain, each with its label ``domain``.

    Of n sequences k = round(p·n) are of the original domain, one at a random place in each of the k stretches
    [j·n/k, (j + 1)·n/k). So the share is exact over the run and near p in every part of it. Within a domain every row
    comes once before one comes again, in a new order each time.

    Everything follows from the seed and the number of a sequence. So the stream is the same for any number of ranks and
    workers, and a run goes on wherever it was: a Trainer does both by itself, with ``train_dataset=mix`` and one epoch.

    Args:
        new: rows (mappings) of the new domain.
        original: rows of the original domain, or of a proxy of it; None with a share of 0.
        share: p, from 0 to 1.
        length: n, the sequences of the run: steps x batch size x accumulation steps x processes. None: as many as the
            new domain has to be read once.
        seed: of places and orders.

    Attributes:
        domains, rows: of each sequence of the run, its domain and its row there.
        originals: k.

    Raises:
        SetupError: a share outside [0, 1] or of less than half a sequence, or no length.
        DataError: a domain that is needed and empty, or rows that are no mappings or have a column ``domain`` already.

    Source: Talla, Jégou, Grave, arXiv 2410.02744 (p = 0.1).

    Example:
        >>> new, original = [{"text": f"new {i}"} for i in range(6)], [{"text": f"old {i}"} for i in range(9)]
        >>> mix = DomainMix(new, original, share=0.25)
        >>> len(mix), [mix[i]["domain"] for i in range(8)].count(0)
        (8, 2)
    """

    def __init__(
        self, new: Rows, original: Rows | None, *, share: float = 0.1, length: int | None = None, seed: int = 0
    ):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise SetupError("the share of original-domain sequences is no share", found=repr(share), allowed="0 to 1")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise SetupError("the seed of a mix is no seed", found=f"seed={seed!r}", allowed="0, 1, 2, …")
        for rows, name in ((new, "new"), (original, "original")):
            _check_rows(rows, name)
        if length is None:
            if share == 1:
                raise SetupError(
                    "a run on the original domain alone needs a length", found="share=1", fix="length=1000"
                )
            length = math.floor(len(new) / (1 - share) + 0.5)
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise SetupError("a run needs at least one sequence", found=f"length={length!r}", allowed="1, 2, …")
        self.share, self.seed = share, seed
        self.originals = math.floor(share * length + 0.5)
        if share and not self.originals:
            raise SetupError(
                "the share of original-domain sequences is less than half a sequence of the run",
                found=f"share={share}, length={length}",
                allowed=f"share from {0.5 / length:.2g}, or share=0 for none",
            )
        self._sources: dict[int, Rows] = {ORIGINAL: [] if original is None else original, NEW: new}
        counts = {ORIGINAL: self.originals, NEW: length - self.originals}
        for domain, name in ((ORIGINAL, "original"), (NEW, "new")):
            if counts[domain] and not len(self._sources[domain]):
                raise DataError(
                    f"there is no row of the {name} domain, and the mix needs {counts[domain]}",
                    found=f"share={share}, length={length}",
                )
        self.domains = np.full(length, NEW, dtype=np.int8)
        edges = [number * length // max(self.originals, 1) for number in range(self.originals + 1)]
        low, high = np.array(edges[:-1], dtype=np.int64), np.array(edges[1:], dtype=np.int64)
        self.domains[np.random.default_rng([seed, 2]).integers(low, high)] = ORIGINAL
        self.rows, self._passes = np.empty(length, dtype=np.int64), np.empty(length, dtype=np.int64)
        for domain, count in counts.items():
            here, available = self.domains == domain, len(self._sources[domain])
            self.rows[here] = _order(count, available, seed, domain)
            self._passes[here] = np.arange(count) // max(1, available)

    def __len__(self) -> int:
        return len(self.domains)

    def place(self, index: int) -> tuple[int, int, int]:
        """Of a sequence of the run: its domain, its row there, and how often all rows came before it."""
        domain = int(self.domains[index])
        return domain, int(self.rows[index]), int(self._passes[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        domain, number, _ = self.place(index)
        row = self._sources[domain][number]
        if not isinstance(row, Mapping) or "domain" in row:
            raise DataError(
                "the rows of a mix are mappings, and their domain is given by where they come from",
                found=f"columns {', '.join(map(str, row))}" if isinstance(row, Mapping) else type(row).__name__,
                allowed="columns such as input_ids, attention_mask, labels; none called domain",
            )
        return {**row, "domain": domain}


def _check_rows(rows: object, name: str) -> None:
    if rows is not None and not hasattr(type(rows), "__len__"):
        raise DataError(
            f"the rows of the {name} domain cannot be counted and asked for by number, as a mix does",
            found=type(rows).__name__,
            allowed="a datasets.Dataset, a list",
            fix=f"list({name}.take(10_000)), or a share that holds in the mean only: datasets.interleave_datasets(["
            "original.map(lambda row: {'domain': 0}), new.map(lambda row: {'domain': 1})], probabilities=[0.1, 0.9])",
        )


def _order(count: int, available: int, seed: int, domain: int) -> np.ndarray:
    passes = math.ceil(count / available) if count else 0
    orders = [np.random.default_rng([seed, domain, number]).permutation(available) for number in range(passes)]
    return np.concatenate(orders)[:count] if orders else np.empty(0, dtype=np.int64)

"""The scores of many maps: each in a thread of its own on the processor, or batches of them on a device."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from graftlm.errors import DataError, SetupError
from graftlm.measure.batched import BatchedEvidence
from graftlm.measure.evidence import Evidence
from graftlm.measure.mapped import MappedEvidence
from graftlm.sources.esm import EmbeddingSpaceMap
from graftlm.sources.pool import Skipped

Given = TypeVar("Given")
Made = TypeVar("Made")
Named = tuple[str, EmbeddingSpaceMap]
Score = tuple[float, float] | Skipped  # the score and its seconds


class Scorer(Protocol):
    """What scores maps of the same features."""

    def scores(self, maps: Iterable[Named], precision: str) -> Iterator[tuple[Named, Score]]:
        """Each map with its score, in order."""

    def without_map(self) -> float:
        """The score of the features as they are."""


def scorer_of(
    features: np.ndarray,
    columns: np.ndarray,
    *,
    threads: int | None = None,
    device: torch.device | None = None,
    maps_at_once: int | None = None,
) -> Scorer:
    """Batches where a GPU or a size of them is named, else threads; arguments as of `graftlm.rank_source_tasks`."""
    _check_count("threads", threads)
    _check_count("maps_at_once", maps_at_once)
    if maps_at_once is None and (device is None or device.type in ("cpu", "mps")):
        return InThreads(features, columns, threads or _cores())
    if threads is not None:
        raise SetupError("threads are for scoring without batches", found=f"threads={threads}", fix="threads=None")
    return InBatches(features, columns, device or torch.device("cpu"), maps_at_once)


class InThreads:
    """One map a thread, by `MappedEvidence`."""

    def __init__(self, features: np.ndarray, columns: np.ndarray, threads: int):
        self._given, self._threads = (features, columns), threads
        self._made: dict[str, MappedEvidence] = {}

    def _base(self, precision: str) -> MappedEvidence:
        if precision not in self._made:
            self._made[precision] = MappedEvidence(*self._given, precision)
        return self._made[precision]

    def scores(self, maps: Iterable[Named], precision: str) -> Iterator[tuple[Named, Score]]:
        base = self._base(precision)
        return in_threads(lambda one: _score(base, *one), maps, self._threads)

    def without_map(self) -> float:
        return self._base("float64").identity().score


class InBatches:
    """Many maps at a time on one device, by `BatchedEvidence`."""

    def __init__(self, features: np.ndarray, columns: np.ndarray, device: torch.device, size: int | None):
        self._given, self._device, self._size = (features, columns), device, size

    def scores(self, maps: Iterable[Named], precision: str) -> Iterator[tuple[Named, Score]]:
        base = BatchedEvidence(*self._given, precision, self._device)
        return in_batches(lambda batch: _scores(base, batch), maps, self._size or base.most)

    def without_map(self) -> float:
        base = BatchedEvidence(*self._given, device=self._device)
        eye = torch.eye(base.width, dtype=torch.float64, device=self._device)[None]
        return base.linear(eye, torch.zeros_like(eye[:, 0]))[0].score


def evidence_of(base: MappedEvidence, esm: EmbeddingSpaceMap) -> Evidence:
    """The evidence of the mapped embeddings, in the form that suits the map.

    Raises:
        DataError: a map of another width.
    """
    if esm.width != base.width:
        raise _of_another_width(base, esm)
    if esm.weight is not None:
        return base.linear(esm.weight, esm.bias)
    up, down = np.asarray(esm.up), np.asarray(esm.down)
    return base.low_rank(up, down, esm.bias, identity=esm.identity)


def _score(base: MappedEvidence, name: str, esm: EmbeddingSpaceMap) -> Score:
    started = time.perf_counter()
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is named below
            score = evidence_of(base, esm).score
    except (DataError, np.linalg.LinAlgError) as error:
        return Skipped(name, str(error))
    return _finite(name, score, time.perf_counter() - started)


def _scores(base: BatchedEvidence, batch: Sequence[Named]) -> list[Score]:
    """Of one batch; a map's seconds are its share of the batch's."""
    started = time.perf_counter()
    fitting = [esm for _, esm in batch if esm.width == base.width]
    with np.errstate(over="ignore", invalid="ignore"):
        found = iter(base.linear(*dense(fitting, base.device)) if fitting else ())
    seconds = (time.perf_counter() - started) / len(batch)
    return [
        _finite(name, next(found).score, seconds)
        if esm.width == base.width
        else Skipped(name, str(_of_another_width(base, esm)))
        for name, esm in batch
    ]


def dense(maps: Sequence[EmbeddingSpaceMap], device: torch.device) -> tuple[Tensor, Tensor]:
    """W and b of maps of one width, (maps, d, d) and (maps, d), those of low rank multiplied out in float64."""
    low = [number for number, esm in enumerate(maps) if esm.weight is None]
    double = bool(low) or any(esm.weight is not None and esm.weight.dtype == np.float64 for esm in maps)
    kind, width = torch.float64 if double else torch.float32, maps[0].width
    weights = torch.empty(len(maps), width, width, dtype=kind, device=device)
    for weight, esm in zip(weights, maps, strict=True):
        if esm.weight is not None:
            weight.copy_(torch.tensor(esm.weight))
    if low:
        sides = np.zeros((2, len(low), width, max(maps[number].rank for number in low)))
        for number, place in enumerate(low):
            sides[0, number, :, : maps[place].rank] = maps[place].up
            sides[1, number, :, : maps[place].rank] = maps[place].down
        up, down = torch.as_tensor(sides, device=device)
        eye = torch.tensor([float(maps[place].identity) for place in low], device=device)[:, None].double()
        weights[low] = up @ down.mT + eye.expand(-1, width).diag_embed()
    return weights, torch.tensor(np.stack([esm.bias for esm in maps])).to(device, kind)


def in_threads(work: Callable[[Given], Made], items: Iterable[Given], threads: int) -> Iterator[tuple[Given, Made]]:
    """Each item with what is made of it, in order; `threads` at once, and not many more are held in memory.

    With several threads each one has BLAS to itself: its own threads would only get into each other's way.
    """
    if threads == 1:
        yield from ((item, work(item)) for item in items)
        return
    waiting: deque[tuple[Given, Future[Made]]] = deque()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > 2 * threads:
                first, made = waiting.popleft()
                yield first, made.result()
        yield from ((item, made.result()) for item, made in waiting)


def in_batches(
    work: Callable[[Sequence[Given]], Sequence[Made]], items: Iterable[Given], size: int
) -> Iterator[tuple[Given, Made]]:
    """Each item with what is made of it, in order, `size` at once; the next batch is read meanwhile."""
    rest = iter(items)
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(lambda: list(itertools.islice(rest, size)))
        while batch := coming.result():
            coming = reader.submit(lambda: list(itertools.islice(rest, size)))
            yield from zip(batch, work(batch), strict=True)


def _finite(name: str, score: float, seconds: float) -> Score:
    if not np.isfinite(score):
        return Skipped(name, f"the score is {score}: the mapped embeddings are too large for the arithmetic")
    return score, seconds


def _of_another_width(base: MappedEvidence | BatchedEvidence, esm: EmbeddingSpaceMap) -> DataError:
    return DataError(f"the map takes embeddings of width {esm.width}", found=f"width {base.width}")


def _check_count(name: str, asked: Any) -> None:
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
        raise SetupError(f"{name} is a whole number of at least 1", found=repr(asked))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

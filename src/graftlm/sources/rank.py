"""Which source task first? Every map of a pool scored for one target task."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits
from torch import nn
from tqdm.auto import tqdm

from graftlm.errors import DataError, SetupError
from graftlm.measure.evidence import Evidence
from graftlm.measure.mapped import MappedEvidence
from graftlm.sources import baselines
from graftlm.sources.embed import Embedder
from graftlm.sources.esm import EmbeddingSpaceMap
from graftlm.sources.pool import Skipped, SourcePool, same_model
from graftlm.sources.result import Ranking, ranked
from graftlm.sources.target import Columns, Target, read_target

METHODS = ("esm-logme", *baselines.METHODS)
Given = TypeVar("Given")
Made = TypeVar("Made")
_EXACT = 50  # sources at the top that are scored again in float64
_MARGIN = 2e-4  # a float32 score may be this far off


def rank_source_tasks(
    model: str | Path | nn.Module | Embedder,
    dataset: Any,
    *,
    text_column: Columns,
    label_column: str,
    pool: SourcePool | str | Path | Iterable[EmbeddingSpaceMap] | None = None,
    method: str = "esm-logme",
    models: Mapping[str, Any] | None = None,
    sources: Mapping[str, Any] | None = None,
    task: str | None = None,
    precision: str = "float64",
    threads: int | None = None,
    progress: bool = False,
    **embedding: Any,
) -> Ranking:
    """Ranks source tasks by what fine-tuning on them first would do for a target task.

    Args:
        model: the base model: a folder, a hub id, a model in memory (with ``tokenizer=``), or an `Embedder`.
        dataset: the target task: a `datasets.Dataset`, a mapping of columns, or a list of rows.
        text_column: the column of its texts, or two of them.
        label_column: the column of its labels: whole numbers (classes) or numbers.
        pool: the Embedding Space Maps of the source tasks: a pool, its folder, or maps.
        method: ``esm-logme``: each map on the target's embeddings, scored by `graftlm.logme`; no source model is run.
            Given ``models``: ``logme``, ``leep``, ``nce``, ``frozen``. Given ``sources``: ``textemb``, ``vocabulary``,
            ``size`` (that of a pool's entries too).
        models: name → model fine-tuned on a source task (folder, hub id, or model in memory).
        sources: name → texts of a source task.
        task: ``classification`` or ``regression``; None: what the labels look like.
        precision: of esm-logme. ``float32`` is 1.4 to 1.7 times as fast: scores are within 1e-4, and the best 50 are
            scored again in float64.
        threads: of esm-logme: maps that are scored at once; None: one a core.
        progress: a bar.
        embedding: arguments of `Embedder`: ``tokenizer``, ``pooling``, ``max_length``, ``batch_size``, ``dtype``,
            ``device``.

    Returns:
        The ranking. What could not be scored is named in `Ranking.skipped`, and does not end the others.

    Raises:
        DataError: an empty pool, maps of another base model or width, columns that do not exist, labels that are
            strings or missing, a target with one class; a pool in which nothing can be scored.
        SetupError: an unknown method or precision, arguments that the method does not take, or lacks.

    Source: arXiv 2410.15148, Sections 3 and 4; for the other methods see `graftlm.sources.baselines`.

    Differs from the paper in: the score is the exact evidence (see `graftlm.logme`); sources are compared with the base
    model without any (`Ranking.without_source`).
    """
    started = time.perf_counter()
    given = {"pool": pool, "models": models, "sources": sources}
    _check_method(method, given)
    target = read_target(dataset, text_column, label_column, task)
    if isinstance(model, Embedder) and embedding:
        raise SetupError("an Embedder has its settings already", found=", ".join(embedding))
    if method != "esm-logme":
        return baselines.rank(method, model, target, pool, models, sources, text_column, embedding, progress)
    maps = _maps(pool)
    embedder = model if isinstance(model, Embedder) else Embedder(model, progress=progress, **embedding)
    notes = _check_base(embedder, maps) if isinstance(maps, SourcePool) else ()
    embedding_started = time.perf_counter()
    features = embedder(target.texts)
    spent = time.perf_counter() - embedding_started
    found = rank_maps(
        maps,
        features,
        target,
        model=embedder.name,
        precision=precision,
        threads=threads,
        progress=progress,
        notes=notes,
    )
    return _timed(found, spent, time.perf_counter() - started)


def rank_maps(
    maps: SourcePool | Iterable[EmbeddingSpaceMap],
    features: np.ndarray,
    target: Target,
    *,
    model: str = "base",
    precision: str = "float64",
    threads: int | None = None,
    progress: bool = False,
    notes: tuple[str, ...] = (),
) -> Ranking:
    """ESM-LogME from embeddings that were made before; see `rank_source_tasks`.

    A few maps are in memory at a time, and the work for each does not depend on the number of rows.
    """
    threads = _threads(threads)
    started = time.perf_counter()
    skipped: list[Skipped] = []
    base = MappedEvidence(features, target.columns, precision)
    scores: dict[str, tuple[float, float]] = {}
    about: dict[str, tuple[str | None, str | None]] = {}
    total = len(maps) if isinstance(maps, Sized) else None
    scored = in_threads(lambda one: _score(base, *one), _named(maps, skipped), threads)
    with tqdm(scored, total=total, desc="ESM-LogME", unit="map", disable=not progress) as bar:
        for (name, esm), score in bar:
            about[name] = esm.task, esm.details.get("task_subset")
            if isinstance(score, Skipped):
                skipped.append(score)
            else:
                scores[name] = score
            if skipped:
                bar.set_postfix_str(f"{len(skipped)} skipped")
    if not scores:
        first = skipped[0].problem.splitlines()[0] if skipped else "no map"
        raise DataError("no source task could be scored", found=f"{len(skipped)} skipped; first: {first}")
    if precision == "float32":
        notes = (*notes, _rescore(maps, features, target, scores, skipped, threads))
    rows = [(name, score, seconds, *about[name]) for name, (score, seconds) in scores.items()]
    exact = base if precision == "float64" else MappedEvidence(features, target.columns)
    return Ranking(
        method="esm-logme",
        model=model,
        rows=len(features),
        classes=target.classes,
        sources=ranked(rows),
        skipped=tuple(skipped),
        without_source=exact.identity().score,
        seconds=time.perf_counter() - started,
        notes=notes,
    )


def evidence_of(base: MappedEvidence, esm: EmbeddingSpaceMap) -> Evidence:
    """The evidence of the mapped embeddings, in the form that suits the map.

    Raises:
        DataError: a map of another width.
    """
    if esm.width != base.width:
        raise DataError(f"the map takes embeddings of width {esm.width}", found=f"width {base.width}")
    if esm.weight is not None:
        return base.linear(esm.weight, esm.bias)
    up, down = np.asarray(esm.up), np.asarray(esm.down)
    return base.low_rank(up, down, esm.bias, identity=esm.identity)


def _score(base: MappedEvidence, name: str, esm: EmbeddingSpaceMap) -> tuple[float, float] | Skipped:
    started = time.perf_counter()
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is named below
            score = evidence_of(base, esm).score
    except (DataError, np.linalg.LinAlgError) as error:
        return Skipped(name, str(error))
    if not np.isfinite(score):
        return Skipped(name, f"the score is {score}: the mapped embeddings are too large for the arithmetic")
    return score, time.perf_counter() - started


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


def _threads(asked: Any) -> int:
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
        raise SetupError("threads is a whole number of at least 1", found=repr(asked))
    if asked:
        return asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _rescore(
    maps: SourcePool | Iterable[EmbeddingSpaceMap],
    features: np.ndarray,
    target: Target,
    scores: dict[str, tuple[float, float]],
    skipped: list[Skipped],
    threads: int,
) -> str:
    """Float64 scores for all that may belong to the best 50; what was done, in words."""
    lowest = sorted((score for score, _ in scores.values()), reverse=True)[:_EXACT][-1] - _MARGIN
    chosen = {name for name, (score, _) in scores.items() if score >= lowest}
    base = MappedEvidence(features, target.columns)
    again = ((name, maps.load(name)) for name in chosen) if isinstance(maps, SourcePool) else _named(maps, [])
    wanted = ((name, esm) for name, esm in again if name in chosen)
    for (name, _), score in in_threads(lambda one: _score(base, *one), wanted, threads):
        if isinstance(score, Skipped):
            skipped.append(score)
        else:
            scores[name] = score[0], scores[name][1] + score[1]
    return f"scores in float32 (within 1e-4), those of the best {len(chosen)} in float64"


def _named(
    maps: SourcePool | Iterable[EmbeddingSpaceMap], skipped: list[Skipped]
) -> Iterable[tuple[str, EmbeddingSpaceMap]]:
    if isinstance(maps, SourcePool):
        return ((entry.name, esm) for entry, esm in maps.maps(skipped))
    named: dict[str, EmbeddingSpaceMap] = {}
    for esm in maps:
        subset = esm.details.get("task_subset")
        name = f"{esm.task}--{subset}" if subset else esm.task
        named[name if name not in named else f"{name}#{len(named)}"] = esm
    return named.items()


def _check_method(method: str, given: Mapping[str, Any]) -> None:
    if method not in METHODS:
        raise SetupError("unknown method", found=repr(method), allowed=METHODS)
    takes = ("pool",) if method == "esm-logme" else baselines.TAKES[method]
    if idle := [name for name, value in given.items() if value is not None and name not in takes]:
        raise SetupError(f"{method} does not use {' and '.join(idle)}", allowed=" or ".join(takes))
    if not any(given[name] is not None for name in takes):
        raise SetupError(f"{method} needs {' or '.join(takes)}", fix=f"{takes[0]}=…")


def _maps(pool: SourcePool | str | Path | Iterable[EmbeddingSpaceMap] | None) -> SourcePool | list[EmbeddingSpaceMap]:
    found: SourcePool | list[EmbeddingSpaceMap]
    if isinstance(pool, str | Path):
        found = SourcePool.open(pool)
    else:
        found = pool if isinstance(pool, SourcePool) else list(pool or ())
    if not len(found):
        raise DataError(
            "the pool is empty", found=getattr(found, "folder", "no map"), fix="graftlm pool add POOL ESM …"
        )
    return found


def _check_base(embedder: Embedder, pool: SourcePool) -> tuple[str, ...]:
    if embedder.width != pool.width:
        raise DataError(
            "the pool's maps take embeddings of another width",
            found=f"{embedder.name}: {embedder.width}",
            allowed=f"{pool.width}, that of {pool.base_model}",
        )
    if same_model(embedder.name, pool.base_model):
        return ()
    if Path(embedder.name).is_dir() or "/" not in embedder.name:
        return (f"note: the maps were made for {pool.base_model}; whether {embedder.name} is that model is not known",)
    raise DataError(
        "the pool belongs to another base model",
        found=embedder.name,
        allowed=pool.base_model,
        fix=f"rank_source_tasks({pool.base_model!r}, …)",
    )


def _timed(found: Ranking, embedding_seconds: float, seconds: float) -> Ranking:
    return replace(found, embedding_seconds=embedding_seconds, seconds=seconds)

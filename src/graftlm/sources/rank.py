"""Which source task first? Every map of a pool scored for one target task."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from graftlm.errors import DataError, SetupError
from graftlm.sources import baselines
from graftlm.sources.device import device_of
from graftlm.sources.embed import Embedder
from graftlm.sources.esm import EmbeddingSpaceMap
from graftlm.sources.pool import Skipped, SourcePool, same_model
from graftlm.sources.result import Ranking, ranked
from graftlm.sources.scoring import Named, Scorer, scorer_of
from graftlm.sources.target import Columns, Target, read_target

METHODS = ("esm-logme", *baselines.METHODS)
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
    device: str | torch.device | None = None,
    maps_at_once: int | None = None,
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
        precision: of esm-logme. ``float32`` is 1.2 to 2 times as fast: scores are within 1e-4, and the best 50 are
            scored again in float64.
        threads: of esm-logme: maps that are scored at once; None: one a core.
        device: where a model that is loaded here goes and where maps are scored: ``cpu``, ``cuda``, ``cuda:1`` … On a
            GPU they are scored in batches (see `graftlm.measure.batched.BatchedEvidence`). A model in memory and an
            `Embedder` stay where they are. None: the model on a GPU if there is one, maps on the processor.
        maps_at_once: of esm-logme: maps in a batch; None: as many as fit into the GPU's free memory, at most 256. On
            the processor it makes batches too, which are slower there than threads.
        progress: a bar.
        embedding: arguments of `Embedder`: ``tokenizer``, ``pooling``, ``max_length``, ``batch_size``, ``dtype``.

    Returns:
        The ranking. What could not be scored is named in `Ranking.skipped`, and does not end the others.

    Raises:
        DataError: an empty pool, maps of another base model or width, columns that do not exist, labels that are
            strings or missing, a target with one class; a pool in which nothing can be scored.
        SetupError: an unknown method or precision, a device that is not there, arguments that the method does not take,
            or lacks.

    Source: arXiv 2410.15148, Sections 3 and 4; for the other methods see `graftlm.sources.baselines`.

    Differs from the paper in: the score is the exact evidence (see `graftlm.logme`); sources are compared with the base
    model without any (`Ranking.without_source`).
    """
    started = time.perf_counter()
    given = {"pool": pool, "models": models, "sources": sources}
    counted = {"device": device} if method == "size" else {}  # nothing is computed
    _check_method(method, given, {"threads": threads, "maps_at_once": maps_at_once} | counted)
    place = device_of(device) if device is not None else None
    target = read_target(dataset, text_column, label_column, task)
    if place is not None and (method != "esm-logme" or not isinstance(model, Embedder | nn.Module)):
        embedding["device"] = place
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
        device=place,
        maps_at_once=maps_at_once,
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
    device: str | torch.device | None = None,
    maps_at_once: int | None = None,
    progress: bool = False,
    notes: tuple[str, ...] = (),
) -> Ranking:
    """ESM-LogME from embeddings that were made before; see `rank_source_tasks`.

    A few maps are in memory at a time, or two batches of them, and the work for each does not depend on the number of
    rows.
    """
    started = time.perf_counter()
    place = device_of(device) if device is not None else None
    scorer = scorer_of(features, target.columns, threads=threads, device=place, maps_at_once=maps_at_once)
    if place is not None and place.type == "mps":
        notes = (*notes, "maps were scored on the processor, since mps has no float64")
    skipped: list[Skipped] = []
    scores: dict[str, tuple[float, float]] = {}
    about: dict[str, tuple[str | None, str | None]] = {}
    total = len(maps) if isinstance(maps, Sized) else None
    scored = scorer.scores(_named(maps, skipped), precision)
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
        notes = (*notes, _rescore(maps, scorer, scores, skipped))
    rows = [(name, score, seconds, *about[name]) for name, (score, seconds) in scores.items()]
    return Ranking(
        method="esm-logme",
        model=model,
        rows=len(features),
        classes=target.classes,
        sources=ranked(rows),
        skipped=tuple(skipped),
        without_source=scorer.without_map(),
        seconds=time.perf_counter() - started,
        notes=notes,
    )


def _rescore(
    maps: SourcePool | Iterable[EmbeddingSpaceMap],
    scorer: Scorer,
    scores: dict[str, tuple[float, float]],
    skipped: list[Skipped],
) -> str:
    """Float64 scores for all that may belong to the best 50; what was done, in words."""
    lowest = sorted((score for score, _ in scores.values()), reverse=True)[:_EXACT][-1] - _MARGIN
    chosen = {name for name, (score, _) in scores.items() if score >= lowest}
    again = ((name, maps.load(name)) for name in chosen) if isinstance(maps, SourcePool) else _named(maps, [])
    wanted = ((name, esm) for name, esm in again if name in chosen)
    for (name, _), score in scorer.scores(wanted, "float64"):
        if isinstance(score, Skipped):
            skipped.append(score)
        else:
            scores[name] = score[0], scores[name][1] + score[1]
    return f"scores in float32 (within 1e-4), those of the best {len(chosen)} in float64"


def _named(maps: SourcePool | Iterable[EmbeddingSpaceMap], skipped: list[Skipped]) -> Iterable[Named]:
    if isinstance(maps, SourcePool):
        return ((entry.name, esm) for entry, esm in maps.maps(skipped))
    named: dict[str, EmbeddingSpaceMap] = {}
    for esm in maps:
        subset = esm.details.get("task_subset")
        name = f"{esm.task}--{subset}" if subset else esm.task
        named[name if name not in named else f"{name}#{len(named)}"] = esm
    return named.items()


def _check_method(method: str, given: Mapping[str, Any], of_maps: Mapping[str, Any]) -> None:
    if method not in METHODS:
        raise SetupError("unknown method", found=repr(method), allowed=METHODS)
    takes = ("pool",) if method == "esm-logme" else baselines.TAKES[method]
    if idle := [name for name, value in given.items() if value is not None and name not in takes]:
        raise SetupError(f"{method} does not use {' and '.join(idle)}", allowed=" or ".join(takes))
    if method != "esm-logme" and (idle := [name for name, value in of_maps.items() if value is not None]):
        raise SetupError(f"{method} does not use {' and '.join(idle)}", fix="method='esm-logme'")
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

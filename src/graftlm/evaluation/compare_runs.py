"""Finished runs → the comparison of `comparison.py`: scores, differences and costs over seeds and test items."""

import statistics as plain_statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graftlm.errors import DataError
from graftlm.evaluation.comparison import (
    MEAN,
    RESAMPLES,
    Comparison,
    Difference,
    Failure,
    Tuned,
    VariantCost,
    VariantResult,
    VariantScore,
)
from graftlm.evaluation.folder import read_lines
from graftlm.evaluation.metrics import METRICS, statistics
from graftlm.evaluation.record import Number
from graftlm.evaluation.result import Interval, Result
from graftlm.measure.statistics import (
    Estimate,
    crossed,
    estimate,
    holm,
    noise_floor,
    resample_items,
    seed_weights,
)


@dataclass(frozen=True)
class VariantRuns:
    """The finished runs of one variant.

    Attributes:
        folders: seed → its run folders, one a fold, in the order of the folds; only seeds with all folds.
    """

    name: str
    values: Mapping[str, Any]
    folders: Mapping[int, Sequence[Path]]
    tuned: tuple[Tuned, ...] = ()


@dataclass(frozen=True)
class _Language:
    """One language's items, and every variant's and seed's answers to them."""

    keys: list[tuple[int, Any]]  # (fold, id)
    is_source: bool
    majority: float | None
    made: dict[tuple[int, int], Callable[[np.ndarray], np.ndarray]]  # (variant, seed) → statistic


def compare_runs(
    name: str,
    variants: Sequence[VariantRuns],
    *,
    root: Path,
    planned: int,
    finished: int,
    failures: Mapping[str, str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Scores variants over seeds and test items, and holds each against the first.

    Items are drawn jointly over languages where the test sets have the same ids, seeds jointly over everything: see
    `graftlm.measure.statistics`. The test items of the folds of a seed are scored together.

    Args:
        name: of the study.
        variants: the runs, the first variant being the reference.
        root: folder that run folders are named from.
        planned: number of runs of the study; finished: how many of them are.
        failures: run → error.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: no variant has a finished seed, or runs that do not have the same task, metric or test items.
    """
    results = {
        (v, s): [Result.read(folder) for folder in folders]
        for v, variant in enumerate(variants)
        for s, folders in variant.folders.items()
    }
    if not results:
        raise DataError("no run is finished yet, so there is nothing to compare", found=root)
    every = [one for group in results.values() for one in group]
    first = every[0]
    for one in every:
        if (one.task, one.metric, one.source) != (first.task, first.metric, first.source):
            raise DataError(
                "runs of another task, metric or source language cannot be compared",
                found=f"{one.task}, {one.metric}, {one.source} in {one.name}",
                allowed=f"{first.task}, {first.metric}, {first.source}",
            )
    languages = _languages(first, variants, results)
    drawn, observed = _resample(first, languages, resamples, seed)
    targets = [tag for tag, one in languages.items() if not one.is_source]
    if len(targets) > 1:
        # the same items and seeds are drawn in all languages, so their mean is resampled with them
        drawn[MEAN] = {key: np.mean([drawn[tag][key] for tag in targets], axis=0) for key in results}
        observed[MEAN] = {key: float(np.mean([observed[tag][key] for tag in targets])) for key in results}
    sign = 1 if METRICS[first.metric].higher_is_better else -1
    floors: dict[str, Number] = {}
    for tag in drawn:
        seeds = max(len(variant.folders) for variant in variants)
        table = np.full((len(variants), seeds), np.nan)
        for v, variant in enumerate(variants):
            table[v, : len(variant.folders)] = [observed[tag][v, s] for s in variant.folders]
        floors[tag] = noise_floor(table)
    return Comparison(
        name=name,
        model=first.model if len({one.model for one in every}) == 1 else None,
        task=first.task,
        metric=first.metric,
        source=first.source,
        selected_on=tuple(dict.fromkeys(tag for one in every for tag in one.selected_on)),
        folds=len(next(iter(results.values()))),
        runs_planned=planned,
        runs_finished=finished,
        failures=tuple(Failure(run=run, error=error) for run, error in (failures or {}).items()),
        variants=tuple(
            VariantResult(
                name=variant.name,
                values=dict(variant.values),
                seeds=tuple(variant.folders),
                scores=tuple(
                    _score(tag, v, variant, languages, drawn[tag], observed[tag], resamples, seed) for tag in drawn
                )
                if variant.folders
                else (),
                tuned=variant.tuned,
                cost=_cost([one for s in variant.folders for one in results[v, s]]),
                runs=tuple(
                    folder.relative_to(root).as_posix() for folders in variant.folders.values() for folder in folders
                ),
            )
            for v, variant in enumerate(variants)
        ),
        differences=_differences(variants, drawn, observed, sign, resamples, seed),
        noise_floor=floors,
        resamples=resamples,
        versions=first.versions,
    )


def _languages(
    first: Result, variants: Sequence[VariantRuns], results: Mapping[tuple[int, int], list[Result]]
) -> dict[str, _Language]:
    answers: dict[str, dict[tuple[int, int], dict[tuple[int, Any], tuple[Any, Any]]]] = {}
    majorities: dict[str, list[tuple[int, float]]] = {}
    for v, s in results:
        for fold, folder in enumerate(variants[v].folders[s]):
            for row in read_lines(folder / "predictions.jsonl"):
                # without an id column items are numbered from 0 in each fold
                found = answers.setdefault(row["language"], {}).setdefault((v, s), {})
                found[fold, row["id"]] = row["label"], row["prediction"]
            for score in results[v, s][fold].scores:
                if score.majority is not None:
                    majorities.setdefault(score.language, []).append((score.n, score.majority))
    made: dict[str, _Language] = {}
    order = [score.language for score in first.ordered]
    for tag in sorted(answers, key=lambda tag: order.index(tag) if tag in order else len(order)):
        groups = answers[tag]
        keys = sorted(next(iter(groups.values())), key=lambda key: (key[0], str(key[1])))
        for (v, s), found in groups.items():
            if len(groups) != len(results) or found.keys() != set(keys):
                raise DataError(
                    f"the runs were not scored on the same items of {tag}",
                    found=f"{len(found)} items in {variants[v].folders[s][0]}, {len(keys)} in the first run",
                )
        weights = majorities.get(tag, [])
        total = sum(n for n, _ in weights)
        made[tag] = _Language(
            keys=keys,
            is_source=tag == first.source,
            majority=sum(n * value for n, value in weights) / total if total else None,
            made={
                key: statistics(first.task, *_sides(first.task, [found[one] for one in keys]))[first.metric]
                for key, found in groups.items()
            },
        )
    return made


def _sides(task: str, pairs: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """Labels and predictions as `graftlm.evaluation.metrics` wants them."""
    labels, predictions = [label for label, _ in pairs], [said for _, said in pairs]
    if task != "multi_label":
        return labels, predictions
    names = sorted({name for side in (labels, predictions) for one in side for name in one})
    labels, predictions = ([[float(name in one) for name in names] for one in side] for side in (labels, predictions))
    return labels, predictions


_Drawn = dict[str, dict[tuple[int, int], np.ndarray]]
_Observed = dict[str, dict[tuple[int, int], float]]


def _resample(first: Result, languages: Mapping[str, _Language], resamples: int, seed: int) -> tuple[_Drawn, _Observed]:
    """The metric of every variant and seed, on the items as they are and on each resample of them."""
    drawn: _Drawn = {}
    observed: _Observed = {}
    for tag, language in languages.items():
        n = len(language.keys)
        # equal n and seed draw the same places, and the keys are in order: parallel sets are drawn jointly
        columns = resample_items(list(language.made.values()), n, resamples, seed)
        drawn[tag] = {key: columns[:, place] for place, key in enumerate(language.made)}
        once = np.ones((1, n))
        observed[tag] = {key: float(statistic(once)[0]) for key, statistic in language.made.items()}
    return drawn, observed


def _estimate(observed: Sequence[float], drawn: Sequence[np.ndarray], resamples: int, seed: int) -> Estimate:
    weights = seed_weights(len(drawn), resamples, seed)
    return estimate(float(np.mean(observed)), crossed(np.stack(drawn, axis=1), weights))


def _score(
    tag: str,
    v: int,
    variant: VariantRuns,
    languages: Mapping[str, _Language],
    drawn: Mapping[tuple[int, int], np.ndarray],
    observed: Mapping[tuple[int, int], float],
    resamples: int,
    seed: int,
) -> VariantScore:
    seeds = list(variant.folders)
    values = [observed[v, s] for s in seeds]
    found = _estimate(values, [drawn[v, s] for s in seeds], resamples, seed)
    targets = [one for one in languages.values() if not one.is_source]
    majorities = [one.majority for one in targets if one.majority is not None]
    if tag == MEAN:
        n = min(len(one.keys) for one in targets)
        majority = float(np.mean(majorities)) if len(majorities) == len(targets) else None
    else:
        n, majority = len(languages[tag].keys), languages[tag].majority
    return VariantScore(
        language=tag,
        n=n,
        is_source=tag != MEAN and languages[tag].is_source,
        score=Interval(value=found.value, low=found.low, high=found.high),
        spread=plain_statistics.stdev(values) if len(values) > 1 else None,
        by_seed=tuple(values),
        majority=majority,
    )


def _differences(
    variants: Sequence[VariantRuns], drawn: _Drawn, observed: _Observed, sign: int, resamples: int, seed: int
) -> tuple[Difference, ...]:
    found: dict[tuple[str, str], Estimate] = {}
    for v, variant in enumerate(variants[1:], start=1):
        seeds = [s for s in variants[0].folders if s in variant.folders]
        for tag in drawn if seeds else ():
            found[variant.name, tag] = _estimate(
                [sign * (observed[tag][v, s] - observed[tag][0, s]) for s in seeds],
                [sign * (drawn[tag][v, s] - drawn[tag][0, s]) for s in seeds],
                resamples,
                seed,
            )
    corrected: dict[tuple[str, str], float] = {}
    for family in ([key for key in found if key[1] == MEAN], [key for key in found if key[1] != MEAN]):
        values = holm(np.array([found[key].p for key in family], dtype=float))
        corrected |= dict(zip(family, values.tolist(), strict=True))
    return tuple(
        Difference(variant=name, language=tag, p_holm=corrected[name, tag], **vars(one))
        for (name, tag), one in found.items()
    )


def _cost(results: Sequence[Result]) -> VariantCost | None:
    if not results:
        return None
    costs = [one.cost for one in results]

    def mean(field: str) -> float | None:
        known = [value for one in costs if (value := getattr(one, field)) is not None]
        return float(np.mean(known)) if known else None

    memory = [one.peak_memory_bytes for one in costs if one.peak_memory_bytes is not None]
    return VariantCost(
        train_seconds=mean("train_seconds"),
        trace_seconds=mean("trace_seconds"),
        steps=mean("steps"),
        trainable_parameters=max(one.trainable_parameters for one in costs),
        total_parameters=max(one.total_parameters for one in costs),
        peak_memory_bytes=max(memory) if memory else None,
        device=costs[0].device,
    )

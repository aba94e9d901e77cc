"""The rankers that Embedding Space Maps are compared with.

- ``logme``: `graftlm.logme` on the embeddings of each fine-tuned source model.
- ``leep``, ``nce``: from the source classifier's outputs on the target's texts
  (`graftlm.measure.transferability`). Source models must have their classification head.
- ``frozen``: frozen transfer. A linear head on the frozen source model, fitted on the target by ridge regression to its
  label columns; the score is the accuracy (regression: Pearson's correlation) in 5-fold cross-validation.
- ``textemb``: cosine of the mean embeddings of target and source texts by the base model (Vu et al., EMNLP 2020,
  arXiv 2005.00770).
- ``vocabulary``: Jaccard index of the token ids that occur in target and source texts.
- ``size``: the number of source texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from graftlm.errors import DataError, GraftError, ModelError, SetupError
from graftlm.measure.logme import logme
from graftlm.measure.transferability import cosine, jaccard, leep, nce
from graftlm.sources.embed import Embedder
from graftlm.sources.pool import Skipped, SourcePool
from graftlm.sources.result import Ranking, ranked
from graftlm.sources.target import Columns, Target, read_texts

TAKES: dict[str, tuple[str, ...]] = {
    "logme": ("models",),
    "leep": ("models",),
    "nce": ("models",),
    "frozen": ("models",),
    "textemb": ("sources",),
    "vocabulary": ("sources",),
    "size": ("sources", "pool"),
}
METHODS = tuple(TAKES)
_FOLDS = 5
_RIDGES = (1e-3, 1e-1, 10.0)


def rank(
    method: str,
    model: str | Path | nn.Module | Embedder,
    target: Target,
    pool: SourcePool | str | Path | Iterable[Any] | None,
    models: Mapping[str, Any] | None,
    sources: Mapping[str, Any] | None,
    text_column: Columns,
    embedding: Mapping[str, Any],
    progress: bool,
) -> Ranking:
    """A ranking by one of the methods above; arguments as of `graftlm.rank_source_tasks`."""
    started = time.perf_counter()
    if method in ("leep", "nce") and target.task != "classification":
        raise SetupError(f"{method} is defined for classes", found=target.task, fix="method='esm-logme'")
    name = model.name if isinstance(model, Embedder) else str(getattr(model, "name_or_path", model))
    skipped: list[Skipped] = []
    given: Mapping[str, Any]
    score: Callable[[Any], float]
    if method == "size":
        given, score = _sizes(pool, sources, skipped), float
    elif models is not None:
        given, score = models, _by_model(method, target, embedding)
    else:
        embedder = model if isinstance(model, Embedder) else Embedder(model, **embedding)
        given, score = sources or {}, _by_texts(method, embedder, target, text_column)
    if not given and not skipped:
        raise DataError("there is no source task to rank", found=f"{method}: nothing given")
    scored: list[tuple[str, float, float, str | None, str | None]] = []
    for source, value in tqdm(given.items(), desc=method, unit="source", disable=not progress):
        begun = time.perf_counter()
        try:
            scored.append((source, score(value), time.perf_counter() - begun, None, None))
        except GraftError as error:
            skipped.append(Skipped(source, str(error)))
    if not scored:
        raise DataError("no source task could be scored", found=f"first: {skipped[0].name}: {skipped[0].problem}")
    return Ranking(
        method=method,
        model=name,
        rows=len(target.texts),
        classes=target.classes,
        sources=ranked(scored),
        skipped=tuple(skipped),
        seconds=time.perf_counter() - started,
    )


def _sizes(pool: Any, sources: Mapping[str, Any] | None, skipped: list[Skipped]) -> dict[str, int]:
    if sources is not None:
        return {name: len(source) for name, source in sources.items()}
    opened = pool if isinstance(pool, SourcePool) else SourcePool.open(pool)
    skipped += [
        Skipped(e.name, "its config does not say how many rows") for e in opened.entries.values() if e.rows is None
    ]
    return {entry.name: entry.rows for entry in opened.entries.values() if entry.rows is not None}


def _by_texts(method: str, embedder: Embedder, target: Target, text_column: Columns) -> Callable[[Any], float]:
    def texts(source: Any) -> list[str]:
        plain = isinstance(source, list | tuple) and all(isinstance(text, str) for text in source)
        return list(source) if plain else read_texts(source, text_column)

    if method == "vocabulary":
        own = {token for ids in embedder.token_ids(target.texts) for token in ids}
        return lambda source: jaccard(own, {token for ids in embedder.token_ids(texts(source)) for token in ids})
    mean = embedder(target.texts).mean(axis=0, dtype=np.float64)
    return lambda source: cosine(mean, embedder(texts(source)).mean(axis=0, dtype=np.float64))


def _by_model(method: str, target: Target, embedding: Mapping[str, Any]) -> Callable[[Any], float]:
    def features(source: Any) -> np.ndarray:
        return Embedder(source, **embedding)(target.texts)

    if method == "logme":
        return lambda source: logme(features(source), target.labels, task=target.task)
    if method == "frozen":
        return lambda source: frozen_transfer(features(source).astype(float), target)

    def outputs(source: Any) -> float:
        probabilities = class_probabilities(source, target.texts, **embedding)
        if method == "leep":
            return leep(probabilities, target.labels.astype(int))
        return nce(probabilities.argmax(axis=1), target.labels.astype(int))

    return outputs


def frozen_transfer(features: np.ndarray, target: Target) -> float:
    """Accuracy or correlation of a linear head in 5-fold cross-validation; the best of three ridges."""
    folds = np.random.default_rng(0).permutation(len(features)) % _FOLDS
    if len(features) < 2 * _FOLDS:
        raise DataError("cross-validation needs more rows", found=len(features), allowed=f"at least {2 * _FOLDS}")
    found = []
    for ridge in _RIDGES:
        predicted = np.empty_like(target.columns)
        for fold in range(_FOLDS):
            train, test = folds != fold, folds == fold
            predicted[test] = _head(features[train], target.columns[train], ridge)(features[test])
        if target.task == "classification":
            found.append(float((predicted.argmax(axis=1) == target.columns.argmax(axis=1)).mean()))
        else:
            found.append(float(np.corrcoef(predicted[:, 0], target.columns[:, 0])[0, 1]))
    return max(found)


def _head(features: np.ndarray, columns: np.ndarray, ridge: float) -> Callable[[np.ndarray], np.ndarray]:
    mean, middle = features.mean(axis=0), columns.mean(axis=0)
    left, singular, right = np.linalg.svd(features - mean, full_matrices=False)
    penalty = ridge * (singular**2).mean()
    weight = (right.T * (singular / (singular**2 + max(penalty, 1e-300)))) @ (left.T @ (columns - middle))
    return lambda rows: (rows - mean) @ weight + middle


def class_probabilities(source: Any, texts: list[str], **embedding: Any) -> np.ndarray:
    """(n, classes): the softmax of a source classifier on texts.

    Raises:
        ModelError: a model that is no classifier, or whose head is not in its checkpoint.
    """
    if isinstance(source, nn.Module):
        classifier: Any = source
    else:
        try:
            classifier, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                str(source), trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"the source classifier cannot be loaded: {error}", found=source) from error
        if info["missing_keys"]:
            raise ModelError(
                "the checkpoint holds no classifier", found=f"{source}: {sorted(info['missing_keys'])[:3]}"
            )
        if embedding.get("tokenizer") is None:
            embedding["tokenizer"] = transformers.AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    if getattr(classifier.config, "num_labels", 1) < 2 or not hasattr(classifier, "forward"):
        raise ModelError("the source model is no classifier", found=type(classifier).__name__)
    embedder = Embedder(classifier, **embedding)
    return embedder.apply(texts, lambda inputs: _softmax(classifier, inputs), int(classifier.config.num_labels))


def _softmax(classifier: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    try:
        logits = getattr(classifier(**inputs), "logits", None)
    except ValueError as error:  # a decoder that does not know its padding
        raise ModelError(f"the source classifier cannot take a batch: {error}", fix="batch_size=1") from error
    if logits is None or logits.ndim != 2:
        raise ModelError("the source model is no classifier of texts", found=type(classifier).__name__)
    return logits.double().softmax(-1)

"""Metrics of labelled tasks and of language models, written as functions of *how often each item is counted*.

A metric takes multiplicities ``w`` of shape (resamples, n) and returns one value per row. A row of ones is the score
of the test set; rows drawn with replacement are the bootstrap (`graftlm.evaluation.transfer`), 2,000 of them in one
matrix product instead of 2,000 calls. The tests hold every metric against scikit-learn, scipy or values computed by
hand.

A metric that is not defined on the items counted (a correlation with a constant, F1 where there is nothing to find and
nothing was found) is NaN there and ``None`` in a result; nothing warns.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from graftlm.errors import DataError, SetupError

Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Metric:
    """What a reader must know of a metric: its title, whether it is shown in percent, and which direction is better."""

    name: str
    title: str
    percent: bool = True
    higher_is_better: bool = True


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy"),
        Metric("macro_f1", "macro F1"),
        Metric("micro_f1", "micro F1"),
        Metric("pearson", "Pearson correlation", percent=False),
        Metric("spearman", "Spearman correlation", percent=False),
        Metric("rmse", "root mean squared error", percent=False, higher_is_better=False),
        Metric("entity_f1", "entity F1"),
        Metric("token_f1", "macro F1 over tokens"),
        Metric("token_accuracy", "token accuracy"),
        Metric("f1", "answer F1"),
        Metric("exact_match", "exact match"),
        Metric("bits_per_byte", "bits per byte", percent=False, higher_is_better=False),
        Metric("nats_per_token", "nats per token", percent=False, higher_is_better=False),
        Metric("masked_bits_per_byte", "bits per masked byte", percent=False, higher_is_better=False),
        Metric("nats_per_masked_token", "nats per mask", percent=False, higher_is_better=False),
    )
}

_BY_TASK = {
    "classification": ("accuracy", "macro_f1"),
    "multi_label": ("micro_f1", "macro_f1"),
    "regression": ("pearson", "spearman", "rmse"),
    "token_classification": ("entity_f1", "token_accuracy"),
    "question_answering": ("f1", "exact_match"),
    "causal_lm": ("bits_per_byte", "nats_per_token"),
    "masked_lm": ("masked_bits_per_byte", "nats_per_masked_token"),
}
TASKS = tuple(_BY_TASK)


def metrics_for(task: str, labels: Sequence | None = None) -> tuple[str, ...]:
    """Names of a task's metrics, the primary one first.

    Args:
        task: one of `TASKS`.
        labels: gold labels; only token classification looks at them. Tags that are all ``O`` or ``B-…``, ``I-…`` (also
            ``E``, ``S``, ``L``, ``U``) are scored as entities, other tags (parts of speech) as tokens.

    Raises:
        SetupError: an unknown task.

    >>> metrics_for("classification")
    ('accuracy', 'macro_f1')
    >>> metrics_for("token_classification", [["NOUN", "VERB"]])
    ('token_f1', 'token_accuracy')
    """
    if task not in _BY_TASK:
        raise SetupError("no metrics for this task", found=task, allowed=TASKS)
    if task == "token_classification" and labels is not None and not _are_entity_tags(chain.from_iterable(labels)):
        return ("token_f1", "token_accuracy")
    return _BY_TASK[task]


def statistics(task: str, labels: Sequence, predictions: Sequence) -> dict[str, Statistic]:
    """The task's metrics on these items, each a function of multiplicities (resamples, n) → (resamples,).

    Args:
        task: one of `TASKS`.
        labels: n gold labels. classification: class names or ids. multi_label: 0/1 of shape (n, classes). regression:
            numbers. token_classification: a list of tags per item. question_answering: an answer or a list of accepted
            answers per item (none: unanswerable). Language modelling: bytes per document.
        predictions: n predictions in the same form (question answering: one string each; language modelling: nats,
            bytes and tokens that were scored, see `graftlm.evaluation.bits_per_byte`).

    Raises:
        DataError: empty, unequal lengths, names against ids, labels that are not finite, or shapes that do not fit.

    >>> accuracy = statistics("classification", ["a", "b", "b"], ["a", "b", "a"])["accuracy"]
    >>> accuracy(np.array([[1, 1, 1], [0, 2, 2]])).round(3).tolist()
    [0.667, 0.5]
    """
    names = metrics_for(task, labels)
    if len(labels) != len(predictions):
        raise DataError(
            "labels and predictions differ in number", found=f"{len(labels)} labels, {len(predictions)} predictions"
        )
    if len(labels) == 0:
        raise DataError("there is nothing to score", found="0 items")
    make = {
        "classification": _classification,
        "multi_label": _multi_label,
        "regression": _regression,
        "token_classification": _token_classification,
        "question_answering": _question_answering,
        "causal_lm": _language_modelling,
        "masked_lm": _language_modelling,
    }[task]
    made = make(labels, predictions)
    return {name: made[name.replace("masked_", "")] for name in names}


def majority(task: str, train_labels: Sequence, labels: Sequence) -> float | None:
    """Primary metric of whoever answers with the most frequent training label, whatever the text says.

    Multi-label: the single most frequent label, for every item. Token classification: the most frequent tag, for every
    token. Ties go to the label that sorts first. None where no such answer exists (question answering, language
    modelling) or the metric is undefined for a constant (correlations).

    >>> majority("classification", ["a", "b", "b"], ["a", "b", "a", "a"])
    0.25
    """
    if task in ("regression", "question_answering", "causal_lm", "masked_lm"):
        return None
    if task == "multi_label":
        guess: Any = np.zeros(np.shape(labels))
        guess[:, int(np.asarray(train_labels).sum(axis=0).argmax())] = 1
    elif task == "token_classification":
        tag = _most_frequent(chain.from_iterable(train_labels))
        guess = [[tag] * len(tags) for tags in labels]
    else:
        guess = [_most_frequent(train_labels)] * len(labels)
    primary = next(iter(statistics(task, labels, guess).values()))
    value = float(primary(np.ones((1, len(labels))))[0])
    return None if np.isnan(value) else value


def _most_frequent(labels: Iterable[Hashable]) -> Hashable:
    counts = Counter(labels)
    if not counts:
        raise DataError("no training labels to take the majority of", found="0 labels")
    return min(counts, key=lambda label: (-counts[label], str(label)))


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient, NaN where the denominator is 0, without a warning."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, dtype=float), denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN where nothing is left."""
    defined = ~np.isnan(values)
    return _divide(np.where(defined, values, 0).sum(axis=-1), defined.sum(axis=-1))


def _mean(per_item: np.ndarray) -> Statistic:
    return lambda w: _divide(w @ per_item, w.sum(axis=-1))


def _f1(hit: np.ndarray, guessed: np.ndarray, gold: np.ndarray, *, macro: bool) -> Statistic:
    """F1 = 2·TP / (guessed + gold) from counts (n, classes); macro: over the classes that are guessed or gold."""

    def statistic(w: np.ndarray) -> np.ndarray:
        true_positives, both = w @ hit, w @ (guessed + gold)
        if macro:
            return _mean_of_defined(_divide(2 * true_positives, both))
        return _divide(2 * true_positives.sum(axis=-1), both.sum(axis=-1))

    return statistic


def _one_hot(items: Sequence[Sequence[Hashable]], classes: dict) -> np.ndarray:
    """Counts (n, classes) of each class in each item."""
    counts = np.zeros((len(items), len(classes)))
    for row, item in zip(counts, items, strict=True):
        for label in item:
            row[classes[label]] += 1
    return counts


def _classes(labels: Iterable, predictions: Iterable) -> dict:
    labels, predictions = list(labels), list(predictions)
    if {isinstance(label, str) for label in labels} != {isinstance(label, str) for label in predictions}:
        raise DataError(
            "labels and predictions must both be names or both be ids",
            found=f"{labels[0]!r} and {predictions[0]!r}" if labels and predictions else "no labels on one side",
            fix="map ids to names with the model's id2label",
        )
    return {label: number for number, label in enumerate(dict.fromkeys(labels + predictions))}


def _classification(labels: Sequence, predictions: Sequence) -> dict[str, Statistic]:
    labels, predictions = np.asarray(labels).tolist(), np.asarray(predictions).tolist()
    classes = _classes(labels, predictions)
    gold, guessed = (_one_hot([[label] for label in side], classes) for side in (labels, predictions))
    hit = gold * guessed
    return {"accuracy": _mean(hit.sum(axis=1)), "macro_f1": _f1(hit, guessed, gold, macro=True)}


def _multi_label(labels: Sequence, predictions: Sequence) -> dict[str, Statistic]:
    gold, guessed = np.asarray(labels, dtype=float), np.asarray(predictions, dtype=float)
    if gold.ndim != 2 or gold.shape != guessed.shape or not np.isin([*gold.flat, *guessed.flat], (0, 1)).all():
        raise DataError(
            "multi-label needs 0 and 1 of shape (items, classes) on both sides",
            found=f"{gold.shape} and {guessed.shape}",
        )
    hit = gold * guessed
    return {"micro_f1": _f1(hit, guessed, gold, macro=False), "macro_f1": _f1(hit, guessed, gold, macro=True)}


def _regression(labels: Sequence, predictions: Sequence) -> dict[str, Statistic]:
    gold, guess = np.asarray(labels, dtype=float).reshape(-1), np.asarray(predictions, dtype=float).reshape(-1)
    if len(gold) != len(guess):
        raise DataError("regression needs one number per item", found=f"{np.shape(labels)} and {np.shape(predictions)}")
    if not np.isfinite(gold).all():
        raise DataError("a regression label is not a finite number", found=gold[~np.isfinite(gold)][0])
    if not np.isfinite(guess).all():  # a run that diverged: no score, rather than no result
        return dict.fromkeys(_BY_TASK["regression"], lambda w: np.full(len(w), np.nan))

    def spearman(w: np.ndarray) -> np.ndarray:
        return _correlation(w, _ranks(w, gold), _ranks(w, guess))

    return {
        "pearson": lambda w: _correlation(w, gold - gold.mean(), guess - guess.mean()),
        "spearman": spearman,
        "rmse": lambda w: np.sqrt(_mean((gold - guess) ** 2)(w)),
    }


def _correlation(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's r of x and y, (n,) or (resamples, n), counted w times."""
    total = w.sum(axis=-1)

    def mean(values: np.ndarray) -> np.ndarray:
        return _divide((w * values).sum(axis=-1), total)

    x_mean, y_mean, x_square, y_square = mean(x), mean(y), mean(x * x), mean(y * y)
    x_variance, y_variance = x_square - x_mean**2, y_square - y_mean**2
    # a constant leaves a variance of rounding errors, not exactly 0
    constant = (x_variance <= 1e-12 * x_square) | (y_variance <= 1e-12 * y_square)
    scale = np.sqrt(np.where(constant, 0, x_variance) * np.where(constant, 0, y_variance))
    return np.clip(_divide(mean(x * y) - x_mean * y_mean, scale), -1, 1)


def _ranks(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Mid-ranks (resamples, n), centred, of x where item i occurs w[·, i] times."""
    _, group = np.unique(x, return_inverse=True)
    order = np.argsort(group, kind="stable")
    sizes = np.add.reduceat(w[:, order], np.searchsorted(group[order], np.arange(group.max() + 1)), axis=1)
    return (np.cumsum(sizes, axis=1) - sizes / 2 - w.sum(axis=1, keepdims=True) / 2)[:, group]


def _token_classification(labels: Sequence[Sequence], predictions: Sequence[Sequence]) -> dict[str, Statistic]:
    for number, (gold, guess) in enumerate(zip(labels, predictions, strict=True)):
        if len(gold) != len(guess):
            raise DataError(
                "an item has other numbers of tags in labels and predictions",
                found=f"item {number}: {len(gold)} and {len(guess)}",
            )
    classes = _classes(chain.from_iterable(labels), chain.from_iterable(predictions))
    pairs = [list(zip(gold, guess, strict=True)) for gold, guess in zip(labels, predictions, strict=True)]
    lengths = np.array([len(pair) for pair in pairs], dtype=float)
    correct = np.array([sum(a == b for a, b in pair) for pair in pairs], dtype=float)
    hit = _one_hot([[a for a, b in pair if a == b] for pair in pairs], classes)
    made = {
        "token_accuracy": lambda w: _divide(w @ correct, w @ lengths),
        "token_f1": _f1(hit, _one_hot(predictions, classes), _one_hot(labels, classes), macro=True),
    }
    if _are_entity_tags(chain.from_iterable(labels)):
        gold, guessed = [entities(tags) for tags in labels], [entities(tags) for tags in predictions]
        counts = np.array([[len(a & b), len(b), len(a)] for a, b in zip(gold, guessed, strict=True)], dtype=float)
        made["entity_f1"] = _f1(counts[:, :1], counts[:, 1:2], counts[:, 2:], macro=False)
    return made


_ENTITY_TAG = re.compile(r"[BIESLU]-.+")


def _are_entity_tags(tags: Iterable) -> bool:
    return all(tag == "O" or (isinstance(tag, str) and _ENTITY_TAG.fullmatch(tag)) for tag in set(tags))


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Entities (type, first token, last token) of IOB, IOB2, IOBES or BILOU tags.

    Read as the CoNLL script reads them: an ``I-`` without a ``B-`` before it opens an entity.

    >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC"]))
    [('LOC', 3, 3), ('PER', 0, 1)]
    """
    found, start, previous = set(), 0, ("O", "")
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        begins = prefix in "BSU" or previous[0] in "OESLU" or kind != previous[1]
        if previous[0] != "O" and (begins or prefix == "O"):
            found.add((previous[1], start, position - 1))
        if begins and prefix != "O":
            start = position
        previous = (prefix, kind)
    return found


def _question_answering(labels: Sequence[str | Sequence[str]], predictions: Sequence[str]) -> dict[str, Statistic]:
    golds = [[label] if isinstance(label, str) else list(label) or [""] for label in labels]
    best = np.array(
        [
            [
                max(answer_f1(gold, guess) for gold in accepted),
                max(normalise(gold) == normalise(guess) for gold in accepted),
            ]
            for accepted, guess in zip(golds, predictions, strict=True)
        ],
        dtype=float,
    )
    return {"f1": _mean(best[:, 0]), "exact_match": _mean(best[:, 1])}


def _language_modelling(labels: Sequence[int], predictions: Sequence[Sequence[float]]) -> dict[str, Statistic]:
    table = np.asarray(predictions, dtype=float)
    if table.ndim != 2 or table.shape[1] != 3:
        raise DataError("language modelling needs nats, bytes and tokens per document", found=table.shape)
    nats, size, tokens = table.T
    nats = np.where(np.isfinite(nats), nats, np.nan)  # a run that diverged: no score, rather than no result
    return {
        "bits_per_byte": lambda w: _divide(w @ nats, w @ size) / np.log(2),
        "nats_per_token": lambda w: _divide(w @ nats, w @ tokens),
    }


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(answer: str) -> str:
    """An answer as SQuAD's script compares it: lower case, no ASCII punctuation, no *a*, *an*, *the*, single spaces.

    The rules are English and are applied to every language, as XQuAD's published scores do. So articles of other
    languages count as words, punctuation outside ASCII (``«``, ``¿``, ``。``) stays, and text without spaces (Chinese,
    Japanese, Thai) is one word: its F1 is its exact match. MLQA's own script strips articles per language and splits
    Chinese into characters; its scores are not comparable to these.

    >>> normalise("The  Quick, brown fox!")
    'quick brown fox'
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def answer_f1(gold: str, guess: str) -> float:
    """F1 over the words, as a bag, of two normalised answers; if one is empty, 1 where both are and else 0 (SQuAD 2.0).

    >>> answer_f1("the Eiffel tower", "Eiffel tower in Paris")
    0.6666666666666666
    """
    gold_words, guess_words = normalise(gold).split(), normalise(guess).split()
    if not gold_words or not guess_words:
        return float(gold_words == guess_words)
    shared = sum((Counter(gold_words) & Counter(guess_words)).values())
    return 2 * shared / (len(gold_words) + len(guess_words))

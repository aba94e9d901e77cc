"""The target task's texts and labels, checked: whatever is wrong with a row is an error that names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graftlm.errors import DataError, SetupError
from graftlm.measure.logme import TASKS, targets_of
from graftlm.sources.embed import PAIR

Columns = str | Sequence[str]
_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Target:
    """Texts and labels of a target task.

    Attributes:
        texts: one string a row; those of a pair in one.
        labels: whole numbers (classification) or numbers.
        task: ``classification`` or ``regression``.
        columns: what `graftlm.measure.evidence` takes: one column a class or number.
    """

    texts: list[str]
    labels: np.ndarray
    task: str
    columns: np.ndarray

    @property
    def classes(self) -> int | None:
        """How many classes occur; None in regression."""
        return self.columns.shape[1] if self.task == "classification" else None


def read_target(dataset: Any, text_column: Columns, label_column: str, task: str | None = None) -> Target:
    """Texts and labels of a data set.

    Args:
        dataset: a `datasets.Dataset`, a mapping of columns, or a list of rows.
        text_column: one column, or two whose texts are joined by " [SEP] ", as in the paper's release.
        label_column: whole numbers or numbers.
        task: None: classification where labels are whole numbers, else regression.

    Raises:
        DataError: no such column, no row, texts or labels that are missing or of another kind, one class.
    """
    if task is not None and task not in TASKS:
        raise SetupError("unknown task", found=repr(task), allowed=TASKS)
    texts = read_texts(dataset, text_column)
    labels = _labels(_column(dataset, label_column, "label_column"), label_column)
    if len(labels) != len(texts):
        raise DataError("there is one label for each text", found=f"{len(texts)} texts, {len(labels)} labels")
    task = task or ("regression" if labels.dtype.kind == "f" else "classification")
    return Target(texts, labels, task, targets_of(labels, task, len(texts)))


def open_dataset(name: str, *, subset: str | None = None, split: str = "train") -> Any:
    """A data set from a file (JSON lines, CSV, Parquet) or from the hub.

    Raises:
        DataError: a file that is missing or cannot be read, or a hub that cannot be reached.
    """
    import datasets

    path = Path(name)
    kind = _FILES.get(path.suffix.lower())
    if kind is not None and not path.is_file():
        raise DataError("there is no such file", found=path)
    try:
        if kind is not None:
            return datasets.load_dataset(kind, data_files=str(path), split="train")
        return datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the data set cannot be loaded: {first}",
            found=name,
            allowed=f"a file ({', '.join(_FILES)}) or a hub id, its subset and split",
        ) from error


def read_texts(dataset: Any, text_column: Columns) -> list[str]:
    """The texts of a data set, those of a pair in one string."""
    names = [text_column] if isinstance(text_column, str) else list(text_column)
    if len(names) not in (1, 2):
        raise SetupError("text_column is one column or two", found=names)
    sides = [_column(dataset, name, "text_column") for name in names]
    for name, side in zip(names, sides, strict=True):
        for row, text in enumerate(side):
            if not isinstance(text, str):
                what = "missing" if text is None else "no string"
                raise DataError(f"text_column {name!r}: a text is {what}", found=f"row {row}: {text!r}")
    if not sides[0]:
        raise DataError("the data set has no row")
    return [PAIR.join(parts) for parts in zip(*sides, strict=True)]


def _column(dataset: Any, name: str, argument: str) -> list[Any]:
    if isinstance(dataset, Mapping) and any(hasattr(value, "column_names") for value in dataset.values()):
        raise DataError("this is several splits, not one", found=", ".join(dataset), fix="dataset['train']")
    if hasattr(dataset, "column_names"):
        known = list(dataset.column_names or ())
    elif isinstance(dataset, Mapping):
        known = list(dataset)
    elif (
        isinstance(dataset, Sequence) and not isinstance(dataset, str) and all(isinstance(r, Mapping) for r in dataset)
    ):
        if not dataset:
            raise DataError("the data set has no row")
        known = list(dataset[0])
        if name in known:
            if (short := next((row for row, one in enumerate(dataset) if name not in one), None)) is not None:
                raise DataError(f"{argument} {name!r} is missing in a row", found=f"row {short}")
            return [row[name] for row in dataset]
    else:
        raise DataError(
            "no data set",
            found=type(dataset).__name__,
            allowed="a datasets.Dataset, a mapping of columns, a list of rows",
        )
    if name not in known:
        raise DataError(f"{argument} {name!r} does not exist", found=name, allowed=known)
    return list(dataset[name])


def _labels(values: list[Any], name: str) -> np.ndarray:
    missing = [row for row, value in enumerate(values) if value is None or value != value]
    if missing:
        raise DataError(
            f"label_column {name!r}: {len(missing)} labels are missing",
            found=f"row {missing[0]}: {values[missing[0]]}",
            fix=f"dataset.filter(lambda row: row[{name!r}] is not None)",
        )
    strings = [row for row, value in enumerate(values) if isinstance(value, str)]
    if strings:
        raise DataError(
            f"label_column {name!r}: labels are strings",
            found=f"row {strings[0]}: {values[strings[0]]!r}",
            allowed="whole numbers (classes) or numbers (regression)",
            fix=f"dataset.class_encode_column({name!r})",
        )
    try:
        labels = np.asarray(values)
    except ValueError:
        labels = np.empty(0, dtype=object)
    if labels.dtype.kind not in "iubf" or labels.ndim != 1:
        raise DataError(f"label_column {name!r}: labels are single numbers", found=f"{values[0]!r}")
    if labels.dtype.kind == "i" and (labels == -1).any():
        count = int((labels == -1).sum())
        raise DataError(
            f"label_column {name!r}: {count} labels are -1, which marks rows without a label",
            found=f"row {int(np.flatnonzero(labels == -1)[0])}",
            fix=f"dataset.filter(lambda row: row[{name!r}] >= 0), or number the classes from 0",
        )
    return labels

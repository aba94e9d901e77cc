"""Text, labels, pairs and language tags, from files and hub data sets to checked, plain columns.

Whatever is wrong with a row is an error that names the file and the row: nothing is dropped or guessed.
"""

import csv
import gzip
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftlm.errors import DataError
from graftlm.recipe import FILE_TYPES, LANGUAGE_MODELLING, Data, Recipe, Source, key_of
from graftlm.starter import STARTER, starter_path

HUB_SPLITS = {"train": "train", "mixing": "train", "dev": "validation", "test": "test"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """Accepted answers of a question and where they start in the context (characters); both empty: no answer."""

    texts: tuple[str, ...]
    starts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Split:
    """One split's columns, checked; all lists have one entry an item.

    Attributes:
        origin: where the items come from, as errors name it.
        ids: what predictions are filed under.
        texts: texts; lists of words in token classification; questions in question answering.
        texts_b: second texts of pairs; contexts in question answering.
        labels: names (classification), lists of names (multi_label, token_classification), numbers (regression),
            Answers (question_answering) or UTF-8 bytes (language modelling).
        names: label names in the order that the data set declares, where it does.
        sources: what FLARE fuses each item with, one text or the two of a pair.
        source_language: as a tokenizer that marks languages marks them.
    """

    origin: str
    ids: list[str | int]
    texts: list[Any]
    texts_b: list[str] | None
    labels: list[Any]
    names: tuple[str, ...] | None = None
    sources: list[tuple[str, ...]] | None = None
    source_language: str | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Labels:
    """The label names of a task in the order of their ids."""

    names: tuple[str, ...]
    ids: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", {name: number for number, name in enumerate(self.names)})

    @classmethod
    def of_training(cls, task: str, train: Split) -> "Labels":
        """Names from the data set's own declaration, else from the training split, sorted (numbers by value).

        Raises:
            DataError: fewer than two classes.
        """
        if task in ("regression", "question_answering", *LANGUAGE_MODELLING):
            return cls(())
        nested = task in ("multi_label", "token_classification")
        seen = {name for label in train.labels for name in (label if nested else [label])}
        names = train.names or tuple(sorted(seen, key=_by_value(seen)))
        if len(names) < (1 if task == "multi_label" else 2):
            raise DataError(
                f"{train.origin}: {task} needs at least two labels in the training split",
                found=", ".join(names) or "no label",
            )
        return cls(names)

    def check(self, task: str, split: Split) -> Split:
        """The same split; a DataError that names the row where a label was never seen in training."""
        nested = task in ("multi_label", "token_classification")
        for row, label in enumerate(split.labels):
            for name in label if nested else [label]:
                if name not in self.ids:
                    raise DataError(
                        f"{split.origin}, row {row + 1}: a label that the training split does not have",
                        found=repr(name),
                        allowed=self.names if len(self.names) <= 30 else f"{len(self.names)} labels",
                    )
        return split


def _by_value(names: set[str]) -> Callable[[str], Any]:
    return int if all(name.lstrip("-").isdecimal() for name in names) else str


def load_split(recipe: Recipe, source: Source, role: str) -> Split:
    """Reads and checks one split.

    Args:
        recipe: its `task` says what a label is, its `data` what the columns are called.
        source: where the split lies; relative paths start from the recipe's folder.
        role: train, dev or test; the split of a hub data set that names none is train, validation or test.

    Raises:
        DataError: a file or data set that is missing or malformed, a missing column, an empty text, a label of the
            wrong kind; with file and row.
    """
    origin, rows, names = read_rows(recipe, source, role)
    if not rows:
        raise DataError(f"{origin}: there is no row in it", fix=f"check {key_of(role)}")
    columns = recipe.data
    if recipe.task == "question_answering" and columns.text_b is None:
        raise DataError(
            "question_answering reads two texts and the recipe names one",
            found=f"data.text: {columns.text}",
            fix="data: {text: question, text_b: context, label: answers}",
        )
    read = _LABEL_READERS[recipe.task]
    ids: list[str | int] = []
    texts: list[Any] = []
    texts_b: list[str] = []
    labels: list[Any] = []
    for number, row in enumerate(rows):
        place = f"{origin}, row {number + 1}"
        text_of = _words if recipe.task == "token_classification" else plain_text
        texts.append(text_of(cell(row, columns.text, place, "data.text"), place, columns.text))
        if columns.text_b is not None:
            texts_b.append(plain_text(cell(row, columns.text_b, place, "data.text_b"), place, columns.text_b))
        labels.append(read(cell(row, columns.label, place, "data.label"), place, columns, names))
        ids.append(cell(row, columns.id, place, "data.id") if columns.id else number)
        if recipe.task == "token_classification" and len(labels[-1]) != len(texts[-1]):
            counts = f"{len(texts[-1])} words, {len(labels[-1])} labels"
            raise DataError(f"{place}: as many labels as words are needed", found=counts)
        if recipe.task == "question_answering":
            labels[-1] = _place_answers(labels[-1], row, texts_b[-1], place, columns, positions=role != "test")
    return Split(origin, ids, texts, texts_b if columns.text_b is not None else None, labels, names)


def load_texts(recipe: Recipe, source: Source, column: str) -> list[str]:
    """One column of a source as texts, whatever else its rows hold; empty ones are left out.

    Raises:
        DataError: a source that is missing or malformed, no such column, a text that is no string.
    """
    origin, rows, _ = read_rows(recipe, source, "train")
    places = ((f"{origin}, row {number + 1}", row) for number, row in enumerate(rows))
    found = ((place, cell(row, column, place, "dropout.text")) for place, row in places)
    return [plain_text(text, place, column) for place, text in found if not isinstance(text, str) or text.strip()]


def read_rows(recipe: Recipe, source: Source, role: str) -> tuple[str, Sequence[Row], tuple[str, ...] | None]:
    """(name for errors, rows, declared label names)."""
    if not source.path.startswith(STARTER) and not source.is_file():
        return from_hub(recipe, source, role)
    path = file_of(recipe, source, role)
    return source.path, list(read_file(path, source.path)), None


def file_of(recipe: Recipe, source: Source, role: str, allowed: tuple[str, ...] = FILE_TYPES) -> Path:
    """The file that a source names; a DataError where there is none, or one of another kind than those allowed."""
    path = starter_path(source.path) if source.path.startswith(STARTER) else recipe.path(source.path)
    refuse_hub_keys(source)
    if not path.is_file():
        kit = starter_path()
        files = (file for file in kit.rglob("*") if file.name.endswith(FILE_TYPES))
        shipped = sorted(f"{STARTER}{file.relative_to(kit).as_posix()}" for file in files)
        raise DataError(
            f"{key_of(role)}: there is no such file",
            found=source.path if source.path.startswith(STARTER) else path,
            allowed=shipped if source.path.startswith(STARTER) else None,
            fix=None if source.path.startswith(STARTER) else "relative paths start from the recipe's folder",
        )
    if not path.name.endswith(allowed):
        raise DataError(f"{key_of(role)}: an unknown kind of file", found=source.path, allowed=allowed)
    return path


def refuse_hub_keys(source: Source) -> None:
    """Raises where a file is given what only a hub data set has."""
    if source.config or source.split or source.revision:
        raise DataError("config, split and revision belong to hub data sets, and this is a file", found=source.path)


def read_file(path: Path, name: str) -> Iterator[Row]:
    """The rows of a file, one at a time; `name` is what errors call it."""
    if path.name.endswith(".parquet"):
        yield from _read_parquet(path, name)
        return
    with open_text(path, name) as file:
        yield from _read_csv(file, name) if path.name.endswith(".csv") else _read_jsonl(file, name)


@contextmanager
def open_text(path: Path, name: str) -> Iterator[Any]:
    """A text file, zipped or not; what is wrong with its bytes is a DataError."""
    # a spreadsheet's CSV may begin with a byte order mark, which is no part of the first column's name
    zipped = path.name.endswith(".gz")
    with gzip.open(path, "rt", encoding="utf-8") if zipped else path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: the file is not UTF-8", found=f"{error.reason} at byte {error.start}") from error
        except (gzip.BadGzipFile, EOFError) as error:
            raise DataError(f"{name}: the file is not whole gzip", found=error) from error


def _read_jsonl(file: Any, name: str) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            shown = line[:80].rstrip()
            raise DataError(f"{name}, line {number}: this is not JSON: {error.msg}", found=shown) from error
        if not isinstance(row, dict):
            raise DataError(f"{name}, line {number}: a line is one JSON object", found=line[:80].rstrip())
        yield row


def _read_csv(file: Any, name: str) -> Iterator[Row]:
    reader = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{name}, line {reader.line_num}: a row with another number of cells than the header",
                    found=", ".join(str(cell) for cell in row.values())[:80],
                    allowed=f"{len(reader.fieldnames or ())} cells: {', '.join(reader.fieldnames or ())}",
                    fix="put text that holds a comma into double quotes",
                )
            yield row
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num}: this is not CSV: {error}") from error


def _read_parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{name}: this is not parquet", found=error) from error


def from_hub(recipe: Recipe, source: Source, role: str) -> tuple[str, Sequence[Row], tuple[str, ...] | None]:
    """A data set of the hub, or a local folder that is laid out like one."""
    import datasets

    local = recipe.path(source.path)
    is_folder = local.is_dir()
    if not is_folder and (source.path.startswith((".", "/", "~")) or source.path.count("/") > 1):
        endings = [f"…{ending}" for ending in FILE_TYPES]
        raise DataError(f"{key_of(role)}: there is no such file or folder", found=local, allowed=endings)
    split = source.split or HUB_SPLITS[role]
    try:
        loaded = datasets.load_dataset(
            str(local) if is_folder else source.path, source.config, split=split, revision=source.revision
        )
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{key_of(role)}: the data set cannot be loaded: {first}",
            found=f"{source.path}, config {source.config}, split {split}",
            fix=f"{key_of(role)}: {{path: OWNER/NAME, config: …, split: …}}, or a file ({', '.join(FILE_TYPES)})",
        ) from error
    feature = loaded.features.get(recipe.data.label)
    inner = getattr(feature, "feature", feature)  # a list of class labels
    names = tuple(inner.names) if isinstance(inner, datasets.ClassLabel) and inner.names else None
    return f"{source.path} ({split})", loaded, names


def cell(row: Row, column: str, place: str, key: str) -> Any:
    if column not in row:
        raise DataError(f"{place}: there is no column {column!r}", allowed=list(row), fix=f"{key}: NAME OF THE COLUMN")
    return row[column]


def plain_text(value: Any, place: str, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: column {column!r} is not text", found=repr(value))
    if not value.strip():
        raise DataError(f"{place}: column {column!r} is empty", found=repr(value), fix="delete the row or fill it in")
    return value


def _words(value: Any, place: str, column: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise DataError(f"{place}: column {column!r} is not a list of words", found=repr(value)[:80])
    if not value:
        raise DataError(f"{place}: column {column!r} has no words", found=repr(value))
    return value


def _name(value: Any, place: str, columns: Data, names: tuple[str, ...] | None) -> str:
    if isinstance(value, float) and math.isnan(value):
        value = None
    if value is None or value == "":
        raise DataError(f"{place}: there is no label in column {columns.label!r}", found=repr(value))
    if names is not None and isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(names):
            allowed = f"0 to {len(names) - 1}"
            raise DataError(f"{place}: a label id that stands for no class", found=value, allowed=allowed)
        return names[value]
    if not isinstance(value, str | int):
        fix = "task: regression" if isinstance(value, float) else "data.label: NAME OF THE COLUMN"
        raise DataError(f"{place}: a label is a name or a whole number", found=repr(value)[:80], fix=fix)
    return str(value)


def _number(value: Any, place: str, columns: Data, names: tuple[str, ...] | None) -> float:
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{place}: column {columns.label!r} is not a finite number", found=repr(value)[:80])
    return number


def _names(value: Any, place: str, columns: Data, names: tuple[str, ...] | None) -> list[str]:
    if isinstance(value, str) and columns.label_separator is not None:
        value = [part.strip() for part in value.split(columns.label_separator) if part.strip()]
    if not isinstance(value, list):
        fix = 'data.label_separator: "|"' if isinstance(value, str) else None
        raise DataError(f"{place}: column {columns.label!r} is not a list of labels", found=repr(value)[:80], fix=fix)
    return [_name(one, place, columns, names) for one in value]


def _answers(value: Any, place: str, columns: Data, names: tuple[str, ...] | None) -> Answers:
    if isinstance(value, dict) and isinstance(value.get("text"), list) and isinstance(value.get("answer_start"), list):
        texts, starts = value["text"], value["answer_start"]
        if len(texts) == len(starts) and all(isinstance(text, str) for text in texts):
            return Answers(tuple(texts), tuple(starts))
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        return Answers((value,) if isinstance(value, str) else tuple(value))
    raise DataError(
        f"{place}: column {columns.label!r} holds no answers",
        found=repr(value)[:80],
        allowed='{"text": ["…"], "answer_start": [0]}, a text, or a list of texts',
    )


def _place_answers(answers: Answers, row: Row, context: str, place: str, columns: Data, *, positions: bool) -> Answers:
    starts = answers.starts
    if starts is None and columns.answer_start is not None:
        value = cell(row, columns.answer_start, place, "data.answer_start")
        try:
            starts = tuple(int(one) for one in (value if isinstance(value, list) else [value]))
        except (TypeError, ValueError) as error:
            raise DataError(f"{place}: column {columns.answer_start!r} is no position", found=repr(value)) from error
    if starts is None and positions and answers.texts:
        raise DataError(
            f"{place}: training needs the position of the answer in the context",
            found=repr(answers.texts[0]),
            fix="data.answer_start: NAME OF THE COLUMN, or answers as {text: […], answer_start: […]}",
        )
    if starts is not None and len(starts) != len(answers.texts):
        counts = f"{len(answers.texts)} and {len(starts)}"
        raise DataError(f"{place}: answers and positions differ in number", found=counts)
    for text, start in zip(answers.texts, starts or (), strict=False):
        if context[start : start + len(text)] != text:
            raise DataError(
                f"{place}: the answer does not stand at its position in the context",
                found=f"{context[start : start + len(text)]!r} at {start}",
                allowed=repr(text),
            )
    return Answers(answers.texts, starts)


_LABEL_READERS: dict[str, Callable[[Any, str, Data, tuple[str, ...] | None], Any]] = {
    "classification": _name,
    "multi_label": _names,
    "regression": _number,
    "token_classification": _names,
    "question_answering": _answers,
}

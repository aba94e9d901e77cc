"""The same items in another language, beside a split: what FLARE fuses, and what its rivals read instead.

data.parallel     a column of the same rows, or files of their own that are joined by `data.id`
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from graftlm.data import Row, Split, load_split, plain_text, read_rows
from graftlm.errors import DataError
from graftlm.recipe import Parallel, Recipe, Source

Texts = tuple[str, ...]  # one, or the two of a pair


def load_pairs(recipe: Recipe, source: Source, role: str, language: str | None = None) -> Split:
    """Reads one split, and beside it what `data.parallel` says.

    Args:
        recipe: `data.parallel.read` says what becomes of the two languages.
        source: where the split lies.
        role: train, dev or test.
        language: of a test split.

    Returns:
        With ``fused`` the split and its `sources`, which are its own texts with an `adapter.source_encoder` and no
        `data.parallel`; else a split of what is read: the source in place of the target (``source``; ``zero_shot`` in
        train and dev), both as a pair of texts (``both``), or the target alone.

    Raises:
        DataError: an item without a partner, by its id, whatever is read: every arm has the same items; ids that are
            not unique; all that `load_split` raises.
    """
    split, parallel = load_split(recipe, source, role), recipe.data.parallel
    split = replace(split, source_language=recipe.adapter.source_language or language or recipe.source)
    if parallel is None:
        if recipe.adapter.source_encoder is None:
            return split
        columns = [split.texts] if split.texts_b is None else [split.texts, split.texts_b]
        return replace(split, sources=list(zip(*columns, strict=True)))
    sources = _partners(recipe, parallel, split, source, role, language)
    if parallel.read == "fused":
        return replace(split, sources=sources)
    if parallel.read == "both":
        return replace(split, texts_b=[text for (text,) in sources])
    if parallel.read == "source" or (parallel.read == "zero_shot" and role != "test"):
        seconds = [texts[1] for texts in sources] if split.texts_b is not None else None
        return replace(split, texts=[texts[0] for texts in sources], texts_b=seconds)
    return split


def _partners(
    recipe: Recipe, parallel: Parallel, split: Split, source: Source, role: str, language: str | None
) -> list[Texts]:
    columns = [parallel.text] if parallel.text_b is None else [parallel.text, parallel.text_b]
    if parallel.train is None:
        origin, rows, _ = read_rows(recipe, source, role)
        places = (f"id {item!r}" if recipe.data.id else f"row {number + 1}" for number, item in enumerate(split.ids))
        return [_texts(row, columns, f"{origin}, {place}") for row, place in zip(rows, places, strict=True)]
    theirs = {"train": parallel.train, "dev": parallel.dev, "test": parallel.test.get(str(language))}[role]
    if theirs is None:
        raise DataError(
            f"{split.origin}: the source-language version of this split is not named",
            found=f"data.parallel has no {role}" + (f" for {language}" if language else ""),
            fix=f"data.parallel.{role}" + (f": {{{language}: …}}" if language else ": …"),
        )
    origin, rows, _ = read_rows(recipe, theirs, role)
    ids = [_id(row, str(recipe.data.id), f"{origin}, row {number + 1}") for number, row in enumerate(rows)]
    own = [_named(item, f"{split.origin}, row {number + 1}") for number, item in enumerate(split.ids)]
    _refuse_repeated(ids, origin)
    _refuse_repeated(own, split.origin)
    found = dict(zip(ids, rows, strict=True))
    if missing := [item for item in split.ids if str(item) not in found]:
        more = f" and {len(missing) - 1} more of {len(split)}" if len(missing) > 1 else ""
        raise DataError(
            f"{split.origin}: an item has no partner in {origin}",
            found=f"{recipe.data.id} {missing[0]!r}{more}",
            fix="leave out items without a partner, or add the partner",
        )
    return [_texts(found[str(item)], columns, f"{origin}, id {item!r}") for item in split.ids]


def _texts(row: Row, columns: Sequence[str], place: str) -> Texts:
    for column in columns:
        if column not in row:
            raise DataError(
                f"{place}: there is no column {column!r} with the source-language text",
                allowed=list(row),
                fix="data.parallel.text: NAME OF THE COLUMN",
            )
        if row[column] is None or row[column] == "":
            raise DataError(
                f"{place}: the item has no partner: column {column!r} is empty",
                found=repr(row[column]),
                fix="leave out items without a partner, or add the partner",
            )
    return tuple(plain_text(row[column], place, column) for column in columns)


def _id(row: Row, column: str, place: str) -> str:
    if column not in row:
        raise DataError(
            f"{place}: there is no column {column!r} to join by",
            allowed=list(row),
            fix="data.id names the items in both files",
        )
    return _named(row[column], place)


def _named(item: Any, place: str) -> str:
    if item is None or item == "":
        raise DataError(
            f"{place}: an item without an id cannot be joined",
            found=f"data.id: {item!r}",
            fix="give each item an id, or leave it out",
        )
    return str(item)  # CSV holds texts only


def _refuse_repeated(ids: Sequence[Any], origin: str) -> None:
    item, times = Counter(ids).most_common(1)[0] if ids else (None, 0)
    if times > 1:
        raise DataError(f"{origin}: ids that are not unique cannot be joined", found=f"{item!r}, {times} times")

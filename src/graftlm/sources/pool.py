"""A pool: the Embedding Space Maps of one base model, as a folder with an index."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import pyarrow
from pyarrow import parquet
from tqdm.auto import tqdm

from graftlm.errors import DataError, SetupError
from graftlm.sources.esm import WEIGHTS, EmbeddingSpaceMap, read_config

INDEX, MAPS = "index.parquet", "maps"
_FORMAT = 1
_NAME = re.compile(r"[\w-][\w.+-]*")


@dataclass(frozen=True)
class Entry:
    """One line of a pool's index.

    Attributes:
        name: what the entry is called in this pool.
        task, subset: the source task.
        architecture, rank: of the map.
        rows: texts of the source task that the map was made from; None where its config does not say.
        folder: where it lies, below ``maps``.
        size: of the weights, in bytes.
        sha256: of the weights.
        config: config.json, as text.
    """

    name: str
    task: str
    subset: str | None
    architecture: str
    rank: int
    rows: int | None
    folder: str
    size: int
    sha256: str
    config: str = field(repr=False)


@dataclass(frozen=True)
class Skipped:
    """An entry or source that could not be used, and why."""

    name: str
    problem: str


class SourcePool:
    """Embedding Space Maps of one base model.

    ``index.parquet`` holds one row an entry, config.json included, so that a pool of ten thousand opens without a look
    at their files; each entry is a folder of its own in the hub's format, below ``maps``. What is written is there as a
    whole or not at all. One process writes at a time; any number may read.

    Attributes:
        folder: where the pool lies.
        base_model: hub id or name of the base model.
        width: d of its embeddings.
        entries: name → `Entry`, in the order in which they were added.

    Example:
        >>> import tempfile, numpy as np
        >>> from graftlm import EmbeddingSpaceMap
        >>> pool = SourcePool.create(tempfile.mkdtemp() + "/pool", base_model="org/base", width=2)
        >>> _ = pool.add(EmbeddingSpaceMap("org/base", "imdb", bias=np.zeros(2), weight=np.eye(2)))
        >>> list(SourcePool.open(pool.folder).entries)
        ['imdb']
    """

    def __init__(self, folder: Path, base_model: str, width: int, entries: Mapping[str, Entry]):
        self.folder, self.base_model, self.width, self.entries = folder, base_model, width, dict(entries)
        self._stale: set[str] = set()  # folders of entries that were replaced or removed

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"SourcePool({str(self.folder)!r}, {self.base_model!r}, width {self.width}, {len(self)} maps)"

    @classmethod
    def create(cls, folder: str | Path, *, base_model: str, width: int) -> SourcePool:
        """An empty pool in a folder that holds none yet.

        Raises:
            SetupError: there is a pool in it already, or a width below 1.
        """
        if width < 1 or not base_model:
            raise SetupError("a pool has a base model and its width", found=f"{base_model!r}, {width}")
        pool = cls(Path(folder), base_model, width, {})
        if (pool.folder / INDEX).exists():
            raise SetupError("there is a pool in this folder already", found=folder)
        pool._write_index()
        return pool

    @classmethod
    def open(cls, folder: str | Path) -> SourcePool:
        """A pool that is there.

        Raises:
            DataError: no pool, or a damaged index.
        """
        folder = Path(folder)
        path = folder / INDEX
        if not path.is_file():
            raise DataError("there is no pool in this folder", found=folder, fix=f"graftlm pool add {folder} ESM …")
        try:
            table = parquet.read_table(path)
            head = json.loads(table.schema.metadata[b"graftlm"])
            columns = table.select([column.name for column in fields(Entry)]).to_pydict()
            rows = zip(*columns.values(), strict=True)
            entries = {row[0]: Entry(*row) for row in rows}
            found = cls(folder, str(head["base_model"]), int(head["width"]), entries)
        except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"the pool's index is damaged: {error}", found=path, fix="SourcePool.rebuild(folder)"
            ) from error
        if head.get("format") != _FORMAT:
            raise DataError("a pool of another format", found=head.get("format"), allowed=str(_FORMAT))
        return found

    @classmethod
    def rebuild(cls, folder: str | Path) -> tuple[SourcePool, list[Skipped]]:
        """The index made anew from the maps that lie in the folder, and what could not be read of them."""
        folder, skipped, found = Path(folder), [], []
        for path in sorted((folder / MAPS).glob("*")):
            try:
                found.append((path, EmbeddingSpaceMap.load(path)))
            except DataError as error:
                skipped.append(Skipped(path.name, str(error)))
        if not found:
            raise DataError("there is no readable map in this folder", found=folder / MAPS)
        pool = cls(folder, found[0][1].base_model, found[0][1].width, {})
        for path, esm in found:
            try:
                pool._check(esm)
                entry = _entry(path.name.rpartition("@")[0] or path.name, path, esm)
                pool.entries[entry.name] = entry
            except DataError as error:
                skipped.append(Skipped(path.name, str(error)))
        pool._write_index()
        return pool, skipped

    def add(self, source: EmbeddingSpaceMap | str | Path, *, name: str | None = None, replace: bool = False) -> Entry:
        """Copies a map, or the folder of one, into the pool.

        Args:
            source: a map, or the folder of one.
            name: of the entry; its task and subset by default.
            replace: an entry of this name, where there is one.

        Raises:
            DataError: a damaged map, or one of another base model or width.
            SetupError: a name that is taken or cannot be one of a folder.
        """
        self._reread()
        entry = self._place(source, name, replace)
        self._write_index()
        self._sweep()
        return entry

    def add_all(
        self,
        sources: Iterable[EmbeddingSpaceMap | str | Path],
        *,
        names: Sequence[str] | None = None,
        replace: bool = False,
        progress: bool = False,
    ) -> tuple[list[Entry], list[Skipped]]:
        """Adds many; those that cannot be added are named in the second list, and end nothing."""
        self._reread()
        added: list[Entry] = []
        skipped: list[Skipped] = []
        sources = list(sources)
        for number, source in enumerate(tqdm(sources, desc="adding", unit="map", disable=not progress)):
            name = names[number] if names is not None else None
            try:
                added.append(self._place(source, name, replace))
            except (DataError, SetupError) as error:
                shown = source.task if isinstance(source, EmbeddingSpaceMap) else name or str(source)
                skipped.append(Skipped(shown, str(error)))
        self._write_index()
        self._sweep()
        return added, skipped

    def remove(self, names: Sequence[str]) -> None:
        """Takes entries out of the index, then deletes their files.

        Raises:
            DataError: a name that is not in the pool; nothing is removed then.
        """
        self._reread()
        if unknown := [name for name in names if name not in self.entries]:
            raise DataError(
                "no such entry in the pool", found=", ".join(unknown), fix=f"graftlm pool list {self.folder}"
            )
        for name in names:
            if (entry := self.entries.pop(name, None)) is not None:
                self._stale.add(entry.folder)
        self._write_index()
        self._sweep()

    def load(self, name: str) -> EmbeddingSpaceMap:
        """One map, read through a memory map.

        Raises:
            DataError: no such entry, a damaged one, or one of another base model or width.
        """
        if name not in self.entries:
            raise DataError("no such entry in the pool", found=name, fix=f"graftlm pool list {self.folder}")
        entry = self.entries[name]
        esm = EmbeddingSpaceMap.from_files(self.folder / MAPS / entry.folder / WEIGHTS, json.loads(entry.config))
        self._check(esm)
        return esm

    def maps(self, skipped: list[Skipped]) -> Iterator[tuple[Entry, EmbeddingSpaceMap]]:
        """All entries with their maps, one in memory at a time; what cannot be read is put into `skipped`."""
        for name, entry in self.entries.items():
            try:
                yield entry, self.load(name)
            except DataError as error:
                skipped.append(Skipped(name, str(error)))

    def verify(self, *, progress: bool = False) -> list[Skipped]:
        """Every entry whose files are missing, changed (SHA-256), unreadable or of another base model or width."""
        problems = []
        for name, entry in tqdm(self.entries.items(), desc="verifying", unit="map", disable=not progress):
            folder = self.folder / MAPS / entry.folder
            try:
                if not (folder / WEIGHTS).is_file():
                    raise DataError("the weights are missing", found=folder / WEIGHTS)
                if (found := _sha256(folder / WEIGHTS)) != entry.sha256:
                    raise DataError("the weights are not those that were added", found=found, allowed=entry.sha256)
                if read_config(folder / "config.json") != json.loads(entry.config):
                    raise DataError("config.json is not the one that was added", found=folder)
                self.load(name)
            except DataError as error:
                problems.append(Skipped(name, str(error)))
        return problems

    def _check(self, esm: EmbeddingSpaceMap) -> None:
        if not same_model(esm.base_model, self.base_model):
            raise DataError("a map of another base model", found=esm.base_model, allowed=self.base_model)
        if esm.width != self.width:
            raise DataError("a map of another width", found=esm.width, allowed=str(self.width))

    def _place(self, source: EmbeddingSpaceMap | str | Path, name: str | None, replace: bool) -> Entry:
        """Writes the files of one entry and puts it into the index in memory."""
        esm = source if isinstance(source, EmbeddingSpaceMap) else EmbeddingSpaceMap.load(source)
        self._check(esm)
        subset = esm.details.get("task_subset")
        name = name if name is not None else "--".join([*esm.task.split("/"), *([str(subset)] if subset else [])])
        if not _NAME.fullmatch(name) or "@" in name:
            raise SetupError(
                "an entry's name becomes that of a folder", found=repr(name), allowed="letters, digits, . _ + -"
            )
        if name in self.entries and not replace:
            raise SetupError("the pool has an entry of this name", found=name, fix="another name, or --replace")
        holder = Path(tempfile.mkdtemp(prefix=".adding.", dir=self._made(MAPS)))
        try:
            written = esm.save(holder / "map")
            digest = _sha256(written / WEIGHTS)
            settings = hashlib.sha256((written / "config.json").read_bytes()).hexdigest()
            folder = self.folder / MAPS / f"{name}@{digest[:8]}{settings[:4]}"
            if not folder.exists():
                os.rename(written, folder)
        finally:
            shutil.rmtree(holder, ignore_errors=True)
        entry = _entry(name, folder, EmbeddingSpaceMap.load(folder))
        if name in self.entries:
            self._stale.add(self.entries[name].folder)
        self.entries[name] = entry
        return entry

    def _made(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _reread(self) -> None:
        """What others have added in the meantime is not lost."""
        self.entries = dict(SourcePool.open(self.folder).entries)

    def _write_index(self) -> None:
        columns = {
            column.name: [getattr(entry, column.name) for entry in self.entries.values()] for column in fields(Entry)
        }
        kinds = {"rank": pyarrow.int64(), "rows": pyarrow.int64(), "size": pyarrow.int64()}
        head = json.dumps({"format": _FORMAT, "base_model": self.base_model, "width": self.width})
        schema = pyarrow.schema(
            [(name, kinds.get(name, pyarrow.string())) for name in columns], metadata={"graftlm": head}
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f".{INDEX}.", suffix=".tmp", dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                parquet.write_table(pyarrow.table(columns, schema=schema), file)
            os.chmod(part, 0o644)
            os.replace(part, self.folder / INDEX)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise

    def _sweep(self) -> None:
        """Deletes what the index no longer names."""
        for name in self._stale - {entry.folder for entry in self.entries.values()}:
            shutil.rmtree(self.folder / MAPS / name, ignore_errors=True)
        self._stale.clear()


def same_model(first: str, second: str) -> bool:
    """Whether two names mean one model: equal, or one of them has no owner.

    >>> same_model("bert-base-uncased", "google-bert/bert-base-uncased"), same_model("a/bert", "b/bert")
    (True, False)
    """
    if first == second:
        return True
    owned = [name.count("/") for name in (first, second)]
    return sorted(owned) == [0, 1] and first.split("/")[-1] == second.split("/")[-1]


def _entry(name: str, folder: Path, esm: EmbeddingSpaceMap) -> Entry:
    weights = folder / WEIGHTS
    subset, rows = esm.details.get("task_subset"), esm.details.get("num_examples")
    return Entry(
        name=name,
        task=esm.task,
        subset=None if subset is None else str(subset),
        architecture=esm.architecture,
        rank=esm.rank,
        rows=rows if isinstance(rows, int) else None,
        folder=folder.name,
        size=weights.stat().st_size,
        sha256=_sha256(weights),
        config=json.dumps(read_config(folder / "config.json"), ensure_ascii=False),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

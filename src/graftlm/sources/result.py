"""A ranking of source tasks: printed, as JSON, as a data frame."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow

from graftlm.errors import DataError
from graftlm.sources.pool import Skipped

FILE, SCHEMA = "ranking.json", "graftlm.ranking/1"
_SHOWN = 20


@dataclass(frozen=True)
class Ranked:
    """One source task.

    Attributes:
        rank: 1 is the best; equal scores have equal ranks.
        name: of the entry, model or source.
        score: higher is better; in the unit of the method.
        seconds: that scoring it took.
        task, subset: of the source, where they are known.
    """

    rank: int
    name: str
    score: float
    seconds: float
    task: str | None = None
    subset: str | None = None


@dataclass(frozen=True)
class Ranking:
    """Source tasks for one target, the best first.

    Attributes:
        method: how they were scored.
        model: the base model.
        rows: of the target task.
        classes: of the target task; None in regression.
        sources: the ranked tasks.
        skipped: entries that could not be scored, and why.
        without_source: the score of the base model itself, where the method has one.
        embedding_seconds: for the embeddings of the target's texts.
        seconds: for everything.
        notes: what a reader must know of how it was made.
    """

    method: str
    model: str
    rows: int
    classes: int | None
    sources: tuple[Ranked, ...]
    skipped: tuple[Skipped, ...] = ()
    without_source: float | None = None
    embedding_seconds: float = 0.0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.sources)

    def __str__(self) -> str:
        return self.table()

    def table(self, top: int | None = _SHOWN) -> str:
        """The best `top` as text (None: all), with what was skipped counted below."""
        shown = self.sources[:top]
        width = max([len(one.name) for one in shown] + [len("source task")])
        lines = [f"{'rank':>4}  {'source task':<{width}}  {self.method:>12}  {'ms':>7}"]
        lines += [
            f"{one.rank:>4}  {one.name:<{width}}  {one.score:>12.6f}  {1000 * one.seconds:>7.1f}" for one in shown
        ]
        if len(shown) < len(self.sources):
            lines.append(f"   …  {len(self.sources) - len(shown)} more")
        if self.without_source is not None:
            better = sum(one.score > self.without_source for one in self.sources)
            lines.append(
                f"      {'(no source task)':<{width}}  {self.without_source:>12.6f}  below {better} of {len(self)}"
            )
        kind = "regression" if self.classes is None else f"{self.classes} classes"
        lines.append(
            f"{len(self)} source tasks for {self.rows} rows ({kind}) with {self.model}: {self.seconds:.2f} s, "
            f"{self.embedding_seconds:.2f} s of them for embeddings"
        )
        if self.skipped:
            lines.append(f"{len(self.skipped)} skipped:")
            lines += [f"  {one.name}: {one.problem.splitlines()[0]}" for one in self.skipped]
        return "\n".join([*lines, *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps({"schema": SCHEMA} | self.as_dict(), indent=2, ensure_ascii=False)

    @classmethod
    def read(cls, path: str | Path) -> Ranking:
        """What `to_json` gave, from ``ranking.json`` in a folder or from a file.

        Raises:
            DataError: no such file, no JSON, or another schema version.
        """
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if record.pop("schema") != SCHEMA:
                raise ValueError(f"not {SCHEMA}")
            lists = {"sources": Ranked, "skipped": Skipped}
            record |= {name: tuple(kind(**one) for one in record[name]) for name, kind in lists.items()}
            return cls(**(record | {"notes": tuple(record["notes"])}))
        except FileNotFoundError:
            raise DataError("there is no ranking here", found=file, fix="graftlm rank … --out FOLDER") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"no ranking of this version of graftlm: {error}", found=file) from error

    def to_pandas(self) -> Any:
        """A data frame with one row a source task."""
        return pyarrow.Table.from_pylist([asdict(one) for one in self.sources]).to_pandas()


def ranked(scored: list[tuple[str, float, float, str | None, str | None]]) -> tuple[Ranked, ...]:
    """Sorted by score, from (name, score, seconds, task, subset); NaN is no score and must not come here."""
    ordered = sorted(scored, key=lambda one: -one[1])
    found: list[Ranked] = []
    for position, (name, score, seconds, task, subset) in enumerate(ordered, 1):
        rank = found[-1].rank if found and found[-1].score == score else position
        found.append(Ranked(rank, name, score, seconds, task, subset))
    return tuple(found)

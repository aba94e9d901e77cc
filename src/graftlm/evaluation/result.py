"""`result.json`: what a run scored, against what, at which cost; a versioned schema that a program can rely on."""

import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from graftlm.errors import DataError
from graftlm.evaluation.table import ScoreTable, metric_of

SCHEMA: Final = "graftlm.result/1"
FILE = "result.json"


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# JSON has no NaN: an undefined number is null
Number = Annotated[float | None, BeforeValidator(_finite_or_none)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Interval(_Record):
    """A value and its 95 % interval; None where undefined (a correlation with a constant) or unknown (one item)."""

    value: Number = Field(description="the value; scores are fractions, not percent; null: undefined on these items")
    low: Number = Field(None, description="lower end of the 95 % bootstrap interval over items; null: unknown")
    high: Number = Field(None, description="upper end")


class Score(_Record):
    """The scores of one language on one split."""

    language: str = Field(description="language tag as in the recipe, for example `deu`")
    split: str = Field("test", description="the split scored")
    n: int = Field(ge=0, description="number of items")
    is_source: bool = Field(description="whether the training labels were in this language")
    metrics: dict[str, Interval] = Field(description="metric → value with interval; all metrics of the task")
    majority: Number = Field(
        None, description="primary metric of always answering the most frequent training label; null: no such answer"
    )
    standard: Interval | None = Field(
        None, description="primary metric of the same recipe with everything trained from the first step; null: not run"
    )
    gain: Interval | None = Field(
        None,
        description="primary metric minus `standard`, positive is better; paired over the same items; null: not run",
    )


class Cost(_Record):
    """What the run took."""

    train_seconds: Number = Field(ge=0, description="wall-clock seconds of training, `trace_seconds` included")
    trace_seconds: Number = Field(None, ge=0, description="seconds of it spent on Fisher traces; null: none measured")
    evaluation_seconds: Number = Field(None, ge=0, description="seconds of scoring after training")
    steps: int = Field(ge=0, description="optimizer steps")
    trainable_parameters: int = Field(ge=0, description="parameters that train at some step, head included")
    total_parameters: int = Field(ge=0, description="all parameters, trainable ones included")
    peak_memory_bytes: int | None = Field(
        None, ge=0, description="most memory held: of the accelerator where there is one, else of the process"
    )
    device: str = Field(description="what it ran on, for example `cpu` or the GPU's name")


class Licences(_Record):
    """SPDX identifiers where there are any, else the licence's name; None where unknown."""

    model: str | None = Field(None, description="of the pretrained model")
    data: str | None = Field(None, description="of the training data")
    weights: str | None = Field(None, description="of the weights that this run wrote")


class Result(_Record):
    """One run's result.

    >>> accuracy = Interval(value=0.61, low=0.52, high=0.70)
    >>> score = Score(language="deu", n=120, is_source=False, metrics={"accuracy": accuracy})
    >>> cost = Cost(train_seconds=60, steps=100, trainable_parameters=10, total_parameters=100, device="cpu")
    >>> about = {"name": "topics", "task": "classification", "metric": "accuracy", "source": "eng", "seed": 0}
    >>> result = Result(**about, scores=[score], cost=cost)
    >>> result.primary(result.scores[0]).value
    0.61
    """

    schema_version: Literal["graftlm.result/1"] = Field(SCHEMA, alias="schema", description=f'always `"{SCHEMA}"`')
    name: str = Field(description="name of the run, which is its folder's")
    created: AwareDatetime = Field(
        default_factory=lambda: datetime.now(UTC).replace(microsecond=0), description="UTC, ISO 8601"
    )
    model: str | None = Field(None, description="the pretrained model, as in the recipe")
    task: str = Field(description="the recipe's task, for example `classification`")
    metric: str = Field(description="the primary metric, a key of `scores[].metrics`")
    source: str = Field(description="language of the training labels")
    selected_on: tuple[str, ...] = Field(
        (), description="languages whose labels a choice was made on (checkpoint, learning rate); empty: no choice"
    )
    seed: int = Field(description="the recipe's seed")
    scores: tuple[Score, ...] = Field(description="one entry per language and split")
    forgetting: dict[str, Interval] | None = Field(
        None,
        description="per language or domain, change of what it could do before; negative: loss; null: not measured",
    )
    cost: Cost = Field(description="what it took")
    versions: dict[str, str] = Field(default_factory=dict, description="package → version, with `python`")
    licences: Licences = Field(default_factory=Licences, description="licences of what went in and came out")

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read ``result.json`` of a run folder (or the file itself).

        Raises:
            DataError: no such file, not JSON, another schema version, or fields that are missing, unknown or of the
                wrong type.
        """
        path = Path(folder)
        path = path / FILE if path.is_dir() or path.suffix != ".json" else path
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                "there is no result here", found=path, fix="graftlm train RECIPE writes one at the end of the run"
            ) from None
        except ValueError as error:
            raise DataError("a result that is not JSON", found=f"{path}: {error}") from None
        schema = record.get("schema") if isinstance(record, dict) else None
        if schema != SCHEMA:
            raise DataError(
                "a result of another schema version",
                found=f"{schema!r} in {path}",
                allowed=SCHEMA,
                fix="read it with the version of graftlm that its `versions` names, or run the recipe again",
            )
        try:
            return cls.model_validate(record)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(f"a result with a wrong field: {where}: {first['msg']}", found=path) from None

    def write(self, folder: str | Path) -> Path:
        """Write ``result.json`` into the folder, under a temporary name first; returns its path."""
        path = Path(folder) / FILE
        write_text(
            path,
            json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False, allow_nan=False)
            + "\n",
        )
        return path

    def primary(self, score: Score) -> Interval:
        """The primary metric of one of the scores; an undefined one where it is missing."""
        return score.metrics.get(self.metric, Interval(value=None))

    @property
    def ordered(self) -> tuple[Score, ...]:
        """The scores, source language first, otherwise in the recipe's order."""
        return tuple(sorted(self.scores, key=lambda score: not score.is_source))

    @property
    def zero_shot(self) -> tuple[Score, ...]:
        """The scores in languages whose labels the training never saw."""
        return tuple(score for score in self.scores if not score.is_source)

    @property
    def ranked(self) -> tuple[Score, ...]:
        """The scores, source language first, then from the best to the worst; undefined ones last."""
        sign = 1 if metric_of(self.metric).higher_is_better else -1

        def place(score: Score) -> tuple[bool, bool, float]:
            value = self.primary(score).value
            return not score.is_source, value is None, -sign * (value or 0)

        return tuple(sorted(self.scores, key=place))

    def table(self) -> ScoreTable:
        """Scores per language as a table to print (`rich`), or to write (`ScoreTable.markdown`)."""
        return ScoreTable.of(self)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: under a temporary name in the same folder, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would hide a shared run folder's file
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def schema_rows(model: type[BaseModel] = Result, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(field, type, meaning) of every field, nested ones with dots, for docs/reference/result.md.

    >>> next(iter(schema_rows()))
    ('schema', 'string', 'always `"graftlm.result/1"`')
    """
    for name, field in model.model_fields.items():
        title = f"{prefix}{field.alias or name}"
        nested, shown, suffix = _type_of(field.annotation)
        yield title, shown, field.description or ""
        # Interval is described once, under its first use, and not in each of its places
        if nested is not None and (nested is not Interval or title == "scores[].metrics"):
            yield from schema_rows(nested, f"{title}{suffix}.")


def _type_of(annotation: Any) -> tuple[type[BaseModel] | None, str, str]:
    """(nested model or None, type as JSON names it, what stands between the field and the nested field)."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    optional = " or null" if type(None) in get_args(annotation) else ""
    origin = getattr(annotation, "__origin__", None)
    if origin is tuple:
        nested, shown, _ = _type_of(parts[0])
        return nested, f"list of {shown}s", "[]"
    if origin is dict:
        nested, shown, _ = _type_of(parts[1])
        return nested, f"map to {shown}", "{}"
    if origin is Literal:
        return None, "string", ""
    if origin is Annotated:
        return _type_of(parts[0])
    if optional:
        nested, shown, suffix = _type_of(parts[0])
        return nested, shown + optional, suffix
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, annotation.__name__.lower(), ""
    return None, {str: "string", int: "integer", float: "number", bool: "boolean"}.get(annotation, "time"), ""


_FIELDS = re.compile(r"(?<=<!-- fields -->\n).*?(?=<!-- end -->)", flags=re.DOTALL)


def update_document(path: str | Path) -> None:
    """Replace the table of fields in docs/reference/result.md, between its two markers, by that of this version."""
    table = "| field | type | meaning |\n| --- | --- | --- |\n" + "".join(
        f"| `{field}` | {kind} | {meaning} |\n" for field, kind, meaning in schema_rows()
    )
    path = Path(path)
    write_text(path, _FIELDS.sub(lambda _: table, path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    update_document(sys.argv[1])

"""`result.json`: what a run scored, against what, at which cost; a versioned schema that a program can rely on."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import AwareDatetime, Field

from graftlm.evaluation.record import Number, Record, read_record, update_document, write_record
from graftlm.evaluation.table import ScoreTable, metric_of

SCHEMA: Final = "graftlm.result/1"
FILE = "result.json"


class Interval(Record):
    """A value and its 95 % interval; None where undefined (a correlation with a constant) or unknown (one item)."""

    value: Number = Field(description="the value; scores are fractions, not percent; null: undefined on these items")
    low: Number = Field(None, description="lower end of the 95 % bootstrap interval over items; null: unknown")
    high: Number = Field(None, description="upper end")


class Score(Record):
    """The scores of one language on one split."""

    language: str = Field(description="language tag as in the recipe, for example `deu`")
    split: str = Field("test", description="the split scored")
    n: int = Field(ge=0, description="number of items")
    is_source: bool = Field(description="whether the training labels, or the training text, were in this language")
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
    base: Interval | None = Field(
        None, description="primary metric of the pretrained model itself; null: it cannot be scored on this task"
    )
    change: Interval | None = Field(
        None,
        description="how much better than `base`, positive is better; paired over the same items; null: no `base`",
    )


class Cost(Record):
    """What the run took."""

    train_seconds: Number = Field(ge=0, description="wall-clock seconds of training, `trace_seconds` included")
    trace_seconds: Number = Field(None, ge=0, description="seconds of it spent on Fisher traces; null: none measured")
    evaluation_seconds: Number = Field(None, ge=0, description="seconds of scoring after training")
    source_cache_seconds: Number = Field(
        None, ge=0, description="seconds before training in which FLARE's source was computed; null: no cache"
    )
    source_cache_bytes: int | None = Field(None, ge=0, description="what that took on disk")
    steps: int = Field(ge=0, description="optimizer steps")
    trainable_parameters: int = Field(ge=0, description="parameters that train at some step, head included")
    total_parameters: int = Field(ge=0, description="all parameters, trainable ones included")
    peak_memory_bytes: int | None = Field(
        None, ge=0, description="most memory held: of the accelerator where there is one, else of the process"
    )
    device: str = Field(description="what it ran on, for example `cpu` or the GPU's name")


class Licences(Record):
    """SPDX identifiers where there are any, else the licence's name; None where unknown."""

    model: str | None = Field(None, description="of the pretrained model")
    data: str | None = Field(None, description="of the training data")
    weights: str | None = Field(None, description="of the weights that this run wrote")


class Result(Record):
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
    source: str = Field(description="language of the training labels, or of the training text")
    selected_on: tuple[str, ...] = Field(
        (), description="languages whose labels a choice was made on (checkpoint, learning rate); empty: no choice"
    )
    seed: int = Field(description="the recipe's seed")
    scores: tuple[Score, ...] = Field(description="one entry per language and split")
    forgetting: dict[str, Interval] | None = Field(
        None,
        description="per language that the model knew before, its `change`; negative: loss; null: not measured",
    )
    language_adapters: dict[str, str] | None = Field(
        None,
        description="language → the adapter that lies below the task adapter in it, seen from the recipe; null: none",
    )
    closed_gates: tuple[str, ...] | None = Field(
        None,
        description="neutral residues: layers whose ReLU gate no token of the new languages' test text opens, so that "
        "their blocks do nothing there; null: not looked at",
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
        return read_record(cls, folder, FILE, SCHEMA, fix="graftlm train RECIPE writes one at the end of the run")

    def write(self, folder: str | Path) -> Path:
        """Write ``result.json`` into the folder, under a temporary name first; returns its path."""
        return write_record(self, folder, FILE)

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


if __name__ == "__main__":
    update_document(Result, sys.argv[1])

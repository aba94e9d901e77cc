"""`study.json`: variants of a recipe held against the first of them, over seeds and test items; a versioned schema."""

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import AwareDatetime, Field

from graftlm.evaluation.record import Number, Record, read_record, update_document, write_record
from graftlm.evaluation.result import Interval

SCHEMA: Final = "graftlm.study/1"
FILE = "study.json"
MEAN = "mean"
RESAMPLES = 10_000


class VariantScore(Record):
    """One variant's primary metric in one language, or the mean over the languages without labels."""

    language: str = Field(description=f"language tag; `{MEAN}`: mean over the languages that are not the source")
    n: int = Field(ge=0, description="number of test items, those of all folds together; of the mean: of each language")
    is_source: bool = Field(description="whether the training labels were in this language")
    score: Interval = Field(description="mean over seeds; 95 % interval over seeds and items")
    spread: Number = Field(description="standard deviation over seeds; null: one seed")
    by_seed: tuple[Number, ...] = Field(description="the score of each of the variant's `seeds`")
    majority: Number = Field(None, description="of always answering the most frequent training label")


class Tuned(Record):
    """What tuning chose for a variant, in one fold."""

    fold: int | None = Field(description="number of the fold, from 1; null: no folds")
    values: dict[str, Any] = Field(description="dotted key → the value chosen")
    dev: Number = Field(description="its score on the dev split, by which it was chosen; higher is better")


class VariantCost(Record):
    """Means over a variant's runs; memory is the most that one held."""

    train_seconds: Number = Field(description="wall-clock seconds of training a run")
    trace_seconds: Number = Field(None, description="of it on Fisher traces; null: none measured")
    steps: Number = Field(description="optimizer steps")
    trainable_parameters: int = Field(description="parameters that train at some step")
    total_parameters: int = Field(description="all parameters")
    peak_memory_bytes: int | None = Field(None, description="most memory held by a run; null: unknown")
    device: str = Field(description="what the runs ran on")


class VariantResult(Record):
    """One variant: what it sets, what it scored, what it cost."""

    name: str = Field(description="the variant's name")
    values: dict[str, Any] = Field(description="dotted key → value that the variant sets")
    seeds: tuple[int, ...] = Field(description="seeds of which all folds are finished")
    scores: tuple[VariantScore, ...] = Field(description="one entry a language, then the mean where there are several")
    tuned: tuple[Tuned, ...] = Field((), description="what tuning chose; empty: nothing was tuned")
    cost: VariantCost | None = Field(description="what a run took; null: no run is finished")
    runs: tuple[str, ...] = Field((), description="folders of the runs that count, seen from the study's folder")


class Difference(Record):
    """A variant minus the first one, on the same seeds and items; positive is better, whatever the metric."""

    variant: str = Field(description="name of the variant")
    language: str = Field(description=f"language tag, or `{MEAN}`")
    value: Number = Field(description="difference of the means over seeds")
    low: Number = Field(description="lower end of the 95 % interval over seeds and items")
    high: Number = Field(description="upper end")
    p: Number = Field(description="two-sided p of no difference")
    p_holm: Number = Field(
        description=f"p after Holm's correction, over the variants for `{MEAN}`, else over all others"
    )


class Failure(Record):
    """A run that failed."""

    run: str = Field(description="its name")
    error: str = Field(description="what ended it")


class Comparison(Record):
    """What came out of a study."""

    schema_version: Literal["graftlm.study/1"] = Field(SCHEMA, alias="schema", description=f'always `"{SCHEMA}"`')
    name: str = Field(description="name of the study, which is its folder's")
    created: AwareDatetime = Field(
        default_factory=lambda: datetime.now(UTC).replace(microsecond=0), description="UTC, ISO 8601"
    )
    model: str | None = Field(None, description="the pretrained model, as in the recipe; null: it differs")
    task: str = Field(description="the recipe's task")
    metric: str = Field(description="the primary metric, which all scores are in")
    source: str = Field(description="language of the training labels")
    selected_on: tuple[str, ...] = Field((), description="languages whose labels a choice was made on")
    folds: int = Field(description="folds that are scored together; 1: none")
    runs_planned: int = Field(ge=0, description="runs of the study, trials of tuning included")
    runs_finished: int = Field(ge=0, description="how many of them are finished")
    failures: tuple[Failure, ...] = Field((), description="runs that failed")
    variants: tuple[VariantResult, ...] = Field(description="the first is the one that the others are compared with")
    differences: tuple[Difference, ...] = Field(description="each other variant against the first, by language")
    noise_floor: dict[str, Number] = Field(
        description="language → what two sets of seeds of one variant stay below in 95 % of cases; null: one seed"
    )
    resamples: int = Field(description="of the bootstrap")
    versions: dict[str, str] = Field(default_factory=dict, description="package → version")

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Reads ``study.json`` of a study's folder (or the file itself).

        Raises:
            DataError: no such file, not JSON, another schema version, or wrong fields.
        """
        return read_record(cls, folder, FILE, SCHEMA, fix="graftlm compare RECIPE … writes one")

    def write(self, folder: str | Path) -> Path:
        """Writes ``study.json`` into the folder; returns its path."""
        return write_record(self, folder, FILE)

    def score(self, variant: VariantResult, language: str) -> VariantScore | None:
        """A variant's score in a language, or in the mean."""
        return next((one for one in variant.scores if one.language == language), None)

    def difference(self, variant: str, language: str) -> Difference | None:
        """A variant's difference from the first in a language, or in the mean."""
        return next((one for one in self.differences if (one.variant, one.language) == (variant, language)), None)

    @property
    def languages(self) -> tuple[str, ...]:
        """All languages, source first, without the mean."""
        scores = {one.language: one for variant in self.variants for one in variant.scores if one.language != MEAN}
        return tuple(sorted(scores, key=lambda tag: not scores[tag].is_source))

    @property
    def main(self) -> str:
        """What the variants are judged by first: the mean where there is one, else the only language without labels."""
        known = [one for variant in self.variants for one in variant.scores]
        targets = [one.language for one in known if not one.is_source]
        return MEAN if MEAN in targets else next(iter(targets), self.languages[0] if known else self.source)


def values_text(values: Mapping[str, Any]) -> str:
    """Settings as `key=value`, one after the other."""
    return ", ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())


if __name__ == "__main__":
    update_document(Comparison, sys.argv[1])

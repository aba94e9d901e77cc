"""Finished runs of a study, made up: for tests of the comparison and its page, and to look at.

python tests/evaluation/made_up_study.py /tmp/made-up-study && graftlm report /tmp/made-up-study
"""

import json
import sys
from pathlib import Path

import numpy as np
from evaluation.made_up_run import made_up_result, made_up_unfreezing

from graftlm.evaluation.compare_runs import VariantRuns, compare_runs
from graftlm.evaluation.comparison import Comparison, Tuned
from graftlm.evaluation.result import Interval, Score

LANGUAGES = {"eng": 0.78, "deu": 0.64, "fra": 0.67, "spa": 0.66, "por": 0.62, "ces": 0.57}
GAIN = {"standard": 0.0, "gradual": 0.03, "FUN": 0.01}
LABELS = ("geography", "politics", "science", "sports")


def write_run(
    folder: Path,
    right: dict[str, np.ndarray],
    *,
    seconds: float = 60.0,
    ids: dict[str, list] | None = None,
    trace: bool = False,
    metric: str = "accuracy",
    seed: int = 0,
) -> Path:
    """One run folder; `right` says of each language which items were answered rightly."""
    folder.mkdir(parents=True)
    rows = []
    for language, values in right.items():
        names = ids[language] if ids else range(len(values))
        for place, (name, ok) in enumerate(zip(names, values, strict=True)):
            label = LABELS[hash_of(name) % len(LABELS)]
            wrong = LABELS[(hash_of(name) + 1 + place % 3) % len(LABELS)]
            rows.append({"id": name, "language": language, "label": label, "prediction": label if ok else wrong})
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scores = [
        Score(
            language=language,
            n=len(values),
            is_source=language == "eng",
            metrics={"accuracy": Interval(value=float(np.mean(values)))},
            majority=0.25,
        )
        for language, values in right.items()
    ]
    whole = made_up_result()
    cost = whole.cost.model_copy(update={"train_seconds": seconds, "steps": 120})
    whole.model_copy(update={"scores": tuple(scores), "cost": cost, "metric": metric, "seed": seed}).write(folder)
    rng = np.random.default_rng(seed)
    log = [
        {"step": step, "eval_accuracy": 0.75 - 0.5 * float(np.exp(-step / 40)) + rng.normal(0, 0.01), "eval_loss": 1.0}
        for step in range(20, 121, 20)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")
    if trace:
        lines = made_up_unfreezing(layers=12, steps=120, every=6, opens_every=5)
        (folder / "unfreezing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return folder


def hash_of(name: object) -> int:
    """A number for an id that is the same in every process."""
    return sum(map(ord, str(name))) * 7


def made_up_comparison(
    root: Path, *, seeds: int = 5, items: int = 200, names: tuple[str, ...] = tuple(GAIN), **changes
) -> Comparison:
    """A study of three variants in six parallel languages, its runs written under `root`."""
    rng = np.random.default_rng(3)
    hard = {language: rng.normal(0, 0.12, size=items) for language in LANGUAGES}
    variants = []
    for name, (_, gain) in zip(names, GAIN.items(), strict=True):
        folders = {}
        for seed in range(seeds):
            lucky = rng.normal(0, 0.008)
            right = {
                language: rng.random(items) < base + lucky + hard[language] + (gain if language != "eng" else 0)
                for language, base in LANGUAGES.items()
            }
            folder = root / "runs" / f"{len(variants)}.seed{seed}"
            write_run(folder, right, seconds=80 - 600 * gain + rng.normal(), trace=gain > 0, seed=seed)
            folders[seed] = [folder]
        tuned = (Tuned(fold=None, values={"training.learning_rate": 0.003}, dev=0.76),)
        variants.append(VariantRuns(name, {"unfreezing.schedule": name}, folders, tuned))
    planned = 3 * seeds
    made = compare_runs("topics-schedule", variants, root=root, planned=planned, finished=planned, resamples=2000)
    made = made.model_copy(update=changes)
    made.write(root)
    return made


if __name__ == "__main__":
    made_up_comparison(Path(sys.argv[1]))

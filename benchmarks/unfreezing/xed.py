"""The second set of the study: polarity of film subtitles, out of XED's emotions. Its files, its floor, its verdict.

    python benchmarks/unfreezing/xed.py --data PATH/xed_emotion         writes work/xed/ and prints the floor
    cd benchmarks/unfreezing/work/xed && graftlm compare xed.yaml       resumable; table and page in studies/schedules
    python benchmarks/unfreezing/xed.py                                 is standard training above the floor?

Positive: joy or trust; negative: anger, disgust, fear or sadness; a line with several emotions or another one is left
out. As many of both in every file, drawn once (seed 0). The set counts where standard training, as the mean over the
five languages without labels, is above the majority (.5) and above English character n-grams by two standard errors.
"""

import argparse
import gzip
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

HERE = Path(__file__).parent
WORK = HERE / "work/xed"
SOURCE, TARGETS = "eng", ("deu", "fra", "spa", "por", "ces")
POLARITY = dict.fromkeys(("joy", "trust"), "positive") | dict.fromkeys(
    ("anger", "disgust", "fear", "sadness"), "negative"
)
MOST_OF_EACH = {"train": 800, "dev": 200, "test": 400}


def read(data: Path, language: str, split: str) -> list[dict]:
    """As many positive as negative lines of a split, drawn once."""
    with gzip.open(data / f"{language}.{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    sides: dict[str, list[dict]] = {"positive": [], "negative": []}
    for number, row in enumerate(rows):
        if side := POLARITY.get(row["label_name"]):
            sides[side].append({"id": number, "text": row["text"], "label": side})
    count = min(MOST_OF_EACH[split], *map(len, sides.values()))
    rng = random.Random(0)
    found = [row for side in sides.values() for row in rng.sample(side, count)]
    return sorted(found, key=lambda row: row["id"])


def write(data: Path) -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    for name in ("xed.yaml", "recipe-xed.yaml"):
        shutil.copyfile(HERE / name, WORK / name)
    for language, split in ((SOURCE, "train"), (SOURCE, "dev"), *((tag, "test") for tag in (SOURCE, *TARGETS))):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in read(data, language, split)]
        (WORK / f"{split}.{language}.jsonl").write_text("".join(lines), encoding="utf-8")


def rows_of(split: str, language: str) -> list[dict]:
    return [json.loads(line) for line in (WORK / f"{split}.{language}.jsonl").read_text(encoding="utf-8").splitlines()]


def ngrams_right() -> dict[str, np.ndarray]:
    """Language → 0 or 1 for each test line: character n-grams fitted on English, C chosen on English dev."""
    train, dev = rows_of("train", SOURCE), rows_of("dev", SOURCE)
    fitted = []
    for penalty in (0.1, 1.0, 10.0):
        ngrams = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
        model = make_pipeline(ngrams, LogisticRegression(C=penalty, max_iter=1000))
        fitted.append(model.fit([row["text"] for row in train], [row["label"] for row in train]))
    best = max(fitted, key=lambda one: one.score([row["text"] for row in dev], [row["label"] for row in dev]))
    right = {}
    for language in (SOURCE, *TARGETS):
        rows = rows_of("test", language)
        found = best.predict([row["text"] for row in rows])
        right[language] = np.array([row["label"] == label for row, label in zip(rows, found, strict=True)], float)
    return right


def standard_right() -> dict[str, np.ndarray] | None:
    """Language → share of the seeds of standard training that are right, for each test line; None before the runs."""
    from graftlm.evaluation.folder import read_lines
    from graftlm.study.execute import tuned
    from graftlm.study.plan import load_study
    from graftlm.study.runner import finished

    study = replace(load_study(WORK / "xed.yaml"), root=WORK / "studies")
    runs = [tuned(study, run) for run in study.scored() if study.variants[run.variant].name == "standard"]
    if not all(run and finished(study.recipe_of(run)) for run in runs):
        return None
    right: dict[str, list[list[bool]]] = {}
    for run in runs:
        one: dict[str, list[bool]] = {}
        for row in read_lines(study.recipe_of(run).folder / "predictions.jsonl"):
            one.setdefault(row["language"], []).append(row["prediction"] == row["label"])
        for language, found in one.items():
            right.setdefault(language, []).append(found)
    return {language: np.mean(found, axis=0) for language, found in right.items()}


def difference(ours: dict[str, np.ndarray], floor: dict[str, np.ndarray | float]) -> tuple[float, float]:
    """Mean over the languages of (ours − floor), and its standard error over the items, which differ by language."""
    parts = [ours[language] - floor[language] for language in TARGETS]
    error = np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / len(parts)
    return float(np.mean([part.mean() for part in parts])), float(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with eng.train.jsonl.gz and so on")
    if data := parser.parse_args().data:
        write(data)
    floor = ngrams_right()
    ours = standard_right()
    print("| | " + " | ".join((SOURCE, *TARGETS)) + " | mean of the five |\n" + "|---" * (len(TARGETS) + 3) + "|")
    print("| test lines | " + " | ".join(str(len(found)) for found in floor.values()) + " | |")
    for name, found in (("character n-grams", floor), ("standard", ours)):
        if found is not None:
            cells = [f"{100 * found[language].mean():.1f}" for language in (SOURCE, *TARGETS)]
            mean = np.mean([found[language].mean() for language in TARGETS])
            print(f"| {name} | {' | '.join(cells)} | {100 * mean:.1f} |")
    if ours is not None:
        for name, other in (("n-grams", floor), ("majority", dict.fromkeys(TARGETS, 0.5))):
            value, error = difference(ours, other)
            above = "above" if value > 2 * error else "not above"
            print(f"\nstandard − {name}: {100 * value:+.2f} points, standard error {100 * error:.2f}: {above} it")


if __name__ == "__main__":
    main()

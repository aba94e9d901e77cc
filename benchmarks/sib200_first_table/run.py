"""Standard training against a schedule on SIB-200, three seeds: a first look, labelled exploratory. See README.md.

    python benchmarks/sib200_first_table/run.py --data FOLDER_OF_SIB200 [--schedules standard,gradual] [--seeds 3]

Finished runs are not repeated; each row is written as soon as its run is done.
"""

import argparse
import json
import statistics
from pathlib import Path

import graftlm

HERE = Path(__file__).parent


def recipe(data: Path, schedule: str, seed: int, runs: Path):
    plain = graftlm.load_recipe(HERE / "recipe.yaml")
    folders = [f"data.{key}={data / getattr(plain.data, key).path}" for key in ("train", "dev")]
    folders += [f"data.test.{language}={data / source.path}" for language, source in plain.data.test.items()]
    return graftlm.load_recipe(
        HERE / "recipe.yaml",
        [
            *folders,
            f"name={schedule}-{seed}",
            f"seed={seed}",
            f"unfreezing.schedule={schedule}",
            f"output.folder={runs}",
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with LANGUAGE.SPLIT.jsonl.gz of SIB-200")
    parser.add_argument("--schedules", default="standard,gradual")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/sib200_first_table"))
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    chosen = parser.parse_args()
    rows = []
    for seed in range(chosen.seeds):
        for schedule in chosen.schedules.split(","):
            result = graftlm.run_recipe(recipe(chosen.data.resolve(), schedule, seed, chosen.runs))
            accuracy = {score.language: round(score.metrics["accuracy"].value, 4) for score in result.scores}
            seconds = round(result.cost.train_seconds, 1)
            rows.append({"schedule": schedule, "seed": seed, "accuracy": accuracy, "train_seconds": seconds})
            chosen.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    languages = list(rows[0]["accuracy"])
    print("schedule ", *(f"{language:>13}" for language in languages), f"{'mean, not eng':>15}")
    for schedule in chosen.schedules.split(","):
        own = [row["accuracy"] for row in rows if row["schedule"] == schedule]
        columns = [[row[language] for row in own] for language in languages]
        columns.append([statistics.mean(v for k, v in row.items() if k != "eng") for row in own])
        print(f"{schedule:9}", *(f"{statistics.mean(c):7.3f} ±{statistics.stdev(c):.3f}" for c in columns))


if __name__ == "__main__":
    main()

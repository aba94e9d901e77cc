"""FLARE against its rivals on sib200: does the runs of the study and prints its tables.

    python benchmarks/flare/run.py --data DATA [--work FOLDER] [--set primary]      once per core
    python benchmarks/flare/run.py [--set primary]                      the tables, from rows that are there
    python benchmarks/flare/run.py --data DATA --scale smoke            every set, tiny: does all of it go through?

DATA holds `multilingual/sib200_topic/` and, for the set `gloss`, `parallel_text/tatoeba_eng/`. Resumable: what is
finished is not repeated. Processes that share the work folder divide the runs.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from folds import write, write_folds
from plan import SCALES, SETS, SOURCE, STUDY, Job, Scale, jobs, step_1
from rows import Rows

HERE = Path(__file__).parent
PAUSE = 2.0  # seconds between two looks at what other processes do


def english(work: Path, name: str, job: Job, scale: Scale):
    """The recipe of step 1; its scores are zero-shot and translate-test."""
    from graftlm import load_recipe

    files = {tag: f"folds/{job.fold}/test.{tag}.jsonl" for tag in (SOURCE, *scale.languages)}
    return load_recipe(
        work / "english.yaml",
        [
            f"name={name}",
            f"seed={job.seed}",
            f"output.folder={json.dumps(str(work / 'english'))}",
            f"data.train=folds/{job.fold}/train.{SOURCE}.jsonl",
            f"data.dev=folds/{job.fold}/dev.{SOURCE}.jsonl",
            f"data.test={json.dumps(files)}",
            f"training.epochs={scale.epochs}",
            f"training.precision={scale.precision}",
        ],
    )


def arm(work: Path, name: str, job: Job, base: Path, scale: Scale = STUDY):
    """The recipe of one run of an arm, with its rate."""
    from graftlm import load_recipe

    read, adapter, column = job.parts
    folds = f"{'glossed' if column == 'gloss' else 'folds'}/{job.fold}"
    return load_recipe(
        work / "recipe.yaml",
        [
            f"name={json.dumps(name)}",
            f"seed={job.seed}",
            f"source={job.tag}",
            f"model={json.dumps(str(base.resolve()))}",
            f"output.folder={json.dumps(str(work / 'arms'))}",
            f"data.train={folds}/train.{job.tag}.jsonl",
            f"data.dev={folds}/dev.{job.tag}.jsonl",
            f"data.test={json.dumps({job.tag: f'{folds}/test.{job.tag}.jsonl'})}",
            f"data.parallel.text={column}",
            f"data.parallel.read={read}",
            f"adapter={json.dumps(adapter)}",
            f"training.learning_rate={job.rate}",
            f"training.epochs={scale.epochs}",
            f"training.precision={scale.precision}",
        ],
    )


def do(work: Path, which: str, rows: Rows) -> None:
    """All runs of a set, with whatever other processes are at it; returns when all are finished."""
    from graftlm.study.claims import Claims

    claims, left = Claims(work / "claims"), jobs(which, rows.scale)
    while left := [job for job in left if not rows.has(job)]:
        if not any(attempt(work, job, claims, rows) for job in left):  # the first that can be done, then look again
            time.sleep(PAUSE)


def attempt(work: Path, job: Job, claims, rows: Rows) -> bool:
    """Does a run, unless it waits for another one or another process is at it."""
    name, base = rows.name(job), step_1(job.fold, job.seed)
    if name is None or (job != base and not rows.has(base)) or (claim := claims.take(name)) is None:
        return False
    try:
        if not rows.has(job):
            perform(work, name, job, rows)
    finally:
        claim.give_back()
    return True


def perform(work: Path, name: str, job: Job, rows: Rows) -> None:
    """Does a run and keeps its row; step 1 is merged too."""
    from graftlm import merge, run_recipe

    base = work / "english" / rows.name(step_1(job.fold, job.seed)) / "merged"
    if job.parts is None:
        recipe = english(work, name, job, rows.scale)
    else:
        rate = job.rate or rows.chosen(job.parts, job.tag)
        recipe = arm(work, name, job._replace(rate=rate), base, rows.scale)
    is_new, began = not recipe.folder.exists(), time.process_time()
    run_recipe(recipe, progress=False)
    seconds = time.process_time() - began
    if job.parts is None and not base.is_dir():
        merge(recipe.folder)
    said = {} if job.parts is None else said_in(recipe)
    rows.put({"run": name, "seconds": seconds if is_new else None} | said)  # None: a part of it was done before
    print(f"{name}: {seconds:.0f} s", flush=True)


def said_in(recipe) -> dict:
    """What a finished run says of its dev and test sentences."""
    from graftlm.study.execute import dev_score

    lines = (recipe.folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    said = sorted(map(json.loads, lines), key=lambda row: row["id"])
    labels = json.loads((recipe.folder / "adapter" / "config.json").read_text(encoding="utf-8"))["id2label"]
    return {
        "dev": dev_score(recipe),
        "labels": [labels[key] for key in sorted(labels, key=int)],
        "ids": [one["id"] for one in said],
        "gold": [one["label"] for one in said],
        "scores": [[float(f"{score:.5g}") for score in one["scores"]] for one in said],
    }


def show(which: str, rows: Rows) -> None:
    """Prints the tables of a set, of the seeds that are whole; the rows of the study go beside this file."""
    from tables import by_language, costs, rates, summary

    kept, planned = HERE / f"rows.{which}.jsonl", rows.scale.of(which).seeds
    if kept.is_file() and rows.scale == STUDY:
        rows.load(kept)
    seeds = next((job.seed for job in jobs(which, rows.scale) if not rows.has(job)), planned)
    if not seeds:
        sys.exit(f"{which}: no seed is whole yet; --data DATA makes the runs")
    scale = replace(rows.scale, seeds=seeds)
    print(f"## {which}: {seeds} of {planned} seeds\n\n{summary(rows, which, scale)}\n")
    if len(scale.of(which).languages) > 1:
        print(f"{by_language(rows, which, scale)}\n")
    print(f"{rates(rows, which, scale)}\n\n{costs(rows, which, scale)}\n")
    if rows.scale == STUDY:
        rows.save(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with multilingual/ and parallel_text/")
    parser.add_argument("--work", type=Path, help="folds, runs and rows (git ignores it); default: work/, by scale")
    parser.add_argument("--set", choices=SETS, help="default: primary; all of them with --scale smoke")
    parser.add_argument("--scale", choices=SCALES, default="study")
    given = parser.parse_args()
    scale = SCALES[given.scale]
    work = given.work or HERE / "work" / ("" if scale == STUDY else given.scale)
    every = tuple(SETS) if given.scale == "smoke" else ("primary",)
    for which in (given.set,) if given.set else every:
        rows = Rows(work / "rows", scale)
        if given.data is not None:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process is for one core
            for name in ("english.yaml", "recipe.yaml"):
                write(work / name, (HERE / name).read_text(encoding="utf-8"))
            write_folds(given.data, work / "folds", scale)
            if which == "gloss":
                write_folds(given.data, work / "glossed", scale.of(which), with_gloss=True)
            do(work, which, rows)
        show(which, rows)


if __name__ == "__main__":
    main()

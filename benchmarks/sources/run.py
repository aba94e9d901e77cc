"""The transfer study of source rankings: source models and maps, transfers, scores, and the table of the README.

    python benchmarks/sources/run.py --data PATH/classification_en        # once per core: the processes divide the work
    python benchmarks/sources/run.py                                      # the table, from the rows that are there

Resumable: what has a row is not repeated. Rows are written as they come.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import numpy as np  # noqa: E402
from plan import PLAN, SMOKE, Plan  # noqa: E402  beside this file
from table import table  # noqa: E402


def rows_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def append(path: Path, row: dict) -> None:
    with path.open("a", encoding="utf-8") as file:  # one write of one short line: processes do not mix theirs
        file.write(json.dumps(row) + "\n")


def divided(work: Path, jobs: list[str], done, do) -> None:
    """Does each job that is not done, unless another process is at it; waits for none."""
    from graftlm.study.claims import Claims

    claims = Claims(work / "claims")
    for number, job in enumerate(jobs, 1):
        if done(job) or (claim := claims.take(job.replace("/", "."))) is None:
            continue
        try:
            if not done(job):
                print(f"[{number}/{len(jobs)}] {job}: {do(job)}", flush=True)
        finally:
            claim.give_back()


def make_sources(plan: Plan, data: Path, work: Path, out: Path) -> None:
    """Fine-tunes the encoder on each source task; fits its maps; keeps its LoRA."""
    from tasks import Clock, Trainer, read

    from graftlm.sources.embed import Embedder
    from graftlm.sources.esm import EmbeddingSpaceMap

    model = plan.model_folder()
    trainer = Trainer(model)
    base = Embedder(model, pooling="mean", max_length=64, device="cpu")

    def do(job: str) -> str:
        task, clock = job.split("/")[1], Clock()
        rows = read(data, task, "train", plan.source_rows)
        fitted = trainer.fit(rows, int(rows.labels.max()) + 1, plan.source_epochs, seed=0)
        spent = clock.seconds()
        held = read(data, task, "dev", 500)
        right = (trainer.probabilities(fitted, held.texts).argmax(1) == held.labels).mean()
        fitted.encoder.save_pretrained(work / "lora" / task)
        encoder = trainer.encoder(work / "lora" / task)
        same = {"tokenizer": trainer.tokenizer, "pooling": "mean", "max_length": 64}
        tuned, plain = Embedder(encoder, **same)(rows.texts), base(rows.texts)
        for kind, how in plan.maps.items():
            esm = EmbeddingSpaceMap.fit(plain, tuned, base_model="MiniLM-L6", task=task, **how)
            esm.save(work / "maps" / kind / task)
        words = sorted({token for ids in base.token_ids(rows.texts) for token in ids})
        (work / "texts").mkdir(exist_ok=True)
        np.savez(work / "texts" / f"{task}.npz", mean=plain.mean(axis=0), words=words, rows=len(rows.texts))
        moved = float(((tuned - plain) ** 2).sum() / (plain**2).sum())
        row = {"task": task, "rows": len(rows.texts), "dev": round(float(right), 4), "moved": round(moved, 4)}
        append(out / "sources.jsonl", row | {"train_seconds": spent, "seconds": clock.seconds()})
        return f"dev accuracy {right:.3f}, {spent:.0f} s"

    jobs = [f"source/{task}" for task in plan.sources]
    divided(work, jobs, lambda job: job.split("/")[1] in {row["task"] for row in rows_in(out / "sources.jsonl")}, do)


def make_cells(plan: Plan, data: Path, work: Path, out: Path) -> None:
    """Fine-tunes on each target from each source, and from none."""
    from tasks import Clock, Trainer, read

    trainer = Trainer(plan.model_folder())

    def done(job: str) -> bool:
        return job in {row["cell"] for row in rows_in(out / "cells.jsonl")}

    def do(job: str) -> str:
        _, target, count, seed, source = job.split("/")
        clock = Clock()
        rows = read(data, target, "train", max(plan.target_rows), seed=1).head(int(count))
        test = read(data, target, "test", plan.test_rows, seed=1)
        classes = int(max(rows.labels.max(), test.labels.max())) + 1
        start = None if source == "none" else work / "lora" / source
        fitted = trainer.fit(rows, classes, plan.target_epochs[int(count)], seed=int(seed), source=start)
        right = float((trainer.probabilities(fitted, test.texts).argmax(1) == test.labels).mean())
        row = {"cell": job, "target": target, "n": int(count), "seed": int(seed), "source": source}
        append(out / "cells.jsonl", row | {"accuracy": round(right, 5), "seconds": clock.seconds()})
        return f"{right:.3f}, {clock.seconds():.0f} s"

    trained = {row["task"] for row in rows_in(out / "sources.jsonl")}
    jobs = [job for job in plan.cells() if job.split("/")[-1] in trained | {"none"}]
    divided(work, jobs, done, do)


def make_scores(plan: Plan, data: Path, work: Path, out: Path) -> None:
    """What each ranker says of each source for each target."""
    from rankers import score_all

    def done(job: str) -> bool:
        return any(row["job"] == job for row in rows_in(out / "scores.jsonl"))

    def do(job: str) -> str:
        _, target, count = job.split("/")
        found = score_all(plan, data, work, target, int(count))
        for name, scores in found.items():
            append(
                out / "scores.jsonl", {"job": job, "target": target, "n": int(count), "ranker": name, "scores": scores}
            )
        return ", ".join(found)

    divided(work, [f"scores/{target}/{count}" for target in plan.targets for count in plan.target_rows], done, do)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, help="the folder with NAME/train.jsonl.gz and so on")
    arguments.add_argument("--work", type=Path, default=HERE / "work", help="LoRA weights and maps (git ignores it)")
    arguments.add_argument("--out", type=Path, default=HERE, help="where the rows go")
    arguments.add_argument("--smoke", action="store_true", help="a few minutes: whether everything runs")
    given = arguments.parse_args()
    plan = SMOKE if given.smoke else PLAN
    if given.data is not None:
        given.work.mkdir(parents=True, exist_ok=True)
        given.out.mkdir(parents=True, exist_ok=True)
        for stage in (make_sources, make_cells, make_scores):
            stage(plan, given.data, given.work, given.out)
    cells, scores = rows_in(given.out / "cells.jsonl"), rows_in(given.out / "scores.jsonl")
    if not cells or not scores:
        sys.exit(f"there are no rows yet in {given.out}; give --data PATH/classification_en to make them")
    print(table(cells, scores))


if __name__ == "__main__":
    main()

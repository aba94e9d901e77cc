"""Guided dropout against the same rates shuffled, and against other controls, on the starter encoder.

    python run.py --data DATA [--stages primary secondary all-rows exploratory pilot longer] [--rows FILE]
    python run.py --table
    python run.py --data DATA --check-rates 2000       are the rates those of many more texts?

Every finished run is a line of rows.jsonl; started again, it goes on with what is missing. The README says what is
compared and was written first.
"""

import argparse
import gzip
import json
import multiprocessing
import random
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
import transformers
from plan import (
    ALL,
    CANDIDATES,
    ENOUGH,
    EXPLORATORY,
    EXPLORATORY_SEEDS,
    LONGER,
    ON_DEV,
    PILOT_SEEDS,
    PRIMARY,
    RATES,
    SECONDARY,
    SEEDS,
    SHORT,
    Amount,
    Job,
)
from scipy.stats import kendalltau
from tables import table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from graftlm.starter import starter_model
from graftlm.training.dropout.guided import GuidedDropout

HERE = Path(__file__).parent
STARTER = starter_model("starter")
POOL, BATCH, LENGTH = 2000, 16, 32
MOST_TEST, MOST_DEV = 1000, 500


def read(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def split(data: Path, task: str, name: str) -> list[dict]:
    if task == "sib200":
        return read(data / f"multilingual/sib200_topic/eng_Latn.{name}.jsonl.gz")
    return read(data / f"classification_en/{task}/{name}.jsonl.gz")


def drawn(rows: list[dict], most: int, seed: int = 0) -> list[dict]:
    return random.Random(seed).sample(rows, min(most, len(rows)))


def pretraining_texts(data: Path) -> list[str]:
    """English text that the starter encoder was pretrained on, in random order."""
    texts = [row["text"] for row in read(data / "parallel_text/ntrex128/eng.jsonl.gz")]
    pairs = read(data / "parallel_text/tatoeba_eng/deu.jsonl.gz")
    texts += [row["eng"] for row in pairs if row["split"] == "train"][:2000]
    texts += [row["text"][:600] for row in read(data / "raw_text/eltec_eng/train.jsonl.gz")[:2000]]
    random.Random(0).shuffle(texts)
    return texts


def measured_rates(data: Path, path: Path, model: str = STARTER) -> GuidedDropout:
    if not path.exists():
        GuidedDropout.estimate(model, pretraining_texts(data)).save(path)
    return GuidedDropout.load(path)


def check_rates(data: Path, path: Path, texts: int) -> str:
    """The rates that were used against those of so many texts, without stopping early."""
    used = GuidedDropout.load(path).rates
    many = GuidedDropout.estimate(STARTER, pretraining_texts(data)[-texts:], tolerance=0.0).rates
    order = kendalltau([used[block] for block in used], [many[block] for block in used]).statistic
    moved = {block: many[block] - used[block] for block in used}
    most = max(moved, key=lambda block: abs(moved[block]))
    mean = np.mean(np.abs(list(moved.values())))
    return f"{texts} other texts: τ {order:.3f}; rates differ by {mean:.4f} on average, by {moved[most]:+.4f} at {most}"


def set_dropout(rates: GuidedDropout, arm: str, model: torch.nn.Module, seed: int) -> None:
    if arm in ("usual", "none"):
        rate = 0.1 if arm == "usual" else 0.0
        rates.using("uniform", upper=rate, lower=rate).apply(model)
    else:
        rates.using(arm, seed=seed).apply(model)


class Runs:
    """Trains and scores; what was done is in `rows`."""

    def __init__(
        self,
        data: Path,
        rows: Path,
        device: str = "cpu",
        bf16: bool = True,
        model: str = STARTER,
        workers: int = 1,
    ):
        self.data, self.path, self.device, self.bf16, self.model, self.workers = (
            data,
            rows,
            device,
            bf16,
            model,
            workers,
        )
        self.rates = measured_rates(data, rows.with_name("rates.json"), model)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.rows = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
        self._tasks: dict[str, tuple] = {}

    def task(self, name: str) -> tuple:
        if name not in self._tasks:
            train, dev, test = (split(self.data, name, one) for one in ("train", "dev", "test"))
            self._tasks[name] = (drawn(train, POOL), drawn(dev, MOST_DEV), drawn(test, MOST_TEST))
        return self._tasks[name]

    def run(self, *asked) -> dict:
        """The row of one run, see `Job`."""
        return self.all([Job(*asked)])[0]

    def all(self, asked: list[Job]) -> list[dict]:
        """The rows of these runs; what is missing is done, in as many processes as there are workers."""
        found = {job: row for job in asked for row in self.rows if job.is_row(row)}
        left = [job for job in asked if job not in found]
        if self.workers == 1:
            for job in left:
                found[job] = self._keep(self.perform(job))
        elif left:
            given = (self.data, self.path, self.device, self.bf16, self.model)
            with ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"), _begin, given) as pool:
                began = {pool.submit(_perform, job): job for job in left}
                for finished in as_completed(began):
                    found[began[finished]] = self._keep(finished.result())
        return [found[job] for job in asked]

    def _keep(self, row: dict) -> dict:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        told = {key: value for key, value in row.items() if key != "right"}
        print(told, flush=True)
        return row

    def perform(self, job: Job) -> dict:
        """Trains and scores one run."""
        began = time.perf_counter()
        pool, dev, test = self.task(job.task)
        train = drawn(pool, round(job.amount.share * len(pool)), job.seed)
        model = self.trained(train, 1 + max(row["label"] for row in pool), job)
        on_dev = job.stage in ON_DEV
        right = self.right(model, dev if on_dev else test)
        bits = np.packbits(right).tobytes().hex()
        row = job.columns() | {"split": "dev" if on_dev else "test", "n": len(right), "score": float(right.mean())}
        row |= {"right": bits, "seconds": round(time.perf_counter() - began, 1)}
        device = torch.cuda.get_device_name() if self.device == "cuda" else self.device
        return row | {"device": device, "precision": "bf16" if self.bf16 else "float32"}

    def trained(self, train: list[dict], labels: int, job: Job) -> torch.nn.Module:
        transformers.set_seed(1000 + job.seed)
        model = AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=labels)
        set_dropout(self.rates, job.arm, model, job.seed)
        model.to(self.device).train()
        decayed = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": rest, "weight_decay": 0.0}], job.lr, weight_decay=0.01, fused=True
        )
        steps = job.amount.epochs * -(-len(train) // BATCH)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        torch.manual_seed(2000 + job.seed)
        rng = random.Random(job.seed)
        for _ in range(job.amount.epochs):
            order = rng.sample(train, len(train))
            for start in range(0, len(order), BATCH):
                with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                    loss = model(**self.batch(order[start : start + BATCH])).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        return model.eval()

    def batch(self, rows: list[dict]) -> dict:
        texts = [row["text"] for row in rows]
        batch = self.tokenizer(texts, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
        batch["labels"] = torch.tensor([row["label"] for row in rows])
        return {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask", "labels")}

    @torch.no_grad()
    def right(self, model: torch.nn.Module, rows: list[dict]) -> np.ndarray:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["text"]))
        right = np.zeros(len(rows), dtype=bool)
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            batch = self.batch([rows[i] for i in part])
            labels = batch.pop("labels")
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                logits = model(**batch).logits
            right[part] = (logits.argmax(-1) == labels).cpu().numpy()
        return right

    def chosen_tasks(self) -> list[str]:
        gains = {}
        for task in CANDIDATES:
            row = self.run("select", task, "usual", 3e-4, 100)
            labels = [one["label"] for one in self.task(task)[1]]
            majority = max(map(labels.count, set(labels))) / len(labels)
            gains[task] = (row["score"] - majority) / (1 - majority)
        print({task: round(gain, 3) for task, gain in gains.items()})
        return sorted(sorted(gains, key=gains.__getitem__)[-3:])

    def tuned(self, arm: str, tasks: list[str]) -> float:
        means = {lr: np.mean([self.run("tune", task, arm, lr, 101)["score"] for task in tasks]) for lr in RATES}
        return max(RATES, key=means.__getitem__)

    def grid(
        self,
        stage: str,
        arms: tuple[str, ...],
        rates: dict[str, float],
        tasks: list[str],
        seeds: int,
        amount: Amount = SHORT,
    ) -> None:
        """Seed by seed, so that what is done at any moment is balanced."""
        runs = [(seed, task, arm) for seed in range(seeds) for task in tasks for arm in arms]
        self.all([Job(stage, task, arm, rates[arm], seed, amount) for seed, task, arm in runs])

    def longer(self, tasks: list[str], lr: float) -> Amount | None:
        """Where dropout at the usual rates is worth most on dev, against none; None where it is worth nothing."""
        runs = [(amount, seed, task) for amount in LONGER for seed in PILOT_SEEDS for task in tasks]
        rows = self.all([Job("pilot", task, arm, lr, s, a) for a, s, task in runs for arm in ("usual", "none")])
        gains = {}
        for amount in LONGER:
            pairs = [
                usual["score"] - none["score"]
                for usual, none in zip(rows[::2], rows[1::2], strict=True)
                if (usual["share"], usual["epochs"]) == amount
            ]
            gains[amount] = np.mean(pairs)
            spread = np.std(pairs, ddof=1) / len(pairs) ** 0.5
            print(f"{amount}: usual − none {100 * gains[amount]:+.2f} ± {100 * spread:.2f} (dev)")
        best = max(gains, key=gains.__getitem__)
        return best if gains[best] > ENOUGH else None


_RUNS: list[Runs] = []  # of a worker process: data and tokenizer are read once


def _begin(*given) -> None:
    torch.set_num_threads(1)
    _quiet()
    _RUNS.append(Runs(*given))


def _perform(job: Job) -> dict:
    return _RUNS[0].perform(job)


def _quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=Path, default=HERE / "rows.jsonl")
    stages = ["primary", "secondary", "all-rows", "exploratory", "pilot", "longer"]
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages[:4])
    parser.add_argument("--seeds", type=int, help=f"{SEEDS}, and {EXPLORATORY_SEEDS} of the exploratory stage")
    parser.add_argument("--model", default=STARTER, help="another encoder with a masked-LM head, see minilm.py")
    parser.add_argument("--rate", type=float, help="a learning rate that is not tuned, for --tasks")
    parser.add_argument("--tasks", nargs="+", choices=CANDIDATES, default=["ag_news", "subj", "trec"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--float32", action="store_true", help="no autocast, on a processor without bf16 instructions")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check-rates", type=int, metavar="TEXTS")
    arguments = parser.parse_args()
    if arguments.table:
        print("\n".join(table([json.loads(line) for line in arguments.rows.read_text().splitlines()])))
        return
    torch.set_num_threads(arguments.threads)
    if arguments.check_rates:
        print(check_rates(arguments.data, arguments.rows.with_name("rates.json"), arguments.check_rates))
        return
    _quiet()
    bf16, model = not arguments.float32, str(arguments.model)
    runs = Runs(arguments.data, arguments.rows, arguments.device, bf16, model, arguments.workers)
    print(runs.rates.table())
    if arguments.rate:  # exploratory: not tuned
        tasks, rates = sorted(arguments.tasks), dict.fromkeys(PRIMARY, arguments.rate)
    else:
        tasks = runs.chosen_tasks()
        rates = {arm: runs.tuned(arm, tasks) for arm in PRIMARY}
    print(f"tasks {tasks}, learning rates {rates}")
    rates |= dict.fromkeys((*SECONDARY, *EXPLORATORY), rates["guided"])
    seeds = arguments.seeds or SEEDS
    if "primary" in arguments.stages:
        runs.grid("primary", PRIMARY, rates, tasks, seeds)
    if "secondary" in arguments.stages:
        runs.grid("secondary", SECONDARY, rates, tasks, seeds)
    if "all-rows" in arguments.stages:
        runs.grid("all rows", PRIMARY, rates, tasks, seeds, ALL)
    if "exploratory" in arguments.stages:  # guided once more, so that all of them ran on one machine
        runs.grid("exploratory", ("guided", *EXPLORATORY), rates, tasks, arguments.seeds or EXPLORATORY_SEEDS)
    if {"pilot", "longer"} & set(arguments.stages):
        amount = runs.longer(tasks, rates["guided"])
        if amount and "longer" in arguments.stages:
            runs.grid("longer", PRIMARY, rates, tasks, seeds, amount)


if __name__ == "__main__":
    main()

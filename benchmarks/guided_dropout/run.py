"""Guided dropout against the same rates shuffled, and against other controls, on the starter encoder.

    python run.py --data DATA [--stages primary secondary exploratory pilot longer] [--rows FILE]
    python run.py --table
    python run.py --data DATA --check-rates 2000       are the rates those of many more texts?

Every finished run is a line of rows.jsonl; started again, it goes on with what is missing. The README says what is
compared and was written first.
"""

import argparse
import gzip
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from scipy.stats import kendalltau
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from graftlm.measure.statistics import crossed, estimate, holm, resample_items, seed_weights
from graftlm.starter import starter_model
from graftlm.training.dropout.guided import GuidedDropout

HERE = Path(__file__).parent
STARTER = starter_model("starter")
CANDIDATES = ("sst2", "trec", "subj", "cola", "ag_news", "sib200")
RATES = (1.5e-4, 5e-4)
PRIMARY, SECONDARY, EXPLORATORY = ("guided", "shuffled"), ("usual", "uniform", "none"), ("reversed", "type")
SEEDS = range(10)
POOL, BATCH, LENGTH = 2000, 16, 32
MOST_TEST, MOST_DEV = 1000, 500
ON_DEV = ("select", "tune", "pilot")


class Amount(NamedTuple):
    """How much a run trains on: a share of the pool's rows, so many times."""

    share: float = 0.25
    epochs: int = 3


SHORT = Amount()
LONGER = (Amount(epochs=15), Amount(share=0.05, epochs=30))
PILOT_SEEDS, ENOUGH = (100, 101, 102), 0.01  # what *usual* has to be above *none* on dev


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


def measured_rates(data: Path, path: Path) -> GuidedDropout:
    if not path.exists():
        GuidedDropout.estimate(STARTER, pretraining_texts(data)).save(path)
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

    def __init__(self, data: Path, rows: Path):
        self.data, self.path = data, rows
        self.rates = measured_rates(data, rows.with_name("rates.json"))
        self.tokenizer = AutoTokenizer.from_pretrained(STARTER)
        self.rows = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
        self._tasks: dict[str, tuple] = {}

    def task(self, name: str) -> tuple:
        if name not in self._tasks:
            train, dev, test = (split(self.data, name, one) for one in ("train", "dev", "test"))
            self._tasks[name] = (drawn(train, POOL), drawn(dev, MOST_DEV), drawn(test, MOST_TEST))
        return self._tasks[name]

    def run(self, stage: str, task: str, arm: str, lr: float, seed: int, amount: Amount = SHORT) -> dict:
        key = {"stage": stage, "task": task, "arm": arm, "lr": lr, "seed": seed, **amount._asdict()}
        for row in self.rows:
            if all(row[name] == value for name, value in key.items()):
                return row
        began = time.perf_counter()
        pool, dev, test = self.task(task)
        train = drawn(pool, round(amount.share * len(pool)), seed)
        model = self.trained(train, 1 + max(row["label"] for row in pool), arm, lr, seed, amount.epochs)
        on_dev = stage in ON_DEV
        right = self.right(model, dev if on_dev else test)
        bits = np.packbits(right).tobytes().hex()
        row = key | {"split": "dev" if on_dev else "test", "n": len(right), "score": float(right.mean()), "right": bits}
        row["seconds"] = round(time.perf_counter() - began, 1)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        print(f"{stage} {task} {arm} lr {lr:g} seed {seed}: {row['score']:.4f} ({row['seconds']} s)", flush=True)
        return row

    def trained(self, train: list[dict], labels: int, arm: str, lr: float, seed: int, epochs: int) -> torch.nn.Module:
        transformers.set_seed(1000 + seed)
        model = AutoModelForSequenceClassification.from_pretrained(STARTER, num_labels=labels)
        set_dropout(self.rates, arm, model, seed)
        model.train()
        decayed = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr, weight_decay=0.01
        )
        steps = epochs * -(-len(train) // BATCH)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        torch.manual_seed(2000 + seed)
        rng = random.Random(seed)
        for _ in range(epochs):
            order = rng.sample(train, len(train))
            for start in range(0, len(order), BATCH):
                with torch.autocast("cpu", torch.bfloat16):
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
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": torch.tensor([row["label"] for row in rows]),
        }

    @torch.no_grad()
    def right(self, model: torch.nn.Module, rows: list[dict]) -> np.ndarray:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["text"]))
        right = np.zeros(len(rows), dtype=bool)
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            batch = self.batch([rows[i] for i in part])
            labels = batch.pop("labels")
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(**batch).logits
            right[part] = (logits.argmax(-1) == labels).numpy()
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
        self, stage: str, arms: tuple[str, ...], rates: dict[str, float], tasks: list[str], amount: Amount = SHORT
    ) -> None:
        for seed in SEEDS:  # so that what is done at any moment is balanced
            for task in tasks:
                for arm in arms:
                    self.run(stage, task, arm, rates[arm], seed, amount)

    def longer(self, tasks: list[str], lr: float) -> Amount | None:
        """Where dropout at the usual rates is worth most on dev, against none; None where it is worth nothing."""
        gains = {}
        for amount in LONGER:
            pairs = [
                self.run("pilot", task, "usual", lr, seed, amount)["score"]
                - self.run("pilot", task, "none", lr, seed, amount)["score"]
                for seed in PILOT_SEEDS
                for task in tasks
            ]
            gains[amount] = np.mean(pairs)
            print(f"{amount}: usual − none {100 * gains[amount]:+.2f} ± {100 * np.std(pairs, ddof=1) / 3:.2f} (dev)")
        best = max(gains, key=gains.__getitem__)
        return best if gains[best] > ENOUGH else None


def outcomes(rows: list[dict], task: str, arm: str, amount: Amount) -> dict[int, np.ndarray]:
    kept = [r for r in rows if (r["task"], r["arm"], r["share"], r["epochs"]) == (task, arm, *amount)]
    chosen = [r for r in kept if r["stage"] not in ON_DEV]
    return {r["seed"]: np.unpackbits(np.frombuffer(bytes.fromhex(r["right"]), np.uint8))[: r["n"]] for r in chosen}


def compare(rows: list[dict], first: str, second: str, amount: Amount, tasks: list[str], resamples: int = 10_000):
    """Mean difference over tasks, with a crossed bootstrap over the seeds and the items of each task."""
    values, draws, most = [], [], 0
    for number, task in enumerate(tasks):
        a, b = (outcomes(rows, task, arm, amount) for arm in (first, second))
        seeds = sorted(a.keys() & b.keys())
        if len(seeds) < 2:
            return None
        most = max(most, len(seeds))
        difference = np.array([a[seed].astype(float) - b[seed] for seed in seeds])
        statistics = [lambda w, row=row: w @ row / len(row) for row in difference]
        weights = seed_weights(len(seeds), resamples, number)
        draws.append(crossed(resample_items(statistics, difference.shape[1], resamples, number), weights))
        values.append(difference.mean())
    return estimate(float(np.mean(values)), np.mean(draws, axis=0)), most


def table(rows: list[dict]) -> Iterator[str]:
    done = [row for row in rows if row["stage"] == "primary"]
    tasks = sorted({row["task"] for row in done})
    for amount in sorted({Amount(row["share"], row["epochs"]) for row in rows if row["split"] == "test"}):
        arms = [a for a in (*PRIMARY, *SECONDARY, *EXPLORATORY) if outcomes(rows, tasks[0], a, amount)]
        yield f"{amount.share:.0%} of the rows, {amount.epochs} epochs: accuracy, mean ± standard deviation over seeds"
        yield "| arm | " + " | ".join(tasks) + " | mean | seeds |"
        yield "| --- |" + " --- |" * (len(tasks) + 2)
        for arm in arms:
            found = [[100 * v.mean() for v in outcomes(rows, task, arm, amount).values()] for task in tasks]
            cells = [f"{np.mean(one):.1f} ± {np.std(one, ddof=1) if len(one) > 1 else 0:.1f}" for one in found]
            mean, seeds = np.mean([np.mean(one) for one in found]), min(map(len, found))
            yield f"| {arm} | {' | '.join(cells)} | {mean:.2f} | {seeds} |"
        yield ""
        yield "| guided minus | points | 95 % interval | p | Holm | seeds |"
        yield "| --- | --- | --- | --- | --- | --- |"
        found = {arm: compare(rows, "guided", arm, amount, tasks) for arm in arms[1:]}
        found = {arm: one for arm, one in found.items() if one}
        family = [arm for arm in found if arm in SECONDARY]
        corrected = (
            dict(zip(family, holm(np.array([found[arm][0].p for arm in family])), strict=True)) if family else {}
        )
        for arm, (one, seeds) in found.items():
            after = f"{corrected[arm]:.3f}" if arm in corrected else "–"
            points = f"{100 * one.value:+.2f} | {100 * one.low:+.2f} to {100 * one.high:+.2f}"
            yield f"| {arm} | {points} | {one.p:.3f} | {after} | {seeds} |"
        yield ""
        for task in tasks:
            one = compare(rows, "guided", "shuffled", amount, [task])
            if one:
                interval = f"{100 * one[0].low:+.2f} to {100 * one[0].high:+.2f}"
                yield f"- {task}, guided minus shuffled: {100 * one[0].value:+.2f} ({interval})"
        yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=Path, default=HERE / "rows.jsonl")
    parser.add_argument("--stages", nargs="+", default=["primary", "secondary", "exploratory"])
    parser.add_argument("--threads", type=int, default=1)
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
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    runs = Runs(arguments.data, arguments.rows)
    print(runs.rates.table())
    tasks = runs.chosen_tasks()
    rates = {arm: runs.tuned(arm, tasks) for arm in PRIMARY}
    print(f"tasks {tasks}, learning rates {rates}")
    rates |= dict.fromkeys((*SECONDARY, *EXPLORATORY), rates["guided"])
    if "primary" in arguments.stages:
        runs.grid("primary", PRIMARY, rates, tasks)
    if "secondary" in arguments.stages:
        runs.grid("secondary", SECONDARY, rates, tasks)
    if "exploratory" in arguments.stages:
        runs.grid("exploratory", EXPLORATORY, rates, tasks)
        runs.grid("exploratory", PRIMARY, rates, tasks, Amount(share=1.0))
    if {"pilot", "longer"} & set(arguments.stages):
        amount = runs.longer(tasks, rates["guided"])
        if amount and "longer" in arguments.stages:
            runs.grid("longer", PRIMARY, rates, tasks, amount)


if __name__ == "__main__":
    main()

"""What the study costs: processor seconds of a run of each arm, from a few of its steps. Nothing is trained to an end.

    python benchmarks/flare/cost.py --data DATA [--rounds 4] [--out cost.json]
    python benchmarks/flare/cost.py --read benchmarks/flare/cost.json           the table again, of what was measured

A run is steps and evaluations; loading and scoring come on top (the smoke scale of run.py measures whole tiny runs).
The arms take turns within one process; fold 1, Danish, rows as long as they are.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

from folds import write_folds
from plan import EXPLORED, FLARE, LORA, RIVALS, SOURCE, STEP_1, STUDY, TUNED, Job, jobs
from run import HERE, arm
from tqdm import tqdm

SCORED = 48  # rows of dev that an evaluation is timed on
ARMS = {
    STEP_1: ("target", LORA, "english"),
    "FLARE": ("fused", FLARE, "english"),
    "FLARE, cached": ("fused", FLARE | {"source_cache": True}, "english"),
    **RIVALS,
    "FLARE, cross_attention": EXPLORED["cross_attention"],
}


def recipe_of(work: Path, name: str, base: Path):
    """An arm's first run in Danish; step 1 is on English rows."""
    job = Job(name, ARMS[name], SOURCE if name == STEP_1 else "dan", TUNED, 0, STUDY.rates[0])
    return arm(work, f"arm{list(ARMS).index(name)}", job, base)


class Arm:
    """An arm before its first step, and its batches."""

    def __init__(self, work: Path, name: str):
        import torch

        from graftlm.prepare import prepare
        from graftlm.starter import starter_model

        recipe = recipe_of(work, name, starter_model("starter"))
        began = time.process_time()
        self.prepared = prepare(recipe, work / "arms" / name, progress=False)
        self.loading = time.process_time() - began
        self.trainer = self.prepared.trainer
        self.model = self.trainer.model
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        self.batches = iter(self.trainer.get_train_dataloader())

    def step(self) -> float:
        """Processor seconds of one step."""
        began = time.process_time()
        batch = next(self.batches)
        self.model.train()
        with self.trainer.accelerator.autocast():
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - began

    def row(self) -> float:
        """Processor seconds of scoring a row of dev."""
        import torch

        features = self.prepared.dev.features.select(range(SCORED))
        self.model.eval()
        began = time.process_time()
        for batch in self.trainer.get_eval_dataloader(features):
            with self.trainer.accelerator.autocast(), torch.no_grad():
                self.model(**batch)
        return (time.process_time() - began) / SCORED

    def run(self, steps: list[float], rows: list[float]) -> float:
        """Processor seconds of a whole run: its steps, dev once an epoch, and test."""
        scored = STUDY.epochs * len(self.prepared.splits.dev) + sum(map(len, self.prepared.splits.test.values()))
        return self.loading + self.prepared.steps * statistics.median(steps) + scored * statistics.median(rows)


def measure(data: Path, rounds: int) -> dict[str, dict]:
    """Seconds of each arm, by name."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shutil.copyfile(HERE / "recipe.yaml", work / "recipe.yaml")
        write_folds(data, work / "folds")
        arms = {name: Arm(work, name) for name in ARMS}
        steps, rows = ({name: [] for name in arms} for _ in range(2))
        for one in arms.values():  # what is made lazily is made here
            one.step()
        for _ in tqdm(range(rounds)):
            for name, one in arms.items():
                steps[name].append(one.step())
                rows[name].append(one.row())
        return {
            name: {
                "seconds": one.run(steps[name], rows[name]),
                "loading": one.loading,
                "steps": steps[name],
                "rows": rows[name],
            }
            for name, one in arms.items()
        }


def table(found: dict[str, dict]) -> str:
    """What the primary set costs, if all of its runs were in Danish; arms that are not in it have no runs."""
    runs, total = Counter(job.arm for job in jobs("primary")), 0.0
    plain = statistics.median(found["LoRA on target rows"]["steps"])
    lines = ["| arm | a step over that of LoRA | processor seconds a run | runs of the primary set | hours |"]
    lines.append("|---" * 5 + "|")
    for name, one in found.items():
        ratio, hours = statistics.median(one["steps"]) / plain, one["seconds"] * runs[name] / 3600
        total += hours
        lines.append(f"| {name} | {ratio:.2f} | {one['seconds']:.0f} | {runs[name]} | {hours:.2f} |")
    return "\n".join([*lines, f"| all | | | {runs.total()} | {total:.2f} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="the folder with multilingual/")
    what.add_argument("--read", type=Path, help="a file that --out wrote")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = json.loads(given.read.read_text(encoding="utf-8")) if given.read else measure(given.data, given.rounds)
    print(table(found))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

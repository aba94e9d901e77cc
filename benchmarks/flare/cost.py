"""What the study costs: processor seconds of a run of each arm, from a few of its steps. Nothing is trained to an end.

    python benchmarks/flare/cost.py --data DATA [--rounds 4] [--out cost.json]

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
from pathlib import Path

from run import EXPLORED, FLARE, HERE, LORA, RIVALS, STUDY, arm, languages_of, write_folds
from tqdm import tqdm

SCORED = 48  # rows of dev that an evaluation is timed on
ARMS = {
    "step 1": ("target", LORA, "english"),  # on the English rows
    "FLARE": ("fused", FLARE, "english"),
    "FLARE, cached": ("fused", FLARE | {"source_cache": True}, "english"),
    **RIVALS,
    "FLARE, cross_attention": EXPLORED["cross_attention"],
}


class Arm:
    """An arm before its first step, and its batches."""

    def __init__(self, work: Path, name: str):
        import torch

        from graftlm.prepare import prepare
        from graftlm.starter import starter_model

        tag = "eng" if name == "step 1" else "dan"
        recipe = arm(work, starter_model("starter"), ARMS[name], tag, 1, 0, STUDY.rates[0])
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with multilingual/")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shutil.copyfile(HERE / "recipe.yaml", work / "recipe.yaml")
        write_folds(given.data, work / "folds")
        arms = {name: Arm(work, name) for name in ARMS}
        steps, rows = ({name: [] for name in arms} for _ in range(2))
        for one in arms.values():  # what is made lazily is made here
            one.step()
        for _ in tqdm(range(given.rounds)):
            for name, one in arms.items():
                steps[name].append(one.step())
                rows[name].append(one.row())
        print("| arm | a step over that of LoRA | processor seconds a run | runs of the primary set | hours |")
        print("|---" * 5 + "|")
        found, plain = {}, statistics.median(steps["LoRA on target rows"])
        for name, one in arms.items():
            seconds = one.run(steps[name], rows[name])
            runs = STUDY.folds * STUDY.seeds
            if name != "step 1":
                runs = len(languages_of(ARMS[name])) * STUDY.folds * (len(STUDY.rates) + STUDY.seeds - 1)
            found[name] = {"seconds": seconds, "loading": one.loading, "steps": steps[name], "rows": rows[name]}
            ratio = statistics.median(steps[name]) / plain
            print(f"| {name} | {ratio:.2f} | {seconds:.0f} | {runs} | {seconds * runs / 3600:.1f} |")
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

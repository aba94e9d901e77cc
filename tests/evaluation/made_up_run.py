"""A run folder as a real run leaves it, made up: for tests of the report and the card, and to look at.

python tests/evaluation/made_up_run.py /tmp/made-up && graftlm report /tmp/made-up
"""

import json
import sys
from pathlib import Path

import numpy as np

from graftlm.evaluation.result import Cost, Interval, Licences, Result, Score

LANGUAGES = {"eng": 0.742, "deu": 0.641, "fra": 0.667, "spa": 0.652, "por": 0.611, "ces": 0.569}


def interval(value: float, half: float) -> Interval:
    return Interval(value=value, low=value - half, high=value + half)


def made_up_result(**changes) -> Result:
    """A result in six languages, with every optional field filled."""
    rng = np.random.default_rng(7)
    scores = []
    for language, accuracy in LANGUAGES.items():
        gain = 0.002 if language == "eng" else float(rng.normal(0.021, 0.012))
        standard = accuracy - gain
        scores.append(
            Score(
                language=language,
                n=204,
                is_source=language == "eng",
                metrics={"accuracy": interval(accuracy, 0.062), "macro_f1": interval(accuracy - 0.017, 0.066)},
                majority=0.25,
                standard=interval(standard, 0.063),
                gain=interval(gain, 0.029),
            )
        )
    cost = Cost(
        train_seconds=83.4,
        trace_seconds=3.6,
        evaluation_seconds=4.2,
        steps=300,
        trainable_parameters=98_311,
        total_parameters=7_214_592,
        peak_memory_bytes=912_000_000,
        device="cpu",
    )
    fields = {
        "name": "topics-fun",
        "created": "2026-11-21T21:40:00Z",
        "model": "starter",
        "task": "classification",
        "metric": "accuracy",
        "source": "eng",
        "selected_on": ("eng",),
        "seed": 0,
        "scores": scores,
        "forgetting": None,
        "cost": cost,
        "versions": {
            "graftlm": "0.1.0",
            "python": "3.11.9",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "peft": "0.21.2",
        },
        "licences": Licences(model="Apache-2.0", data="CC0-1.0", weights="Apache-2.0"),
    }
    return Result(**(fields | changes))


def made_up_unfreezing(layers: int = 10, steps: int = 300, every: int = 10, opens_every: int = 20) -> list[dict]:
    """Rows of unfreezing.jsonl: top-down with two layers out of turn, and a trace with a hill early on."""
    rng = np.random.default_rng(11)
    order = [*range(layers - 1, -1, -1)]
    middle = len(order) // 2
    order[middle - 1], order[middle] = order[middle], order[middle - 1]
    opens = {layer: turn * opens_every for turn, layer in enumerate(order)}
    rows = []
    for step in range(0, steps, every):
        for layer in range(layers):
            hill = np.exp(-((step - 55 - 4 * (layers - layer)) ** 2) / (2 * 48**2))
            fall = 0.25 * np.exp(-step / 120)
            trace = 10 ** (-4.2 + 0.28 * layer) * (0.06 + hill + fall) * rng.lognormal(0, 0.18)
            rows.append(
                {
                    "step": step,
                    "layer": f"layer.{layer}",
                    "position": layer,
                    "trace": float(trace),
                    "open": step >= opens[layer],
                    "opened": step == opens[layer],
                    "kind": "sampled",
                    "examples": 64,
                }
            )
    return rows


def made_up_log(steps: int = 300) -> list[dict]:
    """Rows of log.jsonl: the Trainer's log history with a loss each 10 steps and the dev score each 50."""
    rng = np.random.default_rng(13)
    rows = []
    for step in range(10, steps + 1, 10):
        loss = 0.42 + 1.2 * np.exp(-step / 90) + rng.normal(0, 0.04)
        rows.append({"loss": float(loss), "learning_rate": 1e-3 * (1 - step / steps), "epoch": step / 50, "step": step})
        if step % 50 == 0:
            score = 0.76 - 0.5 * np.exp(-step / 80) + rng.normal(0, 0.01)
            rows.append(
                {"eval_loss": float(loss + 0.1), "eval_accuracy": float(score), "epoch": step / 50, "step": step}
            )
    rows.append({"train_runtime": 83.4, "train_loss": 0.71, "epoch": 6.0, "step": steps})
    return rows


RESOLVED = """\
name: topics-fun  # topics.yaml:1
model: starter  # topics.yaml:2
task: classification  # topics.yaml:3
source: eng  # topics.yaml:4
data:
  train: starter:messages/train.eng.jsonl  # topics.yaml:6
  dev: starter:messages/dev.eng.jsonl  # topics.yaml:7
adapter:
  method: lora  # default
  r: 8  # default
  alpha: 16  # default
  target_modules: auto  # default
unfreezing:
  schedule: fisher  # override
  every_n_steps: 20  # topics.yaml:11
  record_trace: 10  # topics.yaml:12
training:
  epochs: 6  # topics.yaml:14
  learning_rate: 1e-3  # topics.yaml:15
seed: 0  # default
"""


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def make_run(folder: Path, result: Result | None = None, **rows) -> Path:
    """Write the run folder; `unfreezing`, `log` and `resolved` replace the made-up files, None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    (result or made_up_result()).write(folder)
    files = {
        "unfreezing.jsonl": rows.get("unfreezing", made_up_unfreezing()),
        "log.jsonl": rows.get("log", made_up_log()),
        "recipe.resolved.yaml": rows.get("resolved", RESOLVED),
    }
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else lines(content), encoding="utf-8")
    return folder


if __name__ == "__main__":
    make_run(Path(sys.argv[1]))

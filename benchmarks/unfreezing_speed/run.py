"""How much time scheduled unfreezing saves, and what FUN's trace passes cost. See README.md.

    python benchmarks/unfreezing_speed/run.py [--rounds 10] [--out results.jsonl]

Everything is a ratio between arms that take turns within one process; each row is written as soon as it is measured.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from graftlm import ScheduledUnfreezing, Unfreezer, fisher_trace
from graftlm.training.trace_probe import RELATIVE_COST

LAYERS, WIDTH, VOCABULARY, LABELS = 12, 768, 30522, 3


def model() -> nn.Module:
    """BERT base with random weights and LoRA r = 8 on query and value."""
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_labels=LABELS))
    return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]))


def batch(rows: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, tokens), generator=generator)
    labels = torch.randint(0, LABELS, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def clock() -> float:
    """Processor time on a CPU, which other people's work on the machine does not lengthen; wall time on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds(work) -> float:
    started = clock()
    work()
    return clock() - started


def forward_backward(rows: int, tokens: int, rounds: int):
    """Per round: standard once before each stage of gradual, so that both arms see the same machine."""
    adapted, inputs = model().train(), batch(rows, tokens)

    def step():
        adapted(**inputs).loss.backward()
        adapted.zero_grad()

    step()
    for number in tqdm(range(rounds), desc="forward + backward"):
        standard, gradual = [], []
        unfreezer = Unfreezer(adapted, "gradual", 1)
        unfreezer.release()
        for stage in range(LAYERS):
            unfreezer.release()
            standard.append(seconds(step))
            unfreezer = Unfreezer(adapted, "gradual", 1)
            unfreezer.step(stage)
            gradual.append(seconds(step))
        unfreezer.release()
        yield {"what": "forward+backward", "round": number, "ratio": sum(gradual) / sum(standard)}


class StepTimes(TrainerCallback):
    """Time from the second step's beginning to the end: loading, forward, backward, clipping, optimizer, callbacks."""

    def __init__(self):
        self.marks: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.marks.append(clock())

    def on_train_end(self, args, state, control, **kwargs):
        self.marks.append(clock())

    def total(self) -> float:
        """Without the first step, which pays for what is made lazily."""
        return self.marks[-1] - self.marks[1]


def trainer_run(callback, rows: int, tokens: int, steps: int, **more) -> float:
    columns = {name: value.tolist() for name, value in batch(rows * 8, tokens).items()}
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=rows,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            logging_steps=10**6,
            **more,
        )
        data = Dataset.from_dict(columns).with_format("torch")
        Trainer(model(), arguments, train_dataset=data, callbacks=[times, callback]).train()
    return times.total()


def trainer_steps(rows: int, tokens: int, rounds: int, **more):
    """The whole scheduled phase of a Trainer's run: two steps a stage."""
    name = "Trainer step" + (", checkpointing" if more else "")
    for number in tqdm(range(rounds), desc=name):
        totals = {}
        for schedule in ("standard", "gradual") if number % 2 else ("gradual", "standard"):
            callback = ScheduledUnfreezing(schedule, every_n_steps=2)
            totals[schedule] = trainer_run(callback, rows, tokens, 2 * LAYERS, **more)
        yield {"what": name, "round": number, "ratio": totals["gradual"] / totals["standard"]}


def trace_cost(rows: int, tokens: int, rounds: int):
    """An example in a trace pass over an example in a training step: what RELATIVE_COST promises."""
    adapted, inputs = model().train(), batch(rows, tokens)
    unfreezer = Unfreezer(adapted, "standard")
    groups = unfreezer.parameters()
    unfreezer.step(0)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])

    def train():
        adapted(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def trace():
        fisher_trace(adapted, [inputs], groups, task="classification")

    train(), trace()
    for number in tqdm(range(rounds), desc="trace pass"):
        ratio = seconds(trace) / seconds(train)
        yield {"what": "trace example / training example", "round": number, "ratio": ratio, "assumed": RELATIVE_COST}


def fisher_share(rows: int, tokens: int, rounds: int, steps: int):
    """FUN's passes as a share of the whole run, with the number of examples that the callback chooses."""
    for number in tqdm(range(rounds), desc="FUN's share"):
        callback = ScheduledUnfreezing("fisher", every_n_steps=steps // LAYERS - 1, seed=number)
        started = time.perf_counter()
        trainer_run(callback, rows, tokens, steps)
        share = callback.trace_seconds / (time.perf_counter() - started)
        examples = callback.history[0]["examples"]
        yield {"what": "FUN's passes / run", "round": number, "ratio": share, "examples": examples, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", type=int, default=8, help="examples a batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens an example")
    parser.add_argument("--steps", type=int, default=240, help="steps of the run for FUN's share")
    parser.add_argument("--parts", nargs="*", help="steps, trainer, checkpointing, trace, share; all of them otherwise")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.jsonl"), help="appended to")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    size = (chosen.rows, chosen.tokens)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    where = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "batch": size}
    parts = {
        "steps": forward_backward(*size, chosen.rounds),
        "trainer": trainer_steps(*size, chosen.rounds),
        "checkpointing": trainer_steps(*size, max(chosen.rounds // 2, 2), activation_checkpointing=True),
        "trace": trace_cost(*size, chosen.rounds),
        "share": fisher_share(*size, max(chosen.rounds // 5, 1), chosen.steps),
    }
    found: dict[str, list[float]] = {}
    with chosen.out.open("a", encoding="utf-8") as file:
        for name in chosen.parts or parts:
            for row in parts[name]:
                file.write(json.dumps(row | where) + "\n")
                file.flush()
                found.setdefault(row["what"], []).append(row["ratio"])
    for what, ratios in found.items():
        low, high = min(ratios), max(ratios)
        print(f"{what:34} median {statistics.median(ratios):.3f}  ({low:.3f} to {high:.3f}, {len(ratios)} rounds)")


if __name__ == "__main__":
    main()

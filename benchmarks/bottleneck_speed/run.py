"""What bottleneck adapters cost beside a forward written by hand and beside LoRA. See README.md.

    python benchmarks/bottleneck_speed/run.py [--rounds 10] [--out results.jsonl]

Everything is a ratio between arms that take turns within one process; each row is written as soon as it is measured.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from graftlm import BottleneckConfig

LAYERS, WIDTH, VOCABULARY = 12, 768, 30522
SIZE, RANK = 48, 24  # 2·d·m + m + d a layer; 2·2·d·r a layer on query and value
ARMS = ("by hand", "graftlm", "LoRA")

_spec = importlib.util.spec_from_file_location(
    "neutral_residues_speed", Path(__file__).parents[1] / "neutral_residues_speed" / "run.py"
)
if _spec is None or _spec.loader is None:
    sys.exit("benchmarks/neutral_residues_speed/run.py is missing")
speed = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(speed)


class ByHand(nn.Module):
    """BERT's output module with a Pfeiffer adapter and nothing else: LN(x + f + U·relu(D·LN(x + f)))."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(WIDTH, SIZE), nn.Linear(SIZE, WIDTH)

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        f = self.base.dropout(self.base.dense(hidden_states))
        update = self.up(torch.relu(self.down(self.base.LayerNorm(f + input_tensor))))
        return self.base.LayerNorm(f + update + input_tensor)


def model(arm: str) -> nn.Module:
    """BERT base with random weights, the adapter of this arm and a head that trains."""
    torch.manual_seed(0)
    base = BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    if arm == "LoRA":
        return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=RANK, target_modules=["query", "value"]))
    if arm == "graftlm":
        return get_peft_model(base, BottleneckConfig(task_type="SEQ_CLS", bottleneck_size=SIZE))
    base.requires_grad_(False)
    base.classifier.requires_grad_(True)
    for layer in base.bert.encoder.layer:
        layer.output = ByHand(layer.output)
    return base


def batch(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (rows, tokens), generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def adapters(arm: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(down, up) of each layer, bottom first."""
    found: list[tuple[nn.Module, nn.Module]] = []
    for module in arm.modules():
        if isinstance(module, ByHand):
            found.append((module.down, module.up))
        elif hasattr(type(module), "adapter_layer_names") and "bottleneck_down" in type(module).adapter_layer_names:
            found.append((module.bottleneck_down["default"], module.bottleneck_up["default"]))
    return found


def check_equal(inputs: dict[str, torch.Tensor]) -> None:
    """The arms by hand and of graftlm, with the same weights, have the same logits and the same gradients."""
    hand, ours = model("by hand"), model("graftlm")
    pairs = list(zip(adapters(hand), adapters(ours), strict=True))
    if len(pairs) != LAYERS:
        sys.exit(f"{len(pairs)} adapters were found in {LAYERS} layers")
    for theirs, mine in pairs:
        for one, other in zip(theirs, mine, strict=True):
            nn.init.normal_(one.weight, std=0.02)
            other.load_state_dict(one.state_dict())
    first, second = hand(**inputs), ours(**inputs)
    torch.testing.assert_close(first.logits, second.logits)
    first.loss.backward()
    second.loss.backward()
    for theirs, mine in pairs:
        for one, other in zip(theirs, mine, strict=True):
            torch.testing.assert_close(one.weight.grad, other.weight.grad)


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


def works(arm: str, inputs: dict[str, torch.Tensor]):
    """A training step and a forward pass without gradients."""
    adapted = model(arm).to("cuda" if torch.cuda.is_available() else "cpu").train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])

    def step() -> None:
        adapted(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def forward() -> None:
        with torch.no_grad():
            adapted(**inputs)

    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return {"training step": step, "forward pass": forward}, count


def times(inputs: dict[str, torch.Tensor], rounds: int):
    """Per round: every arm once, in an order that turns, each work twice and the shorter one taken."""
    made = {arm: works(arm, inputs)[0] for arm in ARMS}
    for what in ("training step", "forward pass"):
        for arm in ARMS:
            made[arm][what]()
        for number in range(rounds):
            order = [*ARMS[number % 3 :], *ARMS[: number % 3]]
            found = {arm: min(seconds(made[arm][what]) for _ in range(2)) for arm in order}
            for arm in ARMS[1:]:
                ratio = found[arm] / found["by hand"]
                yield {"what": f"{what}, {arm} / by hand", "round": number, "ratio": ratio}
            yield {"what": f"{what}, graftlm / LoRA", "round": number, "ratio": found["graftlm"] / found["LoRA"]}


def memory(inputs: dict[str, torch.Tensor]):
    """Bytes that autograd keeps for the backward pass, weights not counted."""
    kept, trainable = {}, {}
    for arm in ARMS:
        adapted = model(arm).to("cuda" if torch.cuda.is_available() else "cpu").train()
        kept[arm] = speed.kept_for_backward(lambda: adapted(**inputs).loss, besides=adapted.parameters())  # noqa: B023
        trainable[arm] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    pairs = [("graftlm", "by hand"), ("LoRA", "by hand"), ("graftlm", "LoRA")]
    for one, other in pairs:
        row = {"what": f"bytes kept for backward, {one} / {other}", "round": 0, "ratio": kept[one] / kept[other]}
        yield row | {"bytes": kept, "trainable": trainable}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", type=int, default=8, help="examples a batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens an example")
    parser.add_argument("--parts", nargs="*", default=["times", "memory"], choices=["times", "memory"])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.jsonl"), help="appended to")
    chosen = parser.parse_args()
    inputs = batch(chosen.rows, chosen.tokens)
    if torch.cuda.is_available():
        inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
    check_equal(batch(2, 16))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    where = {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": [chosen.rows, chosen.tokens],
    }
    found: dict[str, list[float]] = {}
    with chosen.out.open("a", encoding="utf-8") as file:
        parts = {"times": times(inputs, chosen.rounds), "memory": memory(inputs)}
        for part in chosen.parts:
            for row in parts[part]:
                file.write(json.dumps(row | where) + "\n")
                file.flush()
                found.setdefault(row["what"], []).append(row["ratio"])
    for what, ratios in found.items():
        low, high = min(ratios), max(ratios)
        print(f"{what:44} median {statistics.median(ratios):.3f}  ({low:.3f} to {high:.3f}, {len(ratios)} rounds)")


if __name__ == "__main__":
    main()

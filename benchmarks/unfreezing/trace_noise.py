"""How noisy is the trace that FUN decides by? Estimators of tr(F) per layer against its exact value (exploratory).

    python benchmarks/unfreezing/trace_noise.py --data PATH/sib200_topic > benchmarks/unfreezing/trace_noise.md

The model of the study (starter encoder, LoRA) on 602 English sentences, before training, after a quarter and after half
of the steps of standard training. For 256 of them the squared gradient of log p(class) is taken for each class and
layer, one sentence and class at a time: the exact trace is its expectation under the model's own p. Then each estimator
sees n sentences, drawn a thousand times: does it name the layer with the largest exact trace, and how like is its order
(Kendall's τ)?
"""

import argparse
import gzip
import json
import random
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import kendalltau
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import graftlm
from graftlm.training.layers import trainable_layers

EXAMPLES, SIZES, DRAWS, BATCH_DRAWS = 256, (4, 16, 64), 1000, 40
STEPS, BATCH, RATE = 152, 16, 3e-3
MEASURED = (0, STEPS // 4, STEPS // 2)


def read_train(data: Path) -> tuple[list[str], list[int]]:
    with gzip.open(data / "eng_Latn.train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = sorted(map(json.loads, file), key=lambda row: row["id"])
    random.Random(0).shuffle(rows)
    return [row["text"] for row in rows[:602]], [row["label"] for row in rows[:602]]


def gradients(loss: torch.Tensor, layers: list[list[torch.Tensor]], keep: bool = False) -> np.ndarray:
    """Return ‖gradient of the loss‖² of each layer."""
    flat = [parameter for layer in layers for parameter in layer]
    found = iter(torch.autograd.grad(loss, flat, retain_graph=keep))
    return np.array([sum(next(found).double().square().sum().item() for _ in layer) for layer in layers])


def measure(model, layers, tokenizer, texts: list[str], labels: list[int], rng) -> dict:
    """Return p (sentences × classes), squared gradients (sentences × classes × layers), and traces of batch means."""
    p, squares = [], []
    for text in tqdm(texts[:EXAMPLES], desc="sentences"):
        log_p = model(**tokenizer(text, return_tensors="pt")).logits[0].log_softmax(-1)
        p.append(log_p.detach().exp().double().numpy())
        squares.append([gradients(value, layers, keep=True) for value in log_p])
    p = np.array(p) / np.array(p).sum(1, keepdims=True)
    means = {}
    for size in SIZES:
        means[size] = []
        for _ in tqdm(range(BATCH_DRAWS), desc=f"means of {size}"):
            chosen = rng.choice(EXAMPLES, size, replace=False)
            drawn = torch.tensor([rng.choice(p.shape[1], p=p[i]) for i in chosen])
            batch = tokenizer([texts[i] for i in chosen], padding=True, return_tensors="pt")
            means[size].append(gradients(functional.cross_entropy(model(**batch).logits, drawn), layers))
    return {"p": p, "squares": np.array(squares), "means": means, "gold": np.array(labels[:EXAMPLES])}


def estimates(found: dict, rng) -> dict[tuple[str, int], np.ndarray]:
    """Return, for each estimator and number of sentences, draws × layers."""
    p, squares, everyone = found["p"], found["squares"], np.arange(EXAMPLES)
    table = {}
    for size in SIZES:
        rows = np.array([rng.choice(EXAMPLES, size, replace=False) for _ in range(DRAWS)])
        drawn = (p.cumsum(1)[rows] < rng.random((*rows.shape, 1))).sum(-1).clip(max=p.shape[1] - 1)
        table["exact, per example", size] = np.einsum("ec,ecl->el", p, squares)[rows].mean(1)
        table["sampled, per example (ours)", size] = squares[rows, drawn].mean(1)
        table["mode, per example", size] = squares[everyone, p.argmax(1)][rows].mean(1)
        table["empirical, per example", size] = squares[everyone, found["gold"]][rows].mean(1)
        table["sampled, of the batch mean (the release)", size] = np.array(found["means"][size])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with eng_Latn.train.jsonl.gz")
    data = parser.parse_args().data
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    texts, labels = read_train(data)
    folder = Path(graftlm.__file__).parent / "starter/encoder"
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=128)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=max(labels) + 1)
    model = get_peft_model(model, LoraConfig("SEQ_CLS", r=8, lora_alpha=8, target_modules=["query", "value"]))
    groups = trainable_layers(model)
    layers = [[parameter for _, parameter in groups.parameters[name]] for name in groups.names]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    order = [i for _ in range(4) for i in rng.permutation(len(texts))]
    print("| step | estimator | sentences | names the largest layer | Kendall's τ |\n|---|---|---|---|---|")
    for step in range(MEASURED[-1] + 1):
        if step in MEASURED:
            model.eval()
            found = measure(model, layers, tokenizer, texts, labels, rng)
            exact = np.einsum("ec,ecl->l", found["p"], found["squares"]) / EXAMPLES
            for (name, size), drawn in estimates(found, rng).items():
                right = (drawn.argmax(1) == exact.argmax()).mean()
                tau = np.mean([kendalltau(row, exact).statistic for row in drawn])
                print(f"| {step} | {name} | {size} | {right:.2f} | {tau:.2f} |")
            shares = " ".join(f"{share:.2f}" for share in exact / exact.sum())
            print(f"| {step} | exact trace, share of each layer, bottom first: {shares} | {EXAMPLES} | | |", flush=True)
        model.train()
        rows = [int(i) for i in order[step * BATCH : (step + 1) * BATCH]]
        batch = tokenizer([texts[i] for i in rows], padding=True, truncation=True, return_tensors="pt")
        functional.cross_entropy(model(**batch).logits, torch.tensor([labels[i] for i in rows])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()

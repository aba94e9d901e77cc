"""The estimate of guided dropout against a loop over single texts: equal numbers, and how much faster.

    python cost.py [--texts 48] [--rounds 5] [--tokens 32 64 128] [--device cpu]

Both in one process, taking turns, so that whatever else the machine does falls on both. Random weights and random
tokens: neither the cost nor the agreement depends on them.
"""

import argparse
import random
import time

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM

from graftlm.measure.fisher import undisturbed
from graftlm.measure.pretraining import squared_gradients
from graftlm.training.dropout.sites import find_sites

SHAPES = {"starter encoder": (160, 12, 5, 480, 26_623), "BERT-base": (768, 12, 12, 3072, 30_522)}


def make(shape: str, device: str) -> BertForMaskedLM:
    width, layers, heads, inner, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
    )
    return BertForMaskedLM(config).to(device).eval()


def batches(texts: int, tokens: int, size: int, vocabulary: int, device: str) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(5, vocabulary, (texts, tokens), device=device)
    labels = torch.full_like(ids, -100)
    rng = random.Random(0)
    for row in range(texts):
        chosen = torch.tensor(rng.sample(range(tokens), max(1, round(0.15 * tokens))), device=device)
        labels[row, chosen] = ids[row, chosen]
    masked = torch.where(labels >= 0, 4, ids)
    whole = {"input_ids": masked, "attention_mask": torch.ones_like(ids), "labels": labels}
    return [{name: value[start : start + size] for name, value in whole.items()} for start in range(0, texts, size)]


def in_batches(model, parameters, parts) -> np.ndarray:
    with undisturbed(model, {"measured": list(parameters.values())}):
        found = [squared_gradients(model, part, parameters, task="masked_lm")[1] for part in parts]
    return torch.cat(found).mean(0).numpy()


def one_by_one(model, parameters, parts) -> np.ndarray:
    """What a careful person writes: a text at a time, gradients of the same tensors, their squares added up.

    One that also keeps the full diagonal, as the authors' release does, is slower still.
    """
    tensors, sums, texts = list(parameters.values()), 0.0, 0
    for part in parts:
        for row in range(len(part["labels"])):
            single = {name: value[row : row + 1] for name, value in part.items()}
            gradients = torch.autograd.grad(model(**single).loss, tensors)
            sums = sums + torch.stack([gradient.square().mean() for gradient in gradients]).double().cpu()
            texts += 1
    return (sums / texts).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    arguments = parser.parse_args()
    # processor time on a CPU: other work on the machine does not count
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    print("| model | tokens a text | faster (median of rounds) | lowest to highest | largest relative difference |")
    print("| --- | --- | --- | --- | --- |")
    for shape in arguments.shapes:
        model = make(shape, arguments.device)
        sites = find_sites(model)
        names = dict(sites.backbone.named_parameters())
        used = dict.fromkeys(name for block in (*sites.blocks, *sites.modules) for name in block.tensors)
        parameters = {name: names[name] for name in used}
        # attention does not depend on the keys' bias: its gradient is 0, and what is measured is rounding
        real = np.array([not name.endswith("key.bias") for name in used])
        for tokens in arguments.tokens:
            parts = batches(arguments.texts, tokens, arguments.batch_size, model.config.vocab_size, arguments.device)
            ratios, differences = [], []
            for _ in range(arguments.rounds + 1):
                times, found = [], []
                for way in (in_batches, one_by_one):
                    _synchronise(arguments.device)
                    began = clock()
                    found.append(way(model, parameters, parts))
                    _synchronise(arguments.device)
                    times.append(clock() - began)
                ratios.append(times[1] / times[0])
                differences.append(np.max(np.abs(found[0] - found[1])[real] / found[1][real]))
            ratios = ratios[1:]  # the first round warms up
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"| {shape} | {tokens} | {np.median(ratios):.2f} × | {spread} | {max(differences):.1e} |", flush=True)


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

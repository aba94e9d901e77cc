"""What a masked LM saves by computing the logits of masked tokens alone. See README.md.

    python benchmarks/masked_lm_speed/run.py [--rounds 7]

The two arms take turns within one process; processor time, or wall time on a GPU.
"""

import argparse
import statistics
import time

import torch
from accelerate import Accelerator
from peft import get_peft_model
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from graftlm import BottleneckConfig
from graftlm.evaluation.bits_per_byte import token_losses
from graftlm.language_modelling import logits_at
from graftlm.starter import starter_model

ROWS, TOKENS, SHARE = 8, 128, 0.15


def encoders():
    yield "starter", lambda: AutoModelForMaskedLM.from_pretrained(starter_model("starter"))
    yield "BERT-base's shape", lambda: BertForMaskedLM(BertConfig())


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def steps(make):
    """A training step with all logits, and one with those of masked tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    adapted = get_peft_model(make(), BottleneckConfig(reduction_factor=2, invertible=True)).to(device).train()
    ids = torch.randint(5, adapted.config.vocab_size, (ROWS, TOKENS), device=device)
    places = torch.rand(ROWS, TOKENS, device=device) < SHARE
    labels = ids.where(places, -100)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])

    prepared = Accelerator(mixed_precision="bf16").prepare_model(adapted)  # as Trainer does

    def step(targets) -> None:
        losses, _ = token_losses("masked_lm", prepared(input_ids=ids).logits, targets)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def few() -> None:
        with logits_at(adapted, places):
            step(labels[places][None])

    return {"all": lambda: step(labels), "masked": few}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    for name, make in encoders():
        arms = steps(make)
        for step in arms.values():
            step()
        spent: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(chosen.rounds):
            for arm, step in arms.items():
                started = clock()
                step()
                spent[arm].append(clock() - started)
        ratios = sorted(few / whole for whole, few in zip(spent["all"], spent["masked"], strict=True))
        whole, few = (1000 * statistics.median(spent[arm]) for arm in ("all", "masked"))
        print(
            f"{name}: {few:.0f} of {whole:.0f} ms a step, ratio {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()

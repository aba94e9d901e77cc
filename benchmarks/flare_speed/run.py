"""What a step of FLARE costs over one of plain LoRA, with the source read at each step and from a cache. See README.md.

    python benchmarks/flare_speed/run.py [--rounds 10] [--model bert|llama] [--out results.jsonl]

All arms take turns within one process; a row is written as soon as it is measured.
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from graftlm import FlareCollator, FlareConfig, ModelStates, SourceCache

VOCABULARY, LABELS = 30000, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def base(kind: str, layers: int, width: int) -> nn.Module:
    """A model of BERT base's shape, or a decoder as large, with random weights."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
        "num_labels": LABELS,
        "pad_token_id": 0,
    }
    if kind == "llama":
        return LlamaForSequenceClassification(LlamaConfig(**shape))
    return BertForSequenceClassification(BertConfig(**shape))


def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token."""
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="[SEP]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", model_input_names=["input_ids", "attention_mask"]
    )


def sentences(count: int, tokens: int) -> list[dict]:
    """Pairs that are full to the last token, so that the arms compute the same number of them."""
    rng = random.Random(0)

    def text() -> str:
        return " ".join(f"w{rng.randrange(3, VOCABULARY)}" for _ in range(tokens - 2))

    return [{"target": text(), "source": text(), "label": rng.randrange(LABELS)} for _ in range(count)]


def clock() -> float:
    """Processor time on a CPU, which other people's work on the machine does not lengthen; wall time on a GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def step_of(model: nn.Module, collate: Callable, rows: list[dict], batch_size: int) -> Callable[[int], None]:
    """A whole training step: the batch is made, forward, backward, optimizer."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(number: int) -> None:
        start = number * batch_size % len(rows)
        batch = {name: value.to(DEVICE) for name, value in collate(rows[start : start + batch_size]).items()}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model", choices=("bert", "llama"), default="bert")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="float32", help="of the cache: float32, float16, bfloat16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    words, rows = tokenizer(), sentences(4 * options.batch, options.tokens)
    task = {"r": 8, "lora_alpha": 16, "task_type": "SEQ_CLS"}
    pair = ["q_proj", "v_proj"] if options.model == "llama" else ["query", "value"]
    settings = (options.model, options.layers, options.width)
    lora = get_peft_model(base(*settings), LoraConfig(**task, target_modules=pair)).to(DEVICE).train()
    flare = get_peft_model(base(*settings), FlareConfig(**task)).to(DEVICE).train()
    with tempfile.TemporaryDirectory() as folder:
        began = clock()
        states, texts = ModelStates(flare, words), [row["source"] for row in rows]
        cache = SourceCache.build(Path(folder) / "cache", states, texts, batch_size=options.batch, dtype=options.dtype)
        building = clock() - began

        def target_alone(batch: list[dict]) -> dict:
            found = words([row["target"] for row in batch], padding=True, return_tensors="pt")
            return {**found, "labels": torch.tensor([row["label"] for row in batch])}

        pairs = {"target": "target", "source": "source"}
        steps = {
            "LoRA": step_of(lora, target_alone, rows, options.batch),
            "FLARE": step_of(flare, FlareCollator(words, **pairs), rows, options.batch),
            "FLARE, cached": step_of(flare, FlareCollator(words, **pairs, encode=cache), rows, options.batch),
        }
        for step in steps.values():  # what is made lazily is made here
            step(0)
        names, found, plain = list(steps), [], 0.0
        for number in tqdm(range(options.rounds)):
            seconds = {}
            for name in names[number % 3 :] + names[: number % 3]:
                began = clock()
                steps[name](number)
                seconds[name] = clock() - began
            row = {name: seconds[name] / seconds["LoRA"] for name in names[1:]}
            found.append(row)
            plain += seconds["LoRA"] / options.rounds * len(rows) / options.batch
            write(options, {"round": number, "seconds": seconds, "ratio": row})
        for name in names[1:]:
            values = [row[name] for row in found]
            print(f"{name} / LoRA: {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        disk = {"bytes_per_token": cache.bytes / cache.tokens, "building / a LoRA epoch": building / plain}
        write(options, {"cache": disk})
        print(json.dumps(disk))


def write(options: argparse.Namespace, row: dict) -> None:
    if options.out is None:
        return
    machine = {"machine": platform.machine(), "device": DEVICE, "torch": torch.__version__}
    settings = {key: getattr(options, key) for key in ("model", "layers", "width", "tokens", "batch", "dtype")}
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(settings | machine | row) + "\n")


if __name__ == "__main__":
    main()

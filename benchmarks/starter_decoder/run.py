"""Bits per byte of held-out text: the starter decoder beside a byte n-gram model of the same training text.

python benchmarks/starter_decoder/run.py --data DATA
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from english import english_text, read_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftlm.evaluation.bits_per_byte import bits_per_byte
from graftlm.starter import starter_model, starter_path

ORDER = 6


class ByteNgrams:
    """Witten–Bell interpolated byte n-grams: p(b | c) = (N(cb) + T(c) p(b | c')) / (N(c) + T(c)).

    T(c): how many bytes follow c. c' is c without its oldest byte; below the empty context every byte has 1/256.
    """

    def __init__(self, texts: list[str], order: int = ORDER) -> None:
        self.tables = []
        for length in range(1, order + 1):
            grams, counts = np.unique(packed("\n".join(texts).encode(), length), return_counts=True)
            contexts, first, successors = np.unique(grams >> 8, return_index=True, return_counts=True)
            self.tables.append((grams, counts, contexts, np.add.reduceat(counts, first), successors))

    def bits(self, text: str) -> float:
        """Bits of a text that follows a line break."""
        data = ("\n" + text).encode()
        p = np.full(len(data) - 1, 1 / 256)
        for length, (grams, counts, contexts, totals, successors) in enumerate(self.tables, 1):
            start = max(0, length - 2)  # bytes that have no context of this length
            asked = packed(data, length)[max(0, 2 - length) :]
            seen, here = looked_up(asked, grams, counts), looked_up(asked >> 8, contexts, totals)
            kinds = looked_up(asked >> 8, contexts, successors)
            known = here > 0
            p[start:][known] = (seen + kinds * p[start:])[known] / (here + kinds)[known]
        return float(-np.log2(p).sum())


def packed(data: bytes, length: int) -> np.ndarray:
    """Every run of so many bytes as one number, the last byte lowest."""
    codes = np.frombuffer(data, np.uint8).astype(np.int64)
    found = np.zeros(len(codes) - length + 1, np.int64)
    for place in range(length):
        found = found << 8 | codes[place : place + len(found)]
    return found


def looked_up(asked: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, values[place], 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data pack")
    data = parser.parse_args().data
    english = english_text(data)

    def column(path: Path, most: int) -> list[str]:
        return [row["text"] for row in read_rows(data / path)][:most]

    def messages(language: str) -> list[str]:
        lines = starter_path(f"messages/test.{language}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]

    held_out = {
        "held-out sentences of its sources": english.held_out,
        "other English novels": column(Path("raw_text/eltec_eng/test.jsonl.gz"), 60),
        "the starter's messages": messages("eng"),
        "encyclopaedia (WikiText-2)": column(Path("raw_text/wikitext2_eval/test.jsonl.gz"), 200),
        "French novels": column(Path("raw_text/eltec_fra/test.jsonl.gz"), 20),
        "the starter's messages in French": messages("fra"),
    }
    folder = starter_model("starter-decoder")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ngrams = ByteNgrams(english.novels + english.rest)
    print("| text | bytes a token | starter decoder | byte 6-grams |\n| --- | --- | --- | --- |")
    with torch.inference_mode():
        for name, texts in held_out.items():
            size = sum(len(text.encode()) for text in texts)
            tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
            ours = bits_per_byte(model, tokenizer, texts, max_length=256, stride=64)["bits_per_byte"]
            theirs = sum(map(ngrams.bits, texts)) / size
            interval = f"{ours.value:.3f} ({ours.low:.3f} to {ours.high:.3f})"
            print(f"| {name} | {size / tokens:.2f} | {interval} | {theirs:.3f} |")


if __name__ == "__main__":
    main()

"""The starter's French paragraphs: as many and as long as their card says, and none in another, or in the messages."""

import json
import re

import pytest

from graftlm.starter import starter_path

FOLDER = starter_path("paragraphs")


def texts(path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def six_grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + 6]) for start in range(len(words) - 5)}


@pytest.mark.parametrize("split", ["train", "test"])
def test_counts_and_lengths_are_those_of_the_card(split):
    found = texts(FOLDER / f"{split}.fra.jsonl")
    size = sum(len(text.encode()) for text in found)
    assert f"| `{split}.fra.jsonl` | {len(found)} | {size:,} |" in (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(220 <= len(text) <= 275 for text in found)


def test_no_two_share_six_words_in_a_row():
    found = [text for split in ("train", "test") for text in texts(FOLDER / f"{split}.fra.jsonl")]
    found += texts(starter_path("messages/test.fra.jsonl"))
    seen: set[tuple[str, ...]] = set()
    for text in found:
        runs = six_grams(text)
        assert seen.isdisjoint(runs), text
        seen |= runs

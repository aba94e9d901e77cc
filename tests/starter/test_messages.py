"""The starter's messages are balanced, parallel, clean, and their test split does not repeat what is trained on."""

import json
import re
import unicodedata
from collections import Counter
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "src/graftlm/starter/messages"
LANGUAGES = ("eng", "deu", "fra", "spa", "por", "ces")
CLASSES = {"animals", "food", "health", "money", "travel", "weather"}
LEAST_ROWS = {"train.eng": 540, "dev.eng": 120} | {f"test.{language}": 126 for language in LANGUAGES}
README = FOLDER / "README.md"


def read(name: str) -> list[dict[str, str]]:
    text = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@cache
def words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower().replace("'", "")))


@cache
def word_set(text: str) -> frozenset[str]:
    return frozenset(words(text))


@cache
def five_grams(text: str) -> frozenset[tuple[str, ...]]:
    tokens = words(text)
    return frozenset(tokens[i : i + 5] for i in range(len(tokens) - 4))


def near_copy(a: str, b: str) -> bool:
    """Two sentences share five words in a row, or six tenths of their words."""
    if not five_grams(a).isdisjoint(five_grams(b)):
        return True
    left, right = word_set(a), word_set(b)
    return len(left & right) >= 0.6 * len(left | right)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("The cat sat on the mat today.", "Yesterday the cat sat on the sofa.", True),
        ("Rain again, take a coat!", "take a coat: rain, again", True),
        ("It snowed all night long.", "The bread is still warm.", False),
    ],
)
def test_near_copy_tells_copies_from_others(a, b, expected):
    assert near_copy(a, b) is expected


def test_no_other_data_files():
    assert {path.stem for path in FOLDER.glob("*.jsonl")} == set(LEAST_ROWS)


@pytest.mark.parametrize("name", LEAST_ROWS)
def test_rows(name):
    rows = read(name)
    split = name.split(".")[0]
    assert len(rows) >= LEAST_ROWS[name]
    assert [row["id"] for row in rows] == [f"{split}-{i:03d}" for i in range(1, len(rows) + 1)]
    assert all(set(row) == {"id", "text", "label"} for row in rows)


@pytest.mark.parametrize("name", LEAST_ROWS)
def test_classes_are_balanced(name):
    counts = Counter(row["label"] for row in read(name))
    assert set(counts) == CLASSES
    assert max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize("name", LEAST_ROWS)
def test_classes_do_not_come_in_blocks(name):
    """The first sixty rows hold every class, so that a run on a part of the file is a fair one."""
    counts = Counter(row["label"] for row in read(name)[:60])
    assert set(counts.values()) == {10}


@pytest.mark.parametrize("name", LEAST_ROWS)
def test_text_is_clean(name):
    for row in read(name):
        text = row["text"]
        assert unicodedata.is_normalized("NFC", text), row
        assert not any(unicodedata.category(c) in {"Cc", "Cf", "Co", "Cs", "Cn"} for c in text), row
        assert text == " ".join(text.split()), row
        assert text[-1] in ".?!", row


@pytest.mark.parametrize("name", LEAST_ROWS)
def test_lengths(name):
    low, high = (5, 25) if name.endswith("eng") else (4, 27)
    odd = {row["id"]: row["text"] for row in read(name) if not low <= len(row["text"].split()) <= high}
    assert not odd


@pytest.mark.parametrize("name", LEAST_ROWS)
def test_texts_are_unique(name):
    counts = Counter(" ".join(words(row["text"])) for row in read(name))
    assert max(counts.values()) == 1


@pytest.mark.parametrize("name", LEAST_ROWS)
def test_no_sentence_frame_is_repeated(name):
    frames = Counter(words(row["text"])[:3] for row in read(name))
    assert {frame: n for frame, n in frames.items() if n > 4} == {}


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_translations_are_parallel(language):
    english, other = read("test.eng"), read(f"test.{language}")
    assert [(r["id"], r["label"]) for r in other] == [(r["id"], r["label"]) for r in english]


def test_no_row_is_the_same_in_two_languages():
    splits = {language: read(f"test.{language}") for language in LANGUAGES}
    for a, b in combinations(LANGUAGES, 2):
        same = [x for x, y in zip(splits[a], splits[b], strict=True) if words(x["text"]) == words(y["text"])]
        assert not same, (a, b)


@pytest.mark.parametrize(("a", "b"), list(combinations(("train.eng", "dev.eng", "test.eng"), 2)))
def test_splits_share_no_near_copies(a, b):
    pairs = [(x["text"], y["text"]) for x in read(a) for y in read(b) if near_copy(x["text"], y["text"])]
    assert not pairs


@pytest.mark.parametrize("name", ["train.eng", "dev.eng", "test.eng"])
def test_a_split_holds_no_near_copies(name):
    pairs = [(x["text"], y["text"]) for x, y in combinations(read(name), 2) if near_copy(x["text"], y["text"])]
    assert not pairs


def test_readme_tells_the_counts():
    text = README.read_text(encoding="utf-8")
    assert "CC0" in text
    for name in LEAST_ROWS:
        assert re.search(rf"`{name}\.jsonl` *\| *{len(read(name))} *\|", text), name

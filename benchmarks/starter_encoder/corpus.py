"""The text that the starter encoder is trained on: chosen, checked against the evaluation sets, and counted.

    python corpus.py --data DATA

prints the counts, and that nothing of it stands in sib200 or in the shipped messages.
"""

import argparse
import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from graftlm.evaluation.leakage import EvaluationIndex, find_overlap
from graftlm.starter import starter_path

LANGUAGES = ("deu", "fra", "spa", "por", "ces")
RELATED = ("cat", "nld", "pol", "ron", "slk")
NOVELS = ("eng", "deu", "fra", "por", "ces")
NOVEL_PASSAGES, NOVEL_SENTENCES = 16_000, 20_000
QUESTIONS = "classification_en/query_wellformed/train.jsonl.gz"
TEXT_FIELDS = {
    "text",
    "text_b",
    "text_eng",
    "premise",
    "premise_eng",
    "choice1",
    "choice1_eng",
    "choice2",
    "choice2_eng",
}
TEXT_FIELDS |= {"context", "question", "headline", "subject", "eng", "deu", "fra", "ces", "spa"}


@dataclass
class Corpus:
    """`pairs`: (source, language, English, text in that language). `passages`: (language, text of a novel).

    `english`: questions and single sentences of the novels, without a translation.
    """

    pairs: list[tuple[str, str, str, str]] = field(default_factory=list)
    passages: list[tuple[str, str]] = field(default_factory=list)
    english: list[str] = field(default_factory=list)
    kept: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)

    def texts(self) -> Iterator[str]:
        """Every text that the encoder, its tokenizer or its teacher sees."""
        for _, _, english, other in self.pairs:
            yield english
            yield other
        for _, text in self.passages:
            yield text
        yield from self.english


def read_rows(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def evaluation_texts(data: Path) -> Iterator[str]:
    """Every text of an evaluation split in the data pack: dev and test of all labelled sets, sib200 and FLORES whole,
    the held-out Tatoeba pairs, and the test sets of the translation and language-modelling sets."""
    paths = [
        *data.glob("classification_en/*/dev.jsonl.gz"),
        *data.glob("classification_en/*/test.jsonl.gz"),
        *data.glob("multilingual/*/*.dev.jsonl.gz"),
        *data.glob("multilingual/*/*.test.jsonl.gz"),
        *data.glob("multilingual/sib200_topic/*.train.jsonl.gz"),
        *data.glob("parallel_text/flores200_devtest/*.jsonl.gz"),
        *data.glob("parallel_text/wmt_*/*.jsonl.gz"),
        *data.glob("parallel_text/multi30k/[dt]e*.jsonl.gz"),
        *data.glob("raw_text/wikitext2_eval/*.jsonl.gz"),
    ]
    if len(paths) < 100:
        raise FileNotFoundError(f"{data} is not the data pack: only {len(paths)} evaluation files under it")
    for path in sorted(paths):
        for row in read_rows(path):
            yield from (row[key] for key in row.keys() & TEXT_FIELDS if isinstance(row[key], str))
    for path in sorted(data.glob("parallel_text/tatoeba_eng/*.jsonl.gz")):
        for row in read_rows(path):
            if row["split"] != "train":
                yield row["text"]
                yield row["eng"]


SENTENCE_END = r"(?<=[.!?…»”\"])\s+"


def split_passages(text: str, rng: random.Random) -> Iterator[str]:
    """Cut a page of a novel at sentence ends into passages of 60 to 800 characters, short ones more often."""
    passage, goal = "", rng.uniform(4.1, 6.7)
    for sentence in re.split(SENTENCE_END + r"|\n", text):
        passage = f"{passage} {sentence}".strip()
        if len(passage) >= 2.718**goal:
            yield passage[:1000]
            passage, goal = "", rng.uniform(4.1, 6.7)
    if len(passage) >= 60:
        yield passage[:1000]


def candidate_pairs(data: Path) -> Iterator[tuple[str, str, str, str]]:
    folder = data / "parallel_text"
    for language in LANGUAGES + RELATED:
        if language != "slk":
            for row in read_rows(folder / f"tatoeba_eng/{language}.jsonl.gz"):
                if row["split"] == "train":
                    yield "tatoeba", language, row["eng"], row["text"]
        if language != "cat":
            english = {row["id"]: row["text"] for row in read_rows(folder / "ntrex128/eng.jsonl.gz")}
            for row in read_rows(folder / f"ntrex128/{language}.jsonl.gz"):
                if row["id"] in english:
                    yield "ntrex", language, english[row["id"]], row["text"]
    for row in read_rows(folder / "tico19_eng/fra.jsonl.gz"):
        yield "tico19", "fra", row["eng"], row["text"]


def candidate_passages(data: Path, rng: random.Random) -> Iterator[tuple[str, str]]:
    for language in NOVELS:
        rows = read_rows(data / f"raw_text/eltec_{language}/train.jsonl.gz")
        passages = [passage for row in rows for passage in split_passages(row["text"], rng)]
        rng.shuffle(passages)
        yield from ((language, passage) for passage in passages[:NOVEL_PASSAGES])


def candidate_english(data: Path, passages: list[tuple[str, str]], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (source, text): web questions without their labels, and short sentences of the English novels."""
    for row in read_rows(data / QUESTIONS):
        yield "questions", row["text"]
    sentences = [
        sentence
        for language, passage in passages
        if language == "eng"
        for sentence in re.split(SENTENCE_END, passage)
        if 30 <= len(sentence) <= 200
    ]
    rng.shuffle(sentences)
    yield from (("novel sentences", sentence) for sentence in sentences[:NOVEL_SENTENCES])


def select_corpus(data: Path, seed: int = 0) -> Corpus:
    """Choose the training text; a pair or passage is dropped when any of its texts overlaps an evaluation split."""
    index = EvaluationIndex()
    index.update(evaluation_texts(data))
    corpus = Corpus()
    for pair in candidate_pairs(data):
        source, language, english, other = pair
        overlaps = index.match(english) or index.match(other)
        (corpus.dropped if overlaps else corpus.kept)[f"{source} {language}"] += 1
        if not overlaps:
            corpus.pairs.append(pair)
    for language, text in candidate_passages(data, random.Random(seed)):
        overlaps = index.match(text)
        (corpus.dropped if overlaps else corpus.kept)[f"novels {language}"] += 1
        if not overlaps:
            corpus.passages.append((language, text))
    for source, text in candidate_english(data, corpus.passages, random.Random(seed)):
        overlaps = index.match(text)
        (corpus.dropped if overlaps else corpus.kept)[f"{source} eng"] += 1
        if not overlaps:
            corpus.english.append(text)
    return corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    corpus = select_corpus(data)
    print("kept", dict(corpus.kept), "dropped", dict(corpus.dropped))
    tested = [row["text"] for path in data.glob("multilingual/sib200_topic/*.gz") for row in read_rows(path)]
    for path in sorted(starter_path("messages").glob("test.*.jsonl")):
        tested += [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    overlap = find_overlap(corpus.texts(), tested)
    print(f"{len(overlap)} of {overlap.n_training} training texts overlap {overlap.n_evaluation} evaluation texts")
    if len(overlap):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

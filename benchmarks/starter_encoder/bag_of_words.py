"""How much does a vocabulary hold? The starter encoder's word vectors alone, for a few vocabulary sizes (exploratory).

    python bag_of_words.py --data DATA --work WORK 10240:192 26624:160 >> bag_of_words.jsonl

Each VOCABULARY:WIDTH trains a tokenizer and word vectors (`pretrain.learn_words`), and scores the mean of a sentence's
vectors: logistic regression on English labels, five folds over the sentences of sib200 train and dev; no test row is
read.
"""

import argparse
import json
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from corpus import read_rows
from pretrain import learn_words, prepare
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from student import TEACHER_WIDTH, Teacher, build_student
from torch import nn

LANGUAGES = ("eng", "deu", "fra", "spa", "por", "ces", "dan")
PENALTIES = (0.1, 1.0, 10.0)
FOLDS = 5


def read_sentences(data: Path) -> tuple[dict[str, list[str]], np.ndarray]:
    """Return the sentences of each language in the same order, and their labels."""
    rows = {
        language: {
            row["id"]: row
            for split in ("train", "dev")
            for row in read_rows(data / f"multilingual/sib200_topic/{language}_Latn.{split}.jsonl.gz")
        }
        for language in LANGUAGES
    }
    ids = sorted(rows["eng"])
    return {language: [found[i]["text"] for i in ids] for language, found in rows.items()}, np.array(
        [rows["eng"][i]["label"] for i in ids]
    )


def score(features: dict[str, np.ndarray], labels: np.ndarray, fit) -> dict[str, float]:
    """Return the accuracy per language over five folds of sentences; each fold is fitted on English alone."""
    part = np.random.default_rng(0).permutation(len(labels)) % FOLDS
    hits = {language: np.zeros(len(labels)) for language in features}
    for fold in range(FOLDS):
        train, test = part != fold, part == fold
        model = fit(features["eng"][train], labels[train])
        for language, rows in features.items():
            hits[language][test] = model.predict(rows[test]) == labels[test]
    return {language: round(float(hit.mean()), 3) for language, hit in hits.items()}


def score_vectors(vectors: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """Return `score` of unit vectors for the penalty with the best English accuracy."""
    unit = {language: rows / np.linalg.norm(rows, axis=1, keepdims=True) for language, rows in vectors.items()}
    scale = unit["eng"].std()
    unit = {language: rows / scale / 10 for language, rows in unit.items()}
    found = [score(unit, labels, LogisticRegression(C=penalty, max_iter=1000).fit) for penalty in PENALTIES]
    return max(found, key=lambda scores: scores["eng"])


@torch.inference_mode()
def mean_word_vectors(student: nn.Module, tokenizer, texts: list[str]) -> np.ndarray:
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.stack([student.bert.embeddings(torch.tensor([row]))[0].mean(0).numpy() for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data pack")
    parser.add_argument("--work", type=Path, required=True, help="folder for corpus, tokenizers and vectors")
    parser.add_argument("sizes", nargs="*", help="VOCABULARY:WIDTH")
    parser.add_argument("--references", action="store_true", help="also the teacher and character n-grams")
    arguments = parser.parse_args()
    texts, labels = read_sentences(arguments.data)
    if arguments.references:
        teacher = Teacher()
        vectors = {language: teacher.encode(rows).float().numpy() for language, rows in texts.items()}
        print(json.dumps({"vectors": "teacher"} | score_vectors(vectors, labels)), flush=True)
        words = {language: np.array(rows, dtype=object) for language, rows in texts.items()}

        def fit(rows: np.ndarray, answers: np.ndarray):
            ngrams = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
            return make_pipeline(ngrams, LogisticRegression(C=10.0, max_iter=1000)).fit(rows, answers)

        print(json.dumps({"vectors": "character n-grams"} | score(words, labels, fit)), flush=True)
    for size in arguments.sizes:
        vocabulary, width = map(int, size.split(":"))
        folder = arguments.work / size.replace(":", "x")
        folder.mkdir(parents=True, exist_ok=True)
        for shared in ("corpus.pkl", "salads.pkl", "vectors.pkl"):
            if (arguments.work / shared).exists() and not (folder / shared).exists():
                os.link(arguments.work / shared, folder / shared)
        material = prepare(arguments.data, folder, vocabulary)
        torch.manual_seed(0)
        student = build_student(material.tokenizer, width=width)
        model = nn.ModuleDict({"student": student, "project": nn.Linear(width, TEACHER_WIDTH)})
        learn_words(model, material, Namespace(seed=0, cosine=5.0, similarity=1.0, passages=2500))
        vectors = {language: mean_word_vectors(student, material.tokenizer, rows) for language, rows in texts.items()}
        row = {"vectors": "words", "vocabulary": vocabulary, "width": width}
        print(json.dumps(row | score_vectors(vectors, labels)), flush=True)


if __name__ == "__main__":
    main()

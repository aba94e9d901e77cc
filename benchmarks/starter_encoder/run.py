"""Measure the starter encoder: masked LM, sentence retrieval, and transfer of a task learnt from English alone.

    python run.py --data DATA

Each finished measurement is a line in ROWS, and is not repeated for the same weights. Tables: `python tables.py`.
Regularisation is chosen on the English dev of the task; learning rates on that of the messages, for each arm from two.
"""

import argparse
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np
import torch
from corpus import read_rows, split_passages
from peft import LoraConfig, get_peft_model
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

HERE = Path(__file__).parent
STARTER = HERE.parents[1] / "src/graftlm/starter"
LANGUAGES = ("eng", "deu", "fra", "spa", "por", "ces", "dan")
SEEDS = range(5)
NGRAM_C, VECTOR_C = (1.0, 10.0, 100.0), (0.03, 0.3, 3.0)
RATES = {"random weights": (2e-4, 8e-4), "fine-tuned": (2e-4, 5e-4), "LoRA": (1e-3, 3e-3)}
WITHOUT_WEIGHTS = ("majority", "character n-grams")
EPOCHS = {"sib200": 6, "messages": 8}
Texts = list[tuple[str, str]]


@dataclass
class Task:
    """Labelled text: English train and dev, a test per language (parallel: row i is the same sentence everywhere)."""

    name: str
    train: Texts
    dev: Texts
    tests: dict[str, Texts]


def load_sib200(data: Path) -> Task:
    def read(language: str, split: str) -> Texts:
        rows = read_rows(data / f"multilingual/sib200_topic/{language}_Latn.{split}.jsonl.gz")
        return [(row["text"], row["label_name"]) for row in sorted(rows, key=lambda row: int(row["id"]))]

    tests = {language: read(language, "test") for language in LANGUAGES}
    return Task("sib200", read("eng", "train"), read("eng", "dev"), tests)


def load_messages(folder: Path) -> Task:
    def read(name: str) -> Texts:
        rows = map(json.loads, (folder / name).read_text(encoding="utf-8").splitlines())
        return [(row["text"], row["label"]) for row in sorted(rows, key=lambda row: str(row["id"]))]

    tests = {path.name.split(".")[1]: read(path.name) for path in sorted(folder.glob("test.*.jsonl"))}
    return Task("messages", read("train.eng.jsonl"), read("dev.eng.jsonl"), tests)


class Rows:
    """Results as JSON lines; each knows the weights that it was measured on, or that it needs none of them."""

    def __init__(self, path: Path, weights: Path) -> None:
        self.path = path
        self.weights = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        self.values = {self.key(row): row for row in rows if row["weights"] in (self.weights, None)}

    @staticmethod
    def key(row: dict) -> tuple:
        return row["measure"], row["method"], row.get("language"), row["seed"]

    def has(self, measure: str, method: str, language: str | None = None, seed: int = 0) -> bool:
        return (measure, method, language, seed) in self.values

    def add(self, **row: object) -> None:
        independent = str(row["method"]).startswith(WITHOUT_WEIGHTS)
        row = {"weights": None if independent else self.weights, "seed": 0} | row
        with self.path.open("a") as file:
            print(json.dumps(row), file=file)
        self.values[self.key(row)] = row


def batches(tokenizer, texts: list[str], size: int = 64) -> Iterator[tuple[list[int], dict]]:
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), size):
        positions = order[start : start + size]
        chosen = [texts[i] for i in positions]
        yield positions, tokenizer(chosen, padding=True, truncation=True, return_tensors="pt")


@torch.inference_mode()
def pooled(model, tokenizer, texts: list[str]) -> np.ndarray:
    model.eval()
    vectors = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    for positions, batch in batches(tokenizer, texts):
        vectors[positions] = model(**batch).pooler_output.numpy()
    return vectors


def text_of(data: Path, language: str, source: str, split: str) -> list[str]:
    """Return the sentences of one side of Tatoeba, or the passages of novels; novels of a split are other books."""
    if source == "tatoeba":
        other = "deu" if language == "eng" else language
        rows = read_rows(data / f"parallel_text/tatoeba_eng/{other}.jsonl.gz")
        return [row["eng" if language == "eng" else "text"] for row in rows if row["split"] == split]
    folder = data / "raw_text" / ("adl_dan" if language == "dan" else f"eltec_{language}")
    rows = read_rows(folder / f"{split}.jsonl.gz") if folder.exists() else []
    rng = random.Random(0)
    return [text for row in rows for text in split_passages(row["text"], rng)]


def unigram_losses(tokenizer, training: list[str], held_out: list[str]) -> dict[str, float]:
    """Return nats a token on `held_out` of a unigram model with add-one smoothing of `training`, and of the best one.

    The best unigram model is the held-out text's own distribution: its loss is that text's entropy.
    """
    counts, own = (
        Counter(token for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in ids)
        for texts in (training, held_out)
    )
    total, n = counts.total() + len(tokenizer), own.total()
    return {
        "unigram_loss": -sum(count * log((counts[token] + 1) / total) for token, count in own.items()) / n,
        "unigram_entropy": -sum(count * log(count / n) for count in own.values()) / n,
    }


@torch.inference_mode()
def masked_lm(model, tokenizer, texts: list[str], seed: int) -> dict[str, float]:
    """Return nats per masked token (15 % of them, all by [MASK]) and the share that is guessed."""
    generator = torch.Generator().manual_seed(seed)
    loss, hits, n = 0.0, 0, 0
    for _, batch in batches(tokenizer, texts):
        ids = batch["input_ids"]
        ordinary = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        chosen = ordinary & (torch.rand(ids.shape, generator=generator) < 0.15)
        labels = ids[chosen]
        batch["input_ids"] = ids.masked_fill(chosen, tokenizer.mask_token_id)
        logits = model.cls(model.bert(**batch).last_hidden_state[chosen])
        loss += functional.cross_entropy(logits, labels, reduction="sum").item()
        hits += int((logits.argmax(-1) == labels).sum())
        n += len(labels)
    return {"loss": loss / n, "accuracy": hits / n, "n": n}


def measure_masked_lm(data: Path, encoder: Path, rows: Rows) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = load(AutoModelForMaskedLM, encoder).eval()
    for source in ("tatoeba", "novels"):
        for language in LANGUAGES:
            measure = f"mlm {source}"
            texts = text_of(data, language, source, "dev")
            if not texts or rows.has(measure, "encoder", language, SEEDS[-1]):
                continue
            texts = random.Random(0).sample(texts, min(len(texts), 300))
            unigram = unigram_losses(tokenizer, text_of(data, language, source, "train"), texts)
            for seed in SEEDS:
                result = masked_lm(model, tokenizer, texts, seed) | unigram
                rows.add(measure=measure, method="encoder", language=language, seed=seed, **result)


def measure_retrieval(data: Path, encoder: Path, rows: Rows) -> None:
    """Nearest neighbour by cosine among the held-out pairs of Tatoeba test, both directions."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    for method in ("encoder", "random weights"):
        model = None
        for language in LANGUAGES[1:]:
            if rows.has("retrieval", method, language):
                continue
            model = model or (load(AutoModel, encoder) if method == "encoder" else build(AutoModel, encoder, seed=0))
            found = read_rows(data / f"parallel_text/tatoeba_eng/{language}.jsonl.gz")
            pairs = [row for row in found if row["split"] == "test"]
            sides = [pooled(model, tokenizer, [row[key] for row in pairs]) for key in ("eng", "text")]
            english, other = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
            similarity = english @ other.T
            for direction, scores in (("from", similarity), ("to", similarity.T)):
                correct = scores.argmax(1) == np.arange(len(pairs))
                rows.add(measure=f"retrieval {direction} eng", method=method, language=language, correct=bits(correct))
            rows.add(measure="retrieval", method=method, language=language)


def bits(correct: np.ndarray) -> str:
    return "".join("1" if hit else "0" for hit in correct)


def load(kind, encoder: Path, **options):
    return kind.from_pretrained(encoder, attn_implementation="eager", **options)


def build(kind, encoder: Path, seed: int, **options):
    """Return the same network with random weights."""
    torch.manual_seed(seed)
    return kind.from_config(AutoConfig.from_pretrained(encoder, attn_implementation="eager", **options))


def record(rows: Rows, task: Task, method: str, predict: Callable[[list[str]], list[str]], seed: int = 0) -> None:
    for language, test in task.tests.items():
        guesses = predict([text for text, _ in test])
        correct = np.array([guess == label for guess, (_, label) in zip(guesses, test, strict=True)])
        rows.add(measure=task.name, method=method, language=language, seed=seed, correct=bits(correct))


def best_on_dev(fits: list, dev: Texts, features: Callable) -> object:
    texts, labels = features([text for text, _ in dev]), [label for _, label in dev]
    return max(fits, key=lambda fit: fit.score(texts, labels))


def regressions(rows: Rows, task: Task, encoder: Path) -> None:
    """Majority class, character n-grams, and frozen pooled vectors, each with logistic regression on English."""
    texts, labels = [text for text, _ in task.train], [label for _, label in task.train]
    if not rows.has(task.name, "majority", "eng"):
        majority = Counter(labels).most_common(1)[0][0]
        record(rows, task, "majority", lambda found: [majority] * len(found))
    if not rows.has(task.name, "character n-grams", "eng"):
        fits = []
        for penalty in NGRAM_C:
            vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
            fits.append(make_pipeline(vectorizer, LogisticRegression(C=penalty, max_iter=2000)).fit(texts, labels))
        best = best_on_dev(fits, task.dev, features=list)
        record(rows, task, "character n-grams", lambda found: list(best.predict(found)))
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    for method, seeds in (("frozen", [0]), ("frozen, random weights", SEEDS)):
        for seed in seeds:
            if rows.has(task.name, method, "eng", seed):
                continue
            model = load(AutoModel, encoder) if method == "frozen" else build(AutoModel, encoder, seed)

            def features(found: list[str], model=model) -> np.ndarray:
                return pooled(model, tokenizer, found)

            vectors = features(texts)
            fits = [LogisticRegression(C=penalty, max_iter=5000).fit(vectors, labels) for penalty in VECTOR_C]
            best = best_on_dev(fits, task.dev, features)
            record(rows, task, method, lambda found, best=best, f=features: list(best.predict(f(found))), seed)


def fine_tune(task: Task, encoder: Path, method: str, rate: float, seed: int) -> Callable[[list[str]], list[str]]:
    """Train on English (AdamW, batches of 32, linear warm-up and decay); return its predictions."""
    names = sorted({label for _, label in task.train})
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    torch.manual_seed(seed)
    kind, options = AutoModelForSequenceClassification, {"num_labels": len(names)}
    model = build(kind, encoder, seed, **options) if method == "random weights" else load(kind, encoder, **options)
    if method == "LoRA":
        model = get_peft_model(model, LoraConfig("SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"]))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    rng, steps = random.Random(seed), EPOCHS[task.name] * -(-len(task.train) // 32)
    warm_up = max(1, steps // 10)
    scale = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up))
    )
    model.train()
    for _ in tqdm(range(EPOCHS[task.name]), desc=f"{task.name}, {method}, {rate}, seed {seed}"):
        train = sorted(task.train, key=lambda row: len(row[0]) * rng.uniform(0.8, 1.25))
        for start in rng.sample(range(0, len(train), 32), -(-len(train) // 32)):
            rows = train[start : start + 32]
            batch = tokenizer([text for text, _ in rows], padding=True, truncation=True, return_tensors="pt")
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(**batch).logits
            functional.cross_entropy(logits.float(), torch.tensor([names.index(label) for _, label in rows])).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scale.step()

    @torch.inference_mode()
    def predict(texts: list[str]) -> list[str]:
        model.eval()
        guesses = [""] * len(texts)
        for positions, batch in batches(tokenizer, texts):
            for position, guess in zip(positions, model(**batch).logits.argmax(-1).tolist(), strict=True):
                guesses[position] = names[guess]
        return guesses

    return predict


def fine_tunings(rows: Rows, task: Task, tuned_on: Task, encoder: Path, methods: list[str]) -> None:
    """Choose each arm's rate by one run on the English dev of `tuned_on`, then run five seeds with it."""
    texts, labels = [text for text, _ in tuned_on.dev], [label for _, label in tuned_on.dev]
    for method in methods:
        scores = {}
        for rate in RATES[method]:
            key = (f"{tuned_on.name} dev", f"{method} {rate}", "eng", 100)
            if key not in rows.values:
                guesses = fine_tune(tuned_on, encoder, method, rate, seed=100)(texts)
                correct = bits(np.array(guesses) == np.array(labels))
                rows.add(measure=key[0], method=key[1], language="eng", seed=100, correct=correct)
            scores[rate] = rows.values[key]["correct"].count("1")
        for seed in SEEDS:
            if not rows.has(task.name, method, list(task.tests)[-1], seed):
                record(rows, task, method, fine_tune(task, encoder, method, max(scores, key=scores.get), seed), seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data pack")
    parser.add_argument("--encoder", type=Path, default=STARTER / "encoder", help="folder of the encoder")
    parser.add_argument("--messages", type=Path, default=STARTER / "messages", help="folder of the starter's messages")
    parser.add_argument("--rows", type=Path, default=HERE / "results.jsonl", help="JSON lines, appended to")
    parser.add_argument("--skip", nargs="*", default=[], choices=["mlm", "retrieval", "frozen", "fine-tuning"])
    parser.add_argument("--arms", nargs="*", default=list(RATES), choices=list(RATES), help="fine-tuning arms")
    parser.add_argument("--tasks", nargs="*", default=["sib200", "messages"], choices=["sib200", "messages"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = Rows(arguments.rows, arguments.encoder / "model.safetensors")
    if "mlm" not in arguments.skip:
        measure_masked_lm(arguments.data, arguments.encoder, rows)
    if "retrieval" not in arguments.skip:
        measure_retrieval(arguments.data, arguments.encoder, rows)
    tasks = [load_sib200(arguments.data), load_messages(arguments.messages)]
    chosen = [task for task in tasks if task.name in arguments.tasks]
    for task in chosen:
        if "frozen" not in arguments.skip:
            regressions(rows, task, arguments.encoder)
    for task in chosen:
        if "fine-tuning" not in arguments.skip:
            fine_tunings(rows, task, tasks[1], arguments.encoder, arguments.arms)


if __name__ == "__main__":
    main()

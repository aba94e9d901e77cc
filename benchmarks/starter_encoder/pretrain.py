"""Make the starter encoder: distil a sentence encoder over translations, with masked LM beside it.

    python pretrain.py --data DATA --work WORK --minutes 30 --export ../../src/graftlm/starter/encoder

The vector that is distilled is the pooler's output, which `BertForSequenceClassification` gives to its classifier. It
is mapped by a throw-away projection to the teacher's vector of the English sentence, whether the student reads the
English sentence, its translation, or both. The same forward pass predicts masked tokens. Before that, the word vectors
alone learn the same task as a bag of words, which takes two minutes. Interrupted, it goes on from the last checkpoint
in WORK.
"""

import argparse
import json
import os
import pickle
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import RELATED, read_rows, select_corpus
from optimizer import Optimizer, schedule
from student import TEACHER_WIDTH, Teacher, build_student, export
from tokenizer import MAX_LENGTH, check_tokenizer, train_tokenizer
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import BertForPreTraining, PreTrainedTokenizerFast

VOCABULARY = 26_624
BATCH_TOKENS, BATCHES_A_STEP = 1536, 8
LENGTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
TEMPERATURE = 0.05
PAIRS_A_ROUND, ENGLISH_A_ROUND, SALADS_A_ROUND = 8000, 4000, 4000
SALADS = 100_000
WORD_STEPS, WORD_BATCHES, WORD_RATE = 1200, 8, 5e-3
JOINED, ENGLISH_TOO, RELATED_KEPT = 0.15, 0.4, 0.5
CHECKPOINT_SECONDS = 180


@dataclass
class Material:
    """Token ids of each text without special tokens, and the teacher's vectors of the English ones."""

    tokenizer: PreTrainedTokenizerFast
    ids: list[list[int]]
    pairs: list[tuple[str, int, int]]
    passages: list[int]
    english: list[int]
    salads: list[int]
    vectors: torch.Tensor
    vector_of: dict[int, int]


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Return what `path` holds, after making and writing it the first time."""
    if not path.exists():
        path.with_suffix(".part").write_bytes(pickle.dumps(make()))
        os.replace(path.with_suffix(".part"), path)
    return pickle.loads(path.read_bytes())


def word_salads(words: list[str], rng: random.Random) -> list[str]:
    """Return each word alone and mixtures of two to five, in three ways of writing: text for words no sentence has."""
    mixtures = [rng.sample(words, rng.randint(2, 5)) for _ in range(SALADS)] + [[word] for word in words]
    return [rng.choice((str.lower, str.lower, str.title, str.capitalize))(" ".join(mixture)) for mixture in mixtures]


def prepare(data: Path, work: Path, vocabulary: int = VOCABULARY) -> Material:
    """Select the corpus, train the tokenizer, run the teacher; each is kept in WORK for the next start."""
    corpus = kept(work / "corpus.pkl", lambda: select_corpus(data))
    (work / "corpus.json").write_text(json.dumps({"kept": corpus.kept, "dropped": corpus.dropped}, indent=1))
    tokenizer = kept(work / "tokenizer.pkl", lambda: train_tokenizer(corpus, vocabulary))
    check_tokenizer(tokenizer)
    salads = kept(work / "salads.pkl", lambda: word_salads(Teacher().words(), random.Random(0)))
    texts = list(dict.fromkeys([*corpus.texts(), *salads]))
    position = {text: i for i, text in enumerate(texts)}
    limits = {"add_special_tokens": False, "truncation": True, "max_length": MAX_LENGTH - 2}
    ids = kept(work / "ids.pkl", lambda: tokenizer(texts, **limits)["input_ids"])
    english = [english for _, _, english, _ in corpus.pairs]
    english += [text for language, text in corpus.passages if language == "eng"]
    english = list(dict.fromkeys([*english, *corpus.english, *salads]))
    pairs = [(language, position[english], position[other]) for _, language, english, other in corpus.pairs]
    news = [pair for pair, (source, *_) in zip(pairs, corpus.pairs, strict=True) if source == "ntrex"]
    return Material(
        tokenizer,
        ids,
        pairs + news,  # NTREX twice: its long sentences are few and the nearest to most readers' text
        [position[text] for _, text in corpus.passages],
        [position[text] for text in corpus.english],
        [position[text] for text in salads],
        kept(work / "vectors.pkl", lambda: Teacher().encode(english)),
        {position[text]: i for i, text in enumerate(english)},
    )


@dataclass
class Row:
    first: list[int]
    second: list[int]
    vector: int | None
    masked: bool = True

    def __len__(self) -> int:
        return 2 + len(self.first) + (1 + len(self.second) if self.second else 0)


def endless(items: list, rng: random.Random) -> Iterator:
    while True:
        yield from rng.sample(items, len(items))


def rounded_length(length: int) -> int:
    """Return the padded length; there are few, because a matrix product of a new shape costs far more than padding."""
    return next(limit for limit in LENGTHS if limit >= length)


def draw_batches(material: Material, passages_a_round: int, rng: random.Random) -> Iterator[list[Row]]:
    """Yield batches of rows of one padded length, without end."""
    pairs, passages = endless(material.pairs, rng), endless(material.passages, rng)
    english_only, salads = endless(material.english, rng), endless(material.salads, rng)
    waiting: dict[int, list[Row]] = {length: [] for length in LENGTHS}
    while True:
        rows = []
        for language, english, other in (next(pairs) for _ in range(PAIRS_A_ROUND)):
            if language in RELATED and rng.random() > RELATED_KEPT:
                continue
            vector, sides = material.vector_of[english], [material.ids[english], material.ids[other]]
            if rng.random() < JOINED and sum(map(len, sides)) <= MAX_LENGTH - 3:
                rng.shuffle(sides)
                rows.append(Row(*sides, vector))
                continue
            rows.append(Row(sides[1], [], vector))
            if rng.random() < ENGLISH_TOO:
                rows.append(Row(sides[0], [], vector))
        for passage in (next(passages) for _ in range(passages_a_round)):
            rows.append(Row(material.ids[passage], [], material.vector_of.get(passage)))
        for text in (next(english_only) for _ in range(ENGLISH_A_ROUND)):
            rows.append(Row(material.ids[text], [], material.vector_of[text]))
        for text in (next(salads) for _ in range(SALADS_A_ROUND)):
            rows.append(Row(material.ids[text], [], material.vector_of[text], masked=False))
        batches = []
        for row in rng.sample(rows, len(rows)):
            length = rounded_length(len(row))
            waiting[length].append(row)
            if len(waiting[length]) == BATCH_TOKENS // length:
                batches.append(waiting[length])
                waiting[length] = []
        yield from rng.sample(batches, len(batches))


Masking = tuple[float, float]


def collate(rows: list[Row], tokenizer: PreTrainedTokenizerFast, masking: Masking) -> dict[str, torch.Tensor]:
    """Pad and mask; `masking`: in which share of the rows which share of the tokens.

    Which positions are to be predicted is in `positions` (flat), what stood there in `labels`.
    """
    begin, end, pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    length = rounded_length(max(map(len, rows)))
    ids = torch.full((len(rows), length), pad)
    types = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        line = [begin, *row.first, end] + ([*row.second, end] if row.second else [])
        ids[i, : len(line)] = torch.tensor(line)
        types[i, len(row.first) + 2 : len(line)] = 1
    generator = torch.Generator().manual_seed(random.getrandbits(62))
    ordinary = (ids != begin) & (ids != end) & (ids != pad)
    masked_rows = torch.rand(len(rows), 1, generator=generator) < masking[0]
    masked_rows &= torch.tensor([row.masked for row in rows]).unsqueeze(1)
    chosen = ordinary & masked_rows & (torch.rand(ids.shape, generator=generator) < masking[1])
    positions = chosen.flatten().nonzero().squeeze(1)
    labels = ids.flatten()[positions]
    draw = torch.rand(labels.shape, generator=generator)
    replaced = torch.where(draw < 0.8, tokenizer.mask_token_id, labels)
    some = torch.randint(len(tokenizer.all_special_ids), len(tokenizer), labels.shape, generator=generator)
    return {
        "input_ids": ids.flatten().scatter(0, positions, torch.where(draw > 0.9, some, replaced)).view_as(ids),
        "token_type_ids": types,
        "attention_mask": (ids != pad).long(),
        "positions": functional.pad(positions, (0, -len(positions) % 64)),
        "labels": functional.pad(labels, (0, -len(labels) % 64), value=-100),
        "with_vector": torch.tensor([i for i, row in enumerate(rows) if row.vector is not None], dtype=torch.long),
        "vectors": torch.tensor([row.vector for row in rows if row.vector is not None], dtype=torch.long),
    }


def distillation(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the cosine distance to the teacher's vectors, and the divergence of the similarities within the batch."""
    ours, theirs = functional.normalize(ours.float(), dim=-1), theirs.float()
    target = functional.softmax(theirs @ theirs.T / TEMPERATURE, dim=-1)
    entropy = -(target * target.clamp_min(1e-9).log()).sum(-1).mean()
    return {
        "cosine": 1 - (ours * theirs).sum(-1).mean(),
        "similarity": functional.cross_entropy(ours @ theirs.T / TEMPERATURE, target) - entropy,
    }


def losses(model: nn.ModuleDict, batch: dict, material: Material) -> dict[str, torch.Tensor]:
    """Return the masked-LM loss where a token is masked, and the distillation's where a row has a teacher's vector."""
    student: BertForPreTraining = model["student"]
    output = student.bert(**{key: batch[key] for key in ("input_ids", "token_type_ids", "attention_mask")})
    result = {}
    if len(batch["labels"]):
        hidden = output.last_hidden_state.flatten(0, 1)[batch["positions"]]
        result["mlm"] = functional.cross_entropy(student.cls.predictions(hidden).float(), batch["labels"])
    if len(batch["vectors"]):
        ours = model["project"](output.pooler_output)[batch["with_vector"]]
        result |= distillation(ours, material.vectors[batch["vectors"]])
    return result


def learn_words(model: nn.ModuleDict, material: Material, arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Train the embeddings alone, as a bag of words: projection of their mean over tokens → the teacher's vector."""
    embeddings, project = model["student"].bert.embeddings, model["project"]
    embeddings.position_embeddings.requires_grad_(False)  # a bag has no order
    parameters = [weight for part in (embeddings, project) for weight in part.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=WORD_RATE)
    drawn = draw_batches(material, arguments.passages, random.Random(arguments.seed))
    batches = (batch for batch in drawn if batch[0].vector is not None)
    with tqdm(range(WORD_STEPS), desc="words") as bar:
        for step in bar:
            for rows in (next(batches) for _ in range(WORD_BATCHES)):
                batch = collate(rows, material.tokenizer, masking=(0.0, 0.0))
                mask = batch["attention_mask"].unsqueeze(-1)
                vectors = (embeddings(batch["input_ids"], batch["token_type_ids"]) * mask).sum(1) / mask.sum(1)
                parts = distillation(project(vectors)[batch["with_vector"]], material.vectors[batch["vectors"]])
                sum(getattr(arguments, name) * loss for name, loss in parts.items()).backward()
            optimizer.param_groups[0]["lr"] = WORD_RATE * (1 - step / WORD_STEPS)
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                bar.set_postfix({name: round(loss.item(), 3) for name, loss in parts.items()})
    embeddings.position_embeddings.requires_grad_(True)
    return model.state_dict()


@torch.no_grad()
def probe(model: nn.ModuleDict, material: Material, data: Path) -> dict[str, float]:
    """Retrieval accuracy English → X with the pooler's output on the held-out dev pairs of Tatoeba."""
    result = {}
    for language in ("deu", "ces"):
        rows = [
            row for row in read_rows(data / f"parallel_text/tatoeba_eng/{language}.jsonl.gz") if row["split"] == "dev"
        ]
        sides = []
        for key in ("eng", "text"):
            batch = material.tokenizer([row[key] for row in rows], padding=True, return_tensors="pt")
            sides.append(functional.normalize(model["student"].bert(**batch).pooler_output.float(), dim=-1))
        hits = (sides[0] @ sides[1].T).argmax(1) == torch.arange(len(rows))
        result[f"retrieval {language}"] = round(hits.float().mean().item(), 3)
    return result


def train(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)  # for the teacher
    arguments.work.mkdir(parents=True, exist_ok=True)
    material = prepare(arguments.data, arguments.work)
    torch.manual_seed(arguments.seed)
    random.seed(arguments.seed)
    student = build_student(material.tokenizer)
    model = nn.ModuleDict({"student": student, "project": nn.Linear(student.config.hidden_size, TEACHER_WIDTH)})
    model.load_state_dict(kept(arguments.work / "words.pkl", lambda: learn_words(model, material, arguments)))
    every_token = torch.tensor([token for ids in material.ids for token in ids])
    counts = every_token.bincount(minlength=student.config.vocab_size)
    with torch.no_grad():
        student.cls.predictions.bias.copy_(((counts + 0.1) / counts.sum()).log())
    model.to(torch.bfloat16)
    torch.set_num_threads(1)  # small matrices: a batch a thread wastes less than two threads on one batch
    rng = random.Random(arguments.seed)
    optimizer = Optimizer(model, "encoder.layer", arguments.rate, arguments.muon)
    checkpoint, log = arguments.work / "checkpoint.pt", arguments.work / "log.jsonl"
    spent, step, tokens = 0.0, 0, 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        spent, step, tokens = saved["spent"], saved["step"], saved["tokens"]
        rng.seed(arguments.seed + step)
    budget, batches, sums = arguments.minutes * 60, draw_batches(material, arguments.passages, rng), {}
    last_saved = spent

    def work_on(rows: list[Row]) -> tuple[tuple[torch.Tensor, ...], dict[str, float], int]:
        batch = collate(rows, material.tokenizer, (arguments.masked_rows, arguments.masked))
        parts = losses(model, batch, material)
        nothing = 0.0 * optimizer.weights[0].flatten()[0]  # foreign passages, none of them masked: no loss at all
        total = sum((getattr(arguments, name) * loss for name, loss in parts.items()), nothing)
        gradients = torch.autograd.grad(total, optimizer.weights, materialize_grads=True, allow_unused=True)
        return gradients, {name: loss.item() for name, loss in parts.items()}, int(batch["attention_mask"].sum())

    pool = ThreadPoolExecutor(arguments.threads)
    bar = tqdm(total=round(budget), initial=round(spent), unit="s", desc="training")
    with pool, bar, log.open("a") as lines:
        while spent < budget:
            start = time.monotonic()
            done = list(pool.map(work_on, [next(batches) for _ in range(BATCHES_A_STEP)]))
            optimizer.step([gradients for gradients, _, _ in done], schedule(spent / budget), pool)
            step, tokens = step + 1, tokens + sum(size for _, _, size in done)
            for _, parts, _ in done:
                for name, loss in parts.items():
                    sums.setdefault(name, []).append(loss)
            spent += time.monotonic() - start
            bar.update(min(round(spent), bar.total) - bar.n)
            if step % 20 == 0 or spent >= budget:
                row = {"step": step, "seconds": round(spent), "tokens": tokens}
                row |= {name: round(sum(values) / len(values), 4) for name, values in sums.items()}
                if step % 100 == 0 or spent >= budget:
                    row |= probe(model, material, arguments.data)
                print(json.dumps(row), file=lines, flush=True)
                bar.set_postfix({name: row[name] for name in sums})
                sums = {}
            if spent - last_saved >= CHECKPOINT_SECONDS or spent >= budget:
                last_saved = spent
                state = {"optimizer": optimizer.state_dict(), "spent": spent, "step": step, "tokens": tokens}
                torch.save(state, checkpoint.with_suffix(".part"))
                os.replace(checkpoint.with_suffix(".part"), checkpoint)
                if arguments.export:
                    export(student, material.tokenizer, arguments.export)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data pack")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and the log")
    parser.add_argument("--export", type=Path, help="folder of the finished encoder, rewritten at each checkpoint")
    parser.add_argument(
        "--minutes", type=float, default=30, help="training time; the learning rate falls to zero over it"
    )
    parser.add_argument("--passages", type=int, default=2500, help="passages of novels beside 8,000 pairs")
    parser.add_argument("--masked-rows", type=float, default=0.8)
    parser.add_argument("--masked", type=float, default=0.2, help="share of the tokens of a masked row")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--mlm", type=float, default=1.0, help="weight of the masked-LM loss")
    parser.add_argument("--cosine", type=float, default=5.0)
    parser.add_argument("--similarity", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())

"""Raw text as blocks: all of the text, each document alone, masks and order that follow from seed, epoch and place."""

import gzip
import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from lms import lm
from raw import byte_tokenizer, chain
from small import write_rows
from tiny import MASK, tiny_tokenizer

from graftlm import raw_text
from graftlm.errors import DataError
from graftlm.evaluation.bits_per_byte import collate
from graftlm.language_modelling import CausalLM, MaskedLM
from graftlm.measure.likelihood import IGNORED
from graftlm.raw_text import Blocks, Counts, Documents, Masking, ShuffledBlocks, blocks, cached_blocks, held_out
from graftlm.recipe import Recipe, Source, load_recipe

TEXTS = [*chain(12, seed=0), "Ünï 語é\n\n  w2 🌱! ", "w1 [MASK] w2"]


@pytest.fixture
def recipe(tmp_path):
    def recipe(train: str = "x.jsonl", task: str = "masked_lm", **data: object) -> Recipe:
        path = tmp_path / "recipe.yaml"
        values = {"train": train, "test": {"eng": "x.jsonl"}, **data}
        path.write_text(json.dumps({"name": "x", "task": task, "data": values}), encoding="utf-8")
        return load_recipe(path)

    return recipe


def read(recipe: Recipe) -> list[str]:
    return list(Documents(recipe, recipe.data.train, "train"))


def refused(recipe: Recipe) -> str:
    with pytest.raises(DataError) as caught:
        read(recipe)
    return str(caught.value)


def write(path, texts=TEXTS):
    return write_rows(path, [{"text": text} for text in texts])


# ---------------------------------------------------------------- documents


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_every_kind_of_file_gives_the_same_documents(recipe, tmp_path, name):
    write(tmp_path / name)
    assert read(recipe(name)) == TEXTS


def test_what_a_text_file_holds_is_said_by_the_recipe(recipe, tmp_path):
    text = "\ufeffone\ntwo\n\n \nthree\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text[1:].encode()))
    for name in ("a.txt", "b.txt.gz"):
        assert read(recipe(name)) == ["one\ntwo", "three"], "blank lines end a paragraph; its own line breaks stay"
        assert read(recipe(name, documents="lines")) == ["one", "two", "three"]
        assert read(recipe(name, documents="files")) == [text[1:]]


def test_a_pattern_names_many_files_in_the_order_of_their_names(recipe, tmp_path):
    for name, texts in (("b.jsonl", TEXTS[3:]), ("a.jsonl", TEXTS[:3])):
        write(tmp_path / "novels" / name, texts)
    (tmp_path / "novels" / "notes.md").write_text("no text of ours")
    assert read(recipe("novels/*")) == TEXTS
    assert "no file fits the pattern" in refused(recipe("novels/*.txt"))


def test_a_folder_laid_out_as_a_hub_data_set(recipe, tmp_path):
    write(tmp_path / "set" / "train.jsonl")
    assert read(recipe("./set")) == TEXTS


def test_another_column(recipe, tmp_path):
    write_rows(tmp_path / "x.jsonl", [{"chapter": "w1 w2", "title": "t"}])
    assert read(recipe(text="chapter")) == ["w1 w2"]
    message = refused(recipe())
    assert "x.jsonl, row 1: there is no column 'text'" in message
    assert "chapter, title" in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.jsonl", b"", "there is no text in it"),
        ("x.txt", b"\n \n", "there is no text in it"),
        ("x.jsonl", b'{"text": "w1 w2"}\n{"text": " "}\n', "row 2: column 'text' is empty"),
        ("x.jsonl", b'{"text": 3}\n', "row 1: column 'text' is not text"),
        ("x.jsonl", b'{"text": "\\ud800 w1"}\n', "row 1: half of a surrogate pair"),
        ("x.txt", "é".encode("latin-1"), "not UTF-8"),
        ("x.txt.gz", gzip.compress(b"w1 w2 " * 99, mtime=0)[:-9], "not whole gzip"),
        ("x.xml", b"<x/>", "no such file"),
    ],
)
def test_files_that_are_refused(recipe, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert expected in refused(recipe(name if not name.endswith("xml") else "none.txt"))


def test_a_text_file_has_no_labels(recipe, tmp_path):
    from graftlm.data import load_split

    (tmp_path / "x.txt").write_text("w1 w2")
    with pytest.raises(DataError, match=r"(?s)unknown kind of file.*\.jsonl"):
        load_split(recipe(task="classification"), Source(path="x.txt"), "train")


def test_held_out_text_has_its_bytes_as_labels(recipe, tmp_path):
    write(tmp_path / "x.jsonl")
    split = held_out(recipe(), Source(path="x.jsonl"), "test")
    assert split.labels == [len(text.encode()) for text in TEXTS]
    assert split.ids == list(range(len(TEXTS)))


# ---------------------------------------------------------------- blocks


def placed(texts):
    return [(f"row {number}", text) for number, text in enumerate(texts, start=1)]


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
@pytest.mark.parametrize("length", [9, 16, 500])
def test_the_blocks_hold_all_of_the_text_once(task, length):
    tokenizer = byte_tokenizer() if task == "causal_lm" else tiny_tokenizer()
    counts = Counts()
    made = list(blocks(placed(TEXTS), tokenizer, task, length, counts))
    assert max(len(ids) for ids, _, _ in made) <= length
    for text in TEXTS:
        alone = list(blocks([("here", text)], tokenizer, task, length))
        assert made[: len(alone)] == alone, "a document's blocks do not depend on what stands around it"
        made = made[len(alone) :]
        whole = [token for ids, first, last in alone for token in ids[first:last]]
        if task == "causal_lm":
            assert whole.pop() == tokenizer.eos_token_id
            assert tokenizer.decode(whole) == text
            given = [ids[first - 1] for ids, first, _ in alone]
            before = [tokenizer.eos_token_id, *[ids[last - 1] for ids, _, last in alone]]
            assert given == before[: len(alone)], "each first token follows the one that stands before it in the text"
        else:
            assert whole == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert MASK not in whole
            assert all((ids[0], ids[-1]) == (2, 1) for ids, _, _ in alone)
    assert made == []
    assert counts.documents == len(TEXTS)
    assert counts.characters == sum(map(len, TEXTS))
    assert counts.words == sum(len(text.split()) for text in TEXTS)


def test_a_document_of_one_token_is_refused():
    with pytest.raises(DataError, match=r"(?s)row 2: a document of fewer than two tokens.*found:   1 tokens"):
        list(blocks(placed(["w1 w2", "w1"]), tiny_tokenizer(), "masked_lm", 16))


def made_blocks(tmp_path, recipe, task="masked_lm", texts=TEXTS, length=16) -> Blocks:
    write(tmp_path / "x.jsonl", texts)
    documents = Documents(recipe(task=task), Source(path="x.jsonl"), "train")
    table, _ = cached_blocks(documents, tiny_tokenizer(), task, length, tmp_path / "cache")
    masking = Masking(0.15, MASK, np.arange(5, 96)) if task == "masked_lm" else None
    return Blocks(table, seed=7, batch_size=4, masking=masking)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "qwen3"])
def test_causal_loss_and_gradient_are_those_of_documents_alone(architecture, tmp_path, recipe):
    """Each document in a batch of one, one prefix at a time, against our batches under gradient accumulation."""
    tokenizer, model = tiny_tokenizer(), lm(architecture, dropout=0.0)
    texts = chain(6, seed=4, longest=10)
    nats = tokens = 0
    for text in texts:
        ids = [2, *tokenizer(text, add_special_tokens=False)["input_ids"], 1]
        for end in range(1, len(ids)):
            nats = nats - model(input_ids=torch.tensor([ids[:end]])).logits[0, -1].log_softmax(-1)[ids[end]]
            tokens += 1
    (nats / tokens).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    examples = made_blocks(tmp_path, recipe, "causal_lm", texts)
    loss_of, total = CausalLM("causal_lm", None).loss(), 0.0
    for rows in ([0, 1], [2, 3, 4], [5]):
        batch = collate([examples[row] for row in rows], tokenizer)
        labels = batch.pop("labels")
        loss = loss_of(model(**batch), labels, num_items_in_batch=torch.tensor(tokens))
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(float(nats.detach() / tokens), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("architecture", ["bert", "xlm-roberta", "modernbert"])
def test_masked_loss_is_that_of_documents_alone(architecture, tmp_path, recipe):
    tokenizer, model = tiny_tokenizer(), lm(architecture, dropout=0.0).eval()
    examples = made_blocks(tmp_path, recipe, texts=chain(6, seed=4, longest=10))
    nats, tokens = 0.0, 0
    for row in range(len(examples)):
        one = examples[row]
        logits = model(input_ids=torch.tensor([one["input_ids"]])).logits[0].log_softmax(-1)
        for place, label in enumerate(one["labels"]):
            if label != IGNORED:
                nats, tokens = nats - logits[place, label].item(), tokens + 1
    batch = collate([examples[row] for row in range(len(examples))], tokenizer)
    labels = batch.pop("labels")
    loss = MaskedLM("masked_lm", None).loss()(model(**batch), labels)
    assert loss.item() == pytest.approx(nats / tokens, rel=1e-5)


# ---------------------------------------------------------------- masks and order


def test_masks_follow_from_seed_epoch_and_row(tmp_path, recipe):
    examples = made_blocks(tmp_path, recipe)
    n = len(examples)
    assert [examples[i] for i in range(3 * n)] == [examples[i] for i in range(3 * n)]
    again = made_blocks(tmp_path, recipe)
    assert examples[2 * n + 3] == again[2 * n + 3]
    differing = sum(examples[row]["labels"] != examples[n + row]["labels"] for row in range(n))
    assert differing > n / 2, "another epoch, other masks"
    other = Blocks(examples._table, seed=8, batch_size=4, masking=Masking(0.15, MASK, np.arange(5, 96)))
    assert any(examples[row] != other[row] for row in range(n))


def test_berts_shares(tmp_path, recipe):
    examples = made_blocks(tmp_path, recipe, texts=[" ".join(["w1"] * 398)] * 4, length=400)
    kinds: Counter[str] = Counter()
    for position in range(4 * 20):
        one = examples[position]
        chosen = [place for place, label in enumerate(one["labels"]) if label != IGNORED]
        assert len(chosen) == 60, "15 % of 398, rounded"
        assert (one["input_ids"][0], one["input_ids"][-1]) == (2, 1), "marks are never hidden"
        (word,) = set(one["labels"]) - {IGNORED}
        assert all(token == word for place, token in enumerate(one["input_ids"][1:-1], 1) if place not in chosen)
        for place in chosen:
            token = one["input_ids"][place]
            kinds["mask" if token == MASK else "same" if token == word else "other"] += 1
    total = sum(kinds.values())
    # a replaced token is the same one in 1 of 91 cases; five standard errors
    for kind, share in (("mask", 0.8), ("other", 0.1 * 90 / 91), ("same", 0.1 + 0.1 / 91)):
        assert abs(kinds[kind] / total - share) < 5 * (share * (1 - share) / total) ** 0.5, kind


def test_each_block_comes_once_an_epoch_among_blocks_of_like_length():
    lengths = np.random.default_rng(0).integers(5, 100, size=1003)
    order = ShuffledBlocks(lengths, batch_size=8, seed=3)
    first = list(order)
    assert first == list(order)
    assert sorted(first) == list(range(1003))
    order.epoch = 2
    third = list(order)
    assert sorted(third) == list(range(2 * 1003, 3 * 1003))
    assert [i - 2 * 1003 for i in third] != first
    batches = [lengths[first[i : i + 8]] for i in range(0, 1003, 8)]
    padded = sum(len(batch) * batch.max() for batch in batches)
    assert padded < 1.1 * lengths.sum(), "at random it would be about 1.7 times"
    assert np.corrcoef([batch.mean() for batch in batches], np.arange(len(batches)))[0, 1] < 0.4, "no order of lengths"


# ---------------------------------------------------------------- the cache


def test_the_cache_is_made_once_for_the_same_files_and_settings(tmp_path, recipe, monkeypatch):
    made = made_blocks(tmp_path, recipe)
    (file,) = (tmp_path / "cache").glob("*.arrow")
    stamp = file.stat().st_mtime_ns
    documents = Documents(recipe(), Source(path="x.jsonl"), "train")
    with monkeypatch.context() as patch:
        patch.setattr(raw_text, "blocks", None)  # would fail if it were called
        table, counts = cached_blocks(documents, tiny_tokenizer(), "masked_lm", 16, tmp_path / "cache")
    assert table[:] == made._table[:]
    assert counts.documents == len(TEXTS)
    assert file.stat().st_mtime_ns == stamp
    for length, texts in ((12, TEXTS), (16, TEXTS[1:])):
        made_blocks(tmp_path, recipe, texts=texts, length=length)
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 3
    assert not list((tmp_path / "cache").glob("*.part"))


def test_another_text_than_that_of_the_checkpoints_is_refused(tmp_path, recipe):
    made_blocks(tmp_path, recipe)
    (tmp_path / "cache" / "checkpoint-3").mkdir()
    made_blocks(tmp_path, recipe)
    with pytest.raises(DataError, match=r"(?s)has changed since.*x\.jsonl.*name=ANOTHER_NAME"):
        made_blocks(tmp_path, recipe, texts=TEXTS[1:])


def test_memory_does_not_grow_with_the_corpus(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(raw_text, "_CHARACTERS", 5_000)
    monkeypatch.setattr(raw_text, "_ROWS", 50)
    cached_blocks(
        Documents(recipe(write(tmp_path / "warm.jsonl").name), Source(path="warm.jsonl"), "train"),
        tiny_tokenizer(),
        "causal_lm",
        16,
        tmp_path / "warm",
    )
    peaks = []
    for count in (200, 1600):
        write(tmp_path / f"{count}.jsonl", chain(count, seed=0))
        documents = Documents(recipe(f"{count}.jsonl"), Source(path=f"{count}.jsonl"), "train")
        tracemalloc.start()
        table, _ = cached_blocks(documents, tiny_tokenizer(), "causal_lm", 16, tmp_path / "cache")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert table.cache_files, "memory-mapped"
    assert peaks[1] < 1.3 * peaks[0]

"""Items to features and logits to predictions: alignment, windows and decoding, each against a second way to get it."""

import json

import numpy as np
import pytest
from tiny import BOS, EOS, UNKNOWN, tiny_tokenizer

from graftlm.data import Answers, Labels, Split
from graftlm.errors import ModelError, RecipeError
from graftlm.recipe import Training, load_recipe
from graftlm.tasks import IGNORED, Answering, Tokens, WholeText, check_length

TOKENIZER = tiny_tokenizer()


def split(texts, labels, texts_b=None) -> Split:
    return Split("test.jsonl", list(range(len(texts))), texts, texts_b, labels)


def test_classification_counts_what_it_cuts_and_does_not_know():
    task = WholeText("classification", Labels(("no", "yes")))
    items = split(["w1 w2", " ".join(["w3"] * 20), "w1 never"], ["yes", "no", "yes"])
    encoded = task.encode(items, TOKENIZER, Training(max_length=8))
    rows = [list(row["input_ids"]) for row in encoded.features]
    assert [len(row) for row in rows] == [4, 8, 4]
    assert rows[0] == [BOS, *TOKENIZER.convert_tokens_to_ids(["w1", "w2"]), EOS]
    assert encoded.features["labels"][:] == [1, 0, 1]
    assert (encoded.truncated, encoded.unknown, encoded.tokens) == (1, 1, 2 + 6 + 2)
    assert rows[2][2] == UNKNOWN


def test_a_pair_is_one_input_with_both_texts():
    task = WholeText("regression", Labels(()))
    encoded = task.encode(split(["w1"], [0.5], ["w2 w3"]), TOKENIZER, Training())
    ids = TOKENIZER.convert_tokens_to_ids(["w1", "w2", "w3"])
    assert encoded.features[0]["input_ids"] == [BOS, ids[0], EOS, ids[1], ids[2], EOS]
    assert encoded.features[0]["labels"] == 0.5


def test_probabilities_and_names():
    logits = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, 3.0]])
    single = WholeText("classification", Labels(("a", "b", "c"))).decode(logits, None, None)
    assert [one.value for one in single] == ["a", "b"], "a tie goes to the first"
    by_hand = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert single[0].scores == pytest.approx(by_hand, abs=1e-6)
    several = WholeText("multi_label", Labels(("a", "b", "c"))).decode(logits, None, None)
    assert [one.value for one in several] == [["a", "c"], ["b", "c"]]
    assert several[0].scores == pytest.approx([1 / (1 + np.exp(-x)) for x in logits[0]], abs=1e-6)
    huge = WholeText("classification", Labels(("a", "b"))).decode(np.array([[1e4, -1e4]]), None, None)
    assert huge[0].scores == [1.0, 0.0]


def test_multi_label_targets_and_gold():
    task = WholeText("multi_label", Labels(("a", "b", "c")))
    encoded = task.encode(split(["w1", "w2"], [["c", "a"], []]), TOKENIZER, Training())
    assert encoded.features["labels"][:] == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert task.gold([["b"], []]) == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("max_length", [8, 64])
def test_every_word_has_one_label_and_one_prediction(max_length):
    """Words of several tokens and texts of several windows; logits that spell the gold tags must decode to them."""
    tags = Labels(("O", "B-X", "I-X"))
    task = Tokens("token_classification", tags)
    # BERT's pre-tokenizer splits at punctuation: "w1.w2" is three tokens, one word
    words = [["w1", "w2.w3", "w4"], [f"w{number % 9}-w1" for number in range(11)]]
    gold = [["B-X", "I-X", "O"], ["B-X", "O", "I-X", "O", "O", "B-X", "I-X", "I-X", "O", "B-X", "O"]]
    items = split(words, gold)
    encoded = task.encode(items, TOKENIZER, Training(max_length=max_length))
    rows = list(encoded.features)
    assert max(len(row["input_ids"]) for row in rows) <= max_length
    assert (len(rows) > 2) == (max_length == 8)
    labels = [label for row in rows for label in row["labels"] if label != IGNORED]
    assert labels == [tags.ids[tag] for sentence in gold for tag in sentence], "in order, none twice, none lost"

    width = max(len(row["labels"]) for row in rows)
    logits = np.zeros((len(rows), width, 3))
    logits[:, :, 2] = 1.0  # what positions without a label say must not matter
    for number, row in enumerate(rows):
        for position, label in enumerate(row["labels"]):
            if label != IGNORED:
                logits[number, position] = 5 * np.eye(3)[label]
    assert [one.value for one in task.decode(logits, encoded, items)] == gold


def test_a_word_without_tokens_counts_as_outside():
    task = Tokens("token_classification", Labels(("B-X", "O")))
    items = split([["w1", "\u200b\t", "w2"]], [["B-X", "O", "B-X"]])
    encoded = task.encode(items, TOKENIZER, Training())
    logits = np.zeros((1, len(encoded.features[0]["labels"]), 2))
    logits[:, :, 0] = 1
    said = task.decode(logits, encoded, items)[0].value
    assert len(said) == 3
    assert said[0] == said[2] == "B-X"


CONTEXT = " ".join(f"w{number}" for number in range(40))


def answers(*texts: str) -> Answers:
    return Answers(texts, tuple(CONTEXT.index(text) for text in texts))


def test_answers_are_found_again_in_every_window_that_holds_them():
    task = Answering("question_answering", Labels(()))
    items = split(["w50 w51", "w52"], [answers("w7 w8 w9"), answers("w30 w31")], [CONTEXT, CONTEXT])
    encoded = task.encode(items, TOKENIZER, Training(max_length=20, stride=6))
    assert len(encoded.owners) > 4
    held = [0, 0]
    for row, owner, place in zip(encoded.features, encoded.owners, encoded.places, strict=True):
        start, end = row["start_positions"], row["end_positions"]
        covered = {position: (left, right) for position, left, right in place}
        if start:
            held[owner] += 1
            assert CONTEXT[covered[start][0] : covered[end][1]] == items.labels[owner].texts[0]
        else:
            # the independent way: the text between the window's first and last character does not hold the answer
            assert end == 0
            assert items.labels[owner].texts[0] not in CONTEXT[place[0][1] : place[-1][2]]
    assert min(held) >= 1
    seen = {
        position
        for owner, place in zip(encoded.owners, encoded.places, strict=True)
        if owner == 0
        for _, position, _ in place
    }
    assert len(seen) == 40, "the windows of one item cover its whole context"


def _logits(encoded, spans: dict[int, str], null: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    width = max(len(row["input_ids"]) for row in encoded.features)
    starts, ends = np.full((2, len(encoded.owners), width), -5.0)
    starts[:, 0] = ends[:, 0] = null
    for number, (owner, place) in enumerate(zip(encoded.owners, encoded.places, strict=True)):
        text = spans.get(owner)
        for position, left, right in place:
            if text and left == CONTEXT.index(text):
                starts[number, position] = 4.0
            if text and right == CONTEXT.index(text) + len(text):
                ends[number, position] = 4.0
    return starts, ends


def test_logits_that_point_at_a_span_give_its_text():
    task = Answering("question_answering", Labels(()))
    items = split(["w50", "w51"], [answers("w3 w4"), answers("w30")], [CONTEXT, CONTEXT])
    encoded = task.encode(items, TOKENIZER, Training(max_length=20, stride=6))
    said = task.decode(_logits(encoded, {0: "w3 w4", 1: "w30"}), encoded, items)
    assert [one.value for one in said] == ["w3 w4", "w30"]
    assert task.gold([one.value for one in said]) == ["w3 w4", "w30"]
    assert task.gold(items.labels) == [["w3 w4"], ["w30"]]


def test_no_answer_only_where_training_has_such_questions():
    items = split(["w50", "w51"], [answers("w3 w4"), Answers((), ())], [CONTEXT, CONTEXT])
    for refuses in (False, True):
        task = Answering("question_answering", Labels(()))
        task.may_refuse = refuses
        encoded = task.encode(items, TOKENIZER, Training(max_length=20, stride=6))
        said = task.decode(_logits(encoded, {0: "w3 w4"}, null=1.0), encoded, items)
        assert said[0].value == "w3 w4"
        assert (said[1].value == "") == refuses


def test_an_answer_never_ends_before_it_starts():
    task = Answering("question_answering", Labels(()))
    items = split(["w50"], [answers("w3")], ["w1 w2 w3"])
    encoded = task.encode(items, TOKENIZER, Training())
    positions = [position for position, *_ in encoded.places[0]]
    starts, ends = np.full((2, 1, len(encoded.features[0]["input_ids"])), -5.0)
    starts[0, positions[2]], ends[0, positions[0]] = 9.0, 9.0
    said = task.decode((starts, ends), encoded, items)[0].value
    assert said in ("w1", "w3"), "the best span that exists: one of the two peaks with the other end beside it"


@pytest.mark.parametrize(
    ("question", "training", "expected"),
    [
        ("w1", Training(max_length=32, stride=16), "stride"),
        (" ".join(["w1"] * 30), Training(max_length=32, stride=8), "row 1"),
    ],
)
def test_windows_need_room(question, training, expected):
    task = Answering("question_answering", Labels(()))
    with pytest.raises(RecipeError, match=expected):
        task.encode(split([question], [answers("w3")], [CONTEXT]), TOKENIZER, training)


def test_more_items_than_one_chunk_stay_in_order(monkeypatch):
    monkeypatch.setattr("graftlm.task._CHUNK", 3)
    items = split([f"w{number}" for number in range(10)], ["a", "b"] * 5)
    encoded = WholeText("classification", Labels(("a", "b"))).encode(items, TOKENIZER, Training())
    assert encoded.owners == list(range(10))
    assert [row["input_ids"][1] for row in encoded.features] == TOKENIZER.convert_tokens_to_ids(items.texts)


def test_lengths_that_do_not_fit(tmp_path):
    path = tmp_path / "r.yaml"
    values = {"name": "x", "task": "masked_lm", "data": {"train": "a.jsonl", "test": {"eng": "a.jsonl"}}}
    path.write_text(json.dumps(values), encoding="utf-8")

    class Config:
        max_position_embeddings = 20

    with pytest.raises(ModelError, match=r"training\.max_length=20"):
        check_length(load_recipe(path), TOKENIZER, Config)

"""Metrics against scikit-learn and scipy (items repeated, not weighted); SQuAD and entities worked out by hand."""

from itertools import chain

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from graftlm.errors import DataError, SetupError
from graftlm.evaluation.metrics import METRICS, TASKS, answer_f1, entities, majority, metrics_for, normalise, statistics


def whole(task, labels, predictions):
    """The scores of all items counted once."""
    return {name: f(np.ones((1, len(labels))))[0] for name, f in statistics(task, labels, predictions).items()}


def draws(n, rows=25, seed=3):
    """Resampled item numbers (rows, n) and how often each item is in them."""
    drawn = np.random.default_rng(seed).integers(n, size=(rows, n))
    return drawn, np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(float)


def test_classification_equals_scikit_learn_on_the_set_and_on_every_resample():
    rng = np.random.default_rng(0)
    names = np.array(["news", "sport", "travel", "rare"])
    labels, guesses = names[rng.choice(4, 40, p=[0.4, 0.3, 0.27, 0.03])], names[rng.integers(4, size=40)]
    assert "rare" in labels or "rare" in guesses
    drawn, w = draws(40)
    made = statistics("classification", labels, guesses)
    assert list(made) == ["accuracy", "macro_f1"]
    for row, accuracy, f1 in zip(drawn, made["accuracy"](w), made["macro_f1"](w), strict=True):
        assert accuracy == pytest.approx(sk.accuracy_score(labels[row], guesses[row]))
        assert f1 == pytest.approx(sk.f1_score(labels[row], guesses[row], average="macro", zero_division=0))


def test_multi_label_equals_scikit_learn():
    rng = np.random.default_rng(1)
    labels, guesses = (rng.random((30, 5)) < [0.5, 0.4, 0.3, 0.1, 0.03]).astype(int), rng.integers(2, size=(30, 5))
    guesses[:, 4] = 0
    drawn, w = draws(30)
    made = statistics("multi_label", labels, guesses)
    for row, micro, macro in zip(drawn, made["micro_f1"](w), made["macro_f1"](w), strict=True):
        assert micro == pytest.approx(sk.f1_score(labels[row], guesses[row], average="micro"))
        expected = sk.f1_score(labels[row], guesses[row], average="macro", zero_division=np.nan)
        assert macro == pytest.approx(expected)


@pytest.mark.parametrize("ties", [False, True])
def test_regression_equals_scipy(ties):
    rng = np.random.default_rng(2)
    labels = rng.normal(size=30) + 1000
    guesses = labels + rng.normal(size=30)
    if ties:
        labels, guesses = labels.round(), guesses.round()
    drawn, w = draws(30)
    made = statistics("regression", labels, guesses)
    assert list(made) == ["pearson", "spearman", "rmse"]
    for i, row in enumerate(drawn):
        x, y = labels[row], guesses[row]
        assert made["pearson"](w)[i] == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-9)
        assert made["spearman"](w)[i] == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-9)
        assert made["rmse"](w)[i] == pytest.approx(sk.root_mean_squared_error(x, y))


def test_tokens_equal_scikit_learn_on_all_tokens_in_a_row():
    rng = np.random.default_rng(4)
    lengths = rng.integers(0, 6, size=12)
    lengths[0] = 0
    labels = [list(rng.choice(["NOUN", "VERB", "DET"], n)) for n in lengths]
    guesses = [list(rng.choice(["NOUN", "VERB", "X"], n)) for n in lengths]
    flat, flat_guesses = list(chain.from_iterable(labels)), list(chain.from_iterable(guesses))
    scores = whole("token_classification", labels, guesses)
    assert list(scores) == ["token_f1", "token_accuracy"]
    assert scores["token_accuracy"] == pytest.approx(sk.accuracy_score(flat, flat_guesses))
    assert scores["token_f1"] == pytest.approx(sk.f1_score(flat, flat_guesses, average="macro", zero_division=0))


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", {("PER", 0, 1), ("LOC", 3, 3)}),
        ("B-PER B-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("I-PER I-LOC I-LOC", {("PER", 0, 0), ("LOC", 1, 2)}),  # IOB: a new type begins an entity
        ("O I-ORG I-ORG O", {("ORG", 1, 2)}),  # no B-: opened as the CoNLL script does
        ("B-PER I-LOC", {("PER", 0, 0), ("LOC", 1, 1)}),
        ("S-PER S-PER B-LOC I-LOC E-LOC O", {("PER", 0, 0), ("PER", 1, 1), ("LOC", 2, 4)}),
        ("U-PER L-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("B-A-B I-A-B", {("A-B", 0, 1)}),  # a type with a hyphen
        ("O O", set()),
        ("", set()),
    ],
)
def test_entities_by_hand(tags, expected):
    assert entities(tags.split()) == expected


def test_entity_f1_by_hand():
    labels = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG", "O", "O"]]
    guesses = [["B-PER", "I-PER", "O", "B-ORG"], ["O", "B-ORG", "I-ORG", "O"]]
    # gold 3, guessed 3, right 1 (PER; LOC has the wrong type, ORG the wrong end): 2·1 / 6; tokens: 6 of 8
    scores = whole("token_classification", labels, guesses)
    assert scores == {"entity_f1": pytest.approx(1 / 3), "token_accuracy": pytest.approx(6 / 8)}
    # the first item alone: gold 2, guessed 2, right 1
    assert statistics("token_classification", labels, guesses)["entity_f1"](np.array([[3.0, 0.0]]))[0] == 0.5


def test_squad_by_hand():
    assert normalise("  An  apple, the (red) one's a theory.") == "apple red ones theory"
    assert normalise("Der Hund – „bellt“") == "der hund – „bellt“", "only ASCII punctuation and English articles go"
    # {eiffel, tower} against {eiffel, tower, in, paris}: precision 2/4, recall 2/2
    assert answer_f1("The Eiffel Tower", "eiffel tower, in Paris") == pytest.approx(2 * 0.5 * 1 / 1.5)
    # words as a bag: {very, very, good} against {very, good, good}: 2 shared of 3 and 3
    assert answer_f1("very very good", "very good good") == pytest.approx(2 / 3)
    assert answer_f1("the", "a") == 1, "both empty after normalising"
    assert answer_f1("", "something") == 0
    assert answer_f1("日本語 です", "日本語です") == 0, "no segmentation: a word is what spaces bound"


def test_squad_takes_the_best_of_the_accepted_answers():
    labels = [["Paris", "the city of Paris"], [], "Berlin", ["1 May", "May 1"]]
    guesses = ["city of Paris", "", "Bonn", "on May 1"]
    scores = whole("question_answering", labels, guesses)
    assert scores["exact_match"] == pytest.approx(2 / 4)
    assert scores["f1"] == pytest.approx((1 + 1 + 0 + 0.8) / 4)


def test_majority_by_hand():
    assert majority("classification", ["a", "a", "b"], ["a", "b", "b", "c"]) == 0.25
    assert majority("classification", [1, 0], [0, 0, 1, 1, 1]) == 0.4, "a tie goes to the label that sorts first"
    assert majority("classification", ["x"], ["a", "b"]) == 0, "a label that the test set does not have"
    # always label 1: TP 2, guessed 3, gold 4 → 2·2/7
    assert majority("multi_label", [[0, 1], [1, 1]], [[1, 1], [0, 1], [1, 0]]) == pytest.approx(4 / 7)
    assert majority("token_classification", [["N", "N", "V"]], [["N", "V"], ["N"]]) == pytest.approx(
        (2 * 2 / 5 + 0) / 2
    )
    assert majority("token_classification", [["O", "O", "B-X"]], [["B-X", "O"]]) == 0
    assert majority("regression", [1.0], [2.0]) is None
    assert majority("question_answering", ["a"], ["b"]) is None
    with pytest.raises(DataError, match="no training labels"):
        majority("classification", [], ["a"])


def test_what_is_not_defined_is_nan_and_warns_nobody():
    constant = whole("regression", [0.1 * 3, 0.2, 0.7], [0.1, 0.1, 0.1])
    assert np.isnan([constant["pearson"], constant["spearman"]]).all()
    assert constant["rmse"] == pytest.approx(np.sqrt((0.2**2 + 0.1**2 + 0.6**2) / 3))
    assert np.isnan(whole("regression", [1, 2, 3], [1, 2, np.nan])["rmse"]), "a diverged run has no score"
    assert np.isnan(whole("multi_label", [[0, 0]], [[0, 0]])["micro_f1"])
    assert whole("multi_label", [[0, 1]], [[0, 0]])["micro_f1"] == 0
    assert whole("classification", ["a", "a"], ["a", "a"]) == {"accuracy": 1, "macro_f1": 1}
    assert whole("classification", ["a", "a"], ["b", "b"]) == {"accuracy": 0, "macro_f1": 0}
    assert np.isnan(whole("token_classification", [["O"]], [["O"]])["entity_f1"])


@pytest.mark.parametrize(
    ("task", "labels", "guesses", "message"),
    [
        ("classification", ["a"], ["a", "b"], "differ in number"),
        ("classification", [], [], "nothing to score"),
        ("classification", ["a"], [0], "both be names"),
        ("multi_label", [[0, 2]], [[0, 1]], "0 and 1"),
        ("multi_label", [0, 1], [0, 1], "0 and 1"),
        ("regression", [np.nan], [1.0], "not a finite number"),
        ("regression", [1.0, 2.0], [[1.0, 2.0], [1.0, 2.0]], "one number per item"),
        ("token_classification", [["O", "O"]], [["O"]], "other numbers of tags"),
    ],
)
def test_data_that_does_not_fit_is_an_error(task, labels, guesses, message):
    with pytest.raises(DataError, match=message):
        statistics(task, labels, guesses)


def test_every_metric_has_a_title_and_unknown_tasks_say_what_there_is():
    assert {name for task in TASKS for name in metrics_for(task)} | {"token_f1"} == set(METRICS)
    with pytest.raises(SetupError, match=r"translation[\s\S]*classification, multi_label"):
        metrics_for("translation")

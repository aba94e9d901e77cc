"""Overlap of training text with evaluation text: on made-up text, and on what the starter encoder was trained on."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from graftlm.evaluation.leakage import EvaluationIndex, find_overlap, normalise

ROOT = Path(__file__).parents[2]
SENTENCE = "the old ferry leaves the harbour at seven every morning"
FIRST_EIGHT = "the old ferry leaves the harbour at seven"


def test_the_same_sentence_is_found():
    overlap = find_overlap(["something else", SENTENCE], [SENTENCE])
    assert overlap.sentences == (1,) and overlap.ngrams == ()
    assert 1 in overlap and 0 not in overlap and len(overlap) == 1
    assert (overlap.n_training, overlap.n_evaluation) == (2, 1)


@pytest.mark.parametrize(
    "variant",
    [
        SENTENCE.upper(),
        f"“{SENTENCE}!”",
        SENTENCE.replace(" ", "\u00a0 \n"),
        SENTENCE.replace("the", "ｔｈｅ"),
        SENTENCE.replace(" at ", ", at — "),
    ],
)
def test_case_punctuation_width_and_spaces_do_not_hide_a_sentence(variant):
    assert find_overlap([variant], [SENTENCE]).sentences == (0,)


def test_accents_are_kept_apart_but_their_encodings_are_not():
    assert normalise("e\u0301te\u0301") == normalise("été") != normalise("ete")
    assert normalise("STRASSE") == normalise("Straße")


def test_eight_shared_words_are_found_inside_a_longer_text():
    longer = f"She wrote that {FIRST_EIGHT} on most days of the week."
    assert find_overlap([longer], [SENTENCE]).ngrams == (0,)
    assert find_overlap([SENTENCE], [longer]).ngrams == (0,)


def test_seven_shared_words_are_not_an_overlap():
    seven = " ".join(FIRST_EIGHT.split()[:7])
    assert len(find_overlap([f"She wrote that {seven} eight on most days"], [SENTENCE])) == 0


def test_eight_words_spread_over_two_texts_are_not_an_overlap():
    words = FIRST_EIGHT.split()
    assert len(find_overlap([FIRST_EIGHT], [" ".join(words[:4]), " ".join(words[4:])])) == 0


def test_a_shorter_run_can_be_asked_for():
    assert find_overlap(["x old ferry leaves y"], [SENTENCE], n=3).ngrams == (0,)


def test_short_texts_count_only_as_a_whole():
    assert find_overlap(["Good morning", "Good morning to you"], ["good morning!"]).positions == {0}


def test_text_without_letters_matches_nothing():
    index = EvaluationIndex()
    index.update(["…", "!?", ""])
    assert index.size == 0
    assert index.match("…") is None


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def corpus_module():
    folder = ROOT / "benchmarks/starter_encoder"
    spec = importlib.util.spec_from_file_location("starter_encoder_corpus", folder / "corpus.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.skipif("GRAFTLM_DATA" not in os.environ, reason="GRAFTLM_DATA does not name the data pack")
def test_what_the_starter_encoder_was_trained_on_is_in_no_evaluation_set(corpus_module):
    data = Path(os.environ["GRAFTLM_DATA"])
    trained_on = list(corpus_module.select_corpus(data).texts())
    assert len(trained_on) > 100_000
    sib200 = [
        row["text"]
        for path in sorted(data.glob("multilingual/sib200_topic/*.gz"))
        for row in corpus_module.read_rows(path)
    ]
    messages = [
        text for path in sorted((ROOT / "src/graftlm/starter/messages").glob("test.*.jsonl")) for text in texts_of(path)
    ]
    assert len(sib200) > 50_000
    assert len(find_overlap(trained_on, sib200 + messages)) == 0

"""Overlap of training text with evaluation text, and the choice of the starter encoder's text by it."""

import gzip
import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

from graftlm.evaluation.leakage import EvaluationIndex, find_overlap, normalise

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


ROOT = Path(__file__).parents[2]


@pytest.fixture
def corpus_module():
    file = ROOT / "benchmarks/starter_encoder/corpus.py"
    if not file.exists():
        pytest.skip("the benchmarks are not in this installation")
    spec = importlib.util.spec_from_file_location("starter_encoder_corpus", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_what_stands_in_any_evaluation_file_is_not_trained_on(corpus_module, tmp_path):
    """The text of the starter encoder, chosen from a made-up data pack: a leak from each kind of evaluation file."""
    rng = random.Random(0)

    def sentence() -> str:
        return " ".join(f"{rng.randrange(10**6):06d}" for _ in range(10))

    def write(name: str, rows: list[dict]) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "at", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    evaluation = {
        "classification_en/sst2/dev.jsonl.gz": "text",
        "classification_en/mrpc/test.jsonl.gz": "text_b",
        "multilingual/xcopa/deu.dev.jsonl.gz": "choice1",
        "multilingual/copa/deu.test.jsonl.gz": "premise_eng",
        "multilingual/sib200_topic/deu.train.jsonl.gz": "text",
        "parallel_text/flores200_devtest/fra.jsonl.gz": "text",
        "parallel_text/wmt_news/ces.jsonl.gz": "ces",
        "parallel_text/multi30k/dev.jsonl.gz": "fra",
        "parallel_text/multi30k/test.jsonl.gz": "eng",
        "raw_text/wikitext2_eval/test.jsonl.gz": "text",
    }
    leaks = {name: sentence() for name in evaluation}
    for name, column in evaluation.items():
        write(name, [{column: leaks[name]}])
    for number in range(100):  # fewer files are no data pack
        write(f"multilingual/filler/{number}.test.jsonl.gz", [{"text": sentence()}])
    held_out = {"eng": sentence(), "text": sentence()}
    write("parallel_text/tatoeba_eng/deu.jsonl.gz", [held_out | {"split": "test"}])
    leaked = [*leaks.values(), *held_out.values(), f"before {next(iter(leaks.values()))} after"]

    clean = [(sentence(), sentence()) for _ in range(3)]
    pairs = [*clean, *((leak, sentence()) for leak in leaked), *((sentence(), leak) for leak in leaked)]
    rng.shuffle(pairs)
    write(
        "parallel_text/tatoeba_eng/deu.jsonl.gz",
        [{"eng": english, "text": other, "split": "train"} for english, other in pairs],
    )
    novel = [sentence() for _ in range(3)]
    write("raw_text/eltec_fra/train.jsonl.gz", [{"text": text} for text in [*novel, *leaked]])
    question = sentence()
    write("classification_en/query_wellformed/train.jsonl.gz", [{"text": text} for text in [question, *leaked]])
    for language in corpus_module.LANGUAGES + corpus_module.RELATED:
        write(f"parallel_text/tatoeba_eng/{language}.jsonl.gz", [])
    for language in ("eng", *corpus_module.LANGUAGES, *corpus_module.RELATED):
        write(f"parallel_text/ntrex128/{language}.jsonl.gz", [])
    write("parallel_text/tico19_eng/fra.jsonl.gz", [])
    for language in corpus_module.NOVELS:
        write(f"raw_text/eltec_{language}/train.jsonl.gz", [])

    chosen = corpus_module.select_corpus(tmp_path)
    assert sorted((english, other) for _, _, english, other in chosen.pairs) == sorted(clean)
    assert sorted(chosen.passages) == sorted(("fra", text) for text in novel)
    assert chosen.english == [question]
    assert chosen.dropped == {"tatoeba deu": 26, "novels fra": 13, "questions eng": 13}

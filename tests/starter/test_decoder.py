"""The shipped decoder: small enough, whole, a model of English, and one that reads the bytes of any language."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftlm.evaluation.bits_per_byte import bits_per_byte
from graftlm.recipe import load_recipe, shipped
from graftlm.run import run_recipe
from graftlm.starter import starter_model, starter_path

FOLDER = starter_model("starter-decoder")


def messages(language: str) -> list[str]:
    lines = starter_path(f"messages/test.{language}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def test_it_fits_into_the_repository_and_says_under_which_licence():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 16_000_000
    assert "Attribution-ShareAlike" in (FOLDER / "LICENSE").read_text()
    assert "license: cc-by-sa-4.0" in (FOLDER / "README.md").read_text()


def test_every_weight_is_there_and_training_starts_in_float32():
    model, report = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("text", ["naïve Ærø — 東京 🙂", "a_b 3.14 €", "Příliš žluťoučký kůň"])
def test_text_comes_back_byte_by_byte(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_english_is_far_better_than_french_and_than_its_words_in_another_order(model, tokenizer):
    english, french = messages("eng"), messages("fra")
    turned = [" ".join(reversed(text.split())) for text in english]
    scores = [
        bits_per_byte(model, tokenizer, texts, max_length=256, stride=64)["bits_per_byte"].value
        for texts in (english, turned, french)
    ]
    assert scores[0] < scores[1] - 0.5 and scores[0] < scores[2] - 1


def test_the_offline_recipe_teaches_it_french(tmp_path):
    recipe = load_recipe(shipped()["new-language"])
    settings = ["training.max_steps=10", f"output.folder={tmp_path}"]
    for language, source in recipe.data.test.items():  # a part of the test text, which takes longer than ten steps
        lines = starter_path(source.path.removeprefix("starter:")).read_text(encoding="utf-8").splitlines(keepends=True)
        part = tmp_path / f"{language}.jsonl"
        part.write_text("".join(lines[:25]), encoding="utf-8")
        settings.append(f"data.test.{language}={part}")
    result = run_recipe(load_recipe(shipped()["new-language"], settings), progress=False)
    change = {score.language: score.change for score in result.scores}
    assert change["fra"].low > 0.3, "bits per byte, of 10 of 189 steps"
    assert abs(change["eng"].value) < change["fra"].value

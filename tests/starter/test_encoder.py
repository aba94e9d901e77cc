"""The shipped encoder: small enough, whole, a language model, and one space for its languages."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

FOLDER = Path(__file__).parents[2] / "src/graftlm/starter/encoder"
MESSAGES = FOLDER.parent / "messages"
LANGUAGES = ("deu", "fra", "spa", "por", "ces")


def messages(language):
    lines = (MESSAGES / f"test.{language}.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["text"] for row in sorted(map(json.loads, lines), key=lambda row: row["id"])]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def masked_lm():
    return AutoModelForMaskedLM.from_pretrained(FOLDER).eval()


def test_it_fits_into_the_repository_and_says_under_which_licence():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 16_000_000
    assert "Attribution-ShareAlike" in (FOLDER / "LICENSE").read_text()
    assert "license: cc-by-sa-4.0" in (FOLDER / "README.md").read_text()


def test_every_weight_is_there_and_training_starts_in_float32():
    model, report = AutoModelForSequenceClassification.from_pretrained(FOLDER, num_labels=3, output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"classifier"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not AutoModelForMaskedLM.from_pretrained(FOLDER, output_loading_info=True)[1]["missing_keys"]


@pytest.mark.parametrize("text", ["naïve Ærø — 東京 🙂", "a_b 3.14 €", "Příliš žluťoučký kůň"])
def test_no_token_is_unknown(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@torch.no_grad()
@pytest.mark.parametrize("language", ["eng", *LANGUAGES])
def test_the_sentence_around_a_masked_token_helps_to_guess_it(masked_lm, tokenizer, language):
    """Against the same model that sees [MASK] everywhere: its best guess from the length of the sentence alone."""
    batch = tokenizer(messages(language)[::2], padding=True, return_tensors="pt")
    ids = batch.pop("input_ids")
    ordinary = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    chosen = ordinary & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.15)
    losses = [
        functional.cross_entropy(
            masked_lm(input_ids=ids.masked_fill(hidden, tokenizer.mask_token_id), **batch).logits[chosen], ids[chosen]
        ).item()
        for hidden in (chosen, ordinary)
    ]
    assert losses[0] < losses[1] - 0.3


@pytest.fixture(scope="module")
def vectors(tokenizer):
    """Of the messages in each language: by the shipped encoder and by a random one."""
    torch.manual_seed(0)
    models = (AutoModel.from_pretrained(FOLDER), AutoModel.from_config(AutoConfig.from_pretrained(FOLDER)))
    found = {}
    for language in ("eng", *LANGUAGES):
        batch = tokenizer(messages(language), padding=True, return_tensors="pt")
        with torch.no_grad():
            both = [model.eval()(**batch).pooler_output for model in models]
        found[language] = [functional.normalize(side - side.mean(0), dim=-1) for side in both]
    return found


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_message_is_near_its_translation_in_the_vector_that_a_classifier_reads(vectors, language):
    shipped, random = (
        ((other @ english.T).argmax(1) == torch.arange(len(other))).float().mean().item()
        for english, other in zip(vectors["eng"], vectors[language], strict=True)
    )
    assert shipped > 0.4
    assert random < 0.2

"""Batches that `FlareCollator` makes: answers, labels, pairs of texts, another encoder's tokens."""

import pytest
import torch
from adapters.flares import flare, outputs
from tiny import PAD, tiny_tokenizer

import graftlm
from graftlm.errors import DataError

WORDS = ("en", "kat", "sover", "a", "cat", "sleeps", "the", "dog", "hund", "yes", "no")
ROWS = [
    {"id": "s1", "danish": "en kat sover", "english": "a cat sleeps", "verdict": "yes no no yes yes no yes"},
    {"id": "s2", "danish": "hund", "english": "the dog", "verdict": "no"},
]
PAIRS = {"target": "danish", "source": "english"}


def words(side="right"):
    tokenizer = tiny_tokenizer(WORDS)
    tokenizer.padding_side = side
    return tokenizer


def writes():
    return flare("t5", "seq2seq_lm", task_type="SEQ_2_SEQ_LM")


def ids(text, **settings):
    return torch.tensor([words()(text, **settings).input_ids])


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_encoder_does_not_read_the_answer_that_the_decoder_writes(side):
    """The loss against one by hand: a row at a time, without padding, the answer in the decoder alone."""
    tokenizer, model, summed, count = words(side), writes(), 0.0, 0
    batch = graftlm.FlareCollator(tokenizer, **PAIRS, answer="verdict", encoder_decoder=True)(ROWS)
    assert set(batch) == {"input_ids", "attention_mask", "source_input_ids", "source_attention_mask", "labels"}
    for row, (target, answer) in zip(ROWS, zip(batch["input_ids"], batch["labels"], strict=True), strict=True):
        written = [*ids(row["verdict"], add_special_tokens=False)[0].tolist(), tokenizer.eos_token_id]
        assert answer.tolist() == written + [-100] * (8 - len(written))
        assert target[target != PAD].tolist() == ids(row["danish"])[0].tolist()
        by_hand = {"input_ids": ids(row["danish"]), "source_input_ids": ids(row["english"])}
        logits = outputs(model, by_hand | {"decoder_input_ids": torch.tensor([[PAD, *written[:-1]]])})[0]
        summed -= sum(logits[place].log_softmax(-1)[token] for place, token in enumerate(written))
        count += len(written)
    assert model.eval()(**batch).loss.item() == pytest.approx(summed.item() / count, rel=1e-4)


def test_tokens_as_labels_of_an_encoder_decoder_may_be_longer_than_the_text():
    rows = [row | {"label": words()(row["verdict"]).input_ids} for row in ROWS]
    labels = graftlm.FlareCollator(words("left"), **PAIRS, encoder_decoder=True)(rows)["labels"]
    assert labels.tolist() == [rows[0]["label"], rows[1]["label"] + [-100] * 6]


def test_an_answer_in_the_encoders_input_is_an_error():
    """As a collator for decoders makes it: the loss would fall, and what was learned is to copy."""
    batch = graftlm.FlareCollator(words(), **PAIRS, answer="verdict")(ROWS)
    with pytest.raises(DataError, match=r"would read the answer(.|\n)*encoder_decoder=True"):
        writes()(**batch)
    part = batch["attention_mask"] * (torch.arange(batch["attention_mask"].shape[1]) < 2)
    fused_in_part = batch | {"fusion_mask": part, "labels": batch["input_ids"].flip(1)}
    assert torch.isfinite(writes()(**fused_in_part).loss), "a fusion_mask alone is none"

"""Batches that `FlareCollator` makes: answers, labels, pairs of texts, another encoder's tokens."""

import pytest
import torch
from adapters.flares import flare, outputs
from tiny import PAD, tiny_model, tiny_tokenizer
from tokenizers import processors

import graftlm
from graftlm.errors import DataError, SetupError

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


def labelled(*labels):
    return [row | {"label": label} for row, label in zip(ROWS, labels, strict=True)]


def test_several_labels_an_item_are_as_they_were():
    """Against the loss by hand."""
    batch = graftlm.FlareCollator(words(), **PAIRS)(labelled([1.0, 0.0, 1.0], [0.0, 0.0, 1.0]))
    base = tiny_model("bert", dropout=0.0, problem_type="multi_label_classification")
    model, wanted = flare("bert", base=base), torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    assert torch.equal(batch["labels"], wanted)
    chances = outputs(model, batch).double().sigmoid()
    by_hand = -(wanted * chances.log() + (1 - wanted) * (1 - chances).log()).mean()
    assert model.eval()(**batch).loss.item() == pytest.approx(by_hand.item(), rel=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_tokens_lie_at_their_tokens(side):
    rows = labelled([4, 5, 6, 7, 8], [1, 2, 3])
    batch = graftlm.FlareCollator(words(side), **PAIRS)(rows)
    for row, mask, labels in zip(rows, batch["attention_mask"].bool(), batch["labels"], strict=True):
        assert labels[mask].tolist() == row["label"] and set(labels[~mask].tolist()) <= {-100}
    tensors = [row | {"label": torch.tensor(row["label"])} for row in rows]
    assert torch.equal(graftlm.FlareCollator(words(side), **PAIRS)(tensors)["labels"], batch["labels"])


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (("yes", "no"), r"has to be a number(.|\n)*id='s1': 'yes'(.|\n)*class_encode_column"),
        ((1, None), r"has to be a number(.|\n)*id='s2': None"),
        (([1, 2, 3, 4, 5], ["B", "I", "O"]), r"has to be a number(.|\n)*id='s2'"),
        (([1] * 9, [1, 2, 3]), r"id='s1': 9 labels, not 5(.|\n)*encoder_decoder=True"),
        (([1] * 5, [1, 2]), r"id='s2': 2 labels, not 3"),
        (([1.0, 0.0], [1.0]), r"other lists(.|\n)*id='s2': 1 labels, not 2"),
    ],
)
def test_labels_that_do_not_fit_are_an_error(labels, wanted):
    with pytest.raises(DataError, match=wanted):
        graftlm.FlareCollator(words(), **PAIRS)(labelled(*labels))


INFERENCE = [
    {"premise_da": "en kat sover", "hypothesis_da": "hund", "premise": "a cat sleeps", "hypothesis": "the dog"},
    {"premise_da": "hund", "hypothesis_da": "kat", "premise": "dog dog", "hypothesis": "a cat"},
]
COLUMNS = {"target": ("premise_da", "hypothesis_da"), "source": ("premise", "hypothesis")}


def with_types():
    """As BERT's tokenizer: the second text of a pair has type 1."""
    tokenizer = words()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]",
        pair="[BOS] $A [EOS] $B:1 [EOS]:1",
        special_tokens=[("[BOS]", tokenizer.bos_token_id), ("[EOS]", tokenizer.eos_token_id)],
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


@pytest.mark.parametrize("architecture", ["bert", "xlm-roberta"])
def test_pairs_of_texts_against_a_call_written_by_hand(architecture):
    def tokens(first, second):
        made = with_types()(first, second, return_tensors="pt")
        return made.input_ids, made.token_type_ids

    model, collator = flare(architecture, base=tiny_model(architecture, dropout=0.0, type_vocab_size=2)), {}
    for encode in (None, graftlm.ModelStates(model, with_types())):
        collator[encode] = graftlm.FlareCollator(with_types(), **COLUMNS, encode=encode)
        found = outputs(model, collator[encode](INFERENCE))
        for row, logits in zip(INFERENCE, found, strict=True):
            (ids, types), (source, source_types) = (
                tokens(*(row[column] for column in COLUMNS[which])) for which in ("target", "source")
            )
            assert len(types.unique()) == 2
            call = {"input_ids": ids, "token_type_ids": types, "source_input_ids": source}
            wanted = outputs(model, call | {"source_token_type_ids": source_types})[0]
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match=r"'hypothesis', not ''"):
        collator[None]([INFERENCE[0] | {"hypothesis": ""}])
    with pytest.raises(SetupError, match="1 or 2 columns"):
        graftlm.FlareCollator(words(), target=("a", "b", "c"))

"""Embeddings: batches against single texts, pooling against the model's own outputs, every architecture."""

import json

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, DECODERS, ENCODER_DECODERS, available, tiny_model, tiny_tokenizer

from graftlm import DataError, ModelError, SetupError
from graftlm.sources.embed import Embedder

TEXTS = ["w1 w2 w3 w4 w5 w6", "w7", "w8 w9", "w1 w1 w1 w1", "w20 w30 w40 w50 w60 w2 w3"]


def alone(model, ids):
    """The last states and the pooler output of one text, without padding."""
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    with torch.no_grad():
        return model.eval()(**inputs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_is_many_batches_of_one(architecture):
    model, tokenizer = tiny_model(architecture, "base"), tiny_tokenizer()
    embedder = Embedder(model, tokenizer=tokenizer, batch_size=3)
    expected_pooling = "last" if architecture in DECODERS else "mean" if architecture in ENCODER_DECODERS else "cls"
    assert embedder.pooling == ("pooler" if architecture == "bert" else expected_pooling)
    found = embedder(TEXTS)
    assert found.shape == (5, 16) and found.dtype == np.float32
    assert model.training, "the mode of the model is as it was"
    core = model.get_encoder() if architecture in ENCODER_DECODERS else model
    for text, row in zip(TEXTS, found, strict=True):
        outputs = alone(core, tokenizer(text)["input_ids"])
        states = outputs.last_hidden_state[0]
        expected = {"last": states[-1], "cls": states[0], "mean": states.mean(0)}
        if embedder.pooling == "pooler":
            expected["pooler"] = outputs.pooler_output[0]
        assert np.allclose(row, expected[embedder.pooling].numpy(), atol=2e-5)


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean", "last"])
def test_pooling_by_name(pooling):
    model, tokenizer = tiny_model("bert", "base"), tiny_tokenizer()
    found = Embedder(model, tokenizer=tokenizer, pooling=pooling)(TEXTS)
    outputs = alone(model, tokenizer(TEXTS[0])["input_ids"])
    states = outputs.last_hidden_state[0]
    expected = {"pooler": outputs.pooler_output[0], "cls": states[0], "mean": states.mean(0), "last": states[-1]}
    assert np.allclose(found[0], expected[pooling].numpy(), atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_task_head_is_left_out(architecture):
    task = "sequence_classification"
    if not available(architecture, task):
        pytest.skip("transformers has no such head")
    tokenizer = tiny_tokenizer()
    headed = tiny_model(architecture, task)
    found = Embedder(headed, tokenizer=tokenizer, pooling="mean")(TEXTS)
    core = headed.get_encoder() if architecture in ENCODER_DECODERS else headed.base_model
    states = alone(core, tokenizer(TEXTS[0])["input_ids"]).last_hidden_state[0]
    assert np.allclose(found[0], states.mean(0).numpy(), atol=1e-5)


def test_an_adapter_counts():
    from peft import LoraConfig, get_peft_model

    tokenizer = tiny_tokenizer()
    plain = Embedder(tiny_model("bert", "base"), tokenizer=tokenizer)(TEXTS)
    adapted = get_peft_model(tiny_model("bert", "base"), LoraConfig(target_modules=["query"], init_lora_weights=False))
    moved = Embedder(adapted, tokenizer=tokenizer)(TEXTS)
    assert moved.shape == plain.shape and not np.allclose(moved, plain)


def test_long_texts_are_cut():
    model, tokenizer = tiny_model("bert", "base"), tiny_tokenizer()
    text = " ".join(f"w{number}" for number in range(20))
    cut = Embedder(model, tokenizer=tokenizer, max_length=6)
    assert [len(ids) for ids in cut.token_ids([text])] == [6]
    assert np.allclose(cut([text]), cut([" ".join(text.split()[:4])]), atol=1e-6)
    assert Embedder(model, tokenizer=tokenizer).max_length == 32, "the tokenizer's limit, below 128"
    with pytest.raises(ModelError, match="positions"):
        Embedder(model, tokenizer=tokenizer, max_length=65)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("bert", "base").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_from_a_folder(folder):
    expected = Embedder(tiny_model("bert", "base"), tokenizer=tiny_tokenizer())(TEXTS)
    assert np.allclose(Embedder(folder)(TEXTS), expected, atol=1e-6)
    half = Embedder(str(folder), dtype="bfloat16")(TEXTS)
    assert half.dtype == np.float32 and 0 < np.abs(half - expected).max() < 0.05


def test_a_pooler_that_is_not_in_the_checkpoint_is_not_used(tmp_path):
    tiny_model("bert", "masked_lm").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert Embedder(tmp_path).pooling == "cls"
    with pytest.raises(ModelError, match="holds no pooler"):
        Embedder(tmp_path, pooling="pooler")
    with pytest.raises(ModelError, match="has no pooler"):
        Embedder(tiny_model("modernbert", "base"), tokenizer=tiny_tokenizer(), pooling="pooler")


def test_sentence_encoders_are_averaged(tmp_path):
    tiny_model("bert", "base").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    modules = [{"type": "sentence_transformers.models.Transformer"}, {"type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert Embedder(tmp_path).pooling == "mean"


@pytest.mark.parametrize("texts", ["w1", [], ["w1", None], ["w1", 3]])
def test_what_is_no_list_of_texts_is_an_error(texts):
    with pytest.raises(DataError):
        Embedder(tiny_model("bert", "base"), tokenizer=tiny_tokenizer())(texts)


def test_a_text_without_tokens_is_an_error():
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(DataError, match="row 1"):
        Embedder(tiny_model("gpt2", "base"), tokenizer=tokenizer)(["w1 w2", ""])


def test_a_model_that_gives_nan_is_an_error():
    model = tiny_model("bert", "base")
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[20] = torch.nan
    with pytest.raises(ModelError, match="NaN"):
        Embedder(model, tokenizer=tiny_tokenizer())(["w1 w2", "w15 w16 w14"])


def test_arguments_that_make_no_sense_are_errors(folder, tmp_path):
    model = tiny_model("bert", "base")
    with pytest.raises(SetupError, match="tokenizer"):
        Embedder(model)
    for wrong in ({"pooling": "max"}, {"batch_size": 0}, {"max_length": 0}, {"dtype": "bfloat16"}, {"device": "cpu"}):
        with pytest.raises(SetupError):
            Embedder(model, tokenizer=tiny_tokenizer(), **wrong)
    with pytest.raises(SetupError, match="dtype"):
        Embedder(folder, dtype="int8")
    with pytest.raises(SetupError, match="no such device"):
        Embedder(folder, device="cuda:99")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Embedder(tmp_path / "nothing")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Embedder("nobody/nothing-here")

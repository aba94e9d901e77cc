"""Sources that were represented before: the model's own from a cache, and another encoder's (FLARE MT)."""

import copy
import json
import pickle

import pytest
import torch
from adapters.flares import ALPHA, ARCHITECTURES, R, flare, fused, outputs, randomised, target_of, weights_of
from peft import PeftModel
from tiny import ENCODER_DECODERS, tiny_model, tiny_tokenizer
from transformers import AutoModel

import graftlm
from graftlm.errors import DataError, SetupError

WORDS = ("en", "kat", "sover", "a", "cat", "sleeps", "the", "dog", "hund")
ROWS = [
    {"id": "s1", "danish": "en kat sover", "english": "a cat sleeps", "label": 1},
    {"id": "s2", "danish": "hund", "english": "the dog the cat a", "label": 0},
    {"id": "s3", "danish": "kat kat", "english": "dog", "label": 2},
]
TOKENIZER = tiny_tokenizer(WORDS)
PAIRS = {"target": "danish", "source": "english"}
ENGLISH = [row["english"] for row in ROWS]


def cached(folder, model, **settings):
    return graftlm.SourceCache.build(folder, graftlm.ModelStates(model, TOKENIZER), ENGLISH, **settings)


@pytest.mark.supports("FLARE", "source cache")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_from_a_cache_it_is_what_the_model_reads_itself(architecture, tmp_path):
    model = flare(architecture, source_layer="same" if architecture == "bert" else "next").train()
    cache = cached(tmp_path / "cache", model, batch_size=2)
    gradients = []
    for encode in (None, cache):
        batch = graftlm.FlareCollator(TOKENIZER, **PAIRS, encode=encode)(ROWS)
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append((outputs(model, batch), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    tokens = sum(len(TOKENIZER(text).input_ids) for text in ENGLISH)
    assert (cache.tokens, len(cache)) == (tokens, 3)
    assert cache.bytes == (tmp_path / "cache" / "states.bin").stat().st_size == tokens * 4 * 16 * 4


def test_training_does_not_change_what_is_cached(tmp_path):
    model = flare("bert")
    before = cached(tmp_path / "cache", model)(ENGLISH)
    randomised(model, seed=8)
    again = graftlm.ModelStates(model, TOKENIZER)(ENGLISH)
    torch.testing.assert_close(again, before)
    assert cached(tmp_path / "cache", model).fingerprint() == cached(tmp_path / "other", model).fingerprint()


def test_a_cache_is_mapped_again_in_a_worker_and_kept_small(tmp_path):
    model = flare("bert")
    whole = cached(tmp_path / "whole", model)
    half = cached(tmp_path / "half", model, dtype="bfloat16")
    assert half.bytes * 2 == whole.bytes
    torch.testing.assert_close(half(ENGLISH)[0].float(), whole(ENGLISH)[0], rtol=0.01, atol=0.01)
    packed = pickle.dumps(whole)
    assert len(packed) < 500
    for one, other in zip(pickle.loads(packed)(ENGLISH[1:]), whole(ENGLISH[1:]), strict=True):
        assert torch.equal(one, other)
    batch = graftlm.FlareCollator(TOKENIZER, **PAIRS, encode=half)(ROWS)
    assert torch.isfinite(model(**batch).loss)


def test_a_cache_that_does_not_fit_is_an_error(tmp_path):
    model, folder = flare("bert"), tmp_path / "cache"
    cache = cached(folder, model)
    with pytest.raises(DataError, match=r"does not hold this text(.|\n)*'cat'"):
        cache(["a cat sleeps", "cat"])
    other = flare("bert", base=tiny_model("bert", seed=1))
    with pytest.raises(DataError, match="another model"):
        cached(folder, other)
    with pytest.raises(DataError, match="another model"):
        graftlm.SourceCache.build(folder, graftlm.ModelStates(model, TOKENIZER, max_length=4), ENGLISH)
    with pytest.raises(DataError, match=r"1 of 4 are missing, such as 'hund'"):
        graftlm.SourceCache.build(folder, graftlm.ModelStates(model, TOKENIZER), [*ENGLISH, "hund"])
    with pytest.raises(DataError, match=r"dtype(.|\n)*bfloat16"):
        cached(tmp_path / "new", model, dtype="int8")
    with pytest.raises(DataError, match="no source cache here"):
        graftlm.SourceCache(tmp_path)
    (folder / "states.bin").write_bytes((folder / "states.bin").read_bytes()[:-4])
    with pytest.raises(DataError, match="not whole"):
        graftlm.SourceCache(folder)
    head = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps(head | {"version": 0}))
    with pytest.raises(DataError, match="another version"):
        graftlm.SourceCache(folder)


def test_states_that_the_numbers_on_disk_cannot_hold_are_an_error(tmp_path):
    base = tiny_model("llama", dropout=0.0)
    with torch.no_grad():
        base.model.norm.weight.mul_(1e5)  # of the last hidden state alone
    model = flare("llama", base=base)
    with pytest.raises(DataError, match=r"not finite(.|\n)*6.55e\+04 in float16(.|\n)*bfloat16"):
        cached(tmp_path / "cache", model, dtype="float16")
    assert not list(tmp_path.iterdir()), "nothing is left of it"
    wanted = graftlm.ModelStates(model, TOKENIZER)(ENGLISH)[0]
    assert wanted.abs().max() > torch.finfo(torch.float16).max
    found = cached(tmp_path / "cache", model, dtype="bfloat16")(ENGLISH)[0]
    torch.testing.assert_close(found.float(), wanted, rtol=0.01, atol=0.01)
    with torch.no_grad():
        base.model.norm.weight.mul_(torch.inf)
    with pytest.raises(DataError, match=r"these are not"):
        cached(tmp_path / "other", model)


def test_a_file_in_the_place_of_a_cache_is_an_error(tmp_path):
    (tmp_path / "file").write_text("1")
    with pytest.raises(DataError, match=r"a file lies in its place(.|\n)*file"):
        cached(tmp_path / "file", flare("bert"))
    with pytest.raises(DataError, match="no source cache here"):
        graftlm.SourceCache(tmp_path / "file")


def test_states_that_do_not_fit_are_an_error():
    model, batch = flare("bert"), graftlm.FlareCollator(TOKENIZER, **PAIRS)(ROWS)
    target = target_of(batch)
    states, mask = graftlm.ModelStates(model, TOKENIZER)(ENGLISH)
    with pytest.raises(DataError, match=r"another model(.|\n)*3 layers(.|\n)*4 layers, width 16"):
        model(**target, source_states=states[:, :3], source_attention_mask=mask)
    with pytest.raises(DataError, match="no pairs"):
        model(**target, source_states=states[:2], source_attention_mask=mask[:2])
    for empty in ({"source_states": states[:, :, :0]}, {"source_input_ids": batch["source_input_ids"][:, :0]}):
        with pytest.raises(DataError, match=r"no pairs(.|\n)*a column at least"):
            model(**target, **empty, source_attention_mask=mask[:, :0])
    with pytest.raises(DataError, match=r"EncoderStates\(…\).attach\(model\)"):
        flare("bert", encoder_width=9)(**batch)
    with pytest.raises(DataError, match="read or given"):
        model(**batch, source_states=states)
    with pytest.raises(DataError, match=r"encoder_width") as error:
        flare("bert", encoder_width=16)(**target, source_states=states, source_attention_mask=mask)
    assert "allowed: 1 layers, width 16" in str(error.value)
    with pytest.raises(SetupError, match="encoder_width"):
        graftlm.FlareConfig(encoder_width=0)


ENCODER_WIDTH = 16


def encoder(architecture="mt5"):
    return tiny_model(architecture, "seq2seq_lm" if architecture in ENCODER_DECODERS else "base", seed=4)


@pytest.mark.supports("FLARE", "FLARE MT")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flare_mt_against_a_forward_written_by_hand(architecture):
    base = tiny_model(architecture, dropout=0.0)
    model = flare(architecture, base=copy.deepcopy(base), encoder_width=ENCODER_WIDTH)
    reads = graftlm.EncoderStates(encoder(), TOKENIZER)
    batch = graftlm.FlareCollator(TOKENIZER, target="danish", source="danish", encode=reads)(ROWS)
    assert batch["source_states"].shape[:2] == (3, 1)
    found = outputs(model, batch)
    state = weights_of(model)
    (weight,) = (tensor for name, tensor in state.items() if name.endswith("lora_fusion_map.weight"))
    (bias,) = (tensor for name, tensor in state.items() if name.endswith("lora_fusion_map.bias"))
    bare, rows = encoder().get_encoder().eval(), []
    for row in ROWS:
        with torch.no_grad():
            last = bare(input_ids=TOKENIZER(row["danish"], return_tensors="pt").input_ids)[0][0]
        rows.append([last @ weight.T + bias] * 4)
    target = target_of(batch)
    with fused(base, architecture, state, rows, batch["attention_mask"]):
        wanted = outputs(base, target)
    with fused(base, architecture, state, None, None):
        plain = outputs(base, target)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
    assert (found - plain).abs().max() > 1e-3 and ALPHA / R == 1.5


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_the_map_trains_and_the_encoder_does_not(use_reentrant):
    reads, model = encoder("bert"), flare("llama", encoder_width=ENCODER_WIDTH).train()
    encode = graftlm.EncoderStates(reads, TOKENIZER)
    batch = graftlm.FlareCollator(TOKENIZER, target="danish", source="danish", encode=encode)(ROWS)
    if use_reentrant is not None:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model(**batch).loss.backward()
    (gradient,) = (p.grad for name, p in model.named_parameters() if name.endswith("lora_fusion_map.default.weight"))
    assert not any(p.requires_grad for p in reads.parameters()) and not reads.training
    twin = flare("llama", encoder_width=ENCODER_WIDTH).train()
    names = [name for name, _ in twin.named_parameters() if name.endswith("lora_fusion_map.default.weight")]
    weight, step = twin.get_parameter(names[0]), 1e-2
    for place in ((0, 0), (3, 5)):  # by finite differences
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * step
                losses.append(twin.eval()(**batch).loss.double())
                weight[place] -= sign * step
        assert float(gradient[place]) == pytest.approx(float(losses[0] - losses[1]) / (2 * step), rel=0.05, abs=1e-5)


def test_flare_mt_is_saved_loaded_deleted_and_generates(tmp_path):
    encode = graftlm.EncoderStates(encoder("bert"), TOKENIZER)
    model = flare("llama", "causal_lm", encoder_width=ENCODER_WIDTH, task_type="CAUSAL_LM").eval()
    texts = [row["danish"] for row in ROWS[:1]]
    inputs = dict(TOKENIZER(texts, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    states, mask = graftlm.SourceCache.build(tmp_path / "cache", encode, texts)(texts)
    sources = {"source_states": states, "source_attention_mask": mask}
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model("llama", "causal_lm", dropout=0.0), tmp_path / "adapter")
    assert torch.equal(outputs(loaded, inputs | sources), outputs(model, inputs | sources))
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    found = model.generate(**inputs, **sources, **settings, output_logits=True, return_dict_in_generate=True)
    length = inputs["input_ids"].shape[1]
    for step, logits in enumerate(found.logits):
        ids = found.sequences[:, : length + step]
        fusion = (torch.arange(ids.shape[1]) < length).long()[None]
        full = outputs(model, {"input_ids": ids, "fusion_mask": fusion, **sources})
        torch.testing.assert_close(full[:, -1], logits, rtol=1e-3, atol=1e-4)
    model.add_adapter("second", graftlm.FlareConfig(r=2, encoder_width=ENCODER_WIDTH))
    model.delete_adapter("second")
    model.add_adapter("second", graftlm.FlareConfig(r=3, encoder_width=8))
    model.set_adapter("second")
    assert torch.isfinite(
        outputs(model, inputs | {"source_states": states[..., :8], "source_attention_mask": mask})
    ).all()


def attached(folder, name, **settings):
    """A FLARE MT model, and the encoder of a name that it was given."""
    encoder(**settings).save_pretrained(folder / name)
    states = graftlm.EncoderStates(AutoModel.from_pretrained(folder / name), OTHER)
    model = flare("bert", encoder_width=ENCODER_WIDTH, task_type="SEQ_CLS")
    states.attach(model)
    return model, states


OTHER = tiny_tokenizer(("zz", *reversed(WORDS)))


def test_an_attached_encoder_reads_the_tokens_of_its_own_tokenizer(tmp_path):
    model, states = attached(tmp_path, "one")
    danish = {"target": "danish", "source": "danish", "max_length": 4}
    found = graftlm.FlareCollator(TOKENIZER, **danish, source_tokenizer=states.tokenizer)(ROWS)
    wanted = graftlm.FlareCollator(TOKENIZER, **danish, encode=graftlm.EncoderStates(encoder(), OTHER, max_length=4))(
        ROWS
    )
    assert found["source_input_ids"].shape[1] == 4 and not torch.equal(found["source_input_ids"], found["input_ids"])
    torch.testing.assert_close(outputs(model, found), outputs(model, wanted), rtol=1e-4, atol=1e-5)
    with pytest.raises(SetupError, match="tokenised or given"):
        graftlm.FlareCollator(TOKENIZER, encode=states, source_tokenizer=OTHER)


def test_an_adapter_remembers_its_encoder(tmp_path):
    model, states = attached(tmp_path, "one")
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["encoder_name"], config["encoder_language"]) == (str(tmp_path / "one"), None)
    loaded = PeftModel.from_pretrained(tiny_model("bert", dropout=0.0), tmp_path / "adapter")
    _, other = attached(tmp_path, "two", architecture="bert")
    with pytest.raises(SetupError, match=r"trained with another encoder(.|\n)*two(.|\n)*one(.|\n)*encoder_name"):
        other.attach(loaded)
    (tmp_path / "moved").mkdir()
    (tmp_path / "one").rename(tmp_path / "moved" / "one")
    moved = graftlm.EncoderStates(AutoModel.from_pretrained(tmp_path / "moved" / "one"), OTHER)
    moved.attach(loaded)
    batch = graftlm.FlareCollator(TOKENIZER, target="danish", source="danish", source_tokenizer=OTHER)(ROWS)
    assert torch.equal(outputs(loaded, batch), outputs(model, batch))
    for settings in ({}, {"encoder_width": 9}):
        with pytest.raises(SetupError, match=r"no FLARE MT adapter(.|\n)*allowed: encoder_width=16"):
            states.attach(flare("bert", **settings))
    with pytest.raises(SetupError, match="None without encoder_width"):
        graftlm.FlareConfig(encoder_name="facebook/nllb-200-distilled-600M")


class MarksLanguages:
    """Of NLLB's tokenizer what counts here: the mark of the language stands before the text."""

    src_lang = "eng_Latn"

    def __call__(self, texts, **settings):
        return TOKENIZER([f"{'hund' if self.src_lang == 'dan_Latn' else 'dog'} {text}" for text in texts], **settings)


def test_target_text_is_not_marked_as_english():
    with pytest.raises(SetupError, match=r"marks the language(.|\n)*dan_Latn"):
        graftlm.EncoderStates(encoder("bert"), MarksLanguages())
    with pytest.raises(SetupError, match="no marks of languages"):
        graftlm.EncoderStates(encoder("bert"), TOKENIZER, language="dan_Latn")
    marked = graftlm.EncoderStates(encoder("bert"), MarksLanguages(), language="dan_Latn")(["kat"])[0]
    plain = graftlm.EncoderStates(encoder("bert"), TOKENIZER)(["hund kat"])[0]
    assert torch.equal(marked, plain)

"""Neutral residues against forward hooks on the bare model, and what people do with a PEFT adapter."""

import copy
import io
import json

import pytest
import torch
from adapters.neutrals import adapted, outputs, randomised, reference, weights_of
from peft import PeftModel, PeftType, get_peft_model
from tiny import ARCHITECTURES, DECODERS, ENCODER_DECODERS, tiny_batch, tiny_model

import graftlm
from graftlm.adapters.layer import AdapterLayer
from graftlm.errors import ModelError, SetupError

HEAD = "sequence_classification"
METHOD = "Neutral residues"


@pytest.mark.supports(METHOD, "forward by hand")
@pytest.mark.supports(METHOD, "step 0 exact")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_step_0_is_the_base_model_and_then_the_forward_written_by_hand(architecture):
    base, batch = tiny_model(architecture, HEAD, dropout=0.0), tiny_batch(architecture, HEAD)
    plain = outputs(base, batch)
    bare = copy.deepcopy(base)
    model = get_peft_model(base, graftlm.NeutralResiduesConfig())
    assert torch.equal(outputs(model, batch), plain)
    model(**batch, domain=torch.ones(4, dtype=torch.long)).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * 3 * (2 if architecture in ENCODER_DECODERS else 1)
    moved = [name for name, gradient in trained.items() if gradient.abs().sum() > 0]
    assert moved and all("_residues_out" in name for name in moved)  # W_o = 0 holds it back from the others for a step
    for gate in ("relu", "elu") if architecture in DECODERS else ("relu",):
        model = adapted(architecture, base=copy.deepcopy(bare), gate=gate)
        found = outputs(model, batch)
        with reference(bare, weights_of(model), architecture, gate=gate):
            wanted = outputs(bare, batch)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("gate", ["sigmoid", "none"])
def test_the_other_gates(gate):
    base, batch = tiny_model("llama", "causal_lm", dropout=0.0), tiny_batch("llama", "causal_lm")
    model = adapted("llama", base=copy.deepcopy(base), gate=gate)
    with reference(base, weights_of(model), "llama", gate=gate):
        torch.testing.assert_close(outputs(model, batch), outputs(base, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_in_gemma_the_norm_behind_the_block_does_not_rescale_the_residue(architecture):
    model, batch = adapted(architecture, gate="none"), tiny_batch(architecture, "causal_lm")
    sums = []
    layer = model.base_model.model.model.layers[0]
    layer.register_forward_hook(lambda module, args, output: sums.append(output))
    for factor in (0.0, 1.0, 3.0):
        with torch.no_grad():
            layer.mlp.neutral_residues_out["default"].weight.mul_(factor) if factor else None
        if factor == 0.0:
            with model.disable_adapter():
                outputs(model, batch)
        else:
            outputs(model, batch)
    torch.testing.assert_close(sums[2] - sums[0], 3 * (sums[1] - sums[0]), rtol=1e-3, atol=1e-4)


@pytest.mark.supports(METHOD, "save, load, switch, disable, unload")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_adapters_saved_loaded_switched_disabled_unloaded(architecture, tmp_path):
    base, batch = tiny_model(architecture, HEAD, dropout=0.0), tiny_batch(architecture, HEAD)
    untouched, plain = copy.deepcopy(base), outputs(base, batch)
    model = adapted(architecture, base=base)
    first = outputs(model, batch)
    model.add_adapter("second", graftlm.NeutralResiduesConfig(added_parameters=0.3, gate="none"))
    assert torch.equal(outputs(model, batch), first)
    randomised(model, "second", seed=2)
    model.set_adapter("second")
    second = outputs(model, batch)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".second." in name for name in trained)
    with model.disable_adapter():
        assert torch.equal(outputs(model, batch), plain)
    assert torch.equal(outputs(model, batch), second)
    graftlm.stack(model, ["default", "second"])
    assert not torch.equal(outputs(model, batch), second)
    graftlm.stack(model, ["second"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "second", adapter_name="other_name")
    assert torch.equal(outputs(loaded, batch), second)
    result = loaded.load_adapter(str(tmp_path), "one", is_trainable=True)
    assert not result.missing_keys and not result.unexpected_keys
    loaded.set_adapter("one")
    assert torch.equal(outputs(loaded, batch), first)
    loaded.delete_adapter("other_name")
    assert torch.equal(outputs(loaded, batch), first)
    bare = loaded.unload()
    assert torch.equal(outputs(bare, batch), plain) and type(bare) is type(untouched)
    assert bare.state_dict().keys() == untouched.state_dict().keys()
    assert not any(isinstance(module, AdapterLayer) for module in bare.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in bare.modules() if m._forward_hooks is not None)


@pytest.mark.supports(METHOD, "bfloat16 base")
@pytest.mark.parametrize("architecture", ["bert", "llama", "gemma3", "gpt2", "t5"])
def test_a_bfloat16_base_has_float32_adapters(architecture):
    base = tiny_model(architecture, HEAD, dropout=0.0, dtype=torch.bfloat16)
    batch, by_hand, plain = tiny_batch(architecture, HEAD), copy.deepcopy(base), None
    plain = outputs(base, batch)
    model = get_peft_model(base, graftlm.NeutralResiduesConfig())
    assert torch.equal(outputs(model, batch), plain)
    randomised(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    found = outputs(model, batch)
    assert found.dtype == torch.bfloat16
    with reference(by_hand, weights_of(model), architecture):
        torch.testing.assert_close(found, outputs(by_hand, batch), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("architecture", DECODERS)
def test_generate_with_and_without_a_cache(architecture):
    model = adapted(architecture, task_type="CAUSAL_LM").eval()
    ids = {k: v[:1] for k, v in tiny_batch(architecture, "causal_lm").items() if k != "labels"}
    written = [model.generate(**ids, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*written)


@pytest.mark.parametrize("architecture", ["bert", "gemma2"])
def test_the_whole_model_can_be_copied_and_pickled(architecture):
    model, batch = adapted(architecture, HEAD), tiny_batch(architecture, HEAD)
    model.train()(**batch, domain=[0, 1, 0, 1]).loss.backward()
    twin = copy.deepcopy(model)
    wanted = outputs(model, batch)
    assert torch.equal(outputs(twin, batch), wanted)
    randomised(twin, seed=3)
    assert not torch.equal(outputs(twin, batch), wanted) and torch.equal(outputs(model, batch), wanted)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(outputs(again, batch), wanted)
    again.train()(**batch, domain=[0, 1, 0, 1]).loss.backward()


@pytest.mark.parametrize("counts", ["non_embedding", "all"])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_the_size_is_the_nearest_to_the_share(architecture, share, counts):
    task = "masked_lm" if architecture == "bert" else "causal_lm"
    base = tiny_model(architecture, task)
    skip = ("embed", "lm_head", "wte", "wpe", "decoder") if counts == "non_embedding" else ()
    of = sum(p.numel() for name, p in base.named_parameters() if not any(part in name for part in skip))
    if counts == "non_embedding" and architecture == "bert":
        of -= sum(p.numel() for name, p in base.named_parameters() if name == "cls.predictions.bias")
    model = get_peft_model(base, graftlm.NeutralResiduesConfig(added_parameters=share, counts=counts))
    added = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = model.peft_config["default"].size
    assert (size["added"], size["of"], size["counted"]) == (added, of, counts)
    assert size["share"] == added / of and abs(added - share * of) <= 3 * 16 * 3 / 2
    assert json.loads(json.dumps(size)) == size


def test_a_file_keeps_its_size_under_another_head(tmp_path):
    model = adapted("bert", "masked_lm")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("bert", HEAD, num_labels=40, dropout=0.0), tmp_path)
    assert loaded.peft_config["default"].size["hidden_units"] == model.peft_config["default"].size["hidden_units"]
    assert all(torch.equal(tensor, weights_of(loaded)[name]) for name, tensor in weights_of(model).items())


def test_initial_variance():
    base = tiny_model("llama", "causal_lm", hidden_size=64, intermediate_size=128)
    for initialisation, variance in (("low_variance", 1 / (64 * 3)), ("he", 2 / 64)):
        model = get_peft_model(
            copy.deepcopy(base), graftlm.NeutralResiduesConfig(added_parameters=0.5, initialisation=initialisation)
        )
        drawn = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for role in ("glu", "in", "gate"):
            found = torch.cat([p.flatten() for name, p in drawn.items() if f"residues_{role}." in name])
            assert found.var().item() == pytest.approx(variance, rel=0.35 if role == "gate" else 0.1)
        assert all(p.abs().sum() == 0 for name, p in drawn.items() if "residues_out" in name)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"gate": "rellu"}, "relu, elu, sigmoid, none"),
        ({"penalty": "l2"}, "l1, cross_entropy"),
        ({"penalty": "cross_entropy"}, 'gate="sigmoid"'),
        ({"penalty_weight": -1}, "0 or more"),
        ({"added_parameters": 0}, "above 0"),
        ({"added_parameters": float("nan")}, "above 0"),
        ({"original_share": 1.5}, "up to 1"),
        ({"original_share": 0}, "up to 1"),
        ({"initialisation": "zero"}, "low_variance, he"),
        ({"counts": "some"}, "non_embedding, all"),
    ],
)
def test_a_wrong_setting_is_an_error(settings, says):
    with pytest.raises(SetupError, match=says):
        graftlm.NeutralResiduesConfig(**settings)


def test_what_does_not_fit_leaves_the_model_as_it_was():
    from transformers import OPTConfig, OPTModel

    config = OPTConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, ffn_dim=8, vocab_size=10)
    with pytest.raises(ModelError, match="OPTDecoderLayer"):
        get_peft_model(OPTModel(config), graftlm.NeutralResiduesConfig())
    base = tiny_model("llama", "causal_lm")
    with pytest.raises(SetupError, match=r"no hidden unit(.|\n)*allowed: from 0\.0"):
        get_peft_model(base, graftlm.NeutralResiduesConfig(added_parameters=1e-4))
    assert all(p.requires_grad for p in base.parameters()) and not base._forward_pre_hooks


def test_peft_knows_it(tmp_path):
    assert PeftType.NEUTRAL_RESIDUES == "NEUTRAL_RESIDUES"
    with pytest.raises(ModelError, match="cannot be merged"):
        adapted("llama").merge_and_unload()
    settings = {"gate": "elu", "penalty_weight": 3.0, "original_share": None, "layers_to_transform": [0, 2]}
    graftlm.NeutralResiduesConfig(**settings).save_pretrained(tmp_path)
    loaded = graftlm.NeutralResiduesConfig.from_pretrained(tmp_path)
    assert {key: getattr(loaded, key) for key in settings} == settings and loaded.penalty == "l1"

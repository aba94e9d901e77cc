"""Bottleneck adapters against forward hooks on the bare model, on every architecture."""

import copy

import pytest
import torch
from adapters.bottlenecks import KINDS, adapted, outputs, randomised, reference, weights_of
from peft import get_peft_model
from tiny import ARCHITECTURES, ENCODER_DECODERS, tiny_batch, tiny_model
from torch import nn

import graftlm
from graftlm.adapters.layer import AdapterLayer
from graftlm.errors import ModelError, SetupError

HEAD = "sequence_classification"
POST_NORM = ("bert", "roberta", "xlm-roberta", "distilbert")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_a_forward_written_by_hand(architecture, kind):
    base, batch = tiny_model(architecture, HEAD, dropout=0.0), tiny_batch(architecture, HEAD)
    plain = outputs(base, batch)
    model = adapted(architecture, base=copy.deepcopy(base), kind=kind, activation="gelu", scaling=0.7)
    found = outputs(model, batch)
    with reference(base, weights_of(model), kind, architecture, activation="gelu", scaling=0.7):
        wanted = outputs(base, batch)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.supports("Bottleneck adapters", "{kind}")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_step_0_equals_the_base_model_exactly(architecture, kind):
    base, batch = tiny_model(architecture, HEAD), tiny_batch(architecture, HEAD)
    wanted = outputs(base, batch)
    # gelu: of four relu units all may be closed for every token of a tiny batch, and then nothing moves
    model = get_peft_model(base, graftlm.BottleneckConfig(kind=kind, reduction_factor=4, activation="gelu"))
    assert torch.equal(outputs(model, batch), wanted)
    model.train()
    model(**batch).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    stacks = 2 if architecture in ENCODER_DECODERS else 1
    assert len(trained) == 3 * stacks * (2 if kind == "houlsby" else 1) * 4
    for name, gradient in trained.items():
        assert "bottleneck_" in name
        moves = gradient is not None and bool(gradient.abs().sum() > 0)
        assert moves == ("bottleneck_up" in name), name  # U = 0 holds the gradient back from D for one step


def test_gradients_are_those_of_the_forward_written_by_hand():
    base, batch = tiny_model("bert", HEAD, dropout=0.0), tiny_batch("bert", HEAD)
    model = adapted("bert", base=copy.deepcopy(base))
    model(**batch).loss.backward()
    found = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    weights = {k: v.clone().requires_grad_() for k, v in weights_of(model).items()}
    with reference(base, weights, "pfeiffer", "bert"):
        base(**batch).loss.backward()
    assert len(found) == len(weights) == 12
    for name, tensor in weights.items():
        torch.testing.assert_close(
            tensor.grad, found[name.replace("_down.", "_down.default.").replace("_up.", "_up.default.")]
        )


@pytest.mark.parametrize("architecture", POST_NORM)
def test_dropout_of_a_post_norm_model_comes_before_the_adapter(architecture):
    """With everything dropped f = 0: the adapter must still read LN(x) and its part must come through."""
    base, batch = tiny_model(architecture, HEAD, dropout=0.0), tiny_batch(architecture, HEAD)
    model = adapted(architecture, base=base)
    before = outputs(model, batch)
    for name, module in model.named_modules():
        if name.endswith(("ffn.base_layer.dropout", "output.base_layer.dropout")):
            assert isinstance(module, nn.Dropout)
            module.p = 1.0
    model.train()
    one = model(**batch).logits
    two = randomised(model, seed=5)(**batch).logits
    assert (one - before).abs().max() > 1e-4 and (one - two).abs().max() > 1e-4


def test_sizes():
    def sizes(**settings):
        model = get_peft_model(tiny_model("bert"), graftlm.BottleneckConfig(**settings))
        return {tuple(p.shape) for n, p in model.named_parameters() if "bottleneck_down" in n and "weight" in n}

    assert sizes(reduction_factor=4) == {(4, 16)}
    assert sizes(reduction_factor=3) == {(5, 16)}
    assert sizes(bottleneck_size=7) == {(7, 16)}
    with pytest.raises(SetupError, match=r"up to 16"):
        sizes(reduction_factor=17)


def test_dropout_is_on_the_adapters_part_alone():
    model, batch = adapted("llama", "causal_lm", dropout=0.5), tiny_batch("llama", "causal_lm")
    torch.manual_seed(0)
    a, b = model.train()(**batch).logits, model(**batch).logits
    assert not torch.equal(a, b)
    assert torch.equal(outputs(model, batch), outputs(model, batch))
    with model.disable_adapter():
        assert torch.equal(model.train()(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"layers_to_transform": [0, 2]}, ["layer.0.output", "layer.2.output"]),
        ({"layers_to_transform": 1}, ["layer.1.output"]),
        ({"layers_to_transform": 1, "kind": "houlsby"}, ["layer.1.attention.output", "layer.1.output"]),
        ({"exclude_modules": ["layer.1.output"]}, ["layer.0.output", "layer.2.output"]),
        ({"exclude_modules": r".*layer\.[01]\..*"}, ["layer.2.output"]),
    ],
)
def test_some_layers_only(settings, names):
    model = get_peft_model(tiny_model("bert"), graftlm.BottleneckConfig(bottleneck_size=2, **settings))
    wrapped = [name for name, module in model.named_modules() if isinstance(module, AdapterLayer)]
    assert wrapped == [f"base_model.model.bert.encoder.{name}" for name in names]


def test_weight_decay_reaches_the_projections():
    """Trainer decays by name: a leaf below a module called LayerNorm would silently get none."""
    from transformers import Trainer

    for architecture in ARCHITECTURES:
        model = get_peft_model(tiny_model(architecture), graftlm.BottleneckConfig(kind="houlsby", bottleneck_size=2))
        decayed = set(Trainer.get_decay_parameter_names(None, model))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert (name in decayed) == name.endswith("weight"), name


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "reduction_factor and bottleneck_size"),
        ({"reduction_factor": 2, "bottleneck_size": 2}, "reduction_factor and bottleneck_size"),
        ({"kind": "pfeifer", "bottleneck_size": 2}, "pfeiffer, houlsby, parallel"),
        ({"activation": "rello", "bottleneck_size": 2}, "relu"),
        ({"reduction_factor": 0}, "above 0"),
        ({"bottleneck_size": 0}, "1, 2"),
        ({"bottleneck_size": 2.5}, "1, 2"),
        ({"bottleneck_size": 2, "dropout": 1.0}, "below 1"),
        ({"bottleneck_size": 2, "scaling": float("nan")}, "finite"),
    ],
)
def test_a_wrong_setting_is_an_error(settings, says):
    with pytest.raises(SetupError, match=says):
        graftlm.BottleneckConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers_to_transform": [1, 3]}, "0 to 2"),
        ({"exclude_modules": ["layer.7.output"]}, "excludes|names no module"),
        ({"exclude_modules": ".*"}, "No layer is left"),
    ],
)
def test_a_restriction_that_does_not_fit_leaves_the_model_as_it_was(settings, says):
    base = tiny_model("bert")
    before = {name: p.requires_grad for name, p in base.named_parameters()}
    with pytest.raises(ModelError, match=says):
        get_peft_model(base, graftlm.BottleneckConfig(bottleneck_size=2, **settings))
    assert {name: p.requires_grad for name, p in base.named_parameters()} == before


def test_a_model_of_unknown_structure_is_an_error_that_names_it():
    from transformers import OPTConfig, OPTModel

    config = OPTConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, ffn_dim=8, vocab_size=10)
    with pytest.raises(ModelError, match=r"OPTDecoderLayer(.|\n)*fc1"):
        get_peft_model(OPTModel(config), graftlm.BottleneckConfig(bottleneck_size=2))

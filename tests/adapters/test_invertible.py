"""The invertible adapter: exact inverse, identity at the start, and both ends of the model."""

import copy

import pytest
import torch
from adapters.bottlenecks import adapted, outputs, randomised, weights_of
from peft import PeftModel, get_peft_model
from tiny import ARCHITECTURES, ENCODERS, available, tiny_batch, tiny_model
from torch import nn
from torch.nn.functional import linear, relu

import graftlm
from graftlm.adapters.invertible import Invertible
from graftlm.errors import ModelError

TASKS = {name: "masked_lm" if name in ENCODERS else "causal_lm" for name in ARCHITECTURES}
FITTING = [name for name in ARCHITECTURES if name not in ("gpt2", "t5", "mt5")]


def part(model):
    (found,) = (module for module in model.modules() if isinstance(module, Invertible))
    return found


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_inverse_is_exact(activation):
    layer = Invertible(nn.Identity(), None).double()
    config = graftlm.BottleneckConfig(bottleneck_size=1, activation=activation)
    for name in ("one", "two"):
        layer.update_layer(name, config, 32)
    layer.double().set_adapter(["one", "two"])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4)
    e = torch.randn(3, 7, 32, dtype=torch.float64)
    o = layer(e)
    assert (o - e).abs().max() > 0.5
    assert (layer.inverse(o) - e).abs().max() < 1e-13
    assert (layer(layer.inverse(e)) - e).abs().max() < 1e-13


def coupling(w, e, *, back=False):
    """MAD-X's equations on a last dimension of 16, from the saved tensors."""

    def mlp(name, x):
        inner = relu(linear(x, w[f"{name}_down.weight"], w[f"{name}_down.bias"]))
        return linear(inner, w[f"{name}_up.weight"], w[f"{name}_up.bias"])

    one, two = e[..., :8], e[..., 8:]
    if back:
        two = two - mlp("g", one)
        return torch.cat([one - mlp("f", two), two], -1)
    one = one + mlp("f", two)
    return torch.cat([one, two + mlp("g", one)], -1)


@pytest.mark.supports("Bottleneck adapters", "invertible")
@pytest.mark.parametrize("architecture", FITTING)
def test_both_ends_against_hooks_on_the_bare_model(architecture):
    task = TASKS[architecture]
    base, batch = tiny_model(architecture, task, dropout=0.0), tiny_batch(architecture, task)
    by_hand, plain = copy.deepcopy(base), outputs(base, batch)
    model = get_peft_model(base, graftlm.BottleneckConfig(bottleneck_size=2, invertible=True))
    assert torch.equal(outputs(model, batch), plain)
    for name, parameter in model.named_parameters():  # the bottlenecks stay at zero: they are tested elsewhere
        if "bottleneck_f" in name or "bottleneck_g" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    saved = {
        k.split("bottleneck_")[-1]: v
        for k, v in weights_of(model).items()
        if "bottleneck_f" in k or "bottleneck_g" in k
    }
    assert len(saved) == 8
    path = "embeddings" if architecture in ENCODERS else "embed_tokens"
    (below,) = (m for n, m in by_hand.named_modules() if n.endswith(f".{path}"))
    below.register_forward_hook(lambda module, args, e: coupling(saved, e))
    above = by_hand.get_output_embeddings()
    above.register_forward_pre_hook(lambda module, args: (coupling(saved, args[0], back=True),))
    found = outputs(model, batch)
    torch.testing.assert_close(found, outputs(by_hand, batch), rtol=1e-4, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(outputs(model, batch), plain)
    assert torch.equal(outputs(copy.deepcopy(model), batch), found)
    bare = model.unload()
    assert torch.equal(outputs(bare, batch), plain)
    assert not bare.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_saved_and_loaded(architecture, tmp_path):
    task = TASKS[architecture]
    batch = tiny_batch(architecture, task)
    model = adapted(architecture, task, invertible=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(architecture, task, dropout=0.0), tmp_path, adapter_name="other")
    assert torch.equal(outputs(loaded, batch), outputs(model, batch))
    assert "embeddings" in graftlm.trainable_layers(model).names


def test_the_gradient_reaches_it_from_both_ends():
    model, batch = adapted("bert", "masked_lm", invertible=True).train(), tiny_batch("bert", "masked_lm")
    model(**batch).loss.backward()
    whole = part(model).bottleneck_f_up["default"].weight.grad.clone()
    model.zero_grad()
    part(model).release()
    model(**batch).loss.backward()
    assert not torch.allclose(part(model).bottleneck_f_up["default"].weight.grad, whole)


def test_in_a_stack_the_language_adapters_alone_is_used():
    model, batch = adapted("bert", "masked_lm", name="lang", invertible=True), tiny_batch("bert", "masked_lm")
    model.add_adapter("task", graftlm.BottleneckConfig(bottleneck_size=2))
    randomised(model, "task", seed=2)
    model.set_adapter("task")
    without = outputs(model, batch)
    graftlm.stack(model, ["lang", "task"])
    assert part(model).active_here == ["lang"]
    assert not torch.equal(outputs(model, batch), without)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in FITTING])
def test_models_with_embeddings_of_several_modules_are_refused(architecture):
    base = tiny_model(architecture, "base")
    with pytest.raises(ModelError, match="one module that gives the embeddings"):
        get_peft_model(base, graftlm.BottleneckConfig(bottleneck_size=2, invertible=True))
    assert not hasattr(base, "peft_config") and available(architecture, "base")


def test_a_trained_copy_of_the_output_matrix_is_refused():
    config = graftlm.BottleneckConfig(bottleneck_size=2, invertible=True, modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match="modules_to_save: lm_head"):
        get_peft_model(tiny_model("llama", "causal_lm"), config)

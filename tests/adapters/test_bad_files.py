"""A file that does not fit is an error before anything has changed."""

import copy
import json

import pytest
import torch
from adapters.bottlenecks import adapted, outputs
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import tiny_batch, tiny_model

import graftlm
from graftlm.errors import ModelError

FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    adapted("bert", kind="houlsby", task_type="SEQ_CLS").save_pretrained(folder)
    return folder


def state(model):
    """All that loading could change."""
    return {
        "tensors": {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()},
        "modules": {name: (type(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()},
        "adapters": list(getattr(model, "peft_config", {})),
        "active": getattr(model, "active_adapters", None) if isinstance(model, PeftModel) else None,
    }


def assert_same(before, after):
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, (tensor, trains) in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name][0]) and trains == after["tensors"][name][1], name
    assert {k: v for k, v in before.items() if k != "tensors"} == {k: v for k, v in after.items() if k != "tensors"}


def spoil(source, target, how):
    """Copies an adapter and breaks it; returns what the error has to say."""
    target.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    tensors = load_file(source / FILE)
    leaf = next(name for name in tensors if "layer.1.output.bottleneck_up.weight" in name)
    says = ""
    if how == "missing":
        del tensors[leaf]
        says = r"lacks 1 of the 26(.|\n)*layer\.1\.output\.bottleneck_up\.weight"
    elif how == "missing head":
        del tensors["base_model.model.classifier.bias"]
        says = r"classifier\.bias"
    elif how == "extra":
        tensors[leaf.replace("layer.1", "layer.7")] = tensors[leaf].clone()
        says = r"1 tensors that have no place(.|\n)*layer\.7"
    elif how == "shape":
        tensors[leaf] = tensors[leaf][:, :-1].contiguous()
        says = r"\(16, 4\) instead of \(16, 5\)"
    elif how == "size":
        config["bottleneck_size"] = 6
        says = "instead of"
    save_file(tensors, target / FILE)
    if how == "cut short":
        content = (target / FILE).read_bytes()
        (target / FILE).write_bytes(content[: len(content) // 2])
        says = "cannot be read"
    elif how == "no safetensors":
        (target / FILE).write_bytes(b"<html>404</html>")
        says = "cannot be read"
    elif how == "pickle":
        (target / FILE).rename(target / "adapter_model.bin")
        says = "cannot be read"
    (target / "adapter_config.json").write_text(json.dumps(config))
    return says


WAYS = ["missing", "missing head", "extra", "shape", "size", "cut short", "no safetensors", "pickle"]


@pytest.mark.parametrize("how", WAYS)
def test_from_pretrained_leaves_the_base_model_as_it_was(how, good, tmp_path):
    says = spoil(good, tmp_path / "bad", how)
    base = tiny_model("bert", dropout=0.0)
    before = state(base)
    with pytest.raises(ModelError, match=says):
        PeftModel.from_pretrained(base, tmp_path / "bad")
    assert_same(before, state(base))
    assert not hasattr(base, "peft_config")
    assert PeftModel.from_pretrained(base, good).active_adapters == ["default"]  # the same object is still usable


@pytest.mark.parametrize("how", WAYS)
def test_load_adapter_leaves_the_adapters_that_are_there(how, good, tmp_path):
    says = spoil(good, tmp_path / "bad", how)
    model, batch = adapted("bert", task_type="SEQ_CLS", seed=4), tiny_batch("bert")
    before, wanted = state(model), outputs(model, batch)
    with pytest.raises(ModelError, match=says):
        model.load_adapter(tmp_path / "bad", "second")
    assert_same(before, state(model))
    assert torch.equal(outputs(model, batch), wanted)
    model.load_adapter(good, "second")


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ({"hidden_size": 32}, r"another width(.|\n)*found:.*width 16(.|\n)*allowed: 32"),
        ({"num_layers": 2}, r"8 tensors that have no place"),
        ({"num_layers": 4}, r"lacks 8 of the 34"),
        ({"num_labels": 5}, r"classifier\.weight \(3, 16\) instead of \(5, 16\)"),
    ],
)
def test_another_base_model(base, says, good):
    model = tiny_model("bert", dropout=0.0, **base)
    before = state(model)
    with pytest.raises(ModelError, match=says):
        PeftModel.from_pretrained(model, good)
    assert_same(before, state(model))


def test_a_state_dict_by_hand_is_held_against_the_adapter_too(good):
    model, batch = adapted("bert", kind="houlsby", task_type="SEQ_CLS", seed=4), tiny_batch("bert")
    wanted = outputs(model, batch)
    tensors = get_peft_model_state_dict(model)
    name = next(name for name in tensors if "bottleneck" in name)
    for changed in (
        {k: v for k, v in tensors.items() if k != name},
        {**tensors, name.replace("layer.0", "layer.9"): tensors[name]},
        {**tensors, name: tensors[name][:-1]},
    ):
        with pytest.raises(ModelError):
            set_peft_model_state_dict(model, {k: v + 1 for k, v in changed.items()})
        assert torch.equal(outputs(model, batch), wanted)
    set_peft_model_state_dict(model, {k: v + 1 for k, v in tensors.items()})
    assert not torch.equal(outputs(model, batch), wanted)


def test_a_saved_configuration_serves_for_a_new_adapter(good):
    config = graftlm.BottleneckConfig.from_pretrained(good)
    config.inference_mode = False
    model = get_peft_model(tiny_model("bert"), copy.deepcopy(config))
    assert all(p.abs().sum() == 0 for n, p in model.named_parameters() if "bottleneck_up" in n)

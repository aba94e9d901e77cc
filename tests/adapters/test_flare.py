"""FLARE against hooks and loops on the bare model, on every architecture."""

import copy

import pytest
import torch
from adapters.flares import ARCHITECTURES, flare, fused, outputs, pair, read, target_of, weights_of
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from torch import nn

import graftlm
from graftlm.adapters.flare_fusion import FUSIONS
from graftlm.errors import DataError, ModelError, SetupError

FIVE = ("add", "mul", "add_relu", "mul_relu", "cross_attention")
GRID = [(fusion, None, layer) for fusion in FIVE for layer in ("next", "same")]
GRID += [("add_relu", align, "next") for align in ("relative", "pooled", "attention")]


def compare(architecture, batch, mask=None, **settings):
    base = tiny_model(architecture, dropout=0.0)
    model = flare(architecture, base=copy.deepcopy(base), **settings)
    found = outputs(model, batch)
    target = target_of(batch)
    align = settings.pop("align", None) or "position"
    settings.pop("target_modules", None)
    with fused(base, architecture, weights_of(model), None, None):
        plain = outputs(base, target)
    rows = read(base, architecture, batch)
    mask = target["attention_mask"] if mask is None else mask
    with fused(base, architecture, weights_of(model), rows, mask, align=align, **settings):
        wanted = outputs(base, target)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
    assert (found - plain).abs().max() > 1e-3
    return model, plain


@pytest.mark.supports("FLARE", "fusion")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_a_forward_written_by_hand(architecture):
    compare(architecture, pair(architecture))


@pytest.mark.parametrize(("fusion", "align", "source_layer"), GRID)
@pytest.mark.parametrize("architecture", ["bert", "llama", "t5"])
def test_every_fusion_alignment_and_source_layer(architecture, fusion, align, source_layer):
    compare(architecture, pair(architecture), fusion=fusion, align=align, source_layer=source_layer)


@pytest.mark.parametrize("architecture", ["xlm-roberta", "gemma2"])
def test_only_the_tokens_of_a_fusion_mask_are_fused(architecture):
    batch = pair(architecture)
    mask = batch["attention_mask"].clone()
    mask[:, 3:] = 0
    compare(architecture, batch | {"fusion_mask": mask}, mask=mask, align="relative")


def test_gradients_are_those_of_the_forward_written_by_hand():
    base, batch = tiny_model("llama", dropout=0.0), pair("llama")
    model = flare("llama", base=copy.deepcopy(base), fusion="cross_attention")
    model(**batch).loss.backward()
    found = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}
    state = {name: tensor.clone().requires_grad_() for name, tensor in weights_of(model).items()}
    rows = read(base, "llama", batch)
    with fused(base, "llama", state, rows, batch["attention_mask"], fusion="cross_attention"):
        base(**target_of(batch)).loss.backward()
    assert len(found) == len(state) == 3 * 2 * 5
    for name, tensor in state.items():
        assert tensor.grad.abs().sum() > 0
        torch.testing.assert_close(found[name], tensor.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.supports("FLARE", "no source: plain LoRA")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_a_source_it_is_pefts_own_lora(architecture):
    batch = target_of(pair(architecture))
    model = flare(architecture)
    rivals = sorted(model.peft_config["default"].target_modules)
    lora = get_peft_model(tiny_model(architecture, dropout=0.0), LoraConfig(r=4, lora_alpha=6, target_modules=rivals))
    lora.load_state_dict(model.state_dict())
    assert torch.equal(outputs(model, batch), outputs(lora, batch))


@pytest.mark.parametrize("architecture", ["bert", "gemma3", "mt5"])
def test_step_0_equals_the_base_model_exactly(architecture):
    base, batch = tiny_model(architecture, dropout=0.0), pair(architecture)
    wanted = outputs(base, target_of(batch))
    for fusion in ("add_relu", "cross_attention"):
        model = get_peft_model(copy.deepcopy(base), graftlm.FlareConfig(r=2, fusion=fusion))
        assert torch.equal(outputs(model, batch), wanted)


def test_a_new_function_is_one_line():
    FUSIONS["mean"] = lambda source, target: (source + target) / 2
    try:
        batch = pair("bert")
        half = flare("bert", fusion="mean")
        whole = flare("bert", fusion="add", lora_alpha=3)  # a row without partner differs: give it one everywhere
        batch = {name: value[:, :3] if value.ndim == 2 else value for name, value in batch.items()}
        torch.testing.assert_close(outputs(half, batch), outputs(whole, batch))
    finally:
        del FUSIONS["mean"]


def test_targets_that_were_named_beside_query_and_value_have_plain_lora():
    batch = pair("llama")
    model, _ = compare("llama", batch, target_modules=["q_proj", "v_proj", "k_proj", "up_proj"])
    kinds = {name.rsplit(".", 1)[-1]: bool(m.lora_variant) for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert kinds == {"q_proj": True, "v_proj": True, "k_proj": False, "up_proj": False}


def test_all_linear_layers_have_lora_and_query_and_value_fuse():
    compare("llama", pair("llama"), target_modules="all-linear")
    model = flare("llama", target_modules="all-linear", task_type="SEQ_CLS")
    fuses = {name: bool(m.lora_variant) for name, m in model.named_modules() if hasattr(m, "lora_A")}
    inside = [name for name, module in tiny_model("llama").model.layers.named_modules() if type(module) is nn.Linear]
    assert {name.partition("layers.")[2] for name in fuses} == set(inside)
    assert {name for name, does in fuses.items() if does} == {n for n in fuses if n.endswith(("q_proj", "v_proj"))}
    everywhere = outputs(flare("t5", target_modules="all-linear"), pair("t5"))
    assert (everywhere - outputs(flare("t5", target_modules="all-linear"), target_of(pair("t5")))).abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"fusion": "sum"},
        {"source_layer": "last"},
        {"align": "words"},
        {"align": "pooled", "fusion": "cross_attention"},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"bias": "all"},
    ],
)
def test_values_that_are_not_allowed(settings):
    with pytest.raises(SetupError, match="FLARE can"):
        graftlm.FlareConfig(**settings)


@pytest.mark.parametrize("architecture", ["gpt2", "modernbert"])
def test_models_with_one_projection_for_all_are_refused(architecture):
    with pytest.raises(ModelError, match="no query and value projection"):
        get_peft_model(tiny_model(architecture), graftlm.FlareConfig())


def test_target_modules_without_query_and_value_are_refused():
    base = tiny_model("bert")
    with pytest.raises(ModelError, match="fuse nowhere"):
        get_peft_model(base, graftlm.FlareConfig(target_modules=["key"]))
    assert not base._forward_pre_hooks and not base._forward_hooks


def test_calls_that_make_no_sense():
    model, batch = flare("bert"), pair("bert")
    with pytest.raises(DataError, match="source that is not there"):
        model(**target_of(batch), source_attention_mask=batch["source_attention_mask"])
    with pytest.raises(DataError, match="no pairs"):
        model(**(batch | {"source_input_ids": batch["source_input_ids"][:2]}))
    with pytest.raises(DataError, match="not as large"):
        model(**batch, fusion_mask=torch.ones(4, 3))
    with pytest.raises(ModelError, match=r"cannot be merged(.|\n)*source sentence"):
        model.merge_and_unload()
    writer = flare("llama", "causal_lm", task_type="CAUSAL_LM")
    with pytest.raises(SetupError, match=r"prompt(.|\n)*fusion_mask"):
        writer(**pair("llama", "causal_lm"))
    assert torch.equal(outputs(model, batch), outputs(flare("bert"), batch))  # an error leaves nothing behind


@pytest.mark.parametrize("name", ["source_inputs_ids", "source_ids", "source", "fusion_masks"])
@pytest.mark.parametrize("architecture", ["bert", "llama", "t5"])
def test_a_keyword_that_is_misspelled_is_not_plain_lora(architecture, name):
    batch = pair(architecture)
    call = target_of(batch) | {name: batch["source_input_ids"]}
    with pytest.raises(
        DataError, match=rf"found: +{name}(.|\n)*allowed: source_input_ids(.|\n)*try: +(source|fusion)_"
    ):
        flare(architecture)(**call)
    with pytest.raises(DataError, match=name):
        flare("llama", "causal_lm", task_type="CAUSAL_LM").generate(**call)


def test_threads_that_would_share_a_source_are_refused():
    model, batch = flare("bert"), pair("bert")
    copy_of_one_gpu = model.base_model.model._replicate_for_data_parallel()
    assert copy_of_one_gpu(**target_of(batch)).logits.shape == (4, 3)
    with pytest.raises(SetupError, match="DataParallel"):
        copy_of_one_gpu(**batch)


def test_keyword_inputs_positional_inputs_and_embeddings_are_the_same():
    model, batch = flare("bert").eval(), pair("bert")
    wanted = outputs(model, batch)
    sources = {name: value for name, value in batch.items() if name.startswith("source_")}
    with torch.no_grad():
        assert torch.equal(model(batch["input_ids"], batch["attention_mask"], **sources).logits, wanted)
        vectors = model.get_input_embeddings()(batch["input_ids"])
        found = model(inputs_embeds=vectors, attention_mask=batch["attention_mask"], **sources).logits
    torch.testing.assert_close(found, wanted)

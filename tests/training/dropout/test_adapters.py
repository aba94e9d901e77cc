"""Rates on the dropouts of adapters of every kind, and on a model that carries them."""

import pytest
import torch
from lms import lm, pair, texts, tokenizer
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES
from torch import nn
from transformers.pytorch_utils import Conv1D

import graftlm
from graftlm.errors import ModelError, SetupError
from graftlm.training.dropout.guided import GuidedDropout
from graftlm.training.dropout.noise import ATTENTION
from graftlm.training.dropout.sites import canonical


def estimate(model, count=4):
    return GuidedDropout.estimate(
        model, texts(count), tokenizer=tokenizer(), progress=False, check_head=False, tolerance=0.0
    )


def scores_by_hand(measured, rates, adapted, kind):
    """Path of each wrapped module → its dropout, and the mean score of all tensors of the linear layers in it."""
    linear = {n: m for n, m in measured.base_model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    found = {}
    for path, wrapper in adapted.base_model.model.base_model.named_modules():
        if (slot := dict(wrapper.named_children()).get(f"{kind}_dropout")) is not None:
            inside = [n for n in linear if f"{n}.".startswith(f"{path}.")]
            tensors = [rates.tensors[f"{n}.{p}"].score for n in inside for p, _ in linear[n].named_parameters()]
            assert tensors
            found[path] = slot["default"].p, sum(tensors) / len(tensors)
    return found


def check_one_rate_for_each_wrapped_module(architecture, kind, config, count):
    model, head = pair(architecture, num_layers=2, dropout=0.2)
    rates = estimate(model)
    adapted = get_peft_model(head, config)
    applied = rates.apply(adapted, on="adapters")
    found = scores_by_hand(model, rates, adapted, kind)
    layers = 4 if architecture in ("t5", "mt5") else 2
    assert len(applied.rows) == len(found) == count * layers
    assert {row.block: (row.new, row.score) for row in applied.rows} == {
        path: (rate, pytest.approx(score)) for path, (rate, score) in found.items()
    }
    by_score = sorted(found.values(), key=lambda pair: pair[1])
    top = len(by_score) - 1
    assert [rate for rate, _ in by_score] == pytest.approx([0.1 * (top - i) / top for i in range(top + 1)])
    assert [row.rank for row in sorted(applied.rows, key=lambda row: row.score)] == list(range(top + 1))
    for row in applied.rows:  # although the output of a new adapter, which is dropped, is zero everywhere
        assert row.elements > 500
        assert row.measured == pytest.approx(row.new, abs=0.03)
    own = rates.apply(adapted, on="model", check="config")
    assert {row.old for row in own.rows} == {0.2}
    inside = {
        canonical(n): m.p
        for n, m in adapted.base_model.model.base_model.named_modules()
        if isinstance(m, nn.Dropout) and f".{kind}_dropout." not in f".{n}"
    }
    assert inside == {row.module: row.new for row in own.rows if row.module in inside}


@pytest.mark.supports("Guided dropout", "applied to the dropout of bottleneck adapters")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bottleneck_adapters(architecture):
    config = graftlm.BottleneckConfig(kind="houlsby", reduction_factor=4, task_type="SEQ_CLS")
    check_one_rate_for_each_wrapped_module(architecture, "bottleneck", config, count=2)


@pytest.mark.supports("Guided dropout", "applied to the dropout of neutral residues")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_neutral_residues(architecture):
    config = graftlm.NeutralResiduesConfig(task_type="SEQ_CLS")
    check_one_rate_for_each_wrapped_module(architecture, "neutral_residues", config, count=1)


def test_the_dropout_of_neutral_residues_drops_their_residue_in_training_only():
    _, head = pair("bert", num_layers=1, dropout=0.0)
    adapted = get_peft_model(
        head, graftlm.NeutralResiduesConfig(task_type="SEQ_CLS", gate="none", penalty_weight=0, dropout=0.5)
    )
    layer = next(m for m in adapted.modules() if hasattr(m, "neutral_residues_out"))
    torch.manual_seed(0)
    nn.init.normal_(layer.neutral_residues_out["default"].weight)
    n = torch.randn(8, 16, 16)
    whole = layer.eval()._residue(n)
    torch.testing.assert_close(whole, layer._block("default", n, None))
    dropped = layer.train()._residue(n)
    lost = dropped == 0
    assert lost.float().mean() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(dropped[~lost], 2 * whole[~lost])
    with pytest.raises(SetupError, match="dropout of neutral residues"):
        graftlm.NeutralResiduesConfig(dropout=1.0)


def test_of_a_stack_the_top_is_guided():
    """The adapters below it do not train."""
    model, head = pair("llama", num_layers=2)
    rates = estimate(model)
    config = {"kind": "pfeiffer", "reduction_factor": 4, "dropout": 0.3}
    adapted = get_peft_model(head, graftlm.BottleneckConfig(**config), adapter_name="language")
    adapted.add_adapter("task", graftlm.BottleneckConfig(**config))
    graftlm.stack(adapted, ["language", "task"])
    assert {row.module.rpartition(".")[2] for row in rates.apply(adapted).rows} == {"task"}
    slots = [m.bottleneck_dropout for m in adapted.modules() if hasattr(m, "bottleneck_down")]
    assert [slot["language"].p for slot in slots] == [0.3, 0.3]
    assert sorted(slot["task"].p for slot in slots) == [0.0, 0.1]
    assert {row.module.rpartition(".")[2] for row in rates.apply(adapted, adapter="language").rows} == {"language"}
    with pytest.raises(ModelError, match=r"no adapter of this name(?s:.*)'langage'(?s:.*)language, task"):
        rates.apply(adapted, adapter="langage")


@pytest.mark.parametrize("more", [{"modules_to_save": ["EMBEDDINGS"]}, {"trainable_token_indices": [5, 6]}])
@pytest.mark.parametrize(
    ("architecture", "target", "embeddings"),
    [("bert", "query", "word_embeddings"), ("llama", "q_proj", "embed_tokens")],
)
def test_embeddings_that_train_beside_an_adapter(architecture, target, embeddings, more):
    """PEFT puts the measured table behind a wrapper, which is no adapter and has no dropout."""
    model, head = pair(architecture, num_layers=2)
    rates = estimate(model)
    more = {key: [embeddings] if value == ["EMBEDDINGS"] else value for key, value in more.items()}
    adapted = get_peft_model(head, LoraConfig(task_type="SEQ_CLS", target_modules=[target], **more))
    assert len(rates.apply(adapted, on="adapters").rows) == 2
    assert len(rates.apply(adapted, on="model").rows) == len(rates.blocks)
    if architecture == "bert":  # whose embeddings are a block: the wrapped table is the one that is compared
        own = next(p for n, p in adapted.named_parameters() if canonical(n).endswith(f"{embeddings}.weight"))
        with torch.no_grad():
            own.add_(torch.randn_like(own))
        with pytest.raises(ModelError, match="other weights"):
            rates.apply(adapted, on="model")


def test_a_dropout_in_a_part_that_peft_has_copied_is_named():
    model, head = pair("bert", num_layers=2)
    adapted = get_peft_model(
        head, LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["output"])
    )
    with pytest.raises(
        ModelError, match=r"copied(?s:.*)output\.modules_to_save\.default\.dropout(?s:.*)modules_to_save"
    ):
        estimate(model).apply(adapted)


def test_an_adapter_outside_the_layers_is_no_silent_exception():
    model = lm("llama", num_layers=2)
    rates = estimate(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], lora_dropout=0.3))
    with pytest.raises(ModelError, match=r"not measured(?s:.*)lm_head\.lora_dropout(?s:.*)target_modules"):
        rates.apply(adapted)


def test_rates_on_adapters_leave_the_noise_of_the_model_alone():
    model, head = pair("bert", num_layers=2)
    rates = estimate(model)
    adapted = get_peft_model(head, LoraConfig(target_modules=["query"], task_type="SEQ_CLS", lora_dropout=0.1))
    gaussian = rates.using(noise="gaussian")
    gaussian.apply(adapted, on="model")
    gaussian.apply(adapted, on="adapters")
    rates.apply(adapted, on="adapters")
    assert head.config._attn_implementation == ATTENTION
    rates.apply(adapted, on="model")
    assert head.config._attn_implementation == "sdpa"


def test_flex_attention_is_refused():
    """Trap: the check runs it in eager form and would pass; transformers raises in the first training step."""
    model, head = pair("llama", num_layers=1)
    rates = estimate(model)
    head.config._attn_implementation = "flex_attention"
    before = head.model.layers[0].self_attn.attention_dropout
    with pytest.raises(ModelError, match=r"flex attention has no dropout(?s:.*)set_attn_implementation\('sdpa'\)"):
        rates.apply(head, on="model")
    assert head.model.layers[0].self_attn.attention_dropout == before
    assert len(rates.using("uniform", upper=0.0).apply(head, on="model", verify=False).rows) == 1

"""Rates on models: set where they belong, in force, refused where they do not fit."""

import copy
import json

import pytest
import torch
from lms import ADAPTED, NATIVE, classifier, lm, pair, texts, tokenizer
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, available, tiny_batch, tiny_model
from torch import nn
from transformers import AttentionInterface, AutoModelForMaskedLM, T5EncoderModel, T5ForTokenClassification

from graftlm.errors import DataError, ModelError, SetupError
from graftlm.evaluation.dropout_section import dropout_section
from graftlm.training.dropout.fingerprint import Fingerprint
from graftlm.training.dropout.guided import GuidedDropout
from graftlm.training.dropout.noise import GaussianDropout
from graftlm.training.dropout.rates import Schedule
from graftlm.training.dropout.sites import find_sites

QUICK = {"progress": False, "check_head": False, "tolerance": 0.0}


def estimate(model, count=4):
    return GuidedDropout.estimate(model, texts(count), tokenizer=tokenizer(), **QUICK)


def dropouts_by_hand(model):
    """Every dropout of the backbone: path → rate, from a walk that knows two shapes: modules and float attributes."""
    found = {}
    for path, module in model.base_model.named_modules():
        if isinstance(module, nn.Dropout):
            found[path] = module.p
        else:
            found |= {f"{path}.{k}": v for k, v in vars(module).items() if "drop" in k and isinstance(v, float)}
    return found


@pytest.mark.supports("Guided dropout", "applied to the model's own dropout")
@pytest.mark.parametrize("architecture", NATIVE)
def test_rates_reach_every_dropout_of_the_backbone_and_no_other(architecture):
    """Trap: the release sets rates by position in modules(), and hits modules that are no dropout."""
    model, head = pair(architecture, dropout=0.25)
    rates = estimate(model)
    inside = set(dropouts_by_hand(head))
    others = {
        n: m.p
        for n, m in head.named_modules()
        if isinstance(m, nn.Dropout) and ".".join(n.split(".")[1:]) not in inside
    }
    applied = rates.apply(head)
    now = dropouts_by_hand(head)
    assert {row.module: row.new for row in applied.rows} == now
    assert {row.old for row in applied.rows} == {0.25}
    assert sorted(set(now.values())) == pytest.approx(
        [0.1 * i / (len(rates.blocks) - 1) for i in range(len(rates.blocks))]
    )
    for row in applied.rows:
        assert row.new == rates.rates[row.block]
        assert row.elements > 500
        assert row.measured == pytest.approx(row.new, abs=0.03)
        assert (row.measured == 0) == (row.new == 0)
    assert others or architecture == "gpt2"
    assert all(dict(head.named_modules())[name].p == p for name, p in others.items())  # the classifier's own
    assert "old rate" in str(applied)
    assert len(str(applied).splitlines()) == len(applied.rows) + 1


def test_the_order_of_scores_is_the_order_of_rates():
    model, head = pair("bert")
    rates = estimate(model, 16)
    rates.apply(head)
    named = dict(head.bert.named_modules())
    low = min(rates.blocks, key=rates.score)
    high = max(rates.blocks, key=rates.score)
    of = {"attention": "attention.self", "attention_output": "attention.output", "ffn_output": "output"}

    def rate(block):
        where = block.name.removesuffix(block.kind) + of.get(block.kind, block.kind)
        return named[f"{where}.dropout"].p

    assert (rate(low), rate(high)) == (pytest.approx(0.1), 0.0)


def test_bert_has_three_blocks_a_layer_and_the_embeddings():
    """37 blocks for BERT-base; FFN-in has no dropout and is in none."""
    sites = find_sites(tiny_model("bert", num_layers=12))
    assert len(sites.blocks) == 37
    assert not any("intermediate" in name for block in sites.blocks for name in block.tensors)
    kinds = [block.kind for block in sites.blocks]
    assert kinds.count("attention") == kinds.count("attention_output") == kinds.count("ffn_output") == 12
    assert len(sites.blocks[1].tensors) == 6
    assert len(find_sites(tiny_model("gpt2", num_layers=2)).blocks) == 7
    assert len(find_sites(tiny_model("t5", num_layers=2)).blocks) == 1 + 2 * 4 + 2 * 6


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["bert", "t5", "modernbert", "gpt2"])
def test_attention_rates_reach_the_kernel(architecture, implementation, monkeypatch):
    """Trap: attention's rate is often a number that SDPA is handed. What the kernels are handed, seen from below."""
    model, head = pair(architecture, num_layers=2)
    head.set_attn_implementation(implementation)
    rates = estimate(model)
    rates.apply(head)
    handed = []
    kernel, functional = torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.dropout

    def sdpa(*args, dropout_p=0.0, **kwargs):
        handed.append(dropout_p)
        return kernel(*args, dropout_p=dropout_p, **kwargs)

    def dropout(x, p=0.5, training=True, inplace=False):
        if x.ndim == 4:
            handed.append(p)
        return functional(x, p, training, inplace)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    head.train()(**tiny_batch(architecture))
    wanted = [rates.rates[block.name] for block in rates.blocks if block.kind in ("attention", "cross_attention")]
    assert handed == wanted
    handed.clear()
    head.eval()(**tiny_batch(architecture))
    assert set(handed) <= {0.0} or implementation == "eager"


def test_a_kernel_that_hides_its_mask_is_measured_in_eager_form():
    """Flash attention's mask cannot be seen; the rate comes through the same argument."""

    def opaque(module, query, key, value, attention_mask, **kwargs):
        raise AssertionError("the check must not run this kernel")

    AttentionInterface.register("opaque", opaque)
    model, head = pair("bert")
    head.set_attn_implementation("opaque")
    estimate(model).apply(head)
    assert head.config._attn_implementation == "opaque"


def test_a_rate_of_zero_in_the_model_is_no_obstacle():
    """ModernBERT ships with nn.Identity in place of a dropout."""
    model, head = pair("modernbert", dropout=0.0)
    assert any(isinstance(m, nn.Identity) for n, m in head.named_modules() if n.endswith("out_drop"))
    rates = estimate(model)
    applied = rates.apply(head)
    assert {row.module: row.new for row in applied.rows} == dropouts_by_hand(head)
    assert len({row.new for row in applied.rows}) == len(rates.blocks)


@pytest.mark.supports("Guided dropout", "applied to the dropout of LoRA")
@pytest.mark.parametrize("architecture", ADAPTED)
def test_adapters_of_models_without_dropout(architecture):
    model, head = pair(architecture, num_layers=2, dropout=0.0)
    rates = estimate(model)
    assert len(rates.rates) == 2 * 7
    with pytest.raises(ModelError, match=r"ship without dropout(?s:.*)get_peft_model"):
        rates.apply(head)
    adapted = get_peft_model(head, LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], task_type="SEQ_CLS"))
    applied = rates.apply(adapted)
    assert len(applied.rows) == 6
    assert {row.old for row in applied.rows} == {0.0}
    by_score = sorted(applied.rows, key=lambda row: rates.tensors[f"{row.block}.weight"].score)
    assert [row.new for row in by_score] == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02, 0.0])
    assert all(abs(row.measured - row.new) < 0.03 for row in applied.rows)
    layers = {n: m for n, m in adapted.named_modules() if "lora_dropout.default" in n}
    assert sorted(m.p for m in layers.values()) == pytest.approx([0, 0.02, 0.04, 0.06, 0.08, 0.1])
    assert not any("drop" in name for name in adapted.state_dict())
    attention = rates.apply(adapted, on="model")
    assert {row.module.rpartition(".")[2] for row in attention.rows} == {"attention_dropout"}


@pytest.mark.parametrize(("architecture", "targets"), [("bert", ["query"]), ("llama", ["q_proj", "v_proj"])])
def test_the_report_shows_what_was_set_on_adapters(architecture, targets, tmp_path):
    """Trap: the file's own rates are those of other blocks, ranked among themselves."""
    model, head = pair(architecture, num_layers=2)
    rates = estimate(model)
    adapted = get_peft_model(head, LoraConfig(target_modules=targets, task_type="SEQ_CLS"))
    rates.save(tmp_path / "dropout.json", rates.apply(adapted, on="adapters"))
    names = [f"{n.split('.lora_dropout')[0]}" for n, _ in adapted.named_modules() if n.endswith("lora_dropout.default")]
    scores = [rates.tensors[f"{name.split('.', 3)[3]}.weight"].score for name in names]
    if architecture == "bert":
        scores = [
            (score + rates.tensors[f"{name.split('.', 3)[3]}.bias"].score) / 2
            for name, score in zip(names, scores, strict=True)
        ]
    order = sorted(scores)
    set_on = {n: m.p for n, m in adapted.named_modules() if n.endswith("lora_dropout.default")}
    section = dropout_section(tmp_path)
    assert len(section["dropout"]["rows"]) == len(names) == 2 * len(targets)
    for row, name, score in zip(section["dropout"]["rows"], names, scores, strict=True):
        assert name.endswith(row["block"])
        assert row["rank"] == order.index(score)
        assert float(row["score"]) == pytest.approx(score, rel=0.01)
        assert float(row["rate"]) == pytest.approx(set_on[f"{name}.lora_dropout.default"], abs=1e-4)
        assert float(row["measured"]) == pytest.approx(float(row["rate"]), abs=0.03)
    assert section["dropout"]["mean"] == "0.0500"
    for target in targets:
        assert target in section["dropout_picture"]
    assert "attention output" not in section["dropout_picture"]


def test_adapters_on_a_model_with_dropout():
    model, head = pair("bert", num_layers=2)
    rates = estimate(model)
    adapted = get_peft_model(head, LoraConfig(target_modules=["query", "value"], lora_dropout=0.3, task_type="SEQ_CLS"))
    own = rates.apply(adapted)
    assert {row.module for row in own.rows} == set(dropouts_by_hand(classifier("bert", num_layers=2)))
    lora = rates.apply(adapted, on="adapters")
    assert {row.old for row in lora.rows} == {0.3}
    assert sorted(row.new for row in lora.rows) == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])
    adapted.disable_adapter_layers()
    with pytest.raises(ModelError, match="no part in the forward pass"):
        rates.apply(adapted, on="adapters")
    with pytest.raises(ModelError, match="no adapter was found"):
        rates.apply(classifier_like(model), on="adapters")


def classifier_like(model):
    """A classifier on the backbone of `model`, without adapters."""
    head = classifier("bert", num_layers=2)
    head.bert.load_state_dict(model.bert.state_dict(), strict=False)
    return head


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["module", "compiled"])
def test_wrapped_models(wrap):
    model, head = pair("bert", num_layers=1)
    assert len(estimate(model).apply(wrap(head)).rows) == 4


@pytest.mark.parametrize("task", ["base", "token_classification", "question_answering", "masked_lm"])
def test_any_head(task):
    rates = estimate(lm("bert"))
    target = tiny_model("bert", task)
    target.base_model.load_state_dict(lm("bert").base_model.state_dict(), strict=False)
    assert len(rates.apply(target).rows) == 10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_head_of_every_architecture_has_known_sites(architecture):
    for task in ("base", "sequence_classification", "token_classification", "question_answering"):
        if available(architecture, task):
            found = find_sites(tiny_model(architecture, task, num_layers=2))
            assert {site.path for block in found.blocks for site in block.sites}


def test_a_dropout_without_a_block_and_a_block_without_a_dropout():
    rates = estimate(lm("bert"))
    extra = pair("bert")[1]
    extra.bert.encoder.layer[1].intermediate.dropout = nn.Dropout(0.1)
    with pytest.raises(ModelError, match=r"no block(?s:.*)encoder\.layer\.1\.intermediate\.dropout"):
        rates.apply(extra)
    number = pair("bert")[1]
    number.bert.encoder.layer[1].intermediate.hidden_dropout_prob = 0.1
    with pytest.raises(ModelError, match=r"intermediate\.hidden_dropout_prob"):
        rates.apply(number)
    less = pair("bert")[1]
    less.bert.encoder.layer[2].output.dropout = nn.Sequential()
    with pytest.raises(
        ModelError, match=r"no dropout behind it(?s:.*)ffn_output(?s:.*)encoder\.layer\.2\.output\.dropout"
    ):
        rates.apply(less)


def test_a_dropout_that_is_never_used_is_noticed(monkeypatch):
    """Applying is verified: a rate that is set but has no effect is an error, and the old rates come back."""
    model, head = pair("bert")
    rates = estimate(model)
    output = head.bert.encoder.layer[0].output
    monkeypatch.setattr(output, "forward", lambda x, y: output.LayerNorm(output.dense(x) + y))
    before = dropouts_by_hand(head)
    with pytest.raises(ModelError, match=r"no part in the forward pass(?s:.*)encoder\.layer\.0\.output\.dropout"):
        rates.apply(head)
    assert dropouts_by_hand(head) == before
    assert len(rates.apply(head, verify=False).rows) == 10


def test_a_mask_that_does_not_agree_is_noticed(monkeypatch):
    model, head = pair("bert")
    rates = estimate(model)
    wrong = head.bert.encoder.layer[0].output.dropout
    monkeypatch.setattr(wrong, "forward", lambda x: nn.functional.dropout(x, 0.5))
    with pytest.raises(
        ModelError, match=r"does not agree(?s:.*)layer\.0\.output\.dropout: set 0\.\d+, measured 0\.[45]"
    ):
        rates.apply(head)


def test_a_check_leaves_no_trace():
    model, head = pair("bert")
    rates = estimate(model)
    head.train()
    head.bert.encoder.layer[0].eval()
    modes = {name: module.training for name, module in head.named_modules()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    rates.apply(head)
    assert torch.equal(state, torch.get_rng_state())
    assert {name: module.training for name, module in head.named_modules()} == modes
    assert not head._forward_hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in head.modules())
    assert all(parameter.grad is None for parameter in head.parameters())


def test_another_model_is_refused(tmp_path):
    model, head = pair("bert")
    rates = estimate(model)
    with pytest.raises(ModelError, match=r"another model(?s:.*)num_hidden_layers: 2 \(measured: 3\)"):
        rates.apply(classifier("bert", num_layers=2))
    with pytest.raises(ModelError, match=r"another model(?s:.*)model_type"):
        rates.apply(classifier("roberta"))
    with pytest.raises(ModelError, match=r"other weights(?s:.*)check='config'"):
        rates.apply(classifier("bert", seed=1))
    rates.apply(classifier("bert", seed=1), check="config")
    rates.apply(copy.deepcopy(head).bfloat16())  # rounding is no other model
    with pytest.raises(SetupError, match="check"):
        rates.apply(head, check="none")
    with pytest.raises(SetupError, match="place"):
        rates.apply(head, on="everything")


def test_tokens_that_were_added_make_no_other_model():
    model, head = pair("bert")
    rates = estimate(model)
    longer = copy.deepcopy(head)
    longer.resize_token_embeddings(100)
    assert len(rates.apply(longer).rows) == 10
    with torch.no_grad():
        longer.bert.embeddings.word_embeddings.weight[:96].normal_()
    with pytest.raises(ModelError, match=r"other weights(?s:.*)word_embeddings"):
        rates.apply(longer)
    shorter = copy.deepcopy(head)
    shorter.resize_token_embeddings(90)
    with pytest.raises(ModelError, match=r"vocab_size: 90 \(measured: 96\)(?s:.*)check='config'"):
        rates.apply(shorter)
    assert len(rates.apply(shorter, check="config").rows) == 10


@pytest.mark.parametrize("kind", [T5EncoderModel, T5ForTokenClassification])
def test_an_encoder_takes_the_rates_of_its_encoder_decoder(kind):
    """Ranked among its own blocks: from the highest rate to the lowest."""
    model = lm("t5", num_layers=2)
    rates = estimate(model)
    head = kind(model.config)
    with pytest.raises(ModelError, match="other weights"):
        rates.apply(head)
    backbone = find_sites(head).backbone
    backbone.load_state_dict(model.state_dict(), strict=False)
    applied = rates.apply(head)
    assert {row.module: row.new for row in applied.rows} == dropouts_by_hand(backbone)
    blocks = sorted((block for block in rates.blocks if "decoder" not in block.name), key=rates.score)
    assert len(blocks) == 1 + 2 * 4
    wanted = {block.name: 0.1 * (8 - i) / 8 for i, block in enumerate(blocks)}
    assert {row.block: row.new for row in applied.rows} == pytest.approx(wanted)


def test_one_changed_tensor_is_another_fingerprint():
    model = lm("bert")
    mark = Fingerprint.of(model.bert, ["encoder.layer.0.output.dense.weight", "embeddings.LayerNorm.bias"])
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.bias.copy_(model.bert.embeddings.LayerNorm.bias.flip(0))
    with pytest.raises(ModelError, match=r"1 of 2 differ, such as embeddings\.LayerNorm\.bias"):
        mark.check(model.bert)


def test_a_file_says_all_of_it(tmp_path):
    model, head = pair("bert")
    rates = estimate(model).using("shuffled", seed=4, mean=0.08)
    path = rates.save(tmp_path / "rates.json")
    again = GuidedDropout.load(path)
    assert again == rates
    assert again.rates == rates.rates
    assert [row.new for row in again.apply(head).rows] == [row.new for row in rates.apply(head).rows]
    assert path.stat().st_size < 40_000
    assert "w1" not in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["rates.json"]
    values = json.loads(path.read_text())
    assert {row["block"]: row["rate"] for row in values["rates"]} == rates.rates
    for broken in (
        "",
        "[]",
        "{}",
        json.dumps(values | {"schema": "graftlm.guided_dropout/9"}),
        json.dumps({**values, "task": 1, "blocks": 3}),
    ):
        path.write_text(broken)
        with pytest.raises(DataError):
            GuidedDropout.load(path)
    with pytest.raises(DataError, match="cannot be read"):
        GuidedDropout.load(tmp_path / "none.json")


def test_a_schedule_is_changed_and_not_begun_anew(tmp_path):
    rates = estimate(lm("bert"))
    chained = rates.using(upper=0.3).using("shuffled", seed=2)
    assert chained.schedule == Schedule("shuffled", upper=0.3, seed=2)
    assert sorted(chained.rates.values()) == pytest.approx([0.3 * i / 9 for i in range(10)])
    loaded = GuidedDropout.load(chained.save(tmp_path / "rates.json"))
    assert loaded.using(mean=0.2).schedule == Schedule("shuffled", upper=0.3, seed=2, mean=0.2)
    assert loaded.using(mean=0.2).using("guided", mean=None).schedule == Schedule(upper=0.3, seed=2)
    with pytest.raises(SetupError, match=r"uper(?s:.*)upper"):
        rates.using(uper=0.3)


def test_rates_come_back_after_save_and_load_of_the_model_only_when_applied(tmp_path):
    model, head = pair("bert")
    rates = estimate(model)
    rates.apply(head)
    head.save_pretrained(tmp_path)
    loaded = type(head).from_pretrained(tmp_path)
    assert set(dropouts_by_hand(loaded).values()) == {0.1}
    rates.apply(loaded)
    assert dropouts_by_hand(loaded) == dropouts_by_hand(head)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "gpt2", "t5", "modernbert", "llama", "gemma2"])
def test_gaussian_noise_in_training_only(architecture):
    """Trap: the release's Gaussian baseline is noisy in evaluation too."""
    model, head = pair(architecture, num_layers=2)
    rates = estimate(model).using("uniform", noise="gaussian", upper=0.4, lower=0.2)
    on = "model"
    clean = head.eval()(**tiny_batch(architecture)).logits
    applied = rates.apply(head, on=on)
    for row in applied.rows:
        assert row.new == pytest.approx(0.3)
        assert row.measured == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(head.eval()(**tiny_batch(architecture)).logits, clean, rtol=1e-4, atol=1e-5)
    one, other = (head.train()(**tiny_batch(architecture)).logits for _ in range(2))
    assert not torch.allclose(one, other, atol=1e-3)
    before = rates.using("guided", noise="bernoulli").apply(head, on=on)  # and back
    assert all(row.old == pytest.approx(0.3) for row in before.rows)
    assert not any(isinstance(module, GaussianDropout) for module in head.modules())
    assert head.config._attn_implementation in ("sdpa", "eager")


def test_gaussian_noise_has_the_variance_of_dropout():
    x = torch.ones(200_000)
    torch.manual_seed(0)
    noisy = GaussianDropout(0.25).train()(x)
    dropped = nn.Dropout(0.25).train()(x)
    assert noisy.mean() == pytest.approx(1.0, abs=0.01)
    assert noisy.var() == pytest.approx(float(dropped.var()), rel=0.02)
    assert noisy.var() == pytest.approx(0.25 / 0.75, rel=0.02)


def test_training_under_gaussian_attention_has_gradients():
    model, head = pair("bert", num_layers=1)
    estimate(model).using("uniform", noise="gaussian").apply(head)
    head.train()(**tiny_batch("bert")).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.bert.encoder.parameters())


def test_rates_of_a_saved_language_model_fit_its_classifier(tmp_path):
    """The usual way: one checkpoint, loaded with two heads."""
    model = lm("bert")
    model.save_pretrained(tmp_path)
    rates = estimate(AutoModelForMaskedLM.from_pretrained(tmp_path))
    from transformers import AutoModelForSequenceClassification

    rates.apply(AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5))

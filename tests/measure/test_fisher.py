"""tr(F) against a loop over single examples that knows nothing of hooks, directions or cotangents."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, available, tiny_batch, tiny_model
from torch import nn

from graftlm.errors import SetupError
from graftlm.measure.fisher import FisherTrace, fisher_trace
from graftlm.measure.likelihood import KINDS

TASK = {"sequence_classification": "classification"}
PAIRS = [
    (architecture, head)
    for architecture in ARCHITECTURES
    for head in ("sequence_classification", "token_classification", "question_answering", "masked_lm", "causal_lm")
    if available(architecture, head)
]


def lora(model, r=4):
    names = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets = [n for n in ("query", "value", "q", "v", "q_proj", "v_proj", "q_lin", "v_lin", "Wqkv") if n in names]
    config = LoraConfig(r=r, target_modules=targets or ["c_attn"], fan_in_fan_out=not targets, init_lora_weights=False)
    return get_peft_model(model, config)


def groups_by_layer(model, trainable=True):
    """Parameters keyed by the first number in their name; everything else under "rest"."""
    groups = {}
    for name, parameter in model.named_parameters():
        if trainable and not parameter.requires_grad:
            continue
        number = next((part for part in name.split(".") if part.isdigit()), "rest")
        groups.setdefault(number, []).append(parameter)
    return groups


def log_probability(task, model, single, choose):
    """log p(y|x) of one example as a scalar in the graph, by log_softmax; `choose(log_p)` gives the labels."""
    inputs = {k: v for k, v in single.items() if k not in ("labels", "start_positions", "end_positions")}
    out = model(**inputs)
    if task == "classification":
        log_p = out.logits.log_softmax(-1)
        return log_p.gather(-1, choose(log_p, single["labels"])[:, None]).sum()
    if task == "multi_label":
        label = choose(out.logits, single["labels"])
        return -nn.functional.binary_cross_entropy_with_logits(out.logits, label.float(), reduction="sum")
    if task == "regression":
        return -0.5 * (single["labels"].reshape(out.logits.shape) - out.logits).square().sum()
    if task == "question_answering":
        length = int(single["attention_mask"].sum())
        start, end = (z[:, :length].log_softmax(-1) for z in (out.start_logits, out.end_logits))
        a, b = choose(start, single["start_positions"]), choose(end, single["end_positions"])
        return start[0, a].sum() + end[0, b].sum()
    logits, labels = out.logits[0], single["labels"][0]
    if task == "causal_lm":
        logits, labels = logits[:-1], labels[1:]
    kept = labels != -100
    log_p = logits[kept].log_softmax(-1)
    return log_p.gather(-1, choose(log_p, labels[kept])[:, None]).sum()


def brute_force(model, batch, groups, task, choose):
    model = model.eval()
    names = {id(p): n for n, p in model.named_parameters()}
    sums = {name: [] for name in groups}
    for row in range(len(batch["input_ids"])):
        value = log_probability(task, model, {k: v[row : row + 1] for k, v in batch.items()}, choose)
        model.zero_grad()
        for p in (p for group in groups.values() for p in group):
            assert names[id(p)]
            p.requires_grad_(True)
        value.backward()
        for name, group in groups.items():
            sums[name].append(sum(p.grad.double().square().sum().item() for p in group if p.grad is not None))
    model.zero_grad()
    return {name: float(np.mean(values)) for name, values in sums.items()}


def gold(_, labels):
    return labels


def mode(log_p, _):
    return log_p.argmax(-1)


def close(found, wanted, tolerance=2e-5):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name] == pytest.approx(wanted[name], rel=tolerance, abs=1e-10), name


@pytest.mark.supports("Fisher trace", "LoRA, {head}")
@pytest.mark.parametrize(("architecture", "head"), PAIRS)
def test_lora_equals_a_loop_over_single_examples(architecture, head):
    model = lora(tiny_model(architecture, head, dropout=0.3))
    batch = tiny_batch(architecture, head)
    groups, task = groups_by_layer(model), TASK.get(head, head)
    found = fisher_trace(model, [batch], groups, task=task, kind="empirical")
    wanted = brute_force(model, batch, groups, task, gold)
    close(found.traces, wanted)
    assert found.examples == 4
    assert len(wanted) >= 3
    assert min(wanted.values()) > 0


@pytest.mark.supports("Fisher trace", "per example, all parameters")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("square", [False, True], ids=["4x7", "7x7"])
def test_full_fine_tuning_equals_a_loop(architecture, square):
    """Norms, embeddings, tied and position tables too; a batch as long as its texts must not confuse them."""
    head = "sequence_classification"
    model = tiny_model(architecture, head, dropout=0.3)
    batch = tiny_batch(architecture, head, batch_size=7 if square else 4)
    groups = groups_by_layer(model)
    close(
        fisher_trace(model, [batch], groups, task="classification", kind="mode").traces,
        brute_force(model, batch, groups, "classification", mode),
        tolerance=1e-4,
    )


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5"])
def test_most_parameters_need_no_loop(architecture):
    """The speed depends on it: only tables without a batch dimension and tensors with two owners are looped over."""
    from graftlm.measure.example_gradients import ExampleGradients

    model = tiny_model(architecture).eval()
    parameters = dict(model.named_parameters())
    batch = tiny_batch(architecture)
    del batch["labels"]
    with ExampleGradients(model, list(parameters.values()), 4, 4) as recorder:
        model(**batch)
    unseen = [n for n, p in parameters.items() if any(p is u for u in recorder.unseen)]
    assert all("relative_attention_bias" in name or "shared" in name for name in unseen)


@pytest.mark.parametrize(("task", "labels"), [("multi_label", 3), ("regression", 1), ("regression", 3)])
@pytest.mark.parametrize("kind", ["empirical", "mode"])
def test_multi_label_and_regression(task, labels, kind):
    model = lora(tiny_model("bert", num_labels=labels))
    batch = tiny_batch("bert")
    batch["labels"] = torch.randn(4, labels) if task == "regression" else torch.randint(0, 2, (4, labels))
    groups = groups_by_layer(model)
    if (task, kind) == ("regression", "mode"):
        with pytest.raises(SetupError, match="mode"):
            fisher_trace(model, [batch], groups, task=task, kind=kind)
        return
    choose = gold if kind == "empirical" else lambda z, _: (z > 0).long()
    close(
        fisher_trace(model, [batch], groups, task=task, kind=kind).traces,
        brute_force(model, batch, groups, task, choose),
    )


def test_multiple_choice_counts_all_choices_of_an_example_as_one():
    from transformers import BertConfig, BertForMultipleChoice

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertForMultipleChoice(config).eval()
    batch = {"input_ids": torch.randint(5, 50, (3, 2, 6)), "labels": torch.tensor([0, 1, 1])}
    groups = groups_by_layer(model)
    found = fisher_trace(model, [batch], groups, task="multiple_choice", kind="empirical")
    wanted = brute_force(model, batch, groups, "classification", gold)
    close(found.traces, wanted, tolerance=1e-4)


def expectation(model, batch, groups, task, labels):
    """Σ_y p(y|x) ‖∇ log p(y|x)‖² by enumeration of every label vector y."""
    totals = dict.fromkeys(groups, 0.0)
    for row in range(len(batch["input_ids"])):
        single = {k: v[row : row + 1] for k, v in batch.items()}
        for y in labels:
            single["labels"] = y
            value = log_probability(task, model, single, gold)
            p = value.exp().item()
            for name, group in groups.items():
                gradients = torch.autograd.grad(value, group, retain_graph=True, allow_unused=True)
                totals[name] += p * sum(g.square().sum().item() for g in gradients if g is not None)
    return {name: total / len(batch["input_ids"]) for name, total in totals.items()}


def test_exact_is_the_expectation_over_every_label():
    model, batch = lora(tiny_model("bert")).eval(), tiny_batch("bert")
    groups = groups_by_layer(model)
    exact = fisher_trace(model, [batch], groups, task="classification", kind="exact").traces
    close(exact, expectation(model, batch, groups, "classification", torch.arange(3)[:, None]))

    batch["labels"] = torch.zeros(4, 3)
    vectors = torch.cartesian_prod(*[torch.arange(2)] * 3)[:, None]
    exact = fisher_trace(model, [batch], groups, task="multi_label", kind="exact").traces
    close(exact, expectation(model, batch, groups, "multi_label", vectors))


def test_exact_for_tokens_enumerates_every_sequence_of_labels():
    model = lora(tiny_model("bert", "token_classification", num_labels=2)).eval()
    batch = tiny_batch("bert", "token_classification", batch_size=1, length=3, num_labels=2)
    groups = groups_by_layer(model)
    sequences = torch.cartesian_prod(*[torch.arange(2)] * 3)[:, None]
    exact = fisher_trace(model, [batch], groups, task="token_classification", kind="exact").traces
    close(exact, expectation(model, batch, groups, "token_classification", sequences))


@pytest.mark.parametrize(("task", "labels"), [("classification", 3), ("multi_label", 3), ("regression", 2)])
def test_sampled_converges_to_exact(task, labels):
    model, batch = lora(tiny_model("bert", num_labels=labels)), tiny_batch("bert")
    batch["labels"] = {"classification": batch["labels"] % labels}.get(task, torch.zeros(4, labels))
    groups = groups_by_layer(model)
    exact = fisher_trace(model, [batch], groups, task=task, kind="exact").traces
    repeated = {name: tensor.repeat(15, *[1] * (tensor.ndim - 1)) for name, tensor in batch.items()}  # 15 draws in one
    draws = [fisher_trace(model, [repeated], groups, task=task, seed=s) for s in range(20)]
    for name in groups:
        values = np.array([d.traces[name] for d in draws])
        error = values.std(ddof=1) / np.sqrt(len(values))
        assert values.std() > 0
        assert abs(values.mean() - exact[name]) < 4 * error


def test_sampled_draws_depend_on_seed_step_and_example_alone():
    model, batch = lora(tiny_model("llama", "causal_lm")), tiny_batch("llama", "causal_lm", batch_size=4)
    groups = groups_by_layer(model)

    def trace(batches, ids, **more):
        return fisher_trace(model, batches, groups, task="causal_lm", example_ids=ids, **more)

    whole = trace([batch], [[0, 1, 2, 3]])
    singles = [{k: v[i : i + 1, : int(batch["attention_mask"][i].sum())] for k, v in batch.items()} for i in range(4)]
    close(trace(singles, [[0], [1], [2], [3]]).traces, whole.traces)  # no padding, one by one
    parts = [trace(singles[r::2], [[i] for i in (0, 1, 2, 3)[r::2]]) for r in range(2)]  # two processes
    added = {n: tuple(map(sum, zip(*[p.sums[n] for p in parts], strict=True))) for n in groups}
    together = FisherTrace.from_sums(added, 4, "sampled")
    close(together.traces, whole.traces)
    close(together.standard_errors, whole.standard_errors, tolerance=1e-4)
    assert trace([batch], [[0, 1, 2, 3]], step=1).traces != whole.traces
    assert trace([batch], [[0, 1, 2, 3]], seed=1).traces != whole.traces


def test_standard_error_is_that_of_the_mean_over_examples():
    model = lora(tiny_model("bert"))
    batch = tiny_batch("bert", batch_size=6)
    groups = groups_by_layer(model)
    each = [
        fisher_trace(model, [{k: v[i : i + 1] for k, v in batch.items()}], groups, task="classification", kind="mode")
        for i in range(6)
    ]
    found = fisher_trace(model, [batch], groups, task="classification", kind="mode")
    for name in groups:
        values = [e.traces[name] for e in each]
        assert found.standard_errors[name] == pytest.approx(np.std(values, ddof=1) / np.sqrt(6), rel=1e-3)
        assert np.isnan(each[0].standard_errors[name])


def test_opacus_agrees():
    opacus = pytest.importorskip("opacus", reason="cross-check with a second implementation, test extra")
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    x, y = torch.randn(6, 5), torch.randint(0, 3, (6,))
    twin = opacus.GradSampleModule(copy.deepcopy(model).train(), loss_reduction="sum")
    nn.functional.cross_entropy(twin(x.clone().requires_grad_()), y, reduction="sum").backward()
    wanted = {str(i): float(p.grad_sample.square().sum() / 6) for i, p in enumerate(twin.parameters())}
    groups = {str(i): [p] for i, p in enumerate(model.parameters())}
    batch = {"input": x, "labels": y}
    close(fisher_trace(model, [batch], groups, task="classification", kind="empirical").traces, wanted)


def test_nothing_of_the_pass_stays_behind():
    model = lora(tiny_model("bert", dropout=0.5))
    parameters = dict(model.named_parameters())
    first = next(p for n, p in parameters.items() if "lora_A" in n)
    first.requires_grad_(False)
    first_layer = next(m for m in model.modules() if isinstance(m, nn.Dropout))
    first_layer.eval()
    groups = {"all": [p for n, p in parameters.items() if "lora_" in n]}
    before = (
        {n: (p.requires_grad, p.detach().clone()) for n, p in parameters.items()},
        {n: m.training for n, m in model.named_modules()},
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),
    )
    with torch.no_grad():
        fisher_trace(model, [tiny_batch("bert")], groups, task="classification")
    for name, p in model.named_parameters():
        assert p.grad is None
        assert p.requires_grad == before[0][name][0]
        assert torch.equal(p, before[0][name][1])
    assert {n: m.training for n, m in model.named_modules()} == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert (np.random.get_state()[1] == before[3]).all()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_state_is_restored_after_an_error():
    model = lora(tiny_model("bert"))
    groups = groups_by_layer(model)
    for p in groups["0"]:
        p.requires_grad_(False)
    with pytest.raises(IndexError):
        fisher_trace(model, [{"input_ids": torch.full((2, 5), 10**6)}], groups, task="classification")
    assert model.training
    assert not any(p.requires_grad for p in groups["0"])
    assert all(not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "exact"])
def test_bfloat16_is_near_float32(kind):
    model, batch = lora(tiny_model("llama")).eval(), tiny_batch("llama")
    groups = groups_by_layer(model)
    wanted = fisher_trace(model, [batch], groups, task="classification", kind=kind).traces
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fisher_trace(model, [batch], groups, task="classification", kind=kind).traces
    for name in groups:
        assert found[name] == pytest.approx(wanted[name], rel=0.15)


def test_errors_say_what_to_type():
    model, batch = lora(tiny_model("llama", "causal_lm")), tiny_batch("llama", "causal_lm")
    groups = groups_by_layer(model)
    with pytest.raises(SetupError, match="multi_label"):
        fisher_trace(model, [batch], groups, task="clasification")
    with pytest.raises(SetupError, match="empirical"):
        fisher_trace(model, [batch], groups, task="causal_lm", kind="true")
    with pytest.raises(SetupError, match="vocabulary"):
        fisher_trace(model, [batch], groups, task="causal_lm", kind="exact")
    with pytest.raises(SetupError, match="labels"):
        fisher_trace(model, [{"input_ids": batch["input_ids"]}], groups, task="causal_lm")
    with pytest.raises(SetupError, match="no example"):
        fisher_trace(model, [], groups, task="causal_lm")
    classifier = lora(tiny_model("bert"))
    with pytest.raises(SetupError, match="gold labels"):
        fisher_trace(
            classifier,
            [{"input_ids": batch["input_ids"]}],
            groups_by_layer(classifier),
            task="classification",
            kind="empirical",
        )
    tokens = lora(tiny_model("bert", "token_classification", num_labels=60))
    with pytest.raises(SetupError, match=r"1024"):
        fisher_trace(
            tokens,
            [tiny_batch("bert", "token_classification", length=20, num_labels=60)],
            groups_by_layer(tokens),
            task="token_classification",
            kind="exact",
        )

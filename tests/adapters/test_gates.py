"""Open tokens: blocks left out where the gate is closed, statistics of the gates, gates that never open."""

import copy

import pytest
import torch
from adapters.neutrals import adapted, outputs, reference, weights_of
from datasets import Dataset
from peft import PeftModel
from tiny import ARCHITECTURES, DECODERS, ENCODER_DECODERS, tiny_batch, tiny_model
from transformers import Trainer, TrainingArguments, default_data_collator

import graftlm
from graftlm.adapters.injected_loss import domains_of
from graftlm.errors import DataError, ModelError, SetupError

METHOD = "Neutral residues"
HEAD = "sequence_classification"


@pytest.mark.supports(METHOD, "sparse inference")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sparse_inference_equals_the_dense_path_and_computes_open_tokens_only(architecture):
    task = "causal_lm" if architecture in DECODERS else HEAD
    model, batch = adapted(architecture, task), tiny_batch(architecture, task)
    dense = outputs(model, batch)
    model.peft_config["default"].sparse_inference = True
    rows = []
    for name, module in model.named_modules():
        if name.endswith("neutral_residues_out.default"):
            module.register_forward_hook(lambda module, args, output: rows.append(output.shape))
    torch.testing.assert_close(outputs(model, batch), dense, rtol=1e-5, atol=1e-6)
    tokens = batch["input_ids"].numel()
    assert len(rows) == 3 * (2 if architecture in ENCODER_DECODERS else 1)
    assert all(len(shape) == 2 for shape in rows) and 0 < sum(shape[0] for shape in rows) < len(rows) * tokens


def test_sparse_inference_with_every_gate_closed_or_open_in_training_and_from_a_file(tmp_path):
    base, batch = tiny_model("llama", "causal_lm", dropout=0.0), tiny_batch("llama", "causal_lm")
    plain = outputs(base, batch)
    model = adapted("llama", base=copy.deepcopy(base), sparse_inference=True)
    open_ones = outputs(model, batch)
    with reference(base, weights_of(model), "llama"):
        torch.testing.assert_close(open_ones, outputs(base, batch), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert again.peft_config["default"].sparse_inference and torch.equal(outputs(again, batch), open_ones)
    model.train()(**batch, domain=[0, 1, 0, 1]).loss.backward()  # dense, with its penalty
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "residues_gate" in name:
                parameter.zero_()
    assert torch.equal(outputs(model, batch), plain)


def test_only_a_relu_gate_can_be_sparse():
    with pytest.raises(SetupError, match="exactly zero"):
        graftlm.NeutralResiduesConfig(gate="elu", sparse_inference=True)
    for gate in ("elu", "none"):
        model, batch = adapted("llama", gate=gate), tiny_batch("llama", "causal_lm")
        model.peft_config["default"].sparse_inference = True
        with pytest.raises(SetupError, match=f'gate="{gate}", sparse_inference=True'):
            outputs(model, batch)
        model.train()(**batch, domain=[0, 1, 0, 1]).loss.backward()


def test_statistics_leave_modules_in_their_modes():
    model = adapted("llama").train()
    model.base_model.model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    graftlm.gate_statistics(model, {"eng": [tiny_batch("llama", "causal_lm")]})
    assert [module.training for module in model.modules()] == before and True in before and False in before


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "llama", "gemma2", "t5"])
def test_statistics_are_those_of_a_forward_written_by_hand(architecture, sparse):
    task = "causal_lm" if architecture in DECODERS else HEAD
    base = tiny_model(architecture, task, dropout=0.0)
    model = adapted(architecture, base=copy.deepcopy(base), sparse_inference=sparse).train()
    batches = [tiny_batch(architecture, task, batch_size=size, seed=size) for size in (4, 2)]
    found = graftlm.gate_statistics(model, {"one": batches, "two": batches[1:]})
    assert model.training and all(
        gate.domain == ("one" if at < len(found) / 2 else "two") for at, gate in enumerate(found)
    )
    sums = [[0, 0, 0.0, 0.0] for _ in found[: len(found) // 2]]
    for batch in batches:
        with reference(base, weights_of(model), architecture) as seen:
            outputs(base, batch)
        mask = batch["attention_mask"].bool()
        if task == "causal_lm":
            mask = torch.cat([batch["labels"][:, 1:] != -100, torch.zeros(len(mask), 1, dtype=torch.bool)], dim=1)
        for at, (z, r) in enumerate(zip(seen["z"], seen["r"], strict=True)):
            kept = torch.ones_like(mask) if architecture == "t5" and at >= 3 else mask
            for row, column in kept.nonzero().tolist():
                gate = max(z[row, column].item(), 0.0)
                step = (1, gate > 0, gate, r[row, column].abs().sum().item() / 16)
                sums[at] = [a + b for a, b in zip(sums[at], step, strict=True)]
    for gate, (count, opened, value, size) in zip(found, sums, strict=False):
        assert (gate.tokens, gate.open) == (count, pytest.approx(opened / count))
        assert (gate.value, gate.size) == (
            pytest.approx(value / count, rel=1e-4),
            pytest.approx(size / count, rel=1e-4),
        )


def test_what_has_no_gates():
    batch = tiny_batch("llama", "causal_lm")
    with pytest.raises(ModelError, match="no active neutral residues"):
        graftlm.gate_statistics(tiny_model("llama", "causal_lm"), {"eng": [batch]})
    with pytest.raises(DataError, match="no token in the text of dan"):
        graftlm.gate_statistics(adapted("llama"), {"dan": []})
    found = graftlm.gate_statistics(adapted("llama", gate="none"), {"eng": [batch]})
    assert [(gate.open, gate.value) for gate in found] == [(None, None)] * 3 and all(gate.size > 0 for gate in found)


@pytest.mark.parametrize(("weight", "labelled"), [(0.01, True), (0, True), (0, False)])
def test_a_gate_that_never_opens_is_named(weight, labelled, tmp_path):
    batch = tiny_batch("llama", "causal_lm", batch_size=4)
    columns = {name: value.tolist() for name, value in batch.items()} | ({"domain": [0, 1, 1, 0]} if labelled else {})
    rows = Dataset.from_dict(columns)
    for closed, says in ((1, "these learn nothing: model.layers.1.mlp"), (None, "no block learns anything any more")):
        model = adapted("llama", penalty_weight=weight)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "residues_gate" in name and closed in (None, int(name.split("layers.")[1][0])):
                    parameter.zero_()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            logging_steps=1,
            per_device_train_batch_size=4,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=rows,
            data_collator=default_data_collator,
            callbacks=[graftlm.PenaltyLog()],
        )
        with pytest.warns(UserWarning, match=says) as seen:
            trainer.train()
        (message,) = [str(one.message) for one in seen if "gates that no token" in str(one.message)]
        assert ("penalty_weight" in message) == (weight > 0)
        assert ["penalty" in row for row in trainer.state.log_history if "loss" in row] == [weight > 0] * 2
        assert not domains_of(model).looks_at_gates


@pytest.mark.parametrize("weight", [0.01, 0])
def test_whether_a_gate_opens_is_asked_of_new_rows_and_counted_tokens_alone(weight):
    model, batch = adapted("llama", penalty_weight=weight).train(), tiny_batch("llama", "causal_lm")
    model.base_model.model.model.layers[1].mlp.neutral_residues_gate["default"].register_forward_hook(_first_row_only)
    batch["labels"][2] = -100
    domains_of(model).looks_at_gates = True
    for labels, opened in (([1, 0, 0, 0], True), ([0, 1, 1, 1], False), ([1, 1, 1, 1], True)):
        model(**batch, domain=labels)
        found = domains_of(model).call.opened
        assert found == {f"model.layers.{layer}.mlp": opened or layer != 1 for layer in range(3)}
    batch["labels"][0] = -100
    model(**batch, domain=[1] * 4)
    assert not domains_of(model).call.opened["model.layers.1.mlp"]


def _first_row_only(module, args, z):
    return torch.cat([z[:1].abs(), -z[1:].abs()])

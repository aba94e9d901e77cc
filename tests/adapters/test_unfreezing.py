"""Scheduled unfreezing on bottleneck adapters: a layer is all of its projections with their biases."""

import re

import pytest
import torch
from adapters.bottlenecks import adapted, pairs, randomised, weights_of
from datasets import Dataset
from peft import get_peft_model
from tiny import ARCHITECTURES, ENCODER_DECODERS, tiny_batch, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import graftlm
from graftlm.measure.fisher import fisher_trace


@pytest.mark.parametrize(
    ("architecture", "kind"), [*((one, "houlsby") for one in ARCHITECTURES), ("bert", "pfeiffer"), ("t5", "pfeiffer")]
)
def test_a_layer_is_both_projections_with_their_biases(architecture, kind):
    model = get_peft_model(
        tiny_model(architecture), graftlm.BottleneckConfig(kind=kind, bottleneck_size=3, task_type="SEQ_CLS")
    )
    found = graftlm.trainable_layers(model)
    stacks = ("encoder", "decoder") if architecture in ENCODER_DECODERS else ("layer",)
    assert found.names == tuple(f"{stack}.{number}" for stack in stacks for number in range(3))
    for name in found.names:
        stack, number = name.split(".")
        names = [key for key, _ in found.parameters[name]]
        assert sum(p.numel() for _, p in found.parameters[name]) == (16 * 3 + 3 + 3 * 16 + 16) * len(names) // 4
        assert len(names) == (8 if kind == "houlsby" else 4)
        assert {tuple(key.split(".")[-3::2]) for key in names} == {
            (f"bottleneck_{role}", part) for role in ("down", "up") for part in ("weight", "bias")
        }
        assert {re.search(r"\.(\d+)\.", key)[1] for key in names} == {number}
        assert stack == "layer" or all(f".{stack}." in key for key in names)
    assert all("bottleneck" not in key for key, _ in found.head)


@pytest.mark.supports("Bottleneck adapters", "Fisher trace")
@pytest.mark.parametrize(("architecture", "kind"), pairs("houlsby"))
def test_the_trace_equals_a_loop_over_single_examples(architecture, kind):
    model = adapted(architecture, kind=kind, dropout=0.3).eval()
    batch = tiny_batch(architecture)
    found = graftlm.trainable_layers(model)
    groups = {name: [p for _, p in found.parameters[name]] for name in found.names}
    measured = fisher_trace(model, [batch], groups, task="classification", kind="empirical")
    totals = dict.fromkeys(groups, 0.0)
    for row in range(4):
        single = {name: value[row : row + 1] for name, value in batch.items()}
        label = single.pop("labels")
        model.zero_grad()
        model(**single).logits.log_softmax(-1)[0, label].sum().backward()
        for name, parameters in groups.items():
            totals[name] += sum(p.grad.double().square().sum().item() for p in parameters) / 4
    assert measured.traces == pytest.approx(totals, rel=1e-4)
    assert min(totals.values()) > 0


class Watch(TrainerCallback):
    """Which layers' adapters have moved by the beginning of each step."""

    def __init__(self):
        self.moved, self.start = {}, None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        now = {name: tensor.clone() for name, tensor in weights_of(model).items() if "bottleneck" in name}
        self.start = self.start or now
        moved = {name for name in now if not torch.equal(now[name], self.start[name])}
        self.moved[state.global_step] = {int(re.search(r"layer\.(\d)", name)[1]) for name in moved}


@pytest.mark.parametrize("schedule", ["gradual", "fisher"])
def test_in_a_trainer_a_layer_moves_once_it_is_open(schedule, tmp_path):
    model = adapted("bert", kind="houlsby", task_type="SEQ_CLS")
    model.add_adapter("below", graftlm.BottleneckConfig(kind="houlsby", bottleneck_size=2))
    randomised(model, "below", seed=3)
    graftlm.stack(model, ["below", "default"])
    below = {name: tensor.clone() for name, tensor in weights_of(model, "below").items()}
    rows = Dataset.from_dict({k: v.tolist() for k, v in tiny_batch("bert", batch_size=16).items()}).with_format("torch")
    callback, watch = graftlm.ScheduledUnfreezing(schedule, every_n_steps=2, trace_examples=8), Watch()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback, watch]).train()
    opened = {row["layer"]: row["step"] for row in callback.history if row["opened"]}
    assert sorted(opened.values()) == [0, 2, 4]
    if schedule == "gradual":
        assert opened == {"layer.2": 0, "layer.1": 2, "layer.0": 4}
    for step, moved in watch.moved.items():
        assert moved == {int(name[-1]) for name, when in opened.items() if when < step}, step
    assert all(torch.equal(tensor, below[name]) for name, tensor in weights_of(model, "below").items())

"""What ScheduledUnfreezing refuses or warns of, and what it works out by itself."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from torch import nn
from training.trained import adapted, rows, train

from graftlm.errors import SetupError
from graftlm.training.callback import ScheduledUnfreezing
from graftlm.training.trace_probe import examples_within_budget, infer_task


def test_a_stream_needs_trace_data(tmp_path):
    stream = rows().to_iterable_dataset()
    with pytest.raises(SetupError, match="trace_data"):
        train(tmp_path, adapted(), ScheduledUnfreezing("fisher", 2), stream)
    callback = ScheduledUnfreezing("fisher", 2, trace_data=rows())
    train(tmp_path, adapted(), callback, stream)
    assert sum(r["opened"] for r in callback.history) == 3


def test_openings_beyond_the_end_of_the_run(tmp_path):
    model = adapted()
    with pytest.raises(SetupError, match=r"every_n_steps=4"):
        train(tmp_path, model, ScheduledUnfreezing("gradual", every_n_steps=6))
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    with pytest.warns(UserWarning, match="every_n_steps=4 or less"):
        train(tmp_path, adapted(), ScheduledUnfreezing("gradual", every_n_steps=5))
    with pytest.warns(UserWarning, match="nothing to schedule"):
        train(tmp_path, adapted(layers_to_transform=[1]), ScheduledUnfreezing("gradual", every_n_steps=5))


def test_lost_savings_are_said(tmp_path):
    model = tiny_model("bert")
    model.enable_input_require_grads()
    with pytest.warns(UserWarning, match="save no time"):
        train(
            tmp_path,
            get_peft_model(model, LoraConfig(r=2, target_modules=["query"])),
            ScheduledUnfreezing("gradual", 3),
        )
    with pytest.warns(UserWarning, match="input embeddings as well"):
        train(tmp_path, tiny_model("gpt2", "causal_lm"), ScheduledUnfreezing("gradual", 2), rows("gpt2", "causal_lm"))


def test_nothing_trainable_is_an_error(tmp_path):
    model = tiny_model("bert")
    model.bert.requires_grad_(False)
    with pytest.raises(SetupError, match="LoraConfig"):
        train(tmp_path, model, ScheduledUnfreezing("gradual", 3))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"fisher": "true"}, "empirical"),
        ({"task": "classify"}, "token_classification"),
        ({"trace_examples": 0}, "at least 1"),
        ({"record_trace": -1}, "at least 1"),
        ({"schedule": "FUN"}, "fisher"),
    ],
)
def test_arguments_are_checked_when_the_callback_is_made(wrong, says):
    with pytest.raises(SetupError, match=says):
        ScheduledUnfreezing(**wrong)


def test_the_task_follows_from_the_model():
    assert infer_task(adapted(), {"labels": torch.tensor([1])}) == "classification"
    assert infer_task(adapted(), {"labels": torch.tensor([[1.0, 0.0, 1.0]])}) == "multi_label"
    assert infer_task(tiny_model("bert", num_labels=1), {}) == "regression"
    with pytest.raises(SetupError, match="task="):
        infer_task(nn.Linear(2, 2), {})


def test_trace_passes_stay_within_their_budget():
    from graftlm.training.trace_probe import RELATIVE_COST

    for steps, batch, passes in [(300, 32, 11), (1000, 8, 30), (5000, 64, 11)]:
        examples = examples_within_budget(steps, batch, passes)
        assert 4 < examples <= 1024
        assert passes * examples * RELATIVE_COST <= 0.05 * steps * batch
    assert examples_within_budget(10, 2, 11) == 4


@pytest.mark.parametrize(
    ("kind", "plugin", "schedule", "says"),
    [
        ("DEEPSPEED", None, "gradual", "DeepSpeed"),
        ("FSDP", {"fsdp_version": 1, "use_orig_params": False}, "gradual", "use_orig_params"),
        ("FSDP", {"fsdp_version": 1, "use_orig_params": True}, "fisher", "sharding a model"),
        ("FSDP", {"fsdp_version": 1, "use_orig_params": True}, "gradual", None),
        ("DEEPSPEED", None, "standard", None),
    ],
)
def test_sharded_set_ups_are_refused_or_not(tmp_path, monkeypatch, kind, plugin, schedule, says):
    """What accelerate reports is made up here; FSDP2 itself runs in test_ddp.py."""
    from types import SimpleNamespace

    from accelerate.utils import DistributedType

    from graftlm.training import setups

    state = SimpleNamespace(distributed_type=DistributedType[kind], fsdp_plugin=SimpleNamespace(**plugin or {}))
    monkeypatch.setattr(setups, "PartialState", lambda: state)
    monkeypatch.setattr(setups, "AcceleratorState", lambda: state)
    if says is None:
        train(tmp_path, adapted(), ScheduledUnfreezing(schedule, 3))
        return
    with pytest.raises(SetupError, match=says):
        train(tmp_path, adapted(), ScheduledUnfreezing(schedule, 3))

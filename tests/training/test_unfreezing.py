"""The loop-agnostic core: what opens when, and that nothing else ever moves."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_batch, tiny_model

from graftlm.errors import SetupError
from graftlm.training.unfreezing import SCHEDULES, Unfreezer


def lora(layers=4):
    return get_peft_model(tiny_model("bert", num_layers=layers), LoraConfig(task_type="SEQ_CLS", r=2))


def openings(unfreezer, steps):
    return {i: opened for i in range(steps) if (opened := unfreezer.step(i))}


def made_up_traces(values):
    return lambda step: {f"layer.{n}": v for n, v in enumerate(values)}


@pytest.mark.parametrize(
    ("schedule", "more", "wanted"),
    [
        ("standard", {}, {0: (0, 1, 2, 3)}),
        ("gradual", {}, {0: (3,), 5: (2,), 10: (1,), 15: (0,)}),
        ("reverse", {}, {0: (0,), 5: (1,), 10: (2,), 15: (3,)}),
        ("fixed", {"order": [1, 3, 0, 2]}, {0: (1,), 5: (3,), 10: (0,), 15: (2,)}),
        ("fixed", {"order": [f"layer.{n}" for n in (2, 0, 1, 3)]}, {0: (2,), 5: (0,), 10: (1,), 15: (3,)}),
        ("lpft", {}, {5: (0, 1, 2, 3)}),
        ("fisher", {"traces": made_up_traces([0.2, 9.0, 0.1, 4.0])}, {0: (1,), 5: (3,), 10: (0,), 15: (2,)}),
    ],
)
def test_what_opens_when(schedule, more, wanted):
    unfreezer = Unfreezer(lora(), schedule, 5, **more)
    wanted = {step: tuple(f"layer.{n}" for n in numbers) for step, numbers in wanted.items()}
    assert openings(unfreezer, 30) == wanted
    assert unfreezer.frozen == ()


def test_random_is_a_permutation_that_follows_the_seed():
    def order(seed):
        return [names[0] for names in openings(Unfreezer(lora(), "random", 1, seed=seed), 10).values()]

    orders = [tuple(order(seed)) for seed in range(12)]
    assert all(sorted(o) == [f"layer.{n}" for n in range(4)] for o in orders)
    assert len(set(orders)) > 6
    assert tuple(order(3)) == orders[3]


def test_fisher_asks_for_traces_only_where_there_is_a_choice():
    asked = []

    def traces(step):
        asked.append(step)
        return {"layer.0": 1.0, "layer.1": float(step), "layer.2": 0.5, "layer.3": 2.0}

    unfreezer = Unfreezer(lora(), "fisher", 3, traces=traces)
    opened = openings(unfreezer, 20)
    assert asked == [0, 3, 6]
    assert [names[0] for names in opened.values()] == ["layer.3", "layer.1", "layer.0", "layer.2"]


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s not in ("fixed", "fisher")])
def test_only_open_layers_and_the_head_move(schedule):
    model = lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    unfreezer = Unfreezer(model, schedule, 2, seed=1)
    batch = tiny_batch("bert")
    for i in range(10):
        unfreezer.step(i)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        may = {f"layer.{n}" for n in range(4)} & set(unfreezer.opened)
        assert any("classifier" in name for name in moved)
        for layer in range(4):
            of_layer = {name for name in moved if f"layer.{layer}." in name}
            assert bool(of_layer) == (f"layer.{layer}" in may), (i, layer)
        assert all("lora_" in name or "classifier" in name for name in moved)


def test_layers_thawed_by_others_get_no_gradient():
    model = lora()
    unfreezer = Unfreezer(model, "gradual", 100)
    unfreezer.step(0)
    with model.disable_adapter():
        pass
    thawed = dict(model.named_parameters())[
        "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.default.weight"
    ]
    assert thawed.requires_grad, "PEFT no longer thaws here (peft#3447): the guard can go"
    model(**tiny_batch("bert")).loss.backward()
    assert thawed.grad is None
    open_one = dict(model.named_parameters())[
        "base_model.model.bert.encoder.layer.3.attention.self.query.lora_B.default.weight"
    ]
    assert open_one.grad is not None
    assert open_one.grad.abs().sum() > 0
    unfreezer.apply()
    assert not thawed.requires_grad


def test_release_leaves_a_model_that_trains_everywhere():
    model = lora()
    unfreezer = Unfreezer(model, "gradual", 100)
    unfreezer.step(0)
    unfreezer.release()
    model(**tiny_batch("bert")).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(gradients) == 8
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_decisions_survive_json():
    first = Unfreezer(lora(), "fisher", 2, traces=made_up_traces([1, 2, 3, 4]))
    openings(first, 3)
    second = Unfreezer(lora(), "fisher", 2, traces=made_up_traces([4, 3, 2, 1]))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.frozen == ("layer.0", "layer.1")
    assert {i: o for i in range(3, 9) if (o := second.step(i))} == {4: ("layer.0",), 6: ("layer.1",)}


def test_deterministic_schedules_catch_up_and_fisher_refuses_to_guess():
    late = Unfreezer(lora(), "gradual", 5)
    assert late.step(11) == ("layer.3", "layer.2", "layer.1")
    with pytest.raises(SetupError, match="load_state_dict"):
        Unfreezer(lora(), "fisher", 5, traces=made_up_traces([1, 2, 3, 4])).step(11)


def test_full_fine_tuning_opens_the_embeddings_last():
    model = tiny_model("bert", num_layers=2)
    unfreezer = Unfreezer(model, "gradual", 1)
    assert [names[0] for names in openings(unfreezer, 5).values()] == ["layer.1", "layer.0", "embeddings"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"schedule": "graduel"}, "gradual, reverse"),
        ({"every_n_steps": 0}, "optimizer steps"),
        ({"every_n_steps": 2.5}, "optimizer steps"),
        ({"schedule": "fixed"}, "needs its `order`"),
        ({"schedule": "gradual", "order": [0]}, "belongs to the fixed"),
        ({"schedule": "fixed", "order": [0, 1, 2]}, "a permutation of 0"),
        ({"schedule": "fixed", "order": [0, 1, 2, 2]}, "a permutation of 0"),
        ({"schedule": "fixed", "order": [0, 1, 2, 9]}, "a permutation of 0"),
        ({"schedule": "fisher"}, "traces="),
    ],
)
def test_errors_say_what_to_type(arguments, says):
    with pytest.raises(SetupError, match=says):
        Unfreezer(lora(), **arguments)


def test_a_trace_that_is_not_finite_is_an_error():
    unfreezer = Unfreezer(lora(), "fisher", 5, traces=made_up_traces([1.0, float("nan"), 2.0, 3.0]))
    with pytest.raises(SetupError, match="diverged"):
        unfreezer.step(0)


def test_decisions_of_another_model_are_refused():
    with pytest.raises(SetupError, match=r"layer\.7"):
        Unfreezer(lora(), "gradual", 5).load_state_dict({"opened": {"layer.7": 0}})


def test_a_schedule_that_was_interrupted_is_noticed():
    model = lora()
    Unfreezer(model, "gradual", 10).step(0)
    with pytest.raises(SetupError, match="stopped in the middle"):
        Unfreezer(model, "gradual", 10)
    again = Unfreezer(model, "gradual", 10)
    assert again.layer_names == tuple(f"layer.{n}" for n in range(4))
    again.release()
    Unfreezer(model, "gradual", 10)

"""ScheduledUnfreezing in real Trainers."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import ARCHITECTURES, available, tiny_model
from training.trained import adapted, arguments, rows, train
from transformers import Trainer, TrainerCallback

from graftlm.errors import SetupError
from graftlm.measure.fisher import fisher_trace
from graftlm.training.callback import ScheduledUnfreezing


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(first, second, tolerance=0.0):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=0, atol=tolerance), name


class Movement(TrainerCallback):
    """Which parameters each optimizer step has moved."""

    def __init__(self):
        self.moved = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = weights(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.moved.append({n for n, p in model.named_parameters() if not torch.equal(p, self.before[n])})


@pytest.mark.supports("Scheduled unfreezing", "gradual, LoRA, in a Trainer")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradual_on_every_architecture(tmp_path, architecture):
    callback, movement = ScheduledUnfreezing("gradual", every_n_steps=2), Movement()
    train(tmp_path, adapted(architecture), callback, rows(architecture), callbacks=[movement], max_steps=14)
    layers = callback.layer_names
    assert len(layers) == (6 if architecture in ("t5", "mt5") else 3)
    for step, moved in enumerate(movement.moved):
        for position, layer in enumerate(layers):
            part = layer.replace("encoder.", "encoder.block.").replace("decoder.", "decoder.block.")
            part = part.replace("layer.", "") if architecture not in ("t5", "mt5") else part
            of_layer = [n for n in moved if f".{part}." in n and "lora_B" in n]
            assert bool(of_layer) == (step >= 2 * (len(layers) - 1 - position)), (step, layer)


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("bert", "token_classification"),
        ("bert", "question_answering"),
        ("xlm-roberta", "masked_lm"),
        ("llama", "causal_lm"),
        ("gemma2", "causal_lm"),
        ("gpt2", "causal_lm"),
        ("t5", "seq2seq_lm"),
        ("mt5", "sequence_classification"),
    ],
)
def test_fisher_on_every_kind_of_head(tmp_path, architecture, head):
    assert available(architecture, head)
    callback = ScheduledUnfreezing("fisher", every_n_steps=2)
    train(tmp_path, adapted(architecture, head), callback, rows(architecture, head), max_steps=14)
    by_step = {}
    for row in callback.history:
        by_step.setdefault(row["step"], []).append(row)
    assert sorted(by_step) == [2 * n for n in range(len(callback.layer_names))]
    for step, found in by_step.items():
        opened = [r for r in found if r["opened"]]
        candidates = [r for r in found if r["opened"] or not r["open"]]
        assert len(opened) == 1
        if len(candidates) > 1:
            assert opened[0]["trace"] == max(r["trace"] for r in candidates) > 0, step
            assert opened[0]["kind"] == "sampled"
            assert opened[0]["examples"] >= 4
        else:
            assert opened[0]["trace"] is None
            assert opened[0]["kind"] is None


def test_the_trace_is_that_of_the_function_a_user_can_call(tmp_path):
    data, model = rows(), adapted()
    groups = {
        f"layer.{i}": [p for n, p in model.named_parameters() if "lora_" in n and f".{i}." in n] for i in range(3)
    }
    chosen = np.random.default_rng([7, 0]).choice(24, 10, replace=False).tolist()
    batches = [data[chosen[i : i + 4]] for i in range(0, 10, 4)]
    ids = [chosen[i : i + 4] for i in range(0, 10, 4)]
    wanted = fisher_trace(model, batches, groups, task="classification", seed=7, step=0, example_ids=ids)
    callback = ScheduledUnfreezing("fisher", every_n_steps=4, trace_examples=10, seed=7)
    train(tmp_path, model, callback, data)
    found = {r["layer"]: r for r in callback.history if r["step"] == 0}
    for name in groups:
        assert found[name]["trace"] == pytest.approx(wanted.traces[name], rel=1e-5)
        assert found[name]["standard_error"] == pytest.approx(wanted.standard_errors[name], rel=1e-4)


@pytest.mark.parametrize("schedule", ["gradual", "random", "lpft", "fisher"])
def test_resume_is_bit_exact(tmp_path, schedule):
    def run(folder, steps, resume=None, **more):
        callback = ScheduledUnfreezing(schedule, every_n_steps=4, record_trace=5, log_path=tmp_path / f"{folder}.jsonl")
        model = adapted(dropout=0.3)
        train(tmp_path / folder, model, callback, resume=resume, save_strategy="steps", save_steps=6, **more)
        return weights(model), callback.history

    whole, history = run("whole", 12)
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    for more in ({}, {"restore_callback_states_from_checkpoint": True}):
        resumed, resumed_history = run("resumed", 12, resume=str(checkpoint), **more)
        same(whole, resumed)
        if not more:  # Trainer then builds a callback of its own from the saved state
            assert resumed_history == history
        assert [json.loads(line) for line in (tmp_path / "resumed.jsonl").read_text().splitlines()] == history


def test_resume_under_another_schedule_is_refused(tmp_path):
    train(tmp_path, adapted(), ScheduledUnfreezing("gradual", 4), save_strategy="steps", save_steps=6)
    with pytest.raises(SetupError, match="checkpoint: 'gradual'"):
        train(tmp_path, adapted(), ScheduledUnfreezing("reverse", 4), resume=str(tmp_path / "checkpoint-6"))


def test_the_trace_leaves_the_run_as_it_was(tmp_path):
    """Recording tr(F) must not change a single bit of the weights, dropout and data order included."""
    plain, recorded = adapted(dropout=0.3), adapted(dropout=0.3)
    train(tmp_path / "a", plain, ScheduledUnfreezing("gradual", every_n_steps=3))
    callback = ScheduledUnfreezing("gradual", every_n_steps=3, record_trace=2)
    train(tmp_path / "b", recorded, callback)
    same(weights(plain), weights(recorded))
    assert sorted({r["step"] for r in callback.history if r["trace"] is not None}) == [0, 2, 4, 6, 8, 10]


def test_a_collator_with_random_masks_is_left_as_it_was(tmp_path):
    from tiny import tiny_tokenizer
    from transformers import DataCollatorForLanguageModeling

    def run(name, record, seed):
        model = adapted("bert", "masked_lm", dropout=0.3)
        trainer = Trainer(
            model,
            arguments(tmp_path / name),
            train_dataset=rows("bert", "base", n=24),
            data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), seed=seed),
            callbacks=[ScheduledUnfreezing("gradual", every_n_steps=3, record_trace=record)],
        )
        trainer.train()
        return weights(model)

    for seed in (None, 3):
        same(run("a", None, seed), run("b", 2, seed))


def test_standard_is_plain_training(tmp_path):
    plain, scheduled = adapted(dropout=0.3), adapted(dropout=0.3)
    train(tmp_path / "a", plain, None)
    train(tmp_path / "b", scheduled, ScheduledUnfreezing("standard"))
    same(weights(plain), weights(scheduled))


class InputGradients(TrainerCallback):
    """Whether the backward pass goes down to the embeddings while training."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.on = any(getattr(m, "_require_grads_hook", None) is not None for m in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(tmp_path, reentrant):
    plain, checkpointed = adapted(dropout=0.0), adapted(dropout=0.0)
    train(tmp_path / "a", plain, ScheduledUnfreezing("fisher", every_n_steps=3))
    seen = InputGradients()

    def checkpointed_run():
        train(
            tmp_path / "b",
            checkpointed,
            ScheduledUnfreezing("fisher", every_n_steps=3),
            callbacks=[seen],
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
        )

    if reentrant:
        with pytest.warns(UserWarning, match="'use_reentrant': False"):
            checkpointed_run()
    else:
        checkpointed_run()
    same(weights(plain), weights(checkpointed), tolerance=1e-6)
    assert seen.on == reentrant
    assert any(getattr(m, "_require_grads_hook", None) is not None for m in checkpointed.modules()), "not put back"


def test_accumulation_counts_optimizer_steps(tmp_path):
    callback, movement = ScheduledUnfreezing("gradual", every_n_steps=2), Movement()
    train(tmp_path, adapted(), callback, callbacks=[movement], max_steps=7, gradient_accumulation_steps=3)
    for step, moved in enumerate(movement.moved):
        for layer in range(3):
            assert any(f".{layer}." in n and "lora" in n for n in moved) == (step >= 2 * (2 - layer))


class Thaws(TrainerCallback):
    def on_substep_end(self, args, state, control, model=None, **kwargs):
        with model.disable_adapter():
            pass

    on_step_end = on_substep_end


class ThawsInTheLoss(Trainer):
    """As preference losses do: a reference pass with the adapter off in the middle of a step."""

    def compute_loss(self, model, inputs, **kwargs):
        with model.disable_adapter(), torch.no_grad():
            model(**inputs)
        return super().compute_loss(model, inputs, **kwargs)


def test_disable_adapter_in_the_middle(tmp_path):
    plain, disturbed = adapted(dropout=0.0), adapted(dropout=0.0)
    settings = {"gradient_accumulation_steps": 2, "max_steps": 8, "weight_decay": 0.1, "max_grad_norm": 0.01}
    train(tmp_path / "a", plain, ScheduledUnfreezing("gradual", 2), **settings)
    ThawsInTheLoss(
        disturbed,
        arguments(tmp_path / "b", **settings),
        train_dataset=rows(),
        callbacks=[ScheduledUnfreezing("gradual", 2), Thaws()],
    ).train()
    same(weights(plain), weights(disturbed))


def test_load_best_model_at_end(tmp_path):
    model, data = adapted(), rows()
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            load_best_model_at_end=True,
            eval_strategy="steps",
            eval_steps=3,
            save_strategy="steps",
            save_steps=3,
            metric_for_best_model="loss",
        ),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[ScheduledUnfreezing("gradual", every_n_steps=4)],
    )
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert trainer.state.best_metric == min(losses.values())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-6)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_bfloat16(tmp_path):
    model, callback = adapted("llama", "causal_lm"), ScheduledUnfreezing("fisher", every_n_steps=3)
    train(tmp_path, model, callback, rows("llama", "causal_lm"), bf16=True)
    assert sum(r["opened"] for r in callback.history) == 3
    assert all(np.isfinite(r["trace"]) for r in callback.history if r["step"] < 6)


def test_full_fine_tuning(tmp_path):
    model, callback, movement = tiny_model("bert"), ScheduledUnfreezing("fisher", every_n_steps=2), Movement()
    train(tmp_path, model, callback, callbacks=[movement])
    assert callback.layer_names == ("embeddings", "layer.0", "layer.1", "layer.2")
    opened = {r["layer"]: r["step"] for r in callback.history if r["opened"]}
    for step, moved in enumerate(movement.moved):
        for layer, since in opened.items():
            part = ".embeddings." if layer == "embeddings" else f".{layer}."
            assert any(part in n for n in moved) == (step >= since)


def test_a_second_run_starts_afresh(tmp_path):
    callback = ScheduledUnfreezing("gradual", every_n_steps=3)
    train(tmp_path, adapted(), callback)
    first = callback.history
    train(tmp_path, adapted(), callback)
    assert callback.history == first
    assert len(first) == 9


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # TRL 1.16 uses the old name
def test_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is in the [test] extra")
    from tiny import tiny_tokenizer

    callback = ScheduledUnfreezing("fisher", every_n_steps=2)
    names = ("output_dir", "max_steps", "per_device_train_batch_size", "save_strategy", "disable_tqdm", "use_cpu")
    settings = {name: getattr(arguments(tmp_path, max_steps=8), name) for name in names}
    more = {"max_length": 16, "bf16": False, "dataloader_pin_memory": False, "report_to": "none"}
    trainer = trl.SFTTrainer(
        tiny_model("llama", "causal_lm"),
        trl.SFTConfig(**settings, **more),
        train_dataset=Dataset.from_dict({"text": [f"w{i} w{i + 1} w{i + 2} w{2 * i}" for i in range(20)]}),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    trainer.train()
    assert sum(r["opened"] for r in callback.history) == 3
    assert all(r["trace"] > 0 for r in callback.history if r["step"] < 4)

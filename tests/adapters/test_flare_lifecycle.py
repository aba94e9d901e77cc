"""FLARE through the life of an adapter: saved, loaded, switched, copied, scheduled, trained."""

import copy
import io
import warnings
from functools import partial

import pytest
import torch
from adapters.flares import ARCHITECTURES, flare, outputs, pair, randomised, target_of, weights_of
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny import ENCODER_DECODERS, tiny_model, tiny_tokenizer
from transformers import Trainer, TrainingArguments

import graftlm
from graftlm.errors import DataError, ModelError, SetupError
from graftlm.measure.fisher import fisher_trace


@pytest.mark.supports("FLARE", "save and load")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_adapter_comes_back(architecture, tmp_path):
    settings = {"fusion": "cross_attention", "source_layer": "same", "task_type": "SEQ_CLS"}
    model, batch = flare(architecture, **settings), pair(architecture)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(architecture, dropout=0.0), tmp_path)
    config = loaded.peft_config["default"]
    assert (config.peft_type, config.fusion, config.source_layer, config.align) == (
        "FLARE",
        "cross_attention",
        "same",
        "attention",
    )
    for changed in (batch, target_of(batch)):
        assert torch.equal(outputs(loaded, changed), outputs(model, changed))
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if "lora_" in name)


def test_what_transformers_loads_itself_takes_a_source_in_a_call_and_not_in_generate(tmp_path):
    """As the how-to says."""
    model, batch = flare("llama", "causal_lm", task_type="CAUSAL_LM"), pair("llama", "causal_lm")
    batch.pop("labels")
    model.save_pretrained(tmp_path)
    native = tiny_model("llama", "causal_lm", dropout=0.0).eval()
    native.load_adapter(str(tmp_path))
    assert torch.equal(outputs(native, batch), outputs(model, batch))
    with pytest.raises(ValueError, match="source_input_ids"):
        native.generate(**batch, max_new_tokens=2, pad_token_id=0)


def test_disabling_switching_deleting_and_unloading():
    base, batch = tiny_model("bert", dropout=0.0), pair("bert")
    plain = outputs(base, target_of(batch))
    model = flare("bert", base=base)
    first = outputs(model, batch)
    with model.disable_adapter():
        assert torch.equal(outputs(model, batch), plain)
    assert torch.equal(outputs(model, batch), first)
    second = graftlm.FlareConfig(r=3, fusion="cross_attention", source_layer="same")
    model.add_adapter("second", second)
    randomised(model, "second", seed=5)
    assert torch.equal(outputs(model, batch), first)
    model.set_adapter("second")
    alone = flare("bert", r=3, lora_alpha=8, fusion="cross_attention", source_layer="same")
    state = {name: tensor for name, tensor in model.state_dict().items() if ".default." not in name}
    alone.load_state_dict({name.replace(".second.", ".default."): tensor for name, tensor in state.items()})
    assert torch.equal(outputs(model, batch), outputs(alone, batch))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trains) == 3 * 2 * 5 and all(".second." in name for name in trains)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(outputs(model, batch), first) and not any("second" in name for name in model.state_dict())
    bare = model.unload()
    assert (
        torch.equal(outputs(bare, target_of(batch)), plain) and not bare._forward_pre_hooks and not bare._forward_hooks
    )


def test_two_adapters_of_one_name_are_an_error_that_changes_nothing():
    base, batch = tiny_model("bert", dropout=0.0), pair("bert")
    model = flare("bert", base=base)
    wanted = outputs(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of a second time
        with pytest.raises(ModelError, match=r"of this name already(.|\n)*'default'(.|\n)*unload"):
            get_peft_model(base, graftlm.FlareConfig(r=2))
        with pytest.raises(ModelError, match="fuse nowhere"):
            get_peft_model(base, graftlm.FlareConfig(r=2, target_modules=["key"]))
    assert torch.equal(outputs(model, batch), wanted)
    again = flare("bert", base=model.unload())
    assert torch.equal(outputs(again, batch), wanted)


def test_the_whole_model_can_be_copied_and_pickled():
    model, batch = flare("llama", fusion="cross_attention"), pair("llama")
    wanted = outputs(model, batch)
    twin = copy.deepcopy(model)
    randomised(model, seed=9)
    assert torch.equal(outputs(twin, batch), wanted)
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    buffer.seek(0)
    assert torch.equal(outputs(torch.load(buffer, weights_only=False), batch), wanted)


def test_bfloat16_stays_finite_and_near():
    batch = pair("gemma2")
    exact = outputs(flare("gemma2"), batch)
    half = flare("gemma2", base=tiny_model("gemma2", dropout=0.0, dtype=torch.bfloat16))
    torch.testing.assert_close(outputs(half, batch).float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.supports("FLARE", "scheduled unfreezing")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_of_a_schedule_are_those_of_lora(architecture):
    model = flare(architecture, task_type="SEQ_CLS")
    found = graftlm.trainable_layers(model)
    stacks = ("encoder", "decoder") if architecture in ENCODER_DECODERS else ("layer",)
    assert found.names == tuple(f"{stack}.{number}" for stack in stacks for number in range(3))
    assert all(len(found.parameters[name]) == (8 if name.startswith("decoder") else 4) for name in found.names)


@pytest.mark.parametrize("architecture", ["xlm-roberta", "llama"])
def test_the_fisher_trace_with_a_source_equals_a_loop_over_single_examples(architecture):
    model, batch = flare(architecture).eval(), pair(architecture)
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


WORDS = ("en", "kat", "sover", "a", "cat", "sleeps", "the", "dog", "hund", "yes", "no")
ROWS = [
    {"id": "s1", "danish": "en kat sover", "english": "a cat sleeps", "label": 1, "verdict": "yes"},
    {"id": "s2", "danish": "hund", "english": "the dog", "label": 0, "verdict": "no no"},
]


def test_a_collator_makes_the_call_from_two_columns():
    tokenizer = tiny_tokenizer(WORDS)
    batch = graftlm.FlareCollator(tokenizer, target="danish", source="english", max_length=4)(ROWS)
    assert set(batch) == {"input_ids", "attention_mask", "source_input_ids", "source_attention_mask", "labels"}
    for column, name in (("danish", "input_ids"), ("english", "source_input_ids")):
        for row, ids in zip(ROWS, batch[name], strict=True):
            wanted = tokenizer(row[column], truncation=True, max_length=4).input_ids
            assert ids.tolist() == wanted + [0] * (len(ids) - len(wanted))
    assert batch["labels"].tolist() == [1, 0]
    assert torch.isfinite(flare("bert")(**batch).loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_collator_with_answers_says_which_tokens_are_the_prompt(side):
    tokenizer = tiny_tokenizer(WORDS)
    tokenizer.padding_side = side
    batch = graftlm.FlareCollator(tokenizer, target="danish", source="english", answer="verdict")(ROWS)
    for number, row in enumerate(ROWS):
        real = batch["attention_mask"][number].bool()
        prompt, answer = (
            tokenizer(row["danish"]).input_ids,
            tokenizer(row["verdict"], add_special_tokens=False).input_ids,
        )
        ids, fuse, labels = (batch[name][number][real].tolist() for name in ("input_ids", "fusion_mask", "labels"))
        assert ids == prompt + answer + [tokenizer.eos_token_id]
        assert fuse == [1] * len(prompt) + [0] * (len(answer) + 1)
        assert labels == [-100] * len(prompt) + answer + [tokenizer.eos_token_id]
        for name, fill in (("fusion_mask", 0), ("labels", -100), ("input_ids", 0)):
            assert set(batch[name][number][~real].tolist()) <= {fill}
    assert batch["source_attention_mask"][1, 0] == (0 if side == "left" else 1)
    model = flare("llama", "causal_lm", task_type="CAUSAL_LM")
    assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize("partner", [None, " ", 3])
def test_a_missing_partner_is_an_error_with_its_id(partner):
    collator = graftlm.FlareCollator(tiny_tokenizer(WORDS), target="danish", source="english")
    with pytest.raises(DataError, match=r"id='s2'(.|\n)*'english'"):
        collator([ROWS[0], {**ROWS[1], "english": partner}])
    with pytest.raises(DataError, match="remove_unused_columns=False"):
        collator([{"label": 1}])
    with pytest.raises(SetupError, match="labels or an answer"):
        graftlm.FlareCollator(tiny_tokenizer(WORDS), labels="topic", answer="verdict")


def test_a_projection_does_not_move_only_where_relu_is_dead_at_all_tokens_that_count():
    batch = graftlm.FlareCollator(tiny_tokenizer(WORDS), target="danish", source="english")(ROWS)
    moved = []
    for seed in range(8):
        torch.manual_seed(seed)
        model = get_peft_model(tiny_model("bert", dropout=0.0), graftlm.FlareConfig(r=1, task_type="SEQ_CLS"))
        inner: dict[str, torch.Tensor] = {}

        def keep(module, args, output, name, inner=inner):
            inner[name] = args[0]

        for name, module in model.named_modules():
            if name.endswith("lora_B.default"):
                module.register_forward_hook(partial(keep, name=name))
        model(**batch).loss.backward()
        for name, found in inner.items():
            # the classifier reads the first token, and so the queries of that token alone in the top layer
            counts = batch["attention_mask"].bool()
            if "layer.2." in name and "query" in name:
                counts = counts & (torch.arange(counts.shape[1]) == 0)
            moves = bool(model.get_parameter(f"{name}.weight").grad.any())
            assert moves == bool(found[counts].any()), name
            moved.append(moves)
    assert 0 < sum(moved) < len(moved)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_a_users_own_trainer(checkpointing, tmp_path):
    torch.manual_seed(0)
    # r = 8: with fewer directions one of the projections may be dead, see above
    model = get_peft_model(tiny_model("bert", dropout=0.0), graftlm.FlareConfig(r=8, task_type="SEQ_CLS"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        remove_unused_columns=False,
        gradient_checkpointing=checkpointing,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=3,
    )
    collator = graftlm.FlareCollator(tiny_tokenizer(WORDS), target="danish", source="english")
    callback = graftlm.ScheduledUnfreezing("gradual", every_n_steps=1)
    trainer = Trainer(
        model, arguments, data_collator=collator, train_dataset=Dataset.from_list(ROWS * 8), callbacks=[callback]
    )
    batch = collator(ROWS)
    before = outputs(model, batch)
    trainer.train()
    moved = {name for name, tensor in weights_of(model).items() if "lora_B" in name and tensor.abs().sum() > 0}
    assert len(moved) == 6
    after = outputs(model, batch)
    assert (after - before).abs().max() > 1e-4
    assert not torch.equal(after, outputs(model, target_of(batch)))


def test_registered_for_whoever_imports_peft():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    assert PEFT_TYPE_TO_CONFIG_MAPPING["FLARE"] is graftlm.FlareConfig

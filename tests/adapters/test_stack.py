"""Language adapter below, task adapter above, against forward hooks on the bare model."""

import copy

import pytest
import torch
from adapters.bottlenecks import adapted, outputs, pairs, randomised, reference, weights_of
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_batch, tiny_model
from transformers import Trainer, TrainingArguments

import graftlm
from graftlm.errors import SetupError

HEAD = "sequence_classification"


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def pair(architecture="bert", kind="pfeiffer", base=None):
    """A classifier with a headless "lang_de" and a "sentiment" that has a head."""
    model = adapted(architecture, base=base, kind=kind, name="lang_de")
    model.add_adapter(
        "sentiment", graftlm.BottleneckConfig(kind=kind, bottleneck_size=3, task_type="SEQ_CLS", activation="relu")
    )
    return randomised(model, "sentiment", seed=7)


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    """Two language adapters, trained (here: drawn) on a masked language model, with an invertible part in one."""
    folder = tmp_path_factory.mktemp("languages")
    for seed, name in enumerate(("lang_de", "lang_fr")):
        model = adapted("bert", "masked_lm", seed=10 + seed, name=name, invertible=name == "lang_fr")
        model.save_pretrained(folder)
    return folder


@pytest.mark.supports("Bottleneck adapters", "stack")
@pytest.mark.parametrize(("architecture", "kind"), pairs("pfeiffer"))
def test_a_stack_equals_the_forward_written_by_hand(architecture, kind):
    base, batch = tiny_model(architecture, HEAD, dropout=0.0), tiny_batch(architecture, HEAD)
    by_hand = copy.deepcopy(base)
    model = pair(architecture, kind, base)
    alone = outputs(model, batch)
    graftlm.stack(model, ["lang_de", "sentiment"])
    found = outputs(model, batch)
    both = [weights_of(model, name) for name in ("lang_de", "sentiment")]
    head = {k.rpartition("model.")[2]: v for k, v in both[1].items() if "bottleneck" not in k}
    by_hand.load_state_dict(head, strict=False)
    with reference(by_hand, both, kind, architecture):
        torch.testing.assert_close(found, outputs(by_hand, batch), rtol=1e-4, atol=1e-5)
    graftlm.stack(model, ["sentiment", "lang_de"])
    turned = outputs(model, batch)
    graftlm.stack(model, ["lang_de"])
    assert torch.equal(outputs(model, batch), alone)
    if kind != "parallel":
        assert (turned - found).abs().max() > 1e-4


def test_only_the_top_trains_and_its_head_is_used():
    model, batch = pair(), tiny_batch("bert")
    graftlm.stack(model, ["lang_de", "sentiment"])
    names = trained(model)
    assert len(names) == 12 + 2 and all(".sentiment." in name for name in names)
    assert any("classifier" in name for name in names)
    assert model.base_model.stacked("sentiment") == ["lang_de", "sentiment"]
    model.train()(**batch).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(names)
    before = outputs(model, batch)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["sentiment"].bias.add_(1)
    torch.testing.assert_close(outputs(model, batch), before + 1)
    graftlm.stack(model, ["lang_de", "sentiment"], inference_mode=True)
    assert trained(model) == []


def test_a_fresh_adapter_on_top_equals_the_base_model():
    base, batch = tiny_model("bert", HEAD, dropout=0.0), tiny_batch("bert", HEAD)
    plain = outputs(base, batch)
    model = adapted("bert", base=base, name="lang_de")
    model.add_adapter("sentiment", graftlm.BottleneckConfig(bottleneck_size=3))
    graftlm.stack(model, ["lang_de", "sentiment"])
    assert torch.equal(outputs(model, batch), plain)


def test_a_layer_that_the_top_one_lacks_is_the_language_adapters():
    base, batch = tiny_model("bert", HEAD, dropout=0.0), tiny_batch("bert", HEAD)
    by_hand = copy.deepcopy(base)
    model = adapted("bert", base=base, name="lang_de")
    model.add_adapter("task", graftlm.BottleneckConfig(bottleneck_size=3, layers_to_transform=[2]))
    randomised(model, "task", seed=3)
    graftlm.stack(model, ["lang_de", "task"])
    with reference(by_hand, [weights_of(model, "lang_de"), weights_of(model, "task")], "pfeiffer", "bert"):
        torch.testing.assert_close(outputs(model, batch), outputs(by_hand, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["task", "language"])
def test_language_adapters_of_a_masked_lm_are_swapped_under_a_task_adapter(first, languages, tmp_path):
    """In either order of loading; PEFT alone asks the language adapter for a classifier that it never had."""
    batch, config = tiny_batch("bert"), graftlm.BottleneckConfig(bottleneck_size=3, task_type="SEQ_CLS")
    base = tiny_model("bert", dropout=0.0)
    if first == "task":
        model = get_peft_model(base, config, adapter_name="topic")
        model.load_adapter(languages / "lang_de", "lang_de")
    else:
        model = PeftModel.from_pretrained(base, languages / "lang_de", adapter_name="lang_de")
        model.add_adapter("topic", config)
    randomised(model, "topic", seed=3)
    graftlm.stack(model, ["lang_de", "topic"])
    german = outputs(model, batch)
    assert len(trained(model)) == 12 + 2 and all(".topic." in name for name in trained(model))
    model.load_adapter(languages / "lang_fr", "lang_fr")
    assert torch.equal(outputs(model, batch), german)
    assert all(".topic." in name for name in trained(model))
    graftlm.stack(model, ["lang_fr", "topic"])
    french = outputs(model, batch)
    assert (french - german).abs().max() > 1e-4
    graftlm.stack(model, ["lang_de", "topic"])
    assert torch.equal(outputs(model, batch), german)

    model.save_pretrained(tmp_path, selected_adapters=["topic"])  # the top one only
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["topic"]
    again = PeftModel.from_pretrained(tiny_model("bert", dropout=0.0), tmp_path / "topic", adapter_name="topic")
    again.load_adapter(languages / "lang_fr", "fr")
    graftlm.stack(again, ["fr", "topic"])
    torch.testing.assert_close(outputs(again, batch), french)


def test_disable_adapter_around_a_stack():
    base, batch = tiny_model("bert", HEAD, dropout=0.0), tiny_batch("bert", HEAD)
    plain = outputs(base, batch)
    model = pair(base=base)
    graftlm.stack(model, ["lang_de", "sentiment"])
    wanted, names = outputs(model, batch), trained(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model, batch), plain)
    assert torch.equal(outputs(model, batch), wanted)
    assert trained(model) == names


def test_the_members_can_be_deleted_and_switched_by_peft():
    model, batch = pair(), tiny_batch("bert")
    model.set_adapter("sentiment")
    alone = outputs(model, batch)
    graftlm.stack(model, ["lang_de", "sentiment"])
    stacked = outputs(model, batch)
    assert not torch.equal(stacked, alone)
    model.set_adapter("lang_de")
    assert all(".lang_de." in name for name in trained(model))
    model.set_adapter("sentiment")  # the stack is its own
    assert torch.equal(outputs(model, batch), stacked)
    assert all(".sentiment." in name for name in trained(model))
    graftlm.stack(model, ["sentiment"])
    assert torch.equal(outputs(model, batch), alone)
    graftlm.stack(model, ["lang_de", "sentiment"])
    model.delete_adapter("lang_de")
    assert torch.equal(outputs(model, batch), alone)
    model.set_adapter("sentiment")
    assert torch.equal(outputs(model, batch), alone)


def test_a_trainer_resumes_a_stack(tmp_path):
    """Trainer reloads every adapter and activates one by its name: with the bottom one active it would train that."""
    rows = Dataset.from_dict({k: v.tolist() for k, v in tiny_batch("bert", batch_size=16).items()}).with_format("torch")

    def train(folder, **more):
        model = pair()
        graftlm.stack(model, ["lang_de", "sentiment"])
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=0.01,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        Trainer(model, arguments, train_dataset=rows).train(**more)
        assert all(".sentiment." in name for name in trained(model))
        return weights_of(model, "lang_de"), weights_of(model, "sentiment")

    whole, fresh = train("whole"), pair()
    resumed = train("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, tensor in weights_of(fresh, "lang_de").items():
        assert torch.equal(resumed[0][name], tensor) and torch.equal(whole[0][name], tensor)
    for name, tensor in weights_of(fresh, "sentiment").items():
        torch.testing.assert_close(resumed[1][name], whole[1][name])
        assert not torch.equal(whole[1][name], tensor)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["lang_fr", "sentiment"], r"lang_fr(.|\n)*lang_de, sentiment(.|\n)*load_adapter"),
        (["lang_de", "lang_de"], "twice"),
        ([], "bottom first"),
        ("lang_de", "bottom first"),
        (["lang_de", "other"], "lang_de: pfeiffer, other: houlsby"),
    ],
)
def test_a_stack_that_cannot_be_leaves_the_model_as_it_was(names, says):
    model, batch = pair(), tiny_batch("bert")
    model.add_adapter("other", graftlm.BottleneckConfig(kind="houlsby", bottleneck_size=2))
    graftlm.stack(model, ["lang_de", "sentiment"])
    wanted, active, train = outputs(model, batch), model.active_adapters, trained(model)
    with pytest.raises(SetupError, match=says):
        graftlm.stack(model, names)
    assert torch.equal(outputs(model, batch), wanted)
    assert (model.active_adapters, trained(model)) == (active, train)


def test_other_models_are_refused():
    lora = get_peft_model(tiny_model("bert"), LoraConfig(target_modules=["query"]))
    for model in (tiny_model("bert"), lora):
        with pytest.raises(SetupError, match="only bottleneck adapters"):
            graftlm.stack(model, ["default"])


class TestPeftsOwnWay:
    """Why `stack` exists: what PEFT does with a list."""

    def lora(self, task_type):
        config = LoraConfig(task_type=task_type, target_modules=["query"], r=2)
        model = get_peft_model(tiny_model("bert"), config, adapter_name="below")
        model.add_adapter("above", copy.deepcopy(config))
        return model

    def test_the_model_takes_no_list(self):
        with pytest.raises(TypeError, match="unhashable"):
            self.lora(None).set_adapter(["below", "above"])
        with pytest.raises(TypeError, match="unhashable"):
            pair().set_adapter(["lang_de", "sentiment"])

    def test_the_tuner_refuses_two_heads(self):
        with pytest.raises(ValueError, match="Only one adapter"):
            self.lora("SEQ_CLS").base_model.set_adapter(["below", "above"])

    def test_the_tuner_trains_all_of_it_and_ours_the_last(self):
        model = self.lora(None)
        model.base_model.set_adapter(["below", "above"])
        assert {name.split(".")[-2] for name in trained(model)} == {"below", "above"}
        model = pair()
        model.base_model.set_adapter(["lang_de", "sentiment"])
        assert all(".sentiment." in name for name in trained(model))

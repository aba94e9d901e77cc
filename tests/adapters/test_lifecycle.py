"""What people do with a PEFT adapter, done with bottleneck adapters on every architecture."""

import copy
import io

import pytest
import torch
from adapters.bottlenecks import KINDS, adapted, outputs, randomised, reference, weights_of
from peft import PeftModel, get_peft_model
from tiny import ARCHITECTURES, DECODERS, ENCODER_DECODERS, tiny_batch, tiny_model, tiny_tokenizer

import graftlm
from graftlm.errors import ModelError

HEAD = "sequence_classification"


def same(model, other):
    one, two = model.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.supports("Bottleneck adapters", "save, load, switch, unload")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_adapters_saved_loaded_switched_disabled_deleted_unloaded(architecture, tmp_path):
    base, batch = tiny_model(architecture, HEAD, dropout=0.0), tiny_batch(architecture, HEAD)
    untouched, plain = copy.deepcopy(base), outputs(base, batch)
    model = adapted(architecture, base=base, kind="houlsby")
    first = outputs(model, batch)
    model.add_adapter(
        "second", graftlm.BottleneckConfig(kind="pfeiffer", bottleneck_size=3, layers_to_transform=[0, 2])
    )
    assert torch.equal(outputs(model, batch), first)
    randomised(model, "second", seed=2)
    model.set_adapter("second")
    second = outputs(model, batch)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".second." in name for name in trained)
    with reference(copy.deepcopy(untouched), weights_of(model, "second"), "pfeiffer", architecture) as by_hand:
        torch.testing.assert_close(second, outputs(by_hand, batch), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(outputs(model, batch), plain)
    assert torch.equal(outputs(model, batch), second)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "second", adapter_name="other_name")
    assert torch.equal(outputs(loaded, batch), second)
    assert not any(p.requires_grad for p in loaded.parameters())
    result = loaded.load_adapter(str(tmp_path), "one", is_trainable=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(outputs(loaded, batch), second)
    loaded.set_adapter("one")
    assert torch.equal(outputs(loaded, batch), first)

    loaded.delete_adapter("other_name")
    assert torch.equal(outputs(loaded, batch), first)
    assert not any("other_name" in name for name, _ in loaded.named_modules())
    bare = loaded.unload()
    assert same(bare, untouched) and type(bare) is type(untouched)
    assert torch.equal(outputs(bare, batch), plain)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "llama", "t5"])
def test_the_file_holds_float32_leaves_under_flat_names(architecture, tmp_path):
    from safetensors.torch import load_file

    model = adapted(architecture, kind="houlsby", name="anything")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "anything" / "adapter_model.safetensors")
    stacks = 2 if architecture in ENCODER_DECODERS else 1
    assert len(saved) == 3 * stacks * 2 * 4
    for name, tensor in saved.items():
        *_, role, part = name.split(".")
        assert role in ("bottleneck_down", "bottleneck_up") and part in ("weight", "bias")
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("architecture", ["bert", "xlm-roberta", "llama", "t5"])
def test_a_bfloat16_base_has_float32_adapters(architecture):
    base = tiny_model(architecture, HEAD, dropout=0.0, dtype=torch.bfloat16)
    batch = tiny_batch(architecture, HEAD)
    by_hand = copy.deepcopy(base)
    model = adapted(architecture, base=base)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    found = outputs(model, batch)
    assert found.dtype == torch.bfloat16
    with reference(by_hand, weights_of(model), "pfeiffer", architecture):
        torch.testing.assert_close(found, outputs(by_hand, batch), rtol=0.05, atol=0.02)
    model.train()(**batch).loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    kept = get_peft_model(
        tiny_model(architecture, HEAD, dtype=torch.bfloat16),
        graftlm.BottleneckConfig(bottleneck_size=2),
        autocast_adapter_dtype=False,
    )
    assert {p.dtype for p in kept.parameters() if p.requires_grad} == {torch.bfloat16}
    assert torch.isfinite(outputs(kept, batch)).all()


@pytest.mark.supports("Bottleneck adapters", "activation checkpointing")
@pytest.mark.parametrize(
    ("architecture", "use_reentrant"), [*((one, False) for one in ARCHITECTURES), ("bert", True), ("t5", True)]
)
def test_gradient_checkpointing_gives_the_same_gradients(architecture, use_reentrant):
    batch = tiny_batch(architecture, HEAD)
    gradients = []
    for checkpointing in (False, True):
        model = adapted(architecture, kind="houlsby").train()
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("architecture", "kind"), [*(("bert", kind) for kind in KINDS), ("llama", "pfeiffer")])
def test_torch_compile(architecture, kind):
    model, batch = adapted(architecture, kind=kind), tiny_batch(architecture)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(outputs(compiled, batch), outputs(model, batch))


@pytest.mark.supports("Bottleneck adapters", "generate")
@pytest.mark.parametrize("architecture", DECODERS + ENCODER_DECODERS)
def test_generate_uses_the_adapter_with_and_without_a_cache(architecture):
    task = "seq2seq_lm" if architecture in ENCODER_DECODERS else "causal_lm"
    kind = "SEQ_2_SEQ_LM" if architecture in ENCODER_DECODERS else "CAUSAL_LM"
    model = adapted(architecture, task, task_type=kind).eval()
    ids = {k: v[:1] for k, v in tiny_batch(architecture, task).items() if k != "labels"}
    written = [model.generate(**ids, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*written)
    with model.disable_adapter():
        plain = model(**tiny_batch(architecture, task)).logits
    assert not torch.equal(plain, outputs(model, tiny_batch(architecture, task)))


def test_pipeline():
    from transformers import pipeline

    model = adapted("bert", task_type="SEQ_CLS").eval()
    tokenizer = tiny_tokenizer(("good", "bad"))
    found = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")("good bad good", top_k=None)
    inputs = tokenizer("good bad good", return_tensors="pt")
    probabilities = outputs(model, {"input_ids": inputs["input_ids"]}).softmax(-1)[0]
    assert sorted(row["score"] for row in found) == pytest.approx(sorted(probabilities.tolist()), abs=1e-5)


def test_the_whole_model_can_be_copied_and_pickled():
    model, batch = adapted("distilbert", kind="pfeiffer"), tiny_batch("distilbert")
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin, batch), outputs(model, batch))
    randomised(twin, seed=3)
    with torch.no_grad():  # the copy reads its own norm, not the first one's
        twin.base_model.model.distilbert.transformer.layer[0].output_layer_norm.weight.zero_()
    assert not torch.equal(outputs(twin, batch), outputs(model, batch))
    layer = twin.base_model.model.distilbert.transformer.layer[0]
    assert layer.ffn._norm[0] is layer.output_layer_norm
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(outputs(torch.load(buffer, weights_only=False), batch), outputs(model, batch))


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_is_impossible_and_says_so(call):
    model, batch = adapted("bert"), tiny_batch("bert")
    wanted = outputs(model, batch)
    with pytest.raises(ModelError, match=r"cannot be merged(.|\n)*unload"):
        getattr(model, call)()
    assert torch.equal(outputs(model, batch), wanted)


def test_another_method_of_peft_beside_it_is_refused_by_peft():
    from peft import LoraConfig

    with pytest.raises(ValueError, match="different peft types"):
        adapted("bert").add_adapter("second", LoraConfig(target_modules=["query"]))


def test_low_cpu_mem_usage(tmp_path):
    model, batch = adapted("llama"), tiny_batch("llama")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama", dropout=0.0), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(outputs(loaded, batch), outputs(model, batch))


def test_the_head_of_a_task_is_saved_with_the_adapter(tmp_path):
    batch = tiny_batch("bert")
    model = adapted("bert", task_type="SEQ_CLS")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.mul_(3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("bert", dropout=0.0), tmp_path)
    assert torch.equal(outputs(loaded, batch), outputs(model, batch))

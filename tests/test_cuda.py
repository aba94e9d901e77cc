"""What a GPU could do differently: the processor's numbers, in each attention kernel and under loss scaling.

CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_cuda.py
"""

import copy

import pytest
import torch
from adapters.flares import flare, outputs, pair
from adapters.neutrals import adapted, reference, weights_of
from lms import lm, texts, tokenizer
from tiny import tiny_batch, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel

import graftlm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DOMAINS = torch.tensor([0, 1, 1, 0])
ALPHA = 3.0


@pytest.fixture(autouse=True)
def _exact_products():
    torch.set_float32_matmul_precision("highest")


def on(device, batch):
    return {name: tensor.to(device) for name, tensor in batch.items()}


def gradients(model):
    return {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}


def checkpoint(model, **how):
    """Older transformers call it gradient checkpointing."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def near(found, wanted, most):
    assert found and found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        error = (found[name].cpu().double() - tensor.double()).norm() / tensor.double().norm()
        assert error < most, (name, float(error))


def loss_and_term(base, weights, batch):
    """Gradients of loss + α·term by autograd on the bare model, in float32 on the processor."""
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    with reference(base, weights, "llama") as seen:
        loss = base(**batch).loss
    tokens = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    tokens[:, :-1] = batch["labels"][:, 1:] != -100
    kept = tokens & (DOMAINS == 0)[:, None]
    terms = [r[kept].abs().sum() / r.shape[-1] / (0.1 * tokens.sum()) for r in seen["r"]]
    (loss + ALPHA * sum(terms) / len(terms)).backward()
    return {name: tensor.grad for name, tensor in weights.items()}


@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non-reentrant"])
@pytest.mark.parametrize(("precision", "most"), [(None, 1e-4), (torch.float16, 0.05), (torch.bfloat16, 0.2)])
def test_the_local_loss_is_exact_under_loss_scaling_and_autocast(precision, most, checkpointing):
    base = tiny_model("llama", "causal_lm", dropout=0.0)
    model = adapted("llama", base=copy.deepcopy(base), penalty_weight=ALPHA).train().cuda()
    batch = tiny_batch("llama", "causal_lm")
    if checkpointing != "off":
        model.enable_input_require_grads()
        checkpoint(model, use_reentrant=checkpointing == "reentrant")
    wanted = loss_and_term(base, {k: v.cpu() for k, v in weights_of(model).items()}, batch)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, enabled=precision == torch.float16)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with torch.autocast("cuda", precision, enabled=precision is not None):
        loss = model(**on("cuda", batch), domain=DOMAINS).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    near(gradients(model), wanted, most)


def test_sparse_inference_equals_the_dense_path():
    model, batch = adapted("llama", "causal_lm").cuda(), on("cuda", tiny_batch("llama", "causal_lm"))
    dense = outputs(model, batch)
    model.peft_config["default"].sparse_inference = True
    torch.testing.assert_close(outputs(model, batch), dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("architecture", ["xlm-roberta", "bert", "llama", "qwen3", "mistral"])
def test_flare_fuses_the_same_in_every_attention_kernel(architecture, backend):
    """The flash kernel takes no mask, so that no row is padded here."""
    wide = {"hidden_size": 64}
    if architecture in ("llama", "qwen3", "mistral"):  # the memory-efficient kernel knows no grouped queries
        wide |= {"head_dim": 16, "num_key_value_heads": 4}
    batch = pair(architecture)
    for name in ("input_ids", "source_input_ids"):
        batch[name] = torch.randint(5, 90, batch[name].shape)
        batch[name.replace("input_ids", "attention_mask")] = torch.ones_like(batch[name])
    how = {"dropout": 0.0, "attn_implementation": "eager"} | wide
    eager = flare(architecture, base=tiny_model(architecture, **how))
    sdpa = flare(architecture, base=tiny_model(architecture, **how | {"attn_implementation": "sdpa"}))
    assert sdpa.config._attn_implementation == "sdpa"
    wanted = outputs(eager, batch)
    without = outputs(eager, {name: value for name, value in batch.items() if not name.startswith("source_")})
    sdpa.bfloat16().cuda()
    with sdpa_kernel(backend):  # no other kernel may step in
        found = outputs(sdpa, on("cuda", batch)).float().cpu()
    effect = (wanted - without).norm()
    assert (found - wanted).norm() < 0.1 * effect, "far less than what fusing changes"


def test_flare_generates_as_a_full_forward_pass_does():
    batch = on("cuda", pair("llama", "causal_lm"))
    batch.pop("labels")
    keep = {name: value[:1] for name, value in batch.items()}
    model = flare("llama", "causal_lm", task_type="CAUSAL_LM").cuda().eval()
    prompt = keep["input_ids"].shape[1]
    made = model.generate(**keep, max_new_tokens=4, do_sample=False, use_cache=True)
    uncached = model.generate(**keep, max_new_tokens=4, do_sample=False, use_cache=False)
    assert made.shape[1] > prompt and torch.equal(made, uncached)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "t5"])
def test_rates_of_guided_dropout_are_those_of_the_processor(architecture):
    model, how = lm(architecture), {"tolerance": 0.0, "check_head": False, "progress": False}
    wanted, found = (
        graftlm.GuidedDropout.estimate(model.to(device), texts(24), tokenizer=tokenizer(), **how)
        for device in ("cpu", "cuda")
    )
    for one, other in zip(found.rows(), wanted.rows(), strict=True):
        assert one["score"] == pytest.approx(other["score"], rel=1e-4), one["block"]
        assert one["rate"] == pytest.approx(other["rate"], abs=1e-6)


def test_the_fisher_trace_is_that_of_the_processor():
    model, batch = tiny_model("bert", dropout=0.0), tiny_batch("bert")
    for kind in ("exact", "empirical"):
        found = []
        for device in ("cpu", "cuda"):
            model.to(device)
            groups = {name: [p] for name, p in model.named_parameters()}
            found.append(graftlm.fisher_trace(model, [on(device, batch)], groups, task="classification", kind=kind))
        wanted, found = ({name: float(one.traces[name]) for name in one.traces} for one in found)
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-9)

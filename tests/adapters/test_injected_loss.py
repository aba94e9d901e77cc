"""The injected gradient against autograd on loss + α·term, the term computed by hand on the bare model."""

import copy

import pytest
import torch
from adapters.neutrals import adapted, randomised, reference, weights_of
from datasets import Dataset
from peft import get_peft_model
from tiny import ARCHITECTURES, DECODERS, ENCODER_DECODERS, tiny_batch, tiny_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

import graftlm
from graftlm.adapters.injected_loss import domains_of
from graftlm.errors import SetupError

HEAD = "sequence_classification"
DOMAINS = torch.tensor([0, 1, 1, 0])
ALPHA = 3.0
METHOD = "Neutral residues"
SINGLE = torch.float32
NEAR = {"rtol": 1e-8, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _everything_in_float64(monkeypatch):
    """Norms, softmaxes and losses of transformers go by way of float32, whose rounding would hide small faults."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(SINGLE)


def predicting(batch):
    found = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
    found[:, :-1] = batch["labels"][:, 1:] != -100
    return found


def term_by_hand(seen, tokens, domains, *, share=0.1, loss="l1"):
    terms = []
    for at, r in enumerate(seen["r"]):
        mask = tokens[at] if isinstance(tokens, list) else tokens
        if loss == "l1":
            count = share * mask.sum() if share else (mask & (domains == 0)[:, None]).sum()
            terms.append(
                sum(r[row][mask[row]].abs().sum() for row in range(len(r)) if domains[row] == 0) / r.shape[-1] / count
            )
        else:
            z, new = seen["z"][at][..., 0], domains[:, None].to(r).expand(mask.shape)
            p = torch.sigmoid(z)
            terms.append(-(new * p.log() + (1 - new) * (1 - p).log())[mask].mean())
    return sum(terms) / len(terms)


def by_hand(base, weights, batch, architecture, *, tokens=None, domains=DOMAINS, alpha=ALPHA, gate="relu", **how):
    """{flat name: gradient} of loss + α·term, and the term."""
    weights = {k: v.clone().requires_grad_() for k, v in weights.items()}
    with reference(base, weights, architecture, gate=gate) as seen:
        loss = base(**batch).loss
    tokens = predicting(batch) if tokens is None else tokens
    term = term_by_hand(seen, tokens, domains, **how)
    (loss + alpha * term).backward()
    return {k: v.grad for k, v in weights.items()}, term.item()


def gradients(model):
    return {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}


def close(found, wanted, **tolerance):
    wanted = {name: tensor for name, tensor in wanted.items() if "neutral_residues" in name}
    assert len(wanted) >= 9
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def pair(architecture="llama", task="causal_lm", **settings):
    base = tiny_model(architecture, task, dropout=0.0).double()
    model = adapted(architecture, base=copy.deepcopy(base), penalty_weight=ALPHA, **settings).double()
    return base, model.train(), tiny_batch(architecture, task)


@pytest.mark.supports(METHOD, "local loss exact, checkpointing {checkpointing}")
@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_the_loss_and_the_term(architecture, checkpointing):
    task = "causal_lm" if architecture in DECODERS else HEAD
    base, model, batch = pair(architecture, task)
    if checkpointing != "off":
        model.enable_input_require_grads()
        how = {"use_reentrant": checkpointing == "reentrant"}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    model(**batch, domain=DOMAINS).loss.backward()
    mask = batch["attention_mask"].bool()
    tokens = predicting(batch) if task == "causal_lm" else mask
    if architecture in ENCODER_DECODERS:  # a T5 classifier's decoder reads the shifted inputs
        tokens = [mask] * 3 + [torch.ones_like(mask)] * 3
    wanted, term = by_hand(base, weights_of(model), batch, architecture, tokens=tokens)
    close(gradients(model), wanted, **NEAR)
    assert domains_of(model).call.term() == pytest.approx(term, rel=1e-6)
    without, _ = by_hand(base, weights_of(model), batch, architecture, tokens=tokens, alpha=0.0)
    assert any((without[name] - wanted[name]).abs().max() > 1e-4 for name in wanted if "residues" in name)


def test_the_first_gemma():
    """Of Llama's structure: no norm behind the block. It is no architecture of the other tests."""
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings |= {"num_hidden_layers": 3, "head_dim": 4, "vocab_size": 96, "pad_token_id": 0}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma", **settings)).double()
    batch = tiny_batch("llama", "causal_lm")
    model = get_peft_model(copy.deepcopy(base), graftlm.NeutralResiduesConfig(penalty_weight=ALPHA))
    assert torch.equal(model.eval()(**batch).logits, base.eval()(**batch).logits)
    model = randomised(model).double().train()
    model(**batch, domain=DOMAINS).loss.backward()
    close(gradients(model), by_hand(base.train(), weights_of(model), batch, "llama")[0], **NEAR)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_scaled_loss_task_type_and_context_manager(task_type):
    base, model, batch = pair(task_type=task_type)
    with graftlm.domain(DOMAINS.bool()):
        loss = model(**batch).loss
    (loss * 1024).backward()
    wanted, _ = by_hand(base, weights_of(model), batch, "llama")
    close(gradients(model), {name: 1024 * tensor for name, tensor in wanted.items()}, rtol=1e-4, atol=1e-3)
    with reference(base, weights_of(model), "llama"):
        torch.testing.assert_close(loss, base(**batch).loss)  # the model's own loss, without the term
    model.zero_grad()
    loss, *_ = model(**batch, domain=DOMAINS, return_dict=False)
    loss.backward()
    close(gradients(model), wanted, **NEAR)


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({"original_share": None}, {"share": None}),
        ({"original_share": 0.5}, {"share": 0.5}),
        ({"gate": "none"}, {}),
        ({"gate": "elu"}, {}),
        ({"gate": "sigmoid", "penalty": "l1"}, {}),
        ({"gate": "sigmoid"}, {"loss": "cross_entropy"}),
    ],
)
def test_gates_and_terms(settings, how):
    base, model, batch = pair(**settings)
    model(**batch, domain=DOMAINS).loss.backward()
    gate = settings.get("gate", "relu")
    wanted, _ = by_hand(base, weights_of(model), batch, "llama", gate=gate, **how)
    close(gradients(model), wanted, **NEAR)


def test_the_term_can_be_kept_from_the_layers_below():
    base, model, batch = pair(penalty_through_input=False)
    model(**batch, domain=DOMAINS).loss.backward()
    found = gradients(model)
    through, _ = by_hand(base, weights_of(model), batch, "llama")
    plain, _ = by_hand(base, weights_of(model), batch, "llama", alpha=0.0)
    top = {name: tensor for name, tensor in through.items() if "layers.2" in name}
    for name, tensor in top.items():  # nothing of it comes from above
        torch.testing.assert_close(found[name], tensor, **NEAR)
    # a layer's own term, by hand: its input held fixed
    weights = {k: v.clone().requires_grad_() for k, v in weights_of(model).items()}
    inputs = []
    with reference(base, weights, "llama"):
        handle = base.model.layers[0].mlp.register_forward_pre_hook(
            lambda module, args: inputs.append(args[0].detach())
        )
        base(**batch)
        handle.remove()
    w = {key.split("residues_")[1].split(".")[0]: v for key, v in weights.items() if "layers.0" in key}
    n = inputs[0]
    r = (functional.silu(n @ w["glu"].T) * (n @ w["in"].T)) @ w["out"].T * functional.relu(n @ w["gate"].T)
    (ALPHA * term_by_hand({"r": [r]}, predicting(batch), DOMAINS) / 3).backward()
    for name, tensor in weights.items():
        if "layers.0" in name:
            torch.testing.assert_close(found[name], plain[name] + tensor.grad, **NEAR)


def test_bfloat16_base_and_autocast(monkeypatch):
    monkeypatch.undo()
    torch.set_default_dtype(SINGLE)
    base, model, batch = pair()
    wanted, _ = by_hand(base, weights_of(model), batch, "llama")
    half = adapted("llama", base=tiny_model("llama", "causal_lm", dropout=0.0).bfloat16(), penalty_weight=ALPHA)
    half.train()(**batch, domain=DOMAINS).loss.backward()
    mixed = adapted("llama", base=tiny_model("llama", "causal_lm", dropout=0.0), penalty_weight=ALPHA).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = mixed(**batch, domain=DOMAINS).loss
    loss.backward()
    for model in (half, mixed):
        found = gradients(model)
        for name, tensor in wanted.items():
            error = (found[name].double() - tensor).norm() / tensor.norm()
            assert found[name].dtype == SINGLE and error < 0.15, (name, error)


class Gradients(torch.optim.SGD):
    """Keeps the gradients of each step."""

    kept: list

    def step(self, closure=None):
        self.kept.append([p.grad.clone() for group in self.param_groups for p in group["params"]])


@pytest.mark.parametrize(("task_type", "checkpointing"), [(None, False), ("CAUSAL_LM", True)])
def test_in_a_trainer_accumulation_gives_the_gradient_of_one_batch(task_type, checkpointing, tmp_path):
    """Rows of different lengths, and batches without any original-domain sequence."""
    base, _, batch = pair()
    batch = tiny_batch("llama", "causal_lm", batch_size=8)
    domains = torch.tensor([0, 1, 0, 1, 1, 1, 1, 0])
    rows = Dataset.from_dict({k: v.tolist() for k, v in batch.items()} | {"domain": domains.tolist()})
    steps, logs = [], []
    for size in (8, 2):
        model = adapted("llama", base=copy.deepcopy(base), penalty_weight=ALPHA, task_type=task_type).double()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            gradient_checkpointing=checkpointing,
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        optimizer = Gradients([p for p in model.parameters() if p.requires_grad], lr=0.1)
        optimizer.kept = []
        names = [name.replace(".default", "") for name, p in model.named_parameters() if p.requires_grad]
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        trainer = Trainer(
            model,
            arguments,
            train_dataset=rows,
            data_collator=default_data_collator,
            optimizers=(optimizer, schedule),
            callbacks=[graftlm.PenaltyLog()],
        )
        trainer.train()
        steps.append(dict(zip(names, optimizer.kept[0], strict=True)))
        logs.append(next(row for row in trainer.state.log_history if "loss" in row))
        weights = weights_of(model)
    wanted, term = by_hand(base, weights, batch, "llama", domains=domains)
    plain = base(**batch).loss.item()
    for found, log in zip(steps, logs, strict=True):
        close(found, wanted, **NEAR)
        assert log["penalty"] == pytest.approx(term, rel=1e-5)
        assert log["loss"] == pytest.approx(logs[0]["loss"], rel=1e-4) and log["penalty"] != plain


def test_what_would_be_silently_wrong_is_an_error():
    _, model, batch = pair()
    with pytest.raises(SetupError, match=r"does not say it(.|\n)*remove_unused_columns"):
        model(**batch)
    with pytest.raises(SetupError, match=r"shape \(3,\)(.|\n)*shape \(4,\)"):
        model(**batch, domain=DOMAINS[:3])
    with pytest.raises(SetupError, match=r"values \[0, 1, 7\]"):
        model(**batch, domain=[0, 1, 7, 0])
    with pytest.raises(SetupError, match="given twice"), graftlm.domain(DOMAINS):
        model(**batch, domain=DOMAINS)
    with pytest.raises(SetupError, match=r"no numbers(.|\n)*'new'"):
        model(**batch, domain=["new", "old", "new", "old"])
    own = functional.cross_entropy(model(**batch, domain=DOMAINS).logits.flatten(0, 1), batch["input_ids"].flatten())
    with pytest.raises(SetupError, match=r"follows the gradient of outputs\.loss(.|\n)*label_smoothing_factor=0"):
        own.backward()


@pytest.mark.parametrize("checkpointing", ["off", "non-reentrant", "reentrant"])
def test_two_forward_passes_before_one_backward(checkpointing):
    base, model, batch = pair()
    if checkpointing != "off":
        model.enable_input_require_grads()
        how = {"use_reentrant": checkpointing == "reentrant"}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    first, second = model(**batch, domain=DOMAINS).loss, model(**batch, domain=1 - DOMAINS).loss
    if checkpointing == "reentrant":  # nothing says which of the two a layer that runs again belongs to
        with pytest.raises(SetupError, match="two forward passes"):
            (first + 2 * second).backward()
        return
    (first + 2 * second).backward()
    one, _ = by_hand(base, weights_of(model), batch, "llama")
    two, term = by_hand(base, weights_of(model), batch, "llama", domains=1 - DOMAINS)
    close(gradients(model), {name: one[name] + 2 * two[name] for name in one}, **NEAR)
    assert domains_of(model).call.term() == pytest.approx(term)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_a_loss_from_outside_of_the_model_carries_the_penalty_too(architecture):
    """Two batches of one step, the loss a mean over both, and the model is not shown the labels."""
    task = "causal_lm" if architecture in DECODERS else "masked_lm"
    base, model, batch = pair(architecture, task)
    labels = batch["labels"] if task == "causal_lm" else batch["labels"].clone()
    shifted = torch.cat([labels[:, 1:], torch.full((4, 1), -100)], dim=1) if task == "causal_lm" else labels
    items = (shifted != -100).sum()
    for rows in (slice(0, 1), slice(1, 4)):
        inputs = {name: tensor[rows] for name, tensor in batch.items() if name != "labels"}
        with graftlm.domain(DOMAINS[rows], targets=labels[rows], items=items):
            logits = model(**inputs).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), shifted[rows].flatten(), reduction="sum") / items
        (graftlm.with_penalty(model, loss) * 8).backward()
    weights = {k: v.clone().requires_grad_() for k, v in weights_of(model).items()}
    with reference(base, weights, architecture) as seen:
        loss = functional.cross_entropy(base(**inputs_of(batch)).logits.flatten(0, 1), shifted.flatten())
    tokens = predicting(batch) if task == "causal_lm" else batch["attention_mask"].bool()
    if task == "causal_lm":
        term = term_by_hand(seen, tokens, DOMAINS)
    else:  # of each batch its own mean, weighted with its share of the labels
        term = 0
        for rows in (slice(0, 1), slice(1, 4)):
            part = (shifted[rows] != -100).sum() / items
            term += part * term_by_hand({"r": [r[rows] for r in seen["r"]]}, tokens[rows], DOMAINS[rows])
    (8 * (loss + ALPHA * term)).backward()
    close(gradients(model), {k: v.grad for k, v in weights.items()}, **NEAR)
    assert graftlm.with_penalty(base, loss) is loss


def inputs_of(batch):
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def test_where_no_label_is_needed():
    base, model, batch = pair()
    model.eval()(**batch)
    with torch.no_grad():
        model.train()(**batch)
    with model.disable_adapter():
        model(**batch)
    adapted("llama", base=copy.deepcopy(base), penalty_weight=0).train()(**batch).loss.backward()
    model.eval()
    torch.testing.assert_close(model(**batch, domain=DOMAINS).logits, model(**batch).logits)


@pytest.mark.parametrize("through", [True, False])
def test_an_eye_on_the_gates_changes_no_gradient(through):
    base, model, batch = pair(penalty_through_input=through)
    model.peft_config["default"].penalty_weight = 0.0
    domains_of(model).looks_at_gates = True
    model(**batch).loss.backward()
    close(gradients(model), by_hand(base, weights_of(model), batch, "llama", alpha=0.0)[0], **NEAR)
    assert len(domains_of(model).call.opened) == 3 and not domains_of(model).call.values


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_evaluation_that_fails_between_forward_and_backward_changes_nothing(reentrant):
    base, model, batch = pair()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    loss = model(**batch, domain=DOMAINS).loss
    with pytest.raises(IndexError), torch.no_grad():
        model(input_ids=torch.full((2, 3), 1000))
    loss.backward()
    close(gradients(model), by_hand(base, weights_of(model), batch, "llama")[0], **NEAR)


def test_a_mask_of_any_shape_where_the_labels_say_which_tokens_count():
    base, model, batch = pair()
    length = batch["input_ids"].shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & batch["attention_mask"].bool()[:, None, None]
    model(**(batch | {"attention_mask": seen}), domain=DOMAINS).loss.backward()
    wanted, _ = by_hand(base, weights_of(model), batch, "llama")
    close(gradients(model), wanted, **NEAR)
    bert = adapted("bert", HEAD).double().train()
    batch = tiny_batch("bert", HEAD)
    with pytest.raises(SetupError, match="labels of one number a token"):
        bert(**(batch | {"attention_mask": batch["attention_mask"][:, None, None].bool()}), domain=DOMAINS)


def test_a_layer_on_another_device_than_the_batch():
    _, model, batch = pair()
    model(**batch, domain=DOMAINS)
    call, config = domains_of(model).call, model.peft_config["default"]
    layer = model.base_model.model.model.layers[0].mlp
    elsewhere = torch.ones(*batch["input_ids"].shape, 16, device="meta", requires_grad=True)
    assert layer._l1(elsewhere, (), call, config).device.type == "meta"
    assert layer._at_gate(elsewhere[..., :1], call, config).device.type == "meta"
    config.penalty = "cross_entropy"
    assert layer._at_gate(elsewhere[..., :1], call, config).device.type == "meta"


def test_an_evaluation_between_forward_and_backward_changes_nothing():
    base, model, batch = pair()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    loss = model(**batch, domain=DOMAINS).loss
    with torch.no_grad():
        model(**tiny_batch("llama", "causal_lm", batch_size=2))
    loss.backward()
    close(gradients(model), by_hand(base, weights_of(model), batch, "llama")[0], **NEAR)

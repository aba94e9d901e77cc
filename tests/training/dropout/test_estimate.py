"""Scores against a loop over single texts that knows nothing of hooks; streaming, stopping, heads."""

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from lms import fitted, lm, task_of, texts, tokenizer
from tiny import ARCHITECTURES, tiny_model
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForPreTraining,
    ElectraForPreTraining,
)

from graftlm.errors import DataError, ModelError, SetupError
from graftlm.training.dropout.guided import GuidedDropout
from graftlm.training.dropout.heads import by_frequency, fresh_parameters, load_with_head
from graftlm.training.dropout.rates import rank_error
from graftlm.training.dropout.texts import batches

QUICK = {"progress": False, "check_head": False, "tolerance": 0.0}


def one_by_one(model, task, some, seed=0, dtype=torch.float32):
    """Parameter name (from the backbone) → mean over texts of the mean squared element of one text's gradient."""
    model = copy.deepcopy(model).to(dtype).eval()
    squares, count = {}, 0
    for (example,), _ in batches(some, tokenizer(), task, batch_size=1, max_length=24, seed=seed):
        ids, labels = torch.tensor([example.ids]), torch.tensor(example.labels)
        inputs = {"labels": labels[None]} if task == "seq2seq_lm" else {}
        logits = model(input_ids=ids, **inputs).logits[0]
        if task == "causal_lm":
            logits, labels = logits[:-1], labels[1:]
        wanted = [i for i, label in enumerate(labels.tolist()) if label >= 0]
        loss = torch.stack([-logits[i].log_softmax(-1)[labels[i]] for i in wanted]).mean()
        model.zero_grad()
        loss.backward()
        for name, parameter in model.base_model.named_parameters():
            if parameter.grad is not None:
                squares[name] = squares.get(name, 0.0) + parameter.grad.double().square().mean().item()
        count += 1
    return {name: value / count for name, value in squares.items()}


@pytest.mark.supports("Guided dropout", "rates from its pretraining loss")
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "electra"])
def test_scores_are_means_over_single_texts(architecture):
    """Tied embeddings, Conv1D, scaled embeddings, norms: all in one pass, dropout off though the model trains."""
    model, task, some = lm(architecture, dropout=0.4), task_of(architecture), texts(11)
    rates = GuidedDropout.estimate(model, some, tokenizer=tokenizer(), batch_size=4, max_length=24, **QUICK)
    wanted = one_by_one(model, task, some)
    assert rates.task == task
    assert rates.settled.examples == 11
    for name, found in rates.tensors.items():
        assert found.score == pytest.approx(wanted[name], rel=1e-4), name
        assert found.score > 0
    for block in rates.blocks:
        assert rates.score(block) == pytest.approx(np.mean([wanted[name] for name in block.tensors]), rel=1e-4)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "gemma2", "t5"])
def test_nothing_is_left_to_the_slow_loop(architecture, monkeypatch):
    from graftlm.measure.example_gradients import ExampleGradients

    left = []
    leave = ExampleGradients.__exit__
    monkeypatch.setattr(ExampleGradients, "__exit__", lambda self, *e: (leave(self, *e), left.extend(self.unseen))[0])
    # 16 texts of 16 tokens: a batch as wide as it is long
    some = [" ".join(["w1 w2 w3 w4 w5 w6 w7"] * 2) for _ in range(16)]
    GuidedDropout.estimate(lm(architecture), some, tokenizer=tokenizer(), batch_size=16, max_length=24, **QUICK)
    assert left == []


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "modernbert", "electra"])
def test_logits_are_made_for_predicted_tokens_only(architecture):
    """With a large vocabulary they are most of the memory. That the scores are right is tested above."""
    model, seen = lm(architecture, num_layers=1), []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, __, output: seen.append(output.shape[:2]))
    some = [" ".join(f"w{i}" for i in range(20))] * 3
    GuidedDropout.estimate(model, some, tokenizer=tokenizer(), max_length=24, **QUICK)
    assert seen == [(3, 3)]  # 15 % of 20
    handle.remove()
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_the_result_does_not_depend_on_the_batch_size():
    model, some = lm("bert"), texts(9)
    one, many = (
        GuidedDropout.estimate(model, some, tokenizer=tokenizer(), batch_size=size, **QUICK) for size in (1, 8)
    )
    for name in one.tensors:
        assert one.tensors[name].score == pytest.approx(many.tensors[name].score, rel=1e-5)
    other = GuidedDropout.estimate(model, some, tokenizer=tokenizer(), seed=1, **QUICK)
    assert other.tensors.keys() == one.tensors.keys()
    assert any(other.tensors[n].score != pytest.approx(one.tensors[n].score, rel=1e-2) for n in one.tensors)


def test_a_mean_over_texts_is_not_a_mean_over_tokens_or_of_the_batch_gradient():
    """Trap: `outputs.loss` weighs long texts more, and the squared gradient of a batch is another quantity."""
    model, some = lm("bert"), ["w1 w2 w3", " ".join(f"w{i}" for i in range(20))] * 3
    rates = GuidedDropout.estimate(model, some, tokenizer=tokenizer(), batch_size=6, **QUICK)
    ((_, batch),) = batches(some, tokenizer(), "masked_lm", batch_size=6, max_length=32, seed=0)
    frozen = copy.deepcopy(model).eval()
    frozen(**batch).loss.backward()
    name = "encoder.layer.0.attention.self.query.weight"
    batch_gradient = dict(frozen.bert.named_parameters())[name].grad.square().mean().item()
    assert batch_gradient < 0.7 * rates.tensors[name].score


def test_the_standard_error_covers_the_truth():
    """Over many samples, the mean of the large population lies within two standard errors about 19 times in 20."""
    model, tokens = lm("bert", num_layers=1), tokenizer()
    name = "encoder.layer.0.output.dense.weight"
    whole = GuidedDropout.estimate(model, texts(1500, seed=5), tokenizer=tokens, batch_size=64, **QUICK)
    inside = 0
    for seed in range(20):
        part = GuidedDropout.estimate(model, texts(60, seed=100 + seed), tokenizer=tokens, seed=seed, **QUICK)
        found = part.tensors[name]
        inside += abs(found.score - whole.tensors[name].score) < 2.1 * found.standard_error
    assert 15 <= inside <= 20


def test_texts_are_streamed_and_the_estimate_stops_early():
    asked = []

    def stream():
        for number, text in enumerate(texts(4000)):
            asked.append(number)
            yield text

    options = {"tokenizer": tokenizer(), "progress": False, "check_head": False, "batch_size": 16}
    rates = GuidedDropout.estimate(lm("bert"), stream(), tolerance=0.08, **options)
    assert rates.settled.early
    assert rates.settled.rank_error <= 0.08
    assert rates.settled.examples < 2000
    assert len(asked) <= rates.settled.examples + 8 * 16 + 1
    assert "ranking settled" in rates.table()
    assert not GuidedDropout.estimate(lm("bert"), texts(70), tolerance=0.0, **options).settled.early
    some = GuidedDropout.estimate(lm("bert"), texts(70), max_examples=21, tolerance=0.0, **options)
    assert some.settled.examples == 21


HALF_AND_HALF = [" ".join(f"w{(7 * i + j) % 60}" for j in range(2 if i % 2 else 20)) for i in range(400)]


@pytest.mark.parametrize("stop", [{"max_examples": 50}, {"tolerance": 0.2}], ids=["counted", "settled"])
def test_a_stop_takes_texts_as_they_come_and_not_the_shortest(stop):
    """Trap: texts are sorted by length a window, so that a stop inside one would see its short texts alone."""
    model = lm("bert", num_layers=1)
    rates = GuidedDropout.estimate(
        model, HALF_AND_HALF, tokenizer=tokenizer(), max_length=24, **QUICK | {"batch_size": 16} | stop
    )
    used = rates.settled.examples
    assert used < len(HALF_AND_HALF)
    assert rates.settled.early == ("tolerance" in stop)
    wanted = one_by_one(model, "masked_lm", HALF_AND_HALF[:used])
    for name, found in rates.tensors.items():
        assert found.score == pytest.approx(wanted[name], rel=1e-4), name


def test_the_rank_error_is_the_spread_of_ranks_over_repeated_samples():
    """Against fresh samples of the population, which the bootstrap stands in for."""
    rng = np.random.default_rng(0)
    means = np.array([1.0, 1.05, 1.1, 2.0, 2.02])

    def sample():
        return rng.gamma(2.0, means / 2, size=(150, 5))

    ranks = np.array([sample().mean(0).argsort().argsort() for _ in range(600)])
    truth = ranks.std(0).mean() / 4
    found = np.mean([rank_error(sample(), seed=i) for i in range(30)])
    assert found == pytest.approx(truth, rel=0.25)
    assert rank_error(np.tile([1.0, 2.0, 3.0], (50, 1))) == 0


def test_progress_and_error_are_shown(capfd):
    GuidedDropout.estimate(lm("bert", num_layers=1), texts(90), tokenizer=tokenizer(), check_head=False, tolerance=0)
    shown = capfd.readouterr()
    assert "Fisher information" in shown.err
    assert "ranks ±" in shown.err
    assert "90 texts, all texts used, ranks certain to ±" in shown.err


LEARNABLE = [f"w{i} w{i + 1} w{i} w{i + 1} w{i} w{i + 1}" for i in range(0, 40, 2)]


def test_a_trained_head_passes_and_a_random_one_is_named():
    model = fitted(lm("bert", num_layers=1, dropout=0.0), LEARNABLE)
    options = {"tokenizer": tokenizer(), "progress": False}
    rates = GuidedDropout.estimate(model, LEARNABLE, **options)
    assert rates.settled.loss < 0.6 * math.log(96)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in broken.cls.parameters():  # its matrix is the embeddings' too
            parameter.normal_(std=0.02)
    with pytest.raises(ModelError, match=r"(?s)head is freshly initialised.*cls.*word frequencies alone"):
        GuidedDropout.estimate(broken, LEARNABLE, **options)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "llama", "gpt2", "t5"])
def test_an_untrained_model_is_refused(architecture):
    with pytest.raises(ModelError, match="freshly initialised"):
        GuidedDropout.estimate(lm(architecture), texts(40), tokenizer=tokenizer(), progress=False)


def test_a_checkpoint_without_its_head(tmp_path):
    """Trap: transformers fills the head with random numbers and only warns."""
    tiny_model("bert", "base").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"freshly initialised(?s:.*)cls\.predictions\.transform\.dense\.weight"):
        GuidedDropout.estimate(tmp_path, texts(8), progress=False)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    fresh = fresh_parameters(model)
    assert fresh
    assert all(name.startswith("cls.predictions.") for name in fresh)
    with pytest.raises(ModelError, match=r"cls\.predictions"):
        GuidedDropout.estimate(model, texts(40), tokenizer=tokenizer(), progress=False)
    fitted(model, LEARNABLE)  # a head that was trained since is a head
    assert fresh_parameters(model) == fresh
    GuidedDropout.estimate(model, LEARNABLE, tokenizer=tokenizer(), progress=False)


def test_a_whole_checkpoint_is_loaded_by_name(tmp_path):
    fitted(lm("bert", num_layers=1, dropout=0.0), LEARNABLE).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    rates = GuidedDropout.estimate(tmp_path, LEARNABLE, progress=False)
    assert rates.fingerprint.name == tmp_path.name
    assert fresh_parameters(BertForMaskedLM.from_pretrained(tmp_path)) == []


def test_a_minilm_without_its_head_is_measured_once_a_head_was_trained_on_it(tmp_path):
    """MiniLM is a narrow BERT that is published without a head; its backbone has to stay as it is meanwhile."""
    shape = {"num_layers": 6, "hidden_size": 24, "num_attention_heads": 12, "intermediate_size": 96, "dropout": 0.1}
    fitted(tiny_model("bert", "masked_lm", **shape), LEARNABLE).bert.save_pretrained(tmp_path / "minilm")
    tokenizer().save_pretrained(tmp_path / "minilm")
    with pytest.raises(ModelError, match=r"freshly initialised(?s:.*)cls\.predictions(?s:.*)train the head"):
        GuidedDropout.estimate(tmp_path / "minilm", LEARNABLE, progress=False)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "minilm")
    model.bert.requires_grad_(False)
    fitted(model, LEARNABLE).save_pretrained(tmp_path / "with_head")
    rates = GuidedDropout.estimate(tmp_path / "with_head", LEARNABLE, tokenizer=tokenizer(), progress=False)
    assert len(rates.blocks) == 1 + 3 * 6
    target = AutoModelForSequenceClassification.from_pretrained(tmp_path / "minilm", num_labels=3)
    applied = rates.apply(target)  # the frozen backbone is that of the checkpoint without a head
    assert sorted(row.new for row in applied.rows) == pytest.approx([0.1 * i / 18 for i in range(19)])


def test_the_discriminator_of_electra_is_named(tmp_path):
    config = lm("electra", num_layers=1).config
    model = ElectraForPreTraining(config)
    with pytest.raises(ModelError, match=r"discriminator(?s:.*)generator"):
        GuidedDropout.estimate(model, texts(4), tokenizer=tokenizer(), **QUICK)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"discriminator(?s:.*)ElectraForPreTraining(?s:.*)generator"):
        GuidedDropout.estimate(tmp_path, texts(4), **QUICK)


def test_word_frequencies_against_a_loop():
    text, targets = Counter({7: 5, 8: 3, 9: 1}), Counter({7: 2, 9: 1})
    total = 0.0
    for target in (7, 7, 9):
        others = text - Counter([target])
        total -= math.log((others[target] + 1) / (sum(others.values()) + 20))
    assert by_frequency(targets, text, 20) == pytest.approx(total / 3)


def test_next_sentence_models_are_measured_by_their_masked_lm():
    model = BertForPreTraining(tiny_model("bert", "base").config)
    twin = BertForMaskedLM(model.config)
    twin.load_state_dict(model.state_dict(), strict=False)
    some = texts(6)
    one, other = (GuidedDropout.estimate(m, some, tokenizer=tokenizer(), **QUICK) for m in (model, twin))
    for name in other.tensors:
        assert one.tensors[name].score == pytest.approx(other.tensors[name].score, rel=1e-4, abs=1e-12)


def test_what_cannot_be_measured_is_said():
    options = {"tokenizer": tokenizer(), **QUICK}
    with pytest.raises(ModelError, match="language-model head"):
        GuidedDropout.estimate(tiny_model("bert"), texts(4), **options)
    with pytest.raises(ModelError, match="transformers model"):
        GuidedDropout.estimate(nn.Linear(2, 2), texts(4), **options)
    with pytest.raises(DataError, match="one string"):
        GuidedDropout.estimate(lm("bert"), "w1 w2", **options)
    with pytest.raises(DataError, match="not a string"):
        GuidedDropout.estimate(lm("bert"), ["w1 w2", None], **options)
    with pytest.raises(DataError, match="anything to predict"):
        GuidedDropout.estimate(lm("bert"), ["", ""], **options)
    with pytest.raises(SetupError, match="tokenizer"):
        GuidedDropout.estimate(lm("bert"), texts(4))
    with pytest.raises(DataError, match="one text cannot show"):
        GuidedDropout.estimate(lm("bert"), ["w1 w2", ""], **options)
    for wrong in (
        {"max_examples": True},
        {"max_examples": 1},
        {"batch_size": 0},
        {"max_length": 3},
        {"seed": -1},
        {"seed": "a"},
        {"tolerance": -1},
        {"tolerance": float("nan")},
        {"tolerance": "0.1"},
    ):
        with pytest.raises(SetupError, match=rf"{next(iter(wrong))} is (?s:.*)try: "):
            GuidedDropout.estimate(lm("bert"), texts(4), **options | wrong)
    bare = tokenizer()
    bare.mask_token = None
    with pytest.raises(ModelError, match="mask token"):
        GuidedDropout.estimate(lm("bert"), texts(4), **options | {"tokenizer": bare})
    from tiny import tiny_tokenizer

    with pytest.raises(ModelError, match="sentinels"):
        GuidedDropout.estimate(lm("t5"), texts(4), **options | {"tokenizer": tiny_tokenizer()})


def test_weights_that_are_no_numbers_are_said_and_not_ranked():
    """Also where the head is checked: NaN is not the loss of a fresh one."""
    model = lm("bert")
    with torch.no_grad():
        model.bert.encoder.layer[2].output.dense.weight[3, 1] = float("nan")
    for check_head in (False, True):
        with pytest.raises(ModelError, match=r"not a finite number(?s:.*)text \d+: loss nan(?s:.*)float32"):
            GuidedDropout.estimate(model, texts(4), tokenizer=tokenizer(), **QUICK | {"check_head": check_head})


def test_where_a_model_is_measured(tmp_path):
    lm("bert", num_layers=1).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert load_with_head(tmp_path, device="meta")[0].device.type == "meta"
    there = "cuda" if torch.cuda.is_available() else "cpu"
    assert load_with_head(tmp_path)[0].device.type == there
    assert GuidedDropout.estimate(tmp_path, texts(4), device="cpu", **QUICK).settled.examples == 4
    with pytest.raises(SetupError, match=r"no such device(?s:.*)'gpu'(?s:.*)cpu"):
        GuidedDropout.estimate(tmp_path, texts(4), device="gpu", **QUICK)
    with pytest.raises(SetupError, match=r"where it lies(?s:.*)model\.to\('cpu'\)"):
        GuidedDropout.estimate(lm("bert"), texts(4), tokenizer=tokenizer(), device="cpu", **QUICK)

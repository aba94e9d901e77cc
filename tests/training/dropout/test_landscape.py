"""Surfaces against models that are moved by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from lms import lm, texts, tokenizer

from graftlm.errors import DataError, ModelError, SetupError
from graftlm.training.dropout.guided import GuidedDropout
from graftlm.training.dropout.landscape import LossLandscape, directions, loss_landscape
from graftlm.training.dropout.texts import batches

SOME = texts(5)


@pytest.fixture(scope="module")
def measured():
    model = lm("bert", num_layers=2)
    return model, GuidedDropout.estimate(
        model, SOME, tokenizer=tokenizer(), progress=False, check_head=False, tolerance=0.0
    )


def surface(model, rates, **options):
    return loss_landscape(model, SOME, rates, tokenizer=tokenizer(), points=3, progress=False, **options)


def halves_by_hand(model, rates):
    named = dict(model.bert.named_parameters())
    order = sorted(rates.tensors, key=lambda name: -rates.tensors[name].score)
    top = order[: math.ceil(len(order) / 2)]
    return {
        "all": [n for n in order if named[n].ndim > 1],
        "top": [n for n in top if named[n].ndim > 1],
        "bottom": [n for n in order[len(top) :] if named[n].ndim > 1],
    }


def test_points_against_models_moved_by_hand(measured):
    model, rates = measured
    found = surface(model, rates, reach=0.6)
    assert found.axis == pytest.approx((-0.6, 0.0, 0.6))
    sets = halves_by_hand(model, rates)
    named = list(dict(model.bert.named_parameters()))
    assert list(rates.tensors) != named  # measured in another order, fewer tensors
    assert found.moved == {name: len(tensors) for name, tensors in sets.items()}
    whole = dict(model.bert.named_parameters())
    drawn = {name: whole[name] for name in named if name in rates.tensors}
    for which, tensors in sets.items():
        for i, j in ((0, 0), (2, 1), (1, 1), (1, 0)):
            wanted = _moved_by_hand(model, drawn, tensors, found.axis[i], found.axis[j])
            assert found.losses[which][i][j] == pytest.approx(wanted, rel=1e-5)
    centre = {which: rows[1][1] for which, rows in found.losses.items()}
    assert len(set(centre.values())) == 1
    assert found.losses["all"][0][0] != pytest.approx(centre["all"], rel=1e-3)


def _moved_by_hand(model, drawn, tensors, a, b):
    model = copy.deepcopy(model).eval()
    first, second = directions(drawn, (0, 1)), directions(drawn, (0, 2))
    named = dict(model.bert.named_parameters())
    losses = []
    with torch.no_grad():
        for name in tensors:
            named[name].add_(a * first[name] + b * second[name])
        for _, batch in batches(SOME, tokenizer(), "masked_lm", batch_size=1, max_length=128, seed=0):
            losses.append(model(**batch).loss.item())
    return float(np.mean(losses))


def test_directions_are_as_long_as_their_tensors(measured):
    model, rates = measured
    named = {n: p for n, p in model.bert.named_parameters() if n in rates.tensors}
    found = directions(named, (3, 1))
    assert all(named[name].ndim > 1 for name in found)
    for name, direction in found.items():
        assert direction.norm() == pytest.approx(float(named[name].detach().norm()), rel=1e-5)
    assert not torch.equal(directions(named, (4, 1))[name], direction)
    radius = surface(model, rates, seed=3).radius
    assert radius["all"] == pytest.approx(
        math.sqrt(sum(float(named[n].detach().square().sum()) for n in found)), rel=1e-5
    )
    assert radius["top"] ** 2 + radius["bottom"] ** 2 == pytest.approx(radius["all"] ** 2, rel=1e-5)


def test_the_confound_of_the_paper_and_the_fair_halves(measured):
    """Tensors of one dimension hold more information and do not move, so the paper's top half moves less."""
    model, rates = measured
    paper, fair = surface(model, rates), surface(model, rates, halves="matrices")
    assert abs(fair.moved["top"] - fair.moved["bottom"]) <= 1
    assert paper.moved["top"] < paper.moved["bottom"]
    assert paper.moved["all"] == fair.moved["all"] == fair.moved["top"] + fair.moved["bottom"]


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
def test_long_texts_are_cut_at_the_positions_of_the_model(architecture):
    """Trap: what the estimate can read, the surface has to read too. 500 words, 64 positions."""
    model, long = lm(architecture, num_layers=1), [" ".join(f"w{i % 60}" for i in range(500))] * 3
    how = {"tokenizer": tokenizer(), "progress": False, "max_length": 600}
    rates = GuidedDropout.estimate(model, long, check_head=False, tolerance=0.0, **how)
    found = loss_landscape(model, long, rates, points=3, **how)
    assert found.losses["all"][1][1] == pytest.approx(rates.settled.loss, rel=1e-5)  # texts of one length


def test_max_examples_takes_the_first_texts(measured):
    model, rates = measured
    cut, few = (
        surface(model, rates, max_examples=2),
        loss_landscape(model, SOME[:2], rates, tokenizer=tokenizer(), points=3, progress=False),
    )
    assert (cut.examples, cut.losses) == (2, few.losses)


def test_the_model_is_left_as_it_was(measured):
    model, rates = measured
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    surface(model, rates)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes


def test_a_file_and_a_picture(measured, tmp_path):
    from graftlm.evaluation.dropout_section import dropout_section

    model, rates = measured
    found = surface(model, rates)
    assert LossLandscape.load(found.save(tmp_path / "landscape.json")) == found
    rates.save(tmp_path / "dropout.json", rates.apply(model))
    shown = dropout_section(tmp_path)
    assert shown["landscape_picture"].count("<svg") == 2
    assert shown["dropout_picture"].count("<svg") == 2
    assert [row["block"] for row in shown["dropout"]["rows"]] == [block.name for block in rates.blocks]
    assert all(row["measured"] for row in shown["dropout"]["rows"])
    (tmp_path / "landscape.json").write_text("{}")
    with pytest.raises(DataError, match="loss landscape"):
        LossLandscape.load(tmp_path / "landscape.json")
    with pytest.raises(DataError, match="another kind"):
        dropout_section(tmp_path)
    assert set(dropout_section(tmp_path / "empty").values()) == {None}


def test_what_makes_no_sense_is_said(measured):
    model, rates = measured
    with pytest.raises(SetupError, match="centre"):
        loss_landscape(model, SOME, rates, tokenizer=tokenizer(), points=4)
    with pytest.raises(SetupError, match="tensors, matrices"):
        surface(model, rates, halves="both")
    with pytest.raises(SetupError, match="distance"):
        surface(model, rates, reach=-1.0)
    with pytest.raises(ModelError, match="other weights"):
        surface(lm("bert", num_layers=2, seed=1), rates)
    with pytest.raises(DataError, match="anything to predict"):
        loss_landscape(model, [""], rates, tokenizer=tokenizer(), progress=False)

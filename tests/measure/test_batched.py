"""Maps in batches against singular values, against the density maximised numerically, and against themselves alone."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measure.test_logme import brute_force, problem
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graftlm import SetupError
from graftlm.measure import batched
from graftlm.measure.banded import Band, to_band
from graftlm.measure.batched import BatchedEvidence
from graftlm.measure.evidence import by_svd
from graftlm.measure.logme import targets_of
from graftlm.measure.mapped import MappedEvidence

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NEAR = {"float64": 1e-8, "float32": 1e-4}
SHAPES = [(150, 70), (70, 150), (90, 90), (50, 33), (30, 64), (40, 3), (3, 40)]


def maps(width, count=4, seed=0, spread=0.4):
    rng = np.random.default_rng(seed)
    weights = np.eye(width) + spread * rng.normal(size=(count, width, width)) / width**0.5
    return torch.tensor(weights), torch.tensor(rng.normal(size=(count, width)))


def exact(features, weights, biases, targets):
    pairs = zip(weights.double().numpy(), biases.double().numpy(), strict=True)
    return [by_svd(features @ weight.T + bias, targets).score for weight, bias in pairs]


def scores(many, weights, biases):
    return [found.score for found in many.linear(weights.to(many.device), biases.to(many.device))]


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("device", DEVICES)
def test_scores_are_those_of_singular_values(rows, width, classes, precision, device):
    classes = min(classes, rows)
    features, labels = problem(rows, width, classes=classes, signal=0.5, mean=3.0)
    targets = targets_of(labels, "classification", rows)
    weights, biases = (part.to(getattr(torch, precision)) for part in maps(width))
    many = BatchedEvidence(features, targets, precision, device)
    assert scores(many, weights, biases) == pytest.approx(
        exact(features, weights, biases, targets), abs=NEAR[precision]
    )


@pytest.mark.parametrize(("rows", "width"), [(20, 5), (12, 40), (25, 24)])
def test_scores_are_the_highest_density(rows, width):
    features, labels = problem(rows, width, signal=0.7, seed=rows)
    targets = targets_of(labels, "classification", rows)
    weights, biases = maps(width, 2)
    expected = [
        np.mean([brute_force(features @ weight.T + bias, column) for column in targets.T])
        for weight, bias in zip(weights.numpy(), biases.numpy(), strict=True)
    ]
    assert scores(BatchedEvidence(features, targets), weights, biases) == pytest.approx(expected, abs=2e-7)


def test_regression_with_several_columns():
    rng = np.random.default_rng(3)
    for rows, width in [(80, 40), (40, 80)]:
        features = rng.normal(size=(rows, width)) + 2
        numbers = features[:, :3] @ rng.normal(size=(3, 3)) + rng.normal(size=(rows, 3))
        many = BatchedEvidence(features, targets_of(numbers, "regression", rows))
        assert scores(many, *maps(width)) == pytest.approx(exact(features, *maps(width), numbers), abs=1e-8)
        assert many.fallbacks == 0


@pytest.mark.parametrize(("seed", "low"), [(9, False), (31, True)])
def test_the_higher_of_two_peaks_is_taken(seed, low):
    """Features of two scales that say something of the numbers each: h has a peak for either."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(40, 30))
    features[:, 15:] *= 1e-4 ** rng.random()
    small = features[:, -3:] / np.abs(features[:, -3:]).max()
    numbers = 0.3 * features[:, :3] @ rng.normal(size=3) + small @ rng.normal(size=3) + 0.05 * rng.normal(size=40)
    many = BatchedEvidence(features, numbers[:, None])
    (found,) = many.linear(torch.eye(30).double()[None], torch.zeros(1, 30).double())
    expected = by_svd(features, numbers[:, None])
    assert found.score == pytest.approx(expected.score, abs=1e-9) and many.fallbacks == 0
    assert found.ratios == pytest.approx(expected.ratios, rel=1e-3) and (found.ratios[0] < 1) == low


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize(("rows", "width"), [(90, 50), (40, 80)])
def test_features_and_maps_without_full_rank(rows, width, precision):
    features, labels = problem(rows, width, rank=7, signal=0.5, mean=1.0, seed=2)
    features[:, 3] = 5.0
    targets = targets_of(labels, "classification", rows)
    weights, biases = maps(width, 5)
    weights[1, :, 4:] = 0
    weights[2, 5:] = 0
    weights[3] = torch.diag(torch.arange(width) % 2).double()
    weights[4] = 0
    many = BatchedEvidence(features, targets, precision)
    assert scores(many, weights, biases) == pytest.approx(
        exact(features, weights, biases, targets), abs=NEAR[precision]
    )


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(4, 80),
    width=st.integers(1, 80),
    classes=st.integers(2, 4),
    signal=st.sampled_from([0.0, 0.3, 2.0]),
    mean=st.sampled_from([0.0, 1.0, 100.0]),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    precision=st.sampled_from(["float64", "float32"]),
    seed=st.integers(0, 10**6),
)
def test_whatever_the_features(rows, width, classes, signal, mean, scale, precision, seed):
    features, labels = problem(rows, width, classes=classes, signal=signal, mean=mean, seed=seed)
    targets = targets_of(labels, "classification", rows)
    weights, biases = (scale * part for part in maps(width, 2, seed, spread=1.0))
    many = BatchedEvidence(features, targets, precision)
    assert scores(many, weights, biases) == pytest.approx(
        exact(features, weights, biases, targets), abs=NEAR[precision]
    )


@pytest.mark.parametrize(("rows", "width"), [(300, 96), (80, 96), (250, 200)])
@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_batch_is_what_ran_and_agrees_with_the_processors_form(rows, width, mean, precision, device):
    features, labels = problem(rows, width, classes=5, signal=0.3, mean=mean)
    targets = targets_of(labels, "classification", rows)
    many, single = BatchedEvidence(features, targets, precision, device), MappedEvidence(features, targets)
    weights, biases = maps(width)
    found = many.linear(weights.to(device), biases.to(device))
    assert many.fallbacks == 0
    for one, weight, bias in zip(found, weights.numpy(), biases.numpy(), strict=True):
        expected = single.linear(weight, bias)
        assert one.columns == pytest.approx(expected.columns, abs=NEAR[precision])
        assert one.ratios == pytest.approx(expected.ratios, rel=1e-2)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_map_that_cannot_be_scored_changes_no_other(precision):
    features, labels = problem(60, 40, signal=0.5, mean=1.0)
    targets = targets_of(labels, "classification", 60)
    many = BatchedEvidence(features, targets, precision)
    weights, biases = maps(40, 6)
    alone = scores(many, weights[[0, 2, 5]], biases[[0, 2, 5]])
    assert many.fallbacks == 0
    weights[1], weights[3], biases[3] = 1e200, 0, 0
    weights[4, 0, 0] = torch.nan
    with np.errstate(over="ignore", invalid="ignore"):
        together = scores(many, weights, biases)
    assert [together[place] for place in (0, 2, 5)] == pytest.approx(alone, abs=1e-2 * NEAR[precision])
    assert np.isnan([together[1], together[4]]).all()
    assert together[3] == pytest.approx(by_svd(np.zeros((60, 40)), targets).score)
    assert many.fallbacks == {"float64": 3, "float32": 6}[precision]


def test_float32_stays_float32_whatever_is_set_for_models():
    features, labels = problem(120, 64, signal=0.5, mean=1.0)
    many = BatchedEvidence(features, targets_of(labels, "classification", 120), "float32")
    expected = scores(many, *maps(64))
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert scores(many, *maps(64)) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside have held at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return made

    def _freed(self, which, count):
        self.known.discard(which)
        self.now -= count


@pytest.mark.parametrize(("rows", "width", "classes"), [(200, 96, 3), (64, 160, 3), (100, 64, 30)])
def test_a_batch_takes_no_more_memory_than_is_counted(rows, width, classes):
    features, labels = problem(rows, width, classes=classes, signal=0.3, mean=1.0)
    many = BatchedEvidence(features, targets_of(labels, "classification", rows))
    weights, biases = maps(width, 8)
    with Peak() as peak:
        many.linear(weights, biases)
    counted = 8 * many.bytes_a_map
    assert 0.3 * counted < peak.most < counted


def test_batches_are_as_large_as_free_memory_lets_them_be(monkeypatch):
    features, labels = problem(50, 20)
    many = BatchedEvidence(features, targets_of(labels, "classification", 50))
    for free, most in ((0, 1), (25 * many.bytes_a_map, 15), (1 << 60, 256)):
        monkeypatch.setattr(batched, "_free", lambda _, free=free: free)
        assert many.most == most


def test_a_batch_that_does_not_fit_is_divided(monkeypatch):
    features, labels = problem(50, 20)
    many = BatchedEvidence(features, targets_of(labels, "classification", 50))
    weights, biases = maps(20, 7)
    expected = scores(many, weights, biases)
    plain, sizes, room = BatchedEvidence._linear, [], [2]

    def narrow(self, weights, biases, precision):
        sizes.append(len(weights))
        if len(weights) > room[0]:
            raise torch.OutOfMemoryError("no room")
        return plain(self, weights, biases, precision)

    monkeypatch.setattr(BatchedEvidence, "_linear", narrow)
    assert scores(many, weights, biases) == pytest.approx(expected, abs=1e-12)
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    room[0] = 0
    with pytest.raises(SetupError, match="too little memory"):
        many.linear(weights, biases)


def test_an_unknown_precision_is_an_error():
    with pytest.raises(SetupError, match="precision"):
        BatchedEvidence(np.eye(3), np.eye(3), "float16")


@pytest.mark.parametrize("size", [20, 32, 64, 70, 129])
def test_a_band_has_the_determinants_and_forms_of_its_matrix(size):
    rng = np.random.default_rng(size)
    root = torch.tensor(rng.normal(size=(3, size, size)))
    matrices = root @ root.mT / size**2
    matrices[1, :, 5] = matrices[1, 5] = 0
    matrices[2] = 0
    sides = torch.tensor(rng.normal(size=(3, size, 4)))
    core = torch.tensor([[[2, 1], [1, 1]], [[1e-3, 1e-3], [1e-3, 0]], [[-1, 0], [0, 1]]]).double()
    diagonal, below, turned = to_band(matrices.clone(), sides)
    share = torch.tensor(rng.normal(size=(2, 2)))
    band = Band(diagonal, below, turned[..., :2], turned[..., 2:], core, share)
    t = torch.tensor([[0.3, 2.0], [0.5, 1.0], [9.0, 7.0]]).double()
    determinant, quadratic = band.at(t)
    _, own = band.at(t, own=True)
    update = sides[..., 2:] @ core @ sides[..., 2:].mT
    for number, shift in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)):
        whole = (matrices[number] + update[number] + t[number, shift] * torch.eye(size)).numpy()
        sign, expected = np.linalg.slogdet(whole)
        assert sign == (-1 if number == 2 else 1)
        if sign < 0:
            assert determinant[number, shift].isnan() and quadratic[number, shift].isnan().all()
            continue
        filled = (band.size - size) * t[number, shift].log()
        assert determinant[number, shift].item() == pytest.approx((expected + filled).item(), abs=1e-9)
        columns = (sides[number, :, :2] + sides[number, :, 2:] @ share).numpy()
        forms = (columns * np.linalg.solve(whole, columns)).sum(0)
        assert quadratic[number, shift].numpy() == pytest.approx(forms, rel=1e-9)
        assert own[number, shift].item() == pytest.approx(forms[shift], rel=1e-9)

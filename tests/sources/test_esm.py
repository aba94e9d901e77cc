"""Embedding Space Maps: fits against least squares, files against those that the released package writes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from graftlm import DataError, EmbeddingSpaceMap, SetupError

NAMES = {"base_model": "org/base", "task": "org/task"}


def pairs(rows=200, width=12, rank=None, noise=0.1, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) + 3
    weight = rng.normal(size=(width, rank or width)) @ rng.normal(size=(rank or width, width))
    return x, x @ weight.T + rng.normal(size=width) + noise * rng.normal(size=(rows, width))


def error(esm, x, y) -> float:
    return float(((esm(x) - y) ** 2).sum())


def test_the_closed_form_is_least_squares():
    x, y = pairs()
    esm = EmbeddingSpaceMap.fit(x, y, ridge=0.0, **NAMES)
    solution, *_ = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)
    assert np.allclose(esm.weight, solution[:-1].T, atol=1e-4) and np.allclose(esm.bias, solution[-1], atol=1e-4)
    assert esm.architecture == "linear" and esm.width == esm.rank == 12


@pytest.mark.parametrize("rows", [8, 200])
def test_ridge_is_least_squares_with_rows_that_say_zero(rows):
    x, y = pairs(rows)
    esm = EmbeddingSpaceMap.fit(x, y, ridge=0.3, **NAMES)
    centred, target = x - x.mean(0), y - y.mean(0)
    penalty = np.sqrt(0.3 * (centred**2).sum() / 12) * np.eye(12)
    solution, *_ = np.linalg.lstsq(np.vstack([centred, penalty]), np.vstack([target, 0 * penalty]), rcond=None)
    assert np.allclose(esm.weight, solution.T, atol=1e-5)
    assert np.allclose(esm(x).mean(0), y.mean(0), atol=1e-4), "the intercept is not shrunk"


def test_the_cross_validated_ridge_is_that_of_leaving_rows_out_in_closed_form():
    """Generalised cross-validation from the hat matrix itself."""
    from graftlm.sources.fitting import RIDGES

    x, y = pairs(rows=20, noise=3.0)
    centred, target = x - x.mean(0), y - y.mean(0)
    gram = centred.T @ centred
    errors = []
    for ridge in RIDGES:
        hat = centred @ np.linalg.solve(gram + ridge * np.trace(gram) / 12 * np.eye(12), centred.T)
        errors.append(((target - hat @ target) ** 2).sum() / (len(x) - 1 - np.trace(hat)) ** 2)
    chosen = EmbeddingSpaceMap.fit(x, y, **NAMES).details["esm_ridge"]
    assert chosen == pytest.approx(RIDGES[int(np.argmin(errors))]) and RIDGES[0] < chosen < RIDGES[-1]


@pytest.mark.parametrize("architecture", ["low_rank", "identity_low_rank"])
def test_a_low_rank_map_has_the_least_error_of_its_rank(architecture):
    x, y = pairs(rows=60, width=6, noise=1.0)
    identity = architecture == "identity_low_rank"
    esm = EmbeddingSpaceMap.fit(x, y, architecture=architecture, rank=2, ridge=0.0, **NAMES)
    assert esm.rank == 2 and esm.identity is identity and esm.architecture == architecture
    centred, target = x - x.mean(0), (y - x if identity else y) - (y - x if identity else y).mean(0)
    best = np.inf
    for seed in range(5):  # alternating least squares from random starts
        up = np.random.default_rng(seed).normal(size=(6, 2))
        for _ in range(300):
            down = np.linalg.lstsq(centred, target @ np.linalg.pinv(up).T, rcond=None)[0]
            up = np.linalg.lstsq(centred @ down, target, rcond=None)[0].T
        best = min(best, ((target - centred @ down @ up.T) ** 2).sum())
    assert error(esm, x, y) == pytest.approx(best, rel=1e-5)


def test_a_map_of_full_rank_is_the_linear_map():
    x, y = pairs(rows=40, width=5)
    full = EmbeddingSpaceMap.fit(x, y, ridge=0.1, **NAMES)
    low = EmbeddingSpaceMap.fit(x, y, architecture="low_rank", rank=5, ridge=0.1, **NAMES)
    assert np.allclose(low.up @ low.down.T, full.weight, atol=1e-4)


@pytest.mark.parametrize(("architecture", "rank"), [("linear", None), ("low_rank", 3), ("identity_low_rank", 3)])
def test_sgd_comes_near_the_closed_form(architecture, rank):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 4))
    y = x @ (np.eye(4) + 0.3 * rng.normal(size=(4, 4))).T + 0.5
    fitted = {"architecture": architecture, "rank": rank, **NAMES}
    best = EmbeddingSpaceMap.fit(x, y, ridge=0.0, **fitted)
    settings = {"method": "sgd", "epochs": 60, "learning_rate": 2e-2, "weight_decay": 0.0}
    found = EmbeddingSpaceMap.fit(x, y, **settings, **fitted)
    total = ((y - y.mean(0)) ** 2).sum()
    assert error(best, x, y) <= error(found, x, y) * (1 + 1e-6) + 1e-6
    assert error(found, x, y) - error(best, x, y) < 0.01 * total


def test_sgd_repeats_and_leaves_the_random_state_alone():
    x, y = pairs(rows=20, width=3)
    torch.manual_seed(5)
    expected = torch.rand(1).item()
    torch.manual_seed(5)
    first = EmbeddingSpaceMap.fit(x, y, method="sgd", epochs=1, seed=3, **NAMES)
    assert torch.rand(1).item() == expected
    again = EmbeddingSpaceMap.fit(x, y, method="sgd", epochs=1, seed=3, **NAMES)
    other = EmbeddingSpaceMap.fit(x, y, method="sgd", epochs=1, seed=4, **NAMES)
    assert (first.weight == again.weight).all() and not (first.weight == other.weight).all()


def made(architecture):
    x, y = pairs(rows=30, width=4)
    rank = None if architecture == "linear" else 2
    more = {"task_subset": "en", "text_column": ["a", "b"]}
    return EmbeddingSpaceMap.fit(x, y, architecture=architecture, rank=rank, details=more, **NAMES), x


@pytest.mark.parametrize("architecture", ["linear", "low_rank", "identity_low_rank"])
def test_what_is_saved_is_loaded(architecture, tmp_path):
    esm, x = made(architecture)
    esm.save(tmp_path / "esm")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "esm", "model.safetensors"]
    found = EmbeddingSpaceMap.load(tmp_path / "esm")
    assert (found(x) == esm(x)).all()
    assert found.config() == esm.config() and found.architecture == architecture
    assert found.details["task_subset"] == "en" and found.details["num_examples"] == 30
    with pytest.raises(SetupError, match="not overwritten"):
        esm.save(tmp_path / "esm")


def test_a_linear_map_is_a_linear_layer_of_torch(tmp_path):
    """What the released package does with the file: load it as the state of nn.Linear."""
    from safetensors.torch import load_file

    esm, x = made("linear")
    tensors = load_file(esm.save(tmp_path / "esm") / "model.safetensors")
    holder = nn.Module()
    holder.model = nn.Linear(4, 4)
    holder.load_state_dict(tensors)
    mapped = holder.model(torch.from_numpy(x).float()).detach().numpy()
    assert np.allclose(mapped, esm(x), atol=1e-4)
    config = json.loads((tmp_path / "esm" / "config.json").read_text())
    assert config["base_model_name"] == "org/base" and config["task_id"] == "org/task"
    assert config["esm_architecture"] == "linear" and config["esm_embedding_dim"] == 4


def published(folder, old: bool, **config):
    """A folder as the released package writes one, made with torch alone."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    prefix = "sequential.0" if old else "model"
    folder.mkdir()
    save_file(
        {f"{prefix}.{name}": value.detach() for name, value in layer.named_parameters()}, folder / "model.safetensors"
    )
    base = {
        "base_model_name": "bert-base-multilingual-uncased",
        "task_id": "imdb",
        "esm_architecture": "linear",
        "esm_embedding_dim": 4,
        "version": "0.1.0" if old else "0.2.1",
        "text_column": "text",
        "model_type": "",
    }
    (folder / "config.json").write_text(json.dumps(base | config))
    return layer


@pytest.mark.parametrize("old", [False, True])
def test_published_maps_are_read(old, tmp_path):
    layer = published(tmp_path / "esm", old)
    esm = EmbeddingSpaceMap.load(tmp_path / "esm")
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    assert np.allclose(esm(x), layer(torch.from_numpy(x)).detach().numpy(), atol=1e-6)
    assert (esm.base_model, esm.task) == ("bert-base-multilingual-uncased", "imdb")
    assert esm.details["text_column"] == "text"


def damage(folder, how):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "cut off":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif how == "a pickle":
        torch.save({"model.weight": torch.eye(4)}, folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "a pickle under its name":
        torch.save({"model.weight": torch.eye(4)}, weights)
    elif how == "NaN":
        save_file({"model.weight": torch.full((4, 4), torch.nan), "model.bias": torch.zeros(4)}, weights)
    elif how == "not square":
        save_file({"model.weight": torch.ones(4, 3), "model.bias": torch.zeros(4)}, weights)
    elif how == "other tensors":
        save_file({"model.weight": torch.eye(4)}, weights)
    elif how == "whole numbers":
        save_file({"model.weight": torch.ones(4, 4, dtype=torch.int64), "model.bias": torch.zeros(4)}, weights)
    elif how == "no config":
        config.unlink()
    elif how == "no JSON":
        config.write_text("{")
    elif how == "a list":
        config.write_text("[]")
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | how))


@pytest.mark.parametrize(
    "how",
    [
        "cut off",
        "a pickle",
        "a pickle under its name",
        "NaN",
        "not square",
        "other tensors",
        "whole numbers",
        "no config",
        "no JSON",
        "a list",
        {"esm_embedding_dim": 5},
        {"esm_architecture": "mlp"},
        {"base_model_name": None},
        {"task_id": ""},
    ],
    ids=str,
)
def test_a_damaged_map_is_an_error(how, tmp_path):
    published(tmp_path / "esm", old=False)
    damage(tmp_path / "esm", how)
    with pytest.raises(DataError):
        EmbeddingSpaceMap.load(tmp_path / "esm")


def test_embeddings_of_another_width_are_an_error():
    esm, _ = made("linear")
    with pytest.raises(DataError, match="width 4"):
        esm(np.ones((2, 5)))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"architecture": "mlp"}, SetupError),
        ({"method": "adam"}, SetupError),
        ({"rank": 2}, SetupError),
        ({"architecture": "low_rank"}, SetupError),
        ({"architecture": "low_rank", "rank": 9}, SetupError),
        ({"ridge": -1.0}, SetupError),
        ({"method": "sgd", "epochs": 0}, SetupError),
        ({"tuned": np.ones((30, 5))}, DataError),
        ({"tuned": np.full((30, 4), np.nan)}, DataError),
        ({"base": np.ones((30, 4))}, DataError),
    ],
)
def test_what_cannot_be_fitted_is_an_error(change, kind):
    x, y = pairs(rows=30, width=4)
    with pytest.raises(kind):
        EmbeddingSpaceMap.fit(**({"base": x, "tuned": y} | NAMES | change))

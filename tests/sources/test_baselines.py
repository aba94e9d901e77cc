"""The other rankers: each score from its definition, on the same tiny models."""

import numpy as np
import pytest
import torch
from sources.test_rank import COLUMNS, WIDTH, maps, rows
from tiny import tiny_model, tiny_tokenizer

import graftlm
from graftlm import DataError, SetupError, SourcePool
from graftlm.measure.transferability import leep, nce
from graftlm.sources.baselines import class_probabilities, frozen_transfer
from graftlm.sources.embed import Embedder
from graftlm.sources.target import read_target

TEXTS = [row["text"] for row in rows()]
LABELS = np.array([row["label"] for row in rows()])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def base():
    return tiny_model("bert", "base")


@pytest.fixture(scope="module")
def classifiers():
    return {f"s{seed}": tiny_model("bert", seed=seed, num_labels=4) for seed in range(3)}


def scores(ranking):
    return {one.name: one.score for one in ranking.sources}


def test_logme_of_source_models(base, classifiers, tokenizer):
    found = graftlm.rank_source_tasks(base, rows(), method="logme", models=classifiers, tokenizer=tokenizer, **COLUMNS)
    expected = {
        name: graftlm.logme(Embedder(model, tokenizer=tokenizer)(TEXTS), LABELS) for name, model in classifiers.items()
    }
    assert scores(found) == pytest.approx(expected, abs=1e-9) and found.method == "logme"


def test_leep_and_nce_of_source_classifiers(base, classifiers, tokenizer):
    for method in ("leep", "nce"):
        expected = {}
        for name, model in classifiers.items():
            outputs = []
            for text in TEXTS:
                with torch.no_grad():
                    outputs.append(model.eval()(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1).numpy())
            theta = np.array(outputs, dtype=float)
            expected[name] = leep(theta, LABELS) if method == "leep" else nce(theta.argmax(axis=1), LABELS)
        more = {"method": method, "models": classifiers, "tokenizer": tokenizer}
        assert scores(graftlm.rank_source_tasks(base, rows(), **more, **COLUMNS)) == pytest.approx(expected, abs=1e-5)


def test_a_classifier_from_a_folder(classifiers, tokenizer, tmp_path):
    classifiers["s1"].save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = class_probabilities(classifiers["s1"], TEXTS[:5], tokenizer=tokenizer)
    assert np.allclose(class_probabilities(tmp_path, TEXTS[:5]), expected, atol=1e-6)
    assert np.allclose(expected.sum(axis=1), 1)


def test_a_model_without_a_head_is_skipped_and_named(base, classifiers, tokenizer, tmp_path):
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    given = {"headless": tmp_path, "bare": base, "good": classifiers["s0"]}
    found = graftlm.rank_source_tasks(base, rows(), method="leep", models=given, tokenizer=tokenizer, **COLUMNS)
    assert list(scores(found)) == ["good"]
    assert {one.name for one in found.skipped} == {"headless", "bare"} and "holds no classifier" in str(found)
    with pytest.raises(DataError, match="no source task could be scored"):
        graftlm.rank_source_tasks(base, rows(), method="nce", models={"x": tmp_path}, tokenizer=tokenizer, **COLUMNS)


def test_frozen_transfer_is_cross_validated_ridge():
    from sklearn.linear_model import Ridge

    target = read_target(rows(), "text", "label")
    features = np.random.default_rng(0).normal(size=(60, WIDTH)) + np.outer(LABELS, np.ones(WIDTH)) / 3
    folds = np.random.default_rng(0).permutation(60) % 5
    best = []
    for ridge in (1e-3, 1e-1, 10.0):
        right = 0
        for fold in range(5):
            train, test = folds != fold, folds == fold
            centred = features[train] - features[train].mean(0)
            penalty = ridge * np.trace(centred.T @ centred) / min(centred.shape)
            head = Ridge(alpha=penalty).fit(features[train], target.columns[train])
            right += (head.predict(features[test]).argmax(1) == LABELS[test]).sum()
        best.append(right / 60)
    assert frozen_transfer(features, target) == pytest.approx(max(best)) and 0.6 < max(best) < 1


def test_frozen_transfer_of_numbers_and_of_few_rows(base, classifiers, tokenizer):
    more = {"method": "frozen", "models": classifiers, "tokenizer": tokenizer, "text_column": "text"}
    found = graftlm.rank_source_tasks(base, rows(), label_column="number", **more)
    assert all(-1 <= one.score <= 1 for one in found.sources) and found.classes is None
    with pytest.raises(DataError, match="more rows"):
        graftlm.rank_source_tasks(base, rows(9), label_column="label", **more)


def test_text_embeddings_and_vocabularies(base, tokenizer):
    sources = {"same": TEXTS, "other": ["w50 w51", "w52"], "rows": rows(20, seed=5)}
    found = graftlm.rank_source_tasks(base, rows(), method="textemb", sources=sources, tokenizer=tokenizer, **COLUMNS)
    embed = Embedder(base, tokenizer=tokenizer)
    mean, other = embed(TEXTS).mean(0), embed(sources["other"]).mean(0)
    assert found.sources[0].name == "same" and found.sources[0].score == pytest.approx(1)
    cosine = mean @ other / np.linalg.norm(mean) / np.linalg.norm(other)
    assert scores(found)["other"] == pytest.approx(cosine, abs=1e-5)

    found = graftlm.rank_source_tasks(
        base, rows(), method="vocabulary", sources=sources, tokenizer=tokenizer, **COLUMNS
    )
    words = [
        {word for text in texts for word in text.split()} | {"[BOS]", "[EOS]"} for texts in (TEXTS, sources["other"])
    ]
    assert scores(found)["same"] == 1
    assert scores(found)["other"] == pytest.approx(len(words[0] & words[1]) / len(words[0] | words[1]))


def test_sizes_of_sources_and_of_a_pool(base, tmp_path):
    sources = {"few": TEXTS[:3], "many": TEXTS}
    found = graftlm.rank_source_tasks(base, rows(), method="size", sources=sources, **COLUMNS)
    assert scores(found) == {"many": 60, "few": 3}
    pool = SourcePool.create(tmp_path / "pool", base_model="org/base", width=WIDTH)
    first, second = maps(2)
    pool.add(type(first)(first.base_model, "known", bias=first.bias, weight=first.weight, details={"num_examples": 9}))
    pool.add(second)
    found = graftlm.rank_source_tasks(base, rows(), method="size", pool=pool, **COLUMNS)
    assert scores(found) == {"known": 9} and [one.name for one in found.skipped] == ["org--task-1"]


def test_what_a_method_cannot_do_is_an_error(base, classifiers, tokenizer):
    with pytest.raises(SetupError, match="defined for classes"):
        graftlm.rank_source_tasks(
            base,
            rows(),
            method="leep",
            models=classifiers,
            tokenizer=tokenizer,
            text_column="text",
            label_column="number",
        )
    with pytest.raises(SetupError, match="needs sources"):
        graftlm.rank_source_tasks(base, rows(), method="textemb", **COLUMNS)
    with pytest.raises(DataError, match="nothing given"):
        graftlm.rank_source_tasks(base, rows(), method="logme", models={}, tokenizer=tokenizer, **COLUMNS)

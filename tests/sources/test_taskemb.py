"""Task embeddings against finite differences; the ranking against its definition."""

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from graftlm.errors import DataError, ModelError, SetupError
from graftlm.sources.taskemb import TaskEmbedding, rank_by_task_embedding, task_embedding

TEXTS, LABELS = ["w1 w2 w3", "w4", "w5 w6 w7 w8"], [0, 2, 1]
STEP = 1e-5


@pytest.fixture(scope="module")
def classifier():
    return tiny_model("bert", num_layers=2, dtype=torch.float64)


def log_probability(model, text, label):
    with torch.no_grad():
        return float(model(**tiny_tokenizer()(text, return_tensors="pt")).logits.log_softmax(-1)[0, label])


def test_weights_are_mean_squared_gradients(classifier):
    for parameter in list(classifier.parameters())[:8]:
        parameter.requires_grad_(False)  # as an adapter leaves them
    found = task_embedding(classifier, TEXTS, LABELS, tokenizer=tiny_tokenizer())
    assert classifier.training and not next(classifier.parameters()).requires_grad
    assert list(found.components) == ["layer.0 outputs", "layer.1 outputs", "layer.0 weights", "layer.1 weights"]
    layer = classifier.bert.encoder.layer[1]
    flat = torch.nn.utils.parameters_to_vector(layer.parameters()).clone()
    assert found.components["layer.1 weights"].shape == flat.shape
    classifier.eval()
    for place in range(0, len(flat), len(flat) // 12):
        squares = []
        for text, label in zip(TEXTS, LABELS, strict=True):
            ends = []
            for sign in (1, -1):
                moved = flat.clone()
                moved[place] += sign * STEP
                torch.nn.utils.vector_to_parameters(moved, layer.parameters())
                ends.append(log_probability(classifier, text, label))
            squares.append(((ends[0] - ends[1]) / (2 * STEP)) ** 2)
        assert found.components["layer.1 weights"][place] == pytest.approx(np.mean(squares), rel=1e-3, abs=1e-9)
    torch.nn.utils.vector_to_parameters(flat, layer.parameters())


def test_outputs_are_averaged_over_tokens(classifier):
    found = task_embedding(classifier, TEXTS[:1], LABELS[:1], tokenizer=tiny_tokenizer()).components["layer.0 outputs"]
    layer, tokens = classifier.bert.encoder.layer[0], len(tiny_tokenizer()(TEXTS[0])["input_ids"])
    classifier.eval()

    def shifted(token, dimension, step):
        def move(module, given, made):
            states = (made[0] if isinstance(made, tuple) else made).clone()
            states[0, token, dimension] += step
            return (states, *made[1:]) if isinstance(made, tuple) else states

        handle = layer.register_forward_hook(move)
        value = log_probability(classifier, TEXTS[0], LABELS[0])
        handle.remove()
        return value

    for dimension in (0, 5):
        slopes = [(shifted(t, dimension, STEP) - shifted(t, dimension, -STEP)) / (2 * STEP) for t in range(tokens)]
        assert found[dimension] == pytest.approx(np.mean(np.square(slopes)), rel=1e-3)


def made(*components):
    return TaskEmbedding("base", 3, {f"layer.{n} outputs": np.array(one) for n, one in enumerate(components)})


def test_orders_are_fused_by_reciprocal_rank(tmp_path):
    target = made([1.0, 0.0], [1.0, 1.0])
    sources = {"a": made([1.0, 0.1], [1.0, 0.0]), "b": made([0.0, 1.0], [1.0, 0.9]), "c": made([1.0, 0.5], [1.0, 0.5])}
    found = rank_by_task_embedding(target, {**sources, "other": made([1.0, 0.0])})
    expected = {"a": 1 / 61 + 1 / 63, "b": 1 / 63 + 1 / 61, "c": 1 / 62 + 1 / 62}
    assert {one.name: one.score for one in found.sources} == pytest.approx(expected)
    assert [one.name for one in found.skipped] == ["other"] and "taskemb" in found.table()
    target.save(tmp_path / "target.safetensors")
    again = TaskEmbedding.load(tmp_path / "target.safetensors")
    assert again.examples == 3 and rank_by_task_embedding(again, sources).sources[0].name == found.sources[0].name


def test_what_makes_no_sense_is_an_error(classifier, tmp_path):
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match="one label for each text"):
        task_embedding(classifier, TEXTS, LABELS[:1], tokenizer=tokenizer)
    with pytest.raises(DataError, match="no output for a label"):
        task_embedding(classifier, TEXTS[:1], [9], tokenizer=tokenizer)
    with pytest.raises(ModelError, match="classifier"):
        task_embedding(tiny_model("bert", "base"), TEXTS, LABELS, tokenizer=tokenizer)
    with pytest.raises(SetupError, match="no source"):
        rank_by_task_embedding(made([1.0]), {})
    with pytest.raises(DataError, match="components of the target"):
        rank_by_task_embedding(made([1.0]), {"a": made([1.0], [2.0])})
    with pytest.raises(DataError, match="no task embedding"):
        TaskEmbedding.load(tmp_path / "missing.safetensors")

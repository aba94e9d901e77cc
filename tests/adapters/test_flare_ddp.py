"""FLARE on two processes, each with its half of a batch, must end where one process ends on the whole of it."""

from pathlib import Path

import pytest
import torch
from adapters.flare_ddp import JOBS, rows, run
from processes import launch
from small import save_model, write_rows

SCRIPT = Path(__file__).with_name("flare_ddp.py")
RECIPE = """\
name: pairs
model: ./model
source: dan
data:
  train: train.jsonl
  test: {dan: train.jsonl}
  text: danish
  id: id
  parallel: {text: english}
adapter: {method: flare, r: 8, source_cache: cache}
training:
  max_steps: 4
  learning_rate: 0.5
  max_length: 32
  arguments: {optim: sgd, max_grad_norm: 0.0, use_cpu: true}
"""


def folder_of(root):
    save_model(root / "model", initializer_range=0.5, dropout=0.0)
    write_rows(root / "train.jsonl", [row | {"label": "abc"[row["label"]]} for row in rows()])
    (root / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(folder_of(tmp_path_factory.mktemp("alone")))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = folder_of(tmp_path_factory.mktemp("pair"))
    found = launch(SCRIPT, folder, 2)
    assert len(list((folder / "cache").iterdir())) == 1, "one process writes the cache, the other one reads it"
    return found


@pytest.mark.parametrize("job", JOBS)
def test_two_processes_equal_one_on_the_joined_batch(alone, pair, job):
    one, (first, second) = alone[job], (results[job] for results in pair)
    moved = [name for name, tensor in one.items() if "lora_B" in name and tensor.abs().max() > 1e-5]
    assert len(moved) == 6, "it was trained"
    for name, wanted in one.items():
        assert torch.equal(first[name], second[name]), f"the ranks drifted apart in {name}"
        assert (first[name] - wanted).abs().max() < (1e-4 if job == "a recipe" else 1e-6), name
    if job.startswith("MT"):
        assert any("lora_fusion_map" in name for name in one)


def test_the_source_counts(alone):
    """Else the equality above would say nothing of it."""
    read = alone["the model reads"]

    def apart(job):
        return max(float((alone[job][name] - tensor).abs().max()) for name, tensor in read.items())

    assert apart("from a cache") < 1e-5 < 1e-3 < apart("MT")

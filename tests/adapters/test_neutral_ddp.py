"""The penalty on two processes, each with its own part of the original-domain rows, against one with all of them."""

from pathlib import Path

import pytest
from adapters.neutral_ddp import JOBS, run
from processes import launch
from raw import chain, raw_folder
from small import write_rows

SCRIPT = Path(__file__).with_name("neutral_ddp.py")
RECIPE = """\
name: mixed
model: ./model
task: causal_lm
source: dan
data:
  train: train.jsonl
  test: {dan: test.dan.jsonl, eng: test.eng.jsonl}
  old: [eng]
mixing: {share: 0.25, data: replay.jsonl}
adapter: {method: neutral_residues, penalty_weight: 3}
training:
  max_steps: 4
  batch_size: 2
  learning_rate: 0.5
  max_length: 24
  stride: 8
  arguments: {optim: sgd, max_grad_norm: 0.0, use_cpu: true, logging_steps: 2}
"""
TRAINED = [name for name in JOBS if name != "gates"]


def folder_of(root):
    raw_folder(root, "causal_lm", "llama", dropout=0.0)
    write_rows(root / "replay.jsonl", [{"text": text} for text in chain(9, 5, first=30)])
    (root / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(folder_of(tmp_path_factory.mktemp("alone")))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return launch(SCRIPT, folder_of(tmp_path_factory.mktemp("pair")), 2)


@pytest.mark.parametrize("job", TRAINED)
def test_two_processes_equal_one_on_the_joined_batch(alone, pair, job):
    one, (first, second) = alone[job], (results[job] for results in pair)
    assert len(one["weights"]) == 12
    for name, wanted in one["weights"].items():
        assert first["weights"][name].equal(second["weights"][name]), f"the ranks drifted apart in {name}"
        assert (first["weights"][name] - wanted).abs().max() < (1e-4 if job == "a recipe" else 1e-6), name
    assert first["log"] == second["log"]
    assert len(one["log"]) == (0 if job == "no penalty" else 2)
    for found, wanted in zip(first["log"], one["log"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)


def test_the_penalty_and_its_way_count(alone):
    """Else the equality above would say nothing of them."""
    read = alone["a batch each"]["weights"]
    for job in ("no penalty", "kept from the layers below"):
        assert max((alone[job]["weights"][name] - tensor).abs().max() for name, tensor in read.items()) > 1e-3


def test_a_gate_that_opens_in_one_process_is_not_named(pair):
    for results in pair:
        (says,) = results["gates"]
        assert "these learn nothing: closed." in says

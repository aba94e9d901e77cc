"""Two processes must end where one process ends on the same batches, and must open the same layers."""

import json
from pathlib import Path

import pytest
import torch
from processes import launch

SCRIPT = Path(__file__).with_name("ddp_run.py")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    (results,) = launch(SCRIPT, tmp_path_factory.mktemp("alone"), 1)
    return results


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def pair(pair_folder):
    return launch(SCRIPT, pair_folder, 2)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return launch(SCRIPT, tmp_path_factory.mktemp("sharded"), 2, "fsdp2")


@pytest.mark.parametrize("kind", ["pair", "sharded"])
@pytest.mark.parametrize("job", ["gradual", "fisher", "fisher-full", "fisher-accumulation"])
def test_two_processes_equal_one(alone, kind, job, request):
    """DDP and FSDP2."""
    (first, second), one = (results[job] for results in request.getfixturevalue(kind)), alone[job]
    for name, wanted in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), f"the ranks drifted apart in {name}"
        assert (first["weights"][name] - wanted).abs().max() < 1e-6, name
    assert first["history"] == second["history"]
    measured = ("trace", "standard_error")
    for found, wanted in zip(first["history"], one["history"], strict=True):
        assert {k: v for k, v in found.items() if k not in measured} == {
            k: v for k, v in wanted.items() if k not in measured
        }
        for key in measured:
            assert found[key] == (wanted[key] if wanted[key] is None else pytest.approx(wanted[key], rel=1e-6))
    assert sum(row["opened"] for row in one["history"]) == (4 if job == "fisher-full" else 3)
    assert any(row["trace"] for row in one["history"]) == (job != "gradual")


def test_one_process_writes_the_log(pair, pair_folder):
    lines = (pair_folder / "gradual.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == pair[0]["gradual"]["history"]


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ("no-unused", "ddp_find_unused_parameters=True"),
        ("checkpointing", "ddp_find_unused_parameters=True"),
        ("static-graph", "ddp_static_graph=False"),
    ],
)
def test_set_ups_that_cannot_work_stop_before_the_first_step(pair, job, says):
    for results in pair:
        assert isinstance(results[job], str), "the run went through"
        assert says in results[job]

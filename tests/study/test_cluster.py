"""A study on a local Ray of two nodes, a worker killed in the middle: nothing lost, nothing done twice."""

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from small import small_folder
from study.test_execute import holders, study_in

from graftlm.errors import MissingExtra
from graftlm.study.claims import Claims
from graftlm.study.cluster import execute_on_ray
from graftlm.study.compare import compare
from graftlm.study.plan import Study


def kill_the_first_worker_in_the_middle(study: Study, killed: list[int]) -> None:
    """Waits until a run has written a checkpoint, then kills the process that does it."""
    claims = Claims(study.folder / "claims")
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        for run in study.scored():
            name = study.run_name(run)
            if any((study.folder / "runs" / name / "checkpoints").glob("checkpoint-*/trainer_state.json")):
                pid = claims.holders(name)[-1].pid
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return
        time.sleep(0.005)


def test_a_worker_killed_in_the_middle_loses_nothing_and_nothing_is_done_twice(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs the extra [cluster]: pip install 'graftlm[cluster]'")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)]))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    folder = small_folder(tmp_path / "recipe", train=16)
    # a checkpoint every second step, so that there is something to go on from
    study = study_in(folder, tmp_path, seeds=3)
    study = replace(study, recipe=study.recipe.changed("training.max_steps=60", "training.eval_steps=2"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    killed: list[int] = []
    killer = threading.Thread(target=kill_the_first_worker_in_the_middle, args=(study, killed))
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        killer.start()
        made = compare(study, ray=cluster.address)
        killer.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert len(killed) == 1, "the worker was killed in the middle of a run"
    assert made.runs_finished == made.runs_planned == 6 and not made.failures
    counts = holders(study)
    assert sorted(counts.values()) == [1] * 5 + [2], "only the killed run was begun again"
    claims = Claims(study.folder / "claims")
    (again,) = [name for name, count in counts.items() if count == 2]
    assert claims.holders(again)[0].pid == killed[0]
    pids = [holder.pid for name in counts for holder in claims.holders(name)]
    assert len(set(pids)) == 7, "each run has a process of its own"
    assert {row for variant in made.variants for row in variant.seeds} == {0, 1, 2}


def test_without_ray_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    study = study_in(small_folder(tmp_path / "recipe", train=16), tmp_path)
    with pytest.raises(MissingExtra, match=r"pip install 'graftlm\[cluster\]'"):
        execute_on_ray(study, "local")

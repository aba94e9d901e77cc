"""A study's runs on a Ray cluster: each worker claims its run in the study's folder, which all machines share.

Ray says which machine is free and starts a task again whose worker died; who does a run, and that nobody does it twice,
is settled by the claims, as without Ray.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

from graftlm.errors import MissingExtra
from graftlm.recipe import Recipe
from graftlm.study.claims import LEASE, Claims
from graftlm.study.execute import Progress, error_age_of, is_over, needed, tuned_or_none
from graftlm.study.plan import Run, Study
from graftlm.study.runner import CLAIMS, TAKEN, do, note_error

log = logging.getLogger("graftlm")
_RETRIES = 3  # of a task whose worker died
_LOOK = 1.0  # seconds between two looks for runs whose choice has been made


def _task(recipe: Recipe, study: Path) -> int:
    """One run in a worker. A claim left by a worker that died on another machine is waited for until it is stale."""
    end = time.monotonic() + 2 * LEASE
    while True:
        code = do(recipe, study)
        if code != TAKEN or time.monotonic() > end:
            return code
        time.sleep(1)


def execute_on_ray(study: Study, address: str) -> None:
    """Does what is not done yet, as many runs at a time as the cluster has room for: one GPU a run, or one CPU.

    Args:
        study: its folder, the recipe's files and the model must be seen under the same paths by all machines.
        address: of the cluster; `auto`: the one that this machine belongs to; `local`: one that is started here.

    Raises:
        MissingExtra: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtra("a cluster needs Ray", fix="pip install 'graftlm[cluster]'") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(address=None if address == "local" else address, log_to_driver=False, include_dashboard=False)
    try:
        _execute(study, ray)
    finally:
        if ours:
            ray.shutdown()


def _execute(study: Study, ray: Any) -> None:
    queue = needed(study)
    total, old = len(queue), {run: error_age_of(study, run) for run in queue}
    queue = [run for run in queue if not is_over(study, run, old)]
    progress = Progress(study, total, len(queue))
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    # a fresh process for each run: its peak memory is its own
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=_RETRIES, max_calls=1)(_task)
    root = study.folder.absolute()
    Claims(root / CLAIMS).folder.mkdir(parents=True, exist_ok=True)
    under_way: dict[Any, tuple[Run, float]] = {}
    while queue or under_way:
        for run in list(queue):
            chosen = tuned_or_none(study, run)
            if chosen is not None:
                under_way[task.remote(_absolute(study.recipe_of(chosen)), root)] = chosen, time.monotonic()
                queue.remove(run)
        if not under_way:
            log.info("%d runs are left out: every trial that they wait for failed", len(queue))
            return
        ready, _ = ray.wait(list(under_way), timeout=_LOOK)
        for reference in ready:
            run, began = under_way.pop(reference)
            try:
                code = ray.get(reference)
            except (ray.exceptions.RayError, OSError) as error:
                code = -1
                note_error(study.folder, study.run_name(run), f"the worker died {_RETRIES + 1} times: {error}")
            log.info(progress.line(study, run, time.monotonic() - began, code, len(queue) + len(under_way)))


def _absolute(recipe: Recipe) -> Recipe:
    """The recipe with paths that do not start from the driver's working folder."""
    moved = recipe.relocated(recipe.base.absolute())
    return moved.changed(f"output.folder={json.dumps(str(Path(recipe.output.folder).absolute()))}")

"""Does the runs of a study, in an order in which a study that is stopped is worth most: seed by seed."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from graftlm.errors import DataError, RecipeError
from graftlm.evaluation.folder import read_lines
from graftlm.evaluation.metrics import METRICS
from graftlm.evaluation.result import Result
from graftlm.recipe import Recipe
from graftlm.study.claims import Claims
from graftlm.study.plan import Run, Study
from graftlm.study.runner import CLAIMS, DONE, TAKEN, do_in_process, error_age, error_of, finished

log = logging.getLogger("graftlm")
_PAUSE = 2.0  # seconds between two looks at what others do


@dataclass(frozen=True)
class Shard:
    """The i-th of n parts of a study's runs, from 1; for array jobs."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Reads `i/n`.

        >>> Shard.parse("2/8")
        Shard(index=2, count=8)
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise RecipeError("a shard is written i/n, from 1/n to n/n", found=text, fix="--shard 1/8")
        return cls(int(index), int(count))


WHOLE = Shard()


class Progress:
    """What has become of the runs, for the lines that are printed; those that other processes do count too."""

    def __init__(self, study: Study, total: int, left: int):
        self.total, self.left = total, left
        self.began = time.monotonic()
        log.info("%s: %d runs, %d of them finished", study.folder, total, total - left)

    def line(self, study: Study, run: Run, seconds: float, outcome: int, left: int) -> str:
        """One run in a line: how many are over, name, score, seconds, and how long those that are left may take."""
        place = f"[{self.total - left:>{len(str(self.total))}}/{self.total}] {study.title(run)}"
        recipe = study.recipe_of(run)
        if outcome != DONE:
            reason = (error_of(study.folder, recipe.name) or "unknown").splitlines()
            return f"{place}: failed: {reason[0]}"
        time_left = left * (time.monotonic() - self.began) / max(self.left - left, 1)
        rest = f", about {_duration(time_left)} left" if left else ""
        return f"{place}: {shown_score(Result.read(recipe.folder))} ({_duration(seconds)}{rest})"


def shown_score(result: Result) -> str:
    """The main metric in a few words."""
    known = [value for one in result.scores if (value := result.primary(one).value) is not None]
    mean = f"{sum(known) / len(known):.3f}" if known else "undefined"
    return f"{result.metric} {mean}" + (f", mean of {len(known)} languages" if len(known) > 1 else "")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def dev_score(recipe: Recipe) -> float:
    """The best score that a finished run had on its dev split; higher is better, whatever the metric."""
    metric = Result.read(recipe.folder).metric
    sign = 1 if METRICS[metric].higher_is_better else -1
    found = [row[f"eval_{metric}"] for row in read_lines(recipe.folder / "log.jsonl") if f"eval_{metric}" in row]
    if not found:
        raise DataError("the run was never scored on dev", found=recipe.folder)
    return max(sign * value for value in found)


def trials_of(study: Study, run: Run) -> list[Run]:
    """The runs whose dev scores decide what this one does; none where nothing is tuned."""
    first = study.seeds[0]
    return [Run(run.variant, first, run.fold, choice) for choice in range(len(study.tune))]


def tuned(study: Study, run: Run) -> Run | None:
    """The run with its choice made, or None while its trials are not all done.

    The choice is the one with the best dev score; of equal ones, the first named. Trials that failed are out.

    Raises:
        DataError: every trial failed.
    """
    if not study.tune or run.choice is not None:
        return run
    scores: dict[int, float] = {}
    for choice, trial in enumerate(trials_of(study, run)):
        recipe = study.recipe_of(trial)
        if finished(recipe):
            scores[choice] = dev_score(recipe)
        elif error_of(study.folder, recipe.name) is None:
            return None
    if not scores:
        raise DataError("every trial failed, so there is nothing to choose from", found=study.title(run))
    return replace(run, choice=max(scores, key=lambda choice: (scores[choice], -choice)))


def tuned_or_none(study: Study, run: Run) -> Run | None:
    """`tuned`, and None also where every trial failed."""
    try:
        return tuned(study, run)
    except DataError:
        return None


def needed(study: Study, shard: Shard = WHOLE) -> list[Run]:
    """The runs of a shard: its part of the trials, then its part of the others (the first seed's are trials)."""
    runs = study.trials() + [run for run in study.scored() if not (study.tune and run.seed == study.seeds[0])]
    return runs[shard.index - 1 :: shard.count]


def execute(study: Study, shard: Shard = WHOLE, *, after: Callable[[Run], None] | None = None) -> None:
    """Does what is not done yet, one run after the other; processes that share the folder divide the work.

    Args:
        study: what `plan_study` or `load_study` made.
        shard: the part of the runs that this process is for.
        after: called with each run that was finished here.

    A run that failed earlier is tried again, once; one that fails is kept with its error and the others go on. What is
    under way in another process is left to it, and waited for only where a choice hangs on it.
    """
    queue, claims = needed(study, shard), Claims(study.folder / CLAIMS)
    total, old_errors = len(queue), {run: error_age_of(study, run) for run in queue}
    queue = [run for run in queue if not is_over(study, run, old_errors)]
    progress = Progress(study, total, len(queue))
    while queue:
        acted = False
        for run in list(queue):
            try:
                chosen = tuned(study, run)
            except DataError as error:
                log.info("%s: left out: %s", study.title(run), error.problem)
                queue.remove(run)
                continue
            if chosen is None:
                continue
            if not is_over(study, run, old_errors):
                if claims.held(study.run_name(chosen)):
                    continue
                began = time.monotonic()
                code = do_in_process(study.recipe_of(chosen), study.folder)
                if code == TAKEN:
                    continue
                left = sum(not is_over(study, other, old_errors) for other in queue)
                log.info(progress.line(study, chosen, time.monotonic() - began, code, left))
                if after and code == DONE:
                    after(chosen)
            queue.remove(run)
            acted = True
        if not acted:
            open_trials = _open_trials(study, queue)
            if not open_trials:
                break  # all that is left is under way elsewhere
            orphan = next(
                (one for one in open_trials if one not in queue and not claims.held(study.run_name(one))), None
            )
            if orphan:  # of another shard that nobody has begun
                queue.insert(0, orphan)
                old_errors[orphan] = error_age_of(study, orphan)
            else:
                time.sleep(_PAUSE)


def error_age_of(study: Study, run: Run) -> int | None:
    """When the run failed last, by the clock of the file system; None where it did not."""
    return error_age(study.folder, study.run_name(run))


def is_over(study: Study, run: Run, old_errors: dict[Run, int | None]) -> bool:
    """Whether the run is finished, or has failed since this process began."""
    chosen = tuned_or_none(study, run)
    if chosen is None:
        return False
    recipe = study.recipe_of(chosen)
    age = error_age(study.folder, recipe.name)
    return finished(recipe) or (age is not None and age != old_errors.get(run))


def _open_trials(study: Study, queue: list[Run]) -> list[Run]:
    """Trials that runs in the queue wait for."""
    waiting = [run for run in queue if tuned_or_none(study, run) is None]
    return [
        trial
        for run in waiting
        for trial in trials_of(study, run)
        if not finished(study.recipe_of(trial)) and error_of(study.folder, study.run_name(trial)) is None
    ]

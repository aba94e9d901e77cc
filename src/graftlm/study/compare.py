"""`graftlm compare`: does a study's runs and writes what came out, for people and for programs."""

import logging
from pathlib import Path

from graftlm.errors import DataError
from graftlm.evaluation.compare_runs import VariantRuns, compare_runs
from graftlm.evaluation.comparison import Comparison, Tuned
from graftlm.evaluation.comparison_report import write_comparison_report
from graftlm.evaluation.comparison_table import markdown
from graftlm.evaluation.record import write_text
from graftlm.study.execute import WHOLE, Shard, dev_score, execute, needed, tuned_or_none
from graftlm.study.plan import Run, Study
from graftlm.study.runner import error_of, finished

TABLES = "study.md"
log = logging.getLogger("graftlm")


def compare(study: Study, shard: Shard = WHOLE, *, ray: str | None = None) -> Comparison | None:
    """Does the runs of a study that are not finished yet, then scores the variants against the first one.

    Each run is a process of its own, begun from a clean one (in a script, call this under
    ``if __name__ == "__main__":``, as for everything that begins processes). Several processes, also on several
    machines that share the folder, divide the runs among them; a run that fails is kept with its error and the others
    go on.

    Args:
        study: what `graftlm.plan_study` or `load_study` made.
        shard: the part of the runs that this process is for.
        ray: address of a Ray cluster whose workers do the runs (`auto`: the one this machine belongs to, `local`: one
            that is started here); None: they are done here, one after the other.

    Returns:
        What `study.json` holds; `study.md` and `study.html` lie beside it. None where no seed has all its runs yet,
        since other processes or shards are at them.

    Raises:
        DataError: no seed has all its runs, and some failed; with their errors.
        MissingExtra: `ray` is given and Ray is not installed.

    Example::

        study = plan_study(load_recipe("topics.yaml"), vary={"unfreezing.schedule": ["standard", "gradual"]}, seeds=5)
        print(markdown(compare(study)))
    """
    if ray is None:
        execute(study, shard)
    else:
        from graftlm.study.cluster import execute_on_ray

        execute_on_ray(study, ray)
    return summarise(study)


def summarise(study: Study) -> Comparison | None:
    """Scores what is finished and writes `study.json`, `study.md` and `study.html`; None: nothing to score yet."""
    runs = {run: chosen for run in needed(study) if (chosen := tuned_or_none(study, run)) is not None}
    done = {run for run, chosen in runs.items() if finished(study.recipe_of(chosen))}
    failures = {
        study.run_name(run): error
        for run in needed(study)
        if run not in done and (error := error_of(study.folder, study.run_name(run))) is not None
    }
    variants = [_variant_runs(study, number) for number in range(len(study.variants))]
    if not any(variant.folders for variant in variants):
        if not failures:
            log.info("no seed has all its runs yet: the tables come when the other processes are done")
            return None
        shown = "; ".join(f"{run}: {error.splitlines()[0]}" for run, error in list(failures.items())[:3])
        raise DataError("no seed has all its runs, so there is nothing to compare", found=shown, fix="see failed/")
    made = compare_runs(
        study.name,
        variants,
        root=study.folder,
        planned=len(needed(study)),
        finished=len(done),
        failures=failures,
    )
    made.write(study.folder)
    write_text(study.folder / TABLES, markdown(made))
    write_comparison_report(study.folder)
    return made


def _variant_runs(study: Study, number: int) -> VariantRuns:
    folders: dict[int, list[Path]] = {}
    chosen: dict[int | None, Run] = {}
    for run in study.scored():
        if run.variant != number:
            continue
        found = tuned_or_none(study, run)
        if found is not None and finished(recipe := study.recipe_of(found)):
            folders.setdefault(run.seed, []).append(recipe.folder)
            chosen[run.fold] = found
    whole = max(1, len(study.folds))
    trials = {fold: Run(number, study.seeds[0], fold, run.choice) for fold, run in chosen.items()} if study.tune else {}
    return VariantRuns(
        name=study.variants[number].name,
        values=study.variants[number].values,
        folders={seed: found for seed, found in folders.items() if len(found) == whole},
        tuned=tuple(
            Tuned(
                fold=None if fold is None else fold + 1,
                values=study.tune[trial.choice],
                dev=dev_score(study.recipe_of(trial)),
            )
            for fold, trial in trials.items()
            if trial.choice is not None
        ),
    )

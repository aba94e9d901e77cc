"""Studies of tiny real runs: nothing twice, nothing lost, what fails is kept and the rest goes on."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from processes import Started
from small import small_folder, small_recipe

from graftlm.errors import DataError, RecipeError
from graftlm.evaluation.comparison import Comparison
from graftlm.evaluation.folder import read_lines
from graftlm.evaluation.result import Result
from graftlm.study import execute as module
from graftlm.study.claims import Claims, Holder
from graftlm.study.compare import compare, summarise
from graftlm.study.execute import Shard, dev_score, execute, needed, tuned
from graftlm.study.plan import Run, plan_study
from graftlm.study.runner import error_of, finished

SCHEDULES = {"unfreezing.schedule": ["standard", "gradual"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("execute"), train=16)


def study_in(folder, root, **changes):
    recipe = small_recipe(folder, "training.max_steps=6", "training.arguments={use_cpu: true}")
    return plan_study(recipe, **({"vary": SCHEDULES, "seeds": 2, "folder": root, "name": "s"} | changes))


def holders(study):
    claims = Claims(study.folder / "claims")
    return {study.run_name(run): len(claims.holders(study.run_name(run))) for run in needed(study)}


def test_a_study_from_end_to_end_and_again(folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="graftlm")
    study = study_in(folder, tmp_path)
    made = compare(study)
    assert made.runs_finished == made.runs_planned == 4 and not made.failures
    assert made == Comparison.read(study.folder) and (study.folder / "study.html").is_file()
    assert "| gradual, German |" in (study.folder / "study.md").read_text()
    assert set(holders(study).values()) == {1}
    lines = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith("[") for line in lines) == 4 and lines[-1].startswith("[4/4] gradual · seed 1: accuracy")
    memory = [Result.read(study.recipe_of(run).folder).cost.peak_memory_bytes for run in study.scored()]
    assert max(memory) < 1.3 * min(memory), "each run has a process of its own"

    before = {path: path.stat().st_mtime_ns for path in study.folder.rglob("result.json")}
    again = compare(study)
    assert {path: path.stat().st_mtime_ns for path in study.folder.rglob("result.json")} == before
    assert again.differences == made.differences
    more = compare(replace(study, seeds=(0, 1, 2)))
    assert more.runs_finished == 6 and more.variants[0].seeds == (0, 1, 2)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_same_seed_is_the_same_run_as_train_makes(folder, tmp_path):
    from graftlm.run import run_recipe

    study = study_in(folder, tmp_path)
    run = study.scored()[-1]
    execute(replace(study, seeds=(1,)))
    alone = run_recipe(
        study.recipe_of(run).changed(f"output.folder={json.dumps(str(tmp_path / 'alone'))}"), progress=False
    )
    assert alone.scores == Result.read(study.recipe_of(run).folder).scores


def test_a_run_that_fails_is_kept_and_the_others_go_on(folder, tmp_path):
    variants = {"whole": {}, "broken": {"adapter.target_modules": ["nothing"]}}
    study = study_in(folder, tmp_path, vary=None, variants=variants, seeds=1)
    made = compare(study)
    assert [failure.run for failure in made.failures] == ["broken.seed0"]
    assert "no module of this name" in made.failures[0].error and "nothing" in made.failures[0].error
    assert made.runs_finished == 1 and made.variants[1].scores == () and made.variants[1].cost is None
    assert "broken.seed0" in (study.folder / "study.html").read_text()
    assert any("Failed: broken.seed0" in line for line in (study.folder / "study.md").read_text().splitlines())
    assert "Traceback" in json.loads((study.folder / "failed" / "broken.seed0.json").read_text())["details"]
    # put right, it is tried again, and its error is gone
    mended = study_in(folder, tmp_path, vary=None, variants=variants | {"broken": {"adapter.r": 2}}, seeds=1)
    assert compare(mended).failures == () and error_of(study.folder, "broken.seed0") is None
    assert holders(study) == {"whole.seed0": 1, "broken.seed0": 2}


def test_where_every_run_fails_the_error_says_why(folder, tmp_path):
    variants = {name: {"adapter.target_modules": [name]} for name in ("nothing", "nowhere")}
    study = study_in(folder, tmp_path, vary=None, variants=variants, seeds=1)
    with pytest.raises(DataError, match=r"nothing to compare(.|\n)*no module of this name"):
        compare(study)


def test_another_recipe_in_the_folder_is_not_taken_for_this_one(folder, tmp_path):
    study = study_in(folder, tmp_path, seeds=1)
    execute(study)
    other = replace(study, recipe=study.recipe.changed("adapter.r=2"))
    assert not finished(other.recipe_of(other.scored()[0]))
    execute(other)
    assert "another recipe" in error_of(study.folder, "standard.seed0")


def command(folder, root):
    code = (
        "import sys; sys.path[:0] = sys.argv[3:]\n"
        "from pathlib import Path\n"
        "from study.test_execute import study_in\n"
        "from graftlm.study.execute import execute\n"
        "if __name__ == '__main__':\n"
        "    execute(study_in(Path(sys.argv[1]), Path(sys.argv[2]), seeds=3))\n"
    )
    return Started("-c", code, str(folder), str(root), str(Path(__file__).parents[1]), folder=root)


def test_two_processes_divide_the_runs_and_a_killed_one_loses_nothing(folder, tmp_path):
    study = study_in(folder, tmp_path, seeds=3)
    first, second = command(folder, tmp_path), command(folder, tmp_path)
    claims = study.folder / "claims"
    deadline = time.monotonic() + 400
    while len(list(claims.glob("*.1"))) < 2:  # both are in the middle of a run
        assert time.monotonic() < deadline and first.process.is_alive() and second.process.is_alive()
        time.sleep(0.05)
    first.process.kill()
    first.finish()
    second.finish()
    execute(study)  # whoever comes later does what the killed one had begun
    made = summarise(study)
    assert made.runs_finished == 6 and not made.failures
    counts = holders(study)
    assert sorted(counts.values())[:-1] == [1] * 5, "nothing is done twice but what was killed"
    assert max(counts.values()) <= 2
    pids = {holder.pid for name in counts for holder in Claims(claims).holders(name)}
    assert len(pids) == sum(counts.values()) and Holder.here().pid not in pids


def test_shards_are_a_partition(folder, tmp_path):
    study = study_in(folder, tmp_path, seeds=5, tune={"adapter.r": [2, 4]})
    parts = [needed(study, Shard(index, 3)) for index in (1, 2, 3)]
    together = [run for part in parts for run in part]
    assert sorted(together, key=str) == sorted(needed(study), key=str) and min(map(len, parts)) >= 3
    for text in ("0/3", "4/3", "1", "a/b", "1/0"):
        with pytest.raises(RecipeError, match="i/n"):
            Shard.parse(text)


def test_a_shard_that_is_done_before_any_seed_is_whole_is_no_error(folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="graftlm")
    folds = [{"data.train": "train.jsonl"}, {"data.train": "dev.jsonl"}]
    study = study_in(folder, tmp_path, folds=folds, seeds=1)
    assert compare(study, Shard(1, 4)) is None
    assert "the tables come when the other processes are done" in caplog.text
    assert not (study.folder / "study.json").exists()


def test_tuning_takes_the_best_on_dev_and_a_shard_does_the_trials_that_it_needs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    study = study_in(folder, tmp_path, tune={"training.learning_rate": [1e-6, 3e-2]}, seeds=2)
    last = next(index for index in range(1, 7) if needed(study, Shard(index, 6)) == [Run(1, 1)])
    part = compare(study, Shard(last, 6))
    assert [variant.seeds for variant in part.variants] == [(), (0, 1)] and part.differences == ()
    assert finished(study.recipe_of(tuned(study, Run(1, 1))))
    assert not any(finished(study.recipe_of(trial)) for trial in study.trials() if trial.variant == 0)
    made = compare(study)
    for number, variant in enumerate(made.variants):
        scores = [dev_score(study.recipe_of(trial)) for trial in study.trials() if trial.variant == number]
        best = scores.index(max(scores))
        assert variant.tuned[0].values == study.tune[best] and variant.tuned[0].dev == max(scores)
        assert variant.runs[0].endswith(f"seed0.try{best + 1}")
        rates = [read_lines(study.folder / run / "log.jsonl")[0]["learning_rate"] for run in variant.runs]
        assert rates[0] == pytest.approx(rates[1])
    assert made.runs_planned == 6 and made.selected_on == ("eng",)


def test_the_count_has_the_runs_of_other_processes_in_it(folder, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", logger="graftlm")
    study = study_in(folder, tmp_path, seeds=3)
    do, done_here = module.do_in_process, []

    def do_more(recipe, where):
        if not done_here:  # while the first is under way, another process does the last two
            for run in needed(study)[-2:]:
                do(study.recipe_of(run), where)
        done_here.append(recipe.name)
        return do(recipe, where)

    monkeypatch.setattr(module, "do_in_process", do_more)
    execute(study)
    assert [line[1:4] for line in caplog.messages if line[0] == "["] == ["3/6", "4/6", "5/6", "6/6"]

"""From a recipe and what varies to the recipes of all runs."""

import pytest
from small import small_folder, small_recipe

from graftlm.errors import RecipeError
from graftlm.recipe import differences
from graftlm.study.plan import Run, is_study, load_study, parse_variant, parse_vary, plan_study

SCHEDULES = {"unfreezing.schedule": ["standard", "gradual"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("plan"))


def test_each_run_is_the_recipe_with_what_varies(folder):
    recipe = small_recipe(folder, "references=[standard, majority]", "output.push_to_hub=me/topics")
    study = plan_study(recipe, vary=SCHEDULES | {"training.learning_rate": [0.1, 0.2]}, seeds=2)
    assert [variant.name for variant in study.variants] == [
        "schedule standard, learning_rate 0.1",
        "schedule standard, learning_rate 0.2",
        "schedule gradual, learning_rate 0.1",
        "schedule gradual, learning_rate 0.2",
    ]
    runs = study.scored()
    assert len(runs) == 8 and [run.seed for run in runs] == [0] * 4 + [1] * 4, "seed by seed"
    one = study.recipe_of(runs[-1])
    assert (one.unfreezing.schedule, one.training.learning_rate, one.seed) == ("gradual", 0.2, 1)
    assert one.folder.parent == study.folder / "runs" and one.output.push_to_hub is None
    changed = set(differences(recipe, one))
    assert {"seed", "name", "training.learning_rate"} <= changed
    assert all(
        key.startswith(("seed", "name", "training.learning", "unfreezing", "references.standard")) for key in changed
    )
    assert one.references.majority
    assert len({study.run_name(run) for run in runs}) == 8


def test_tuning_tries_each_combination_with_the_first_seed(folder):
    study = plan_study(
        small_recipe(folder), vary=SCHEDULES, tune={"training.learning_rate": [0.1, 0.2], "adapter.r": [2, 4]}
    )
    assert len(study.tune) == 4 and len(study.trials()) == 8
    last = study.recipe_of(study.trials()[-1])
    assert (last.training.learning_rate, last.adapter.r, last.seed) == (0.2, 4, 0)
    assert study.run_name(study.trials()[-1]) == "gradual.seed0.try4"
    # the run of another seed has its own folder, whatever was chosen
    assert study.run_name(Run(1, 2, choice=3)) == "gradual.seed2"
    assert study.recipe_of(Run(1, 2, choice=3)).adapter.r == 4


def test_folds_change_the_data(folder):
    study = plan_study(
        small_recipe(folder), vary=SCHEDULES, folds=[{"data.train": "train.jsonl"}, {"data.train": "dev.jsonl"}]
    )
    assert len(study.scored()) == 2 * 2 * 3
    second = Run(0, 0, fold=1)
    assert study.recipe_of(second).data.train.path == "dev.jsonl" and study.run_name(second) == "standard.fold2.seed0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vary": {"unfreezing.schedule": ["standard"]}}, "nothing to compare"),
        ({"vary": {"unfreezing.schedule": ["standard", "standard"]}}, "named twice"),
        ({"vary": {"unfreezing.schedle": ["standard", "gradual"]}}, "did you mean 'schedule'"),
        ({"vary": {"unfreezing.schedule": ["standard", "gradul"]}}, "schedule"),
        ({"vary": {"seed": [1, 2]}}, "a study sets seed itself"),
        ({"vary": {"output.folder": ["a", "b"]}}, "a study sets output itself"),
        ({"vary": None}, "something that varies"),
        ({"variants": {"a": {}, "b": {"adapter.r": 2}}}, "something that varies"),
        ({"vary": None, "variants": {"a b": {}, "a-b": {"adapter.r": 2}}}, "one name"),
        ({"tune": {"unfreezing.schedule": ["standard", "gradual"]}}, "both tuned and set"),
        ({"tune": {"adapter.r": [2, 4]}, "folds": [{"data.dev": None}]}, "chooses on the dev split"),
        ({"seeds": [1, 1]}, "seed is named twice"),
        ({"name": "../up"}, "folder name"),
    ],
)
def test_what_makes_no_study(folder, changes, message):
    with pytest.raises(RecipeError, match=message):
        plan_study(small_recipe(folder), **({"vary": SCHEDULES} | changes))


def test_a_study_in_a_file(folder):
    (folder / "study.yaml").write_text(
        "name: rates\nrecipe: recipe.yaml\nseeds: [3, 5]\n"
        "variants:\n  slow: {unfreezing.schedule: standard, training.learning_rate: 1e-3}\n"
        "  quick: {unfreezing.schedule: gradual, training.learning_rate: 1e-2}\n"
    )
    assert is_study(folder / "study.yaml") and not is_study(folder / "recipe.yaml")
    study = load_study(folder / "study.yaml", ["training.epochs=2"])
    assert [study.run_name(run) for run in study.scored()] == ["slow.seed3", "quick.seed3", "slow.seed5", "quick.seed5"]
    recipe = study.recipe_of(study.scored()[0])
    assert recipe.training.learning_rate == 0.001 and recipe.training.epochs == 2
    assert recipe.path(recipe.data.train.path).is_file()


def test_a_mistake_in_a_study_names_its_line(folder):
    path = folder / "wrong.yaml"
    path.write_text("name: rates\nrecipe: recipe.yaml\nvari: {adapter.r: [2, 4]}\n")
    with pytest.raises(RecipeError, match="wrong.yaml:3: unknown key 'vari'; did you mean 'vary'"):
        load_study(path)
    path.write_text("name: rates\nrecipe: recipe.yaml\n")
    with pytest.raises(RecipeError, match="either vary: or variants:"):
        load_study(path)


def test_what_is_typed():
    assert parse_vary("training.learning_rate=1e-3,2e-3") == ("training.learning_rate", [0.001, 0.002])
    assert parse_variant("adapter.r=4 seed=1") == ("r 4, seed 1", {"adapter.r": 4, "seed": 1})
    for text in ("adapter.r", "=1,2", "adapter.r="):
        with pytest.raises(RecipeError, match="KEY=a,b,c"):
            parse_vary(text)
    with pytest.raises(RecipeError, match="KEY=value"):
        parse_variant("name: adapter.r")

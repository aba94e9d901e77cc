"""The study of neutral residues: its curves against a grid search, and recipes that can be read."""

import importlib.util
import itertools
import math
import random
from pathlib import Path

import pytest

from graftlm.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "benchmarks/neutral_residues"
if not FOLDER.is_dir():  # an installed package without the repository
    pytest.skip("the benchmarks are not in this installation", allow_module_level=True)


@pytest.fixture(scope="module")
def curves():
    spec = importlib.util.spec_from_file_location("curves", FOLDER / "curves.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_front_is_what_no_other_setting_beats(curves):
    rng = random.Random(0)
    for _ in range(50):
        points = [(rng.randrange(8), rng.randrange(8)) for _ in range(9)]
        beaten = {
            one
            for one, other in itertools.permutations(set(points), 2)
            if other[0] >= one[0] and other[1] <= one[1] and other != one
        }
        assert curves.front(points) == sorted(set(points) - beaten)


def test_forgetting_is_read_between_the_settings_of_the_front(curves):
    points = [(1.0, 0.1), (3.0, 0.5), (2.0, 0.9)]
    assert curves.forgetting_at(points, 2.0) == pytest.approx(0.3)
    assert curves.forgetting_at(points, 0.5) == pytest.approx(0.1)
    assert math.isnan(curves.forgetting_at(points, 3.1)), "nothing learned as much"


def made_up(method, slope, stage, seeds):
    return [
        {"language": "dan", "method": method, "stage": stage, "seed": seed, "setting": f"lr {learned}"}
        | {"learned": learned + noise, "forgot": slope * (learned + noise), "forgot_wiki": 0.0, "kl": slope}
        for seed in seeds
        for learned, noise in ((1.0, 0.01 * seed), (2.0, 0.0), (3.0, 0.01 * seed))
    ]


def test_the_table_compares_at_equal_learning(curves):
    slopes = {"neutral": 0.1, "vanilla": 0.5, "lora": 0.8, "full": 1.0}
    rows = [row for method, slope in slopes.items() for row in made_up(method, slope, "sweep", [0])]
    assert curves.equal_learning(rows, "dan") == 3.0
    assert curves.chosen(rows, "dan", "lora") == {"lr 2.0", "lr 3.0"}
    for method, slope in slopes.items():
        keep = curves.chosen(rows, "dan", method)
        rows += [row for row in made_up(method, slope, "seeds", [1, 2, 3]) if row["setting"] in keep]
    page = curves.table(rows)
    assert "dan: at 3.000 bits per byte learned" in page
    assert "| vanilla | +1.5000 |" in page and "| neutral | +0.3000 |" in page
    assert "vanilla − neutral: +1.2000 bits per byte (+1.2000 to +1.2000), 3 seeds; ratio 0.20 (on the line" in page
    assert "lora − neutral: +0.7000 nats of KL a token (+0.7000 to +0.7000), 3 seeds; ratio 0.12" in page


def test_seeds_where_a_method_learns_more_than_the_others_in_all_its_settings(curves):
    rows = [row for method in curves.METHODS for row in made_up(method, 0.5, "sweep", [0])]
    rows = [row | {"learned": row["learned"] + 5 * (row["method"] == "lora")} for row in rows]
    assert curves.chosen(rows, "dan", "lora") == {"lr 1.0", "lr 2.0"}, "the two nearest"
    assert curves.chosen([row for row in rows if row["setting"] == "lr 2.0"], "dan", "lora") == {"lr 2.0"}


def test_below_the_equal_learning_the_seeds_have_settings_of_their_own(curves):
    slopes = {"neutral": 0.1, "vanilla": 0.5, "lora": 0.8, "full": 1.0}
    rows = [row for method, slope in slopes.items() for row in made_up(method, slope, "sweep", [0])]
    rows += [row for method, slope in slopes.items() for row in made_up(method, slope, "seeds", [1, 2])]
    assert curves.chosen(rows, "dan", "vanilla", level=0.5) == {"lr 1.0", "lr 2.0"}
    for seed, forgot in curves.seeds(rows, "dan", "vanilla", 0.5, "forgot").items():
        assert forgot == pytest.approx(0.5 * 1.5), seed
    assert "dan: at 2.700 bits per byte learned (90% of it)" in curves.table(rows)


def test_exploratory_runs_stand_below_the_run_that_they_change(curves):
    rows = [row for method in curves.METHODS for row in made_up(method, 0.5, "sweep", [0])]
    tokens = {"method": "1,000 new tokens", "stage": "exploratory", "setting": "lr 2.0", "kl": None}
    lines = curves.explored([*rows, rows[1] | tokens], "dan")[-2:]
    assert lines[0].startswith("| as in the sweep | lr 2.0 | +2.0000 | +1.0000 |")
    assert lines[1].startswith("| 1,000 new tokens | lr 2.0 |") and lines[1].endswith("| – |")
    assert not curves.explored(rows, "dan")


@pytest.mark.parametrize("name", ["recipe", "paper"])
def test_its_recipes_are_recipes(name):
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    assert recipe.adapter.method == "neutral_residues" and recipe.mixing.share == 0.1

"""The picture of the study of neutral residues, from made-up rows."""

import importlib
import math
import random
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from graftlm.errors import DataError

FOLDER = Path(__file__).parents[2] / "benchmarks/neutral_residues"
if not FOLDER.is_dir():  # an installed package without the repository
    pytest.skip("the benchmarks are not in this installation", allow_module_level=True)


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("curves", "picture"):
        monkeypatch.delitem(importlib.sys.modules, name, raising=False)
    yield importlib.import_module("picture")
    for name in ("curves", "picture"):
        importlib.sys.modules.pop(name, None)


def made_up(language="dan", methods=("neutral", "vanilla", "lora", "full"), seeds=(1, 2, 3)):
    rng = random.Random(0)
    rows = []
    for steep, method in enumerate(methods):
        for number in range(8):
            learned = 0.4 + 0.2 * number + rng.random() / 5
            forgot = (0.02, 0.1, 0.16, 0.3)[steep] * learned**2 + rng.random() / 10 * (number % 3 == 1)
            point = {"learned": learned, "forgot": forgot, "setting": f"lr {number}"}
            rows.append({"language": language, "method": method, "stage": "sweep", "seed": 0, **point})
            for seed in seeds if number in (3, 5) else ():
                moved = {key: point[key] + rng.gauss(0, 0.02) for key in ("learned", "forgot")}
                rows.append(rows[-1] | {"stage": "seeds", "seed": seed, **point, **moved})
    return rows


def test_a_file_of_its_own_with_a_name_at_every_front(module):
    rows = made_up() + made_up("fra")
    text = module.picture(rows)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("role") == "img"
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for name in ("Danish", "French", "neutral residues", "vanilla adapter", "LoRA", "full fine-tuning"):
        assert words.count(name) == (1 if name in ("Danish", "French") else 2), words
    assert "bits per byte learned in the new language" in words and words.count("bits per byte forgotten") == 2
    used = set(re.findall(r"var\((--\w+)\)", text))
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    assert all(f"{name}:" in light and f"{name}:" in dark for name in used) and {"--accent", "--second"} < used
    assert not re.search(r"https?://(?!www\.w3\.org)", text), "nothing is loaded"
    assert module.picture(rows) == text


def test_settings_fronts_and_seeds(module):
    rows = made_up()
    found = module.panel(rows, "dan")
    points = found["lora"]
    mine = [row for row in rows if row["method"] == "lora"]
    assert points["settings"] == [(row["learned"], row["forgot"]) for row in mine if row["stage"] == "sweep"]
    assert all(any(x >= a and y <= b for x, y in points["front"]) for a, b in points["settings"])
    for setting, (learned, forgot) in zip(("lr 3", "lr 5"), points["seeds"], strict=True):
        seeds = [row for row in mine if (row["stage"], row["setting"]) == ("seeds", setting)]
        for key, (mean, low, high) in (("learned", learned), ("forgot", forgot)):
            values = [row[key] for row in seeds]
            assert mean == pytest.approx(sum(values) / 3) and (low, high) == (min(values), max(values))


def test_a_study_that_is_not_finished_and_settings_that_went_astray(module):
    rows = made_up(methods=("neutral", "lora"), seeds=())
    rows.append(rows[-1] | {"learned": -40.0, "forgot": 90.0})
    rows.append(rows[-1] | {"learned": math.nan, "forgot": math.nan})
    text = module.picture([*rows, rows[0] | {"stage": "exploratory", "method": "p = 0"}])
    assert "2 of 18 settings lie outside" in text and "vanilla" not in text
    with pytest.raises(DataError, match="no run of the sweep"):
        module.picture([])


def test_names_stand_apart_and_in_order(module):
    rng = random.Random(1)
    for _ in range(200):
        places = [rng.choice((0.0, rng.random())) * 4 for _ in range(rng.randint(1, 6))]
        moved = module.apart(places, 0.5)
        order = sorted(range(len(places)), key=lambda one: (places[one], moved[one]))
        gaps = [moved[b] - moved[a] for a, b in pairwise(order)]
        assert all(gap > 0.5 - 1e-9 for gap in gaps)
        if all(places[b] - places[a] >= 0.5 for a, b in pairwise(order)):
            assert moved == places
        assert sum(moved) == pytest.approx(sum(places)), "no more to one side than to the other"

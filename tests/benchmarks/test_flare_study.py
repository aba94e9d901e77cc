"""The FLARE study's files on made-up sentences: folds, glosses, recipes, and the table against sums by hand."""

import gzip
import importlib
import itertools
import json
import random
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from graftlm.parallel import load_pairs
from graftlm.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "benchmarks" / "flare"
if not FOLDER.is_dir():  # an installed package without the repository
    pytest.skip("the benchmarks are not in this installation", allow_module_level=True)


MODULES = ("plan", "gloss", "folds", "rows", "tables", "run", "cost")


@pytest.fixture
def study(monkeypatch):
    """The study's modules, without leaving their short names behind."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        sys.modules.pop(name, None)


LABELS = ("blue", "green", "red")
LEXICON = {f"ord{number}": f"word{number}" for number in range(12)}
TARGETS = {"ces": "ces_Latn", "dan": "dan_Latn"}
MEAN = "mean of two models' logits"
TWO = ("LoRA on target rows", "translate-test, trained as long")


def sentences(count, seed, length=4):
    rng = random.Random(seed)
    for _ in range(count):
        chosen = [rng.choice(list(LEXICON)) for _ in range(length)]
        yield " ".join(chosen), " ".join(LEXICON[word] for word in chosen)


@pytest.fixture
def data(tmp_path):
    pairs = list(sentences(50, 0))
    for code in ("eng_Latn", *TARGETS.values()):
        for split, start in (("train", 0), ("dev", 30), ("test", 40)):
            path = tmp_path / "multilingual" / "sib200_topic" / f"{code}.{split}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {"id": i, "text": pairs[i][code == "eng_Latn"], "label": i % 3, "label_name": LABELS[i % 3]}
                for i in range(start, min(start + 30, 50) if split == "train" else start + 10)
            ]
            path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    for tag in TARGETS:
        path = tmp_path / "parallel_text" / "tatoeba_eng" / f"{tag}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"text": text, "eng": eng, "split": "train"} for text, eng in sentences(80, 1)]
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return tmp_path


def test_ibm_model_1_finds_a_dictionary_and_sums_to_one(study):
    pairs = list(sentences(80, 1))
    table = study.gloss.model_1(pairs)
    assert all(sum(found.values()) == pytest.approx(1) for found in table.values())
    translate = study.gloss.glossary(pairs)
    for text, english in sentences(20, 2):
        assert translate(text) == english
    assert translate("Ord3 Peter!") == "word3 peter !"


def read(path):
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def test_folds_have_every_sentence_once_and_every_source(study, data, tmp_path):
    study.folds.write_folds(data, tmp_path / "folds")
    study.folds.write_folds(data, tmp_path / "glossed", with_gloss=True)
    tested = []
    for fold in (1, 3, 5):
        rows = {split: read(tmp_path / f"glossed/{fold}/{split}.dan.jsonl") for split in ("train", "dev", "test")}
        ids = [{row["id"] for row in found} for found in rows.values()]
        assert set.union(*ids) == set(range(50)) and sum(map(len, ids)) == 50
        tested += [row["id"] for row in rows["test"]]
        for row in rows["train"]:
            english = " ".join(LEXICON[word] for word in row["text"].split())
            assert (row["english"], row["gloss"], row["itself"]) == (english, english, row["text"])
        assert sum(row["shuffled"] == row["english"] for row in rows["train"]) < 3
        assert sorted(row["shuffled"] for row in rows["train"]) == sorted(row["english"] for row in rows["train"])
        for split, found in rows.items():  # runs that both sets share read the same bytes
            plain = [{key: value for key, value in row.items() if key != "gloss"} for row in found]
            assert read(tmp_path / f"folds/{fold}/{split}.dan.jsonl") == plain
            assert [row["id"] for row in read(tmp_path / f"folds/{fold}/{split}.ces.jsonl")] == [r["id"] for r in found]
    assert len(set(tested)) == len(tested) == 30 and not (tmp_path / "folds/2").exists()
    tuned_on = {row["id"] for tag in ("eng", *TARGETS) for row in read(tmp_path / f"folds/1/dev.{tag}.jsonl")}
    assert len(tuned_on) == 10 and tuned_on.isdisjoint(tested)
    for folds in ((1, 2), (1, 2, 3, 4, 5), (3, 5)):  # tested on what tunes; nothing to tune on
        with pytest.raises(ValueError, match="rates are chosen on part 2"):
            study.plan.Scale(folds=folds)
    (tmp_path / "recipe.yaml").write_bytes((FOLDER / "recipe.yaml").read_bytes())
    for which in study.plan.SETS.values():
        for parts in which.values():
            recipe = study.run.arm(tmp_path, "one", study.plan.Job("", parts, "dan", 3, 0, 1e-3), tmp_path)
            split = load_pairs(recipe, recipe.data.train, "train")
            assert len(split) == 30 and (split.sources is not None) == (parts[0] == "fused")
            assert ("glossed/" in recipe.data.train.path) == (parts[2] == "gloss")


def test_the_runs_are_those_of_the_readme(study):
    counted = Counter(job.arm for job in study.plan.jobs("primary"))
    assert counted == {"step 1": 15, "FLARE": 32, TWO[0]: 32, TWO[1]: 16, "input-level fusion": 32}
    seeds = [job.seed for job in study.plan.jobs("primary")]
    assert seeds == sorted(seeds)
    trials = {(job.fold, job.seed) for job in study.plan.jobs("primary") if job.rate}
    assert trials == {(1, 0)}
    primary = study.plan.SETS["primary"].values()
    for which, seeds, new in (("gloss", 2, 6), ("controls", 2, 4), ("exploratory", 1, 8)):
        own = [job for job in study.plan.jobs(which) if job.parts and job.parts not in primary]
        assert len(own) == new and {job.tag for job in own} == {"dan"}
        assert {(job.fold, job.seed) for job in study.plan.jobs(which)} == {(1, seed) for seed in range(seeds)}


RATE = {"ces": 1e-3, "dan": 3e-3}  # the better ones on dev of fold 1 with seed 0; anywhere else it is the other one


def fill(study, folder, probabilities):
    """Rows of every fold, seed and *both* rates; arm, language, fold, seed → the scores with the chosen rate."""
    rng, kept = np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    for name, parts in study.plan.SETS["primary"].items():
        for tag in ("dan",) if name == TWO[1] else TARGETS:
            for fold, seed, rate in itertools.product((1, 3, 5), range(5), (1e-3, 3e-3)):
                scores, is_chosen = probabilities(name, tag, fold, seed), rate == RATE[tag]
                if is_chosen:
                    kept[name, tag, fold, seed] = scores
                else:
                    scores = rng.dirichlet(np.ones(3), size=len(scores))
                ids = [100 * fold + place for place in range(len(scores))]
                row = {
                    "run": study.plan.name_of(parts, tag, fold, seed, rate),
                    "dev": float(is_chosen == ((fold, seed) == (1, 0))),
                    "seconds": 90.0 if seed else None,  # None: a run that was stopped between
                    "labels": LABELS,
                    "ids": ids,
                    "gold": [LABELS[i % 3] for i in ids],
                    "scores": np.asarray(scores).tolist(),
                }
                (folder / f"{row['run']}.json").write_text(json.dumps(row))
    for fold, seed in itertools.product((1, 3, 5), range(5)):
        row = {"run": f"eng.fold{fold}.seed{seed}", "seconds": 36.0}
        (folder / f"{row['run']}.json").write_text(json.dumps(row))
    return kept


def test_the_tables_follow_from_the_rows(study, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(1)
    kept = fill(study, tmp_path / "rows", lambda *_: rng.dirichlet(np.ones(3), size=10))
    rows = study.rows.Rows(tmp_path / "rows", study.plan.STUDY)
    tables = study.tables.outcomes(rows, "primary")

    def right(arm, seed, fold, place):
        total = 0
        for tag in TARGETS:
            arms = TWO if arm == MEAN else (arm,)
            last = [kept[one, "dan" if one == TWO[1] else tag, fold, seed][place] for one in arms]
            total += LABELS[int(np.prod(last, axis=0).argmax())] == LABELS[(100 * fold + place) % 3]
        return total / 2

    assert tables.keys() == {*study.plan.SETS["primary"], MEAN}
    for arm, table in tables.items():
        expected = [[right(arm, seed, fold, i) for fold in (1, 3, 5) for i in range(10)] for seed in range(5)]
        assert table == pytest.approx(np.array(expected))
    cells = [line.strip("| ").split(" | ") for line in study.tables.by_language(rows, "primary").splitlines()[2:]]
    for arm, *values in cells:
        mean = np.mean([float(value.split(" ± ")[0]) for value in values])
        assert mean == pytest.approx(100 * tables[arm].mean(), abs=0.1)
    assert {arm for arm, *_ in cells} == tables.keys()
    priced = study.tables.costs(rows, "primary").splitlines()
    assert "| step 1 | 15 | 36 | 0.15 |" in priced and "| FLARE | 32 | 90 | 0.80 |" in priced
    assert priced[-1] == "| all | 127 | | 2.95 |"
    assert "FLARE, ces 0.001; FLARE, dan 0.003;" in study.tables.rates(rows, "primary")
    lines = study.tables.summary(rows, "primary").splitlines()
    shown = [line.split("|")[1].strip() for line in lines if line.startswith("| ") and "minus" not in line]
    assert shown == sorted(set(tables) - {"FLARE"}, key=lambda name: -tables[name].mean())
    # an arm of another set takes the rate of the primary arm that reads alike; equal ones: the smaller
    assert (
        rows.chosen(study.plan.SETS["gloss"][TWO[1]], "dan") == rows.chosen(study.plan.EXPLORED["add"], "dan") == 3e-3
    )
    for rate in (1e-3, 3e-3):
        path = tmp_path / "rows" / f"both.english.dan.fold1.seed0.rate{rate:g}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dev": 0.5}))
    again = study.rows.Rows(tmp_path / "rows", study.plan.STUDY)
    assert again.chosen(study.plan.RIVALS["input-level fusion"], "dan") == 1e-3
    # what is left beside the script is enough
    monkeypatch.setattr(study.run, "HERE", tmp_path)
    study.run.show("primary", again)
    study.run.show("primary", study.rows.Rows(tmp_path / "none", study.plan.STUDY))
    first, second = capsys.readouterr().out.split("## primary: 5 of 5 seeds")[1:]
    assert first.strip() == second.strip()


def test_the_interval_is_that_of_sentences_and_seeds_drawn_jointly(study, tmp_path):
    rng = np.random.default_rng(2)
    ids, seeds = 40, 5
    # who is right hangs on the sentence in all languages alike, and on the seed in all arms and folds alike
    sentence = {
        fold: rng.choice(["flare", "rival", "both", "none"], p=(0.3, 0.15, 0.3, 0.25), size=ids) for fold in (1, 3, 5)
    }
    lucky = rng.random(seeds) * 0.5

    def probabilities(name, tag, fold, seed):
        side = "flare" if name == "FLARE" else "rival"
        is_right = np.isin(sentence[fold], [side, "both"]) ^ (rng.random(ids) < 0.05)
        is_right |= (side == "flare") & (rng.random(ids) < lucky[seed])
        gold = (100 * fold + np.arange(ids)) % 3
        return np.eye(3)[(gold + ~is_right) % 3] * 0.8 + 0.1

    kept = fill(study, tmp_path / "rows", probabilities)
    rows = study.rows.Rows(tmp_path / "rows", study.plan.STUDY)
    found = {}
    for line in study.tables.summary(rows, "primary").splitlines():
        if " to " in line:
            name, _, value, interval = line.strip("| ").split(" | ")[:4]
            found[name] = [float(value), *map(float, interval.split(" to "))]

    def right(name):  # languages × seeds × sentences of the three folds
        gold = np.concatenate([(100 * fold + np.arange(ids)) % 3 for fold in (1, 3, 5)])
        tags = ["dan"] * 2 if name == TWO[1] else TARGETS
        best = [[np.vstack([kept[name, t, f, s] for f in (1, 3, 5)]).argmax(1) for s in range(seeds)] for t in tags]
        return (np.array(best) == gold).astype(float)

    rivals = ["LoRA on target rows", "translate-test, trained as long", "input-level fusion"]
    differences = np.array([right("FLARE") - right(name) for name in rivals])
    drawn, apart = [], []
    for _ in range(6000):
        some = rng.integers(seeds, size=seeds - 1)  # one seed fewer, as seed_weights has it
        one, two = (rng.integers(3 * ids, size=3 * ids) for _ in range(2))
        drawn.append(differences[:, :, some][..., one].mean(axis=(1, 2, 3)))
        apart.append(
            (differences[:, 0, some][..., one].mean((1, 2)) + differences[:, 1, some][..., two].mean((1, 2))) / 2
        )
    for place, name in enumerate(rivals):
        value, low, high = found[name]
        assert value == pytest.approx(100 * differences[place].mean(), abs=0.006)
        sd = 100 * np.std(drawn, axis=0)[place]
        brute = 100 * np.quantile(drawn, [0.025, 0.975], axis=0)[:, place]
        assert [low, high] == pytest.approx(brute, abs=0.2 * sd)
        wrong = 100 * np.quantile(apart, [0.025, 0.975], axis=0)[:, place]
        assert abs((wrong[1] - wrong[0]) - (high - low)) > 0.4 * sd, "this test would not see languages drawn apart"


def test_processes_divide_the_runs_and_go_on_where_they_stopped(study, tmp_path, monkeypatch, capsys):
    done, at_work, scale = [], set(), study.plan.STUDY

    def perform(work, name, job, rows):
        assert name not in at_work and not any(name == other for other, _ in done), "done twice"
        if len(done) == stop_at:
            raise KeyboardInterrupt
        at_work.add(name)
        finished = {other for other, _ in done}
        if job.parts:
            assert f"eng.fold{job.fold}.seed{job.seed}" in finished
        if job.parts and job.rate is None:  # both trials decide, and the larger rate was the better one
            assert name.endswith("rate0.003")
            parts = f"{job.parts[0]}.english.{job.tag}.fold1.seed0.rate"
            assert {f"{parts}0.001", f"{parts}0.003"} <= finished
        time.sleep(0.002)
        row = {"run": name, "seconds": 1.0, "dev": job.rate or 0.0, "labels": LABELS}
        gold = [LABELS[i % 3] for i in range(6)]
        rows.put(row | {"ids": [10 * job.fold + i for i in range(6)], "gold": gold, "scores": [[0.2, 0.3, 0.5]] * 6})
        at_work.remove(name)
        done.append((name, job.seed))

    monkeypatch.setattr(study.run, "perform", perform)
    monkeypatch.setattr(study.run, "PAUSE", 0.01)
    monkeypatch.setattr(study.run, "HERE", tmp_path)
    monkeypatch.setattr(study.tables, "RESAMPLES", 100)

    def process():
        study.run.do(tmp_path, "primary", study.rows.Rows(tmp_path / "rows", scale))

    stop_at = 10
    with pytest.raises(KeyboardInterrupt):
        process()
    with pytest.raises(SystemExit, match="no seed is whole yet"):
        study.run.show("primary", study.rows.Rows(tmp_path / "rows", scale))
    stop_at = 80
    with pytest.raises(KeyboardInterrupt):
        process()
    assert [seed for _, seed in done] == sorted(seed for _, seed in done)
    study.run.show("primary", study.rows.Rows(tmp_path / "rows", scale))
    assert "## primary: 3 of 5 seeds" in capsys.readouterr().out  # 31 runs with both rates, then 24 a seed
    stop_at = None
    with ThreadPoolExecutor(2) as pool:  # a claim is not given twice, to threads as little as to processes
        for one in [pool.submit(process) for _ in range(2)]:
            one.result()
    assert len(done) == 127
    process()
    assert len(done) == 127
    study.run.show("primary", study.rows.Rows(tmp_path / "rows", scale))
    assert "5 of 5 seeds" in capsys.readouterr().out


def test_the_tiny_scale_is_a_part_of_the_study(study, data, tmp_path):
    scale, whole = study.plan.SCALES["smoke"], study.plan.STUDY
    assert set(scale.languages) <= set(whole.languages) and set(scale.rates) <= set(whole.rates)
    assert scale.folds == (1,) and scale.seeds == 1
    study.folds.write_folds(data, tmp_path / "whole")
    study.folds.write_folds(data, tmp_path / "tiny", study.plan.Scale(("dan",), folds=(1,), rows=8))
    assert [folder.name for folder in (tmp_path / "tiny").iterdir() if folder.is_dir()] == ["1"]
    for split, count in (("train", 8), ("dev", 2), ("test", 2)):
        ids = [[row["id"] for row in read(tmp_path / f"{name}/1/{split}.dan.jsonl")] for name in ("whole", "tiny")]
        assert ids[1] == ids[0][:count]


def test_the_arms_that_are_priced_are_those_of_the_study(study, data, tmp_path):
    assert set(study.plan.SETS["primary"]) <= set(study.cost.ARMS)
    study.folds.write_folds(data, tmp_path / "folds")
    (tmp_path / "recipe.yaml").write_bytes((FOLDER / "recipe.yaml").read_bytes())
    for name in study.cost.ARMS:
        recipe = study.cost.recipe_of(tmp_path, name, tmp_path)
        assert recipe.source == ("eng" if name == "step 1" else "dan")
        assert len(load_pairs(recipe, recipe.data.train, "train")) == 30
        assert getattr(recipe.adapter, "source_cache", False) == (name == "FLARE, cached")


def test_the_hours_of_the_readme_are_those_of_the_table(study):
    printed = study.cost.table(json.loads((FOLDER / "cost.json").read_text(encoding="utf-8")))
    assert printed in (FOLDER / "README.md").read_text(encoding="utf-8")
    hours = [float(line.split("|")[5]) for line in printed.splitlines()[2:]]
    assert hours[-1] == pytest.approx(sum(hours[:-1]), abs=0.03) and hours[-1] < 5


def test_the_papers_recipe_is_one():
    recipe = load_recipe(FOLDER / "paper.yaml")
    assert (recipe.adapter.method, recipe.data.parallel.read) == ("flare", "fused")

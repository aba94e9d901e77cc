"""The comparison of variants against loops over seeds and items, and its file, tables and gaps."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from evaluation.made_up_study import made_up_comparison, write_run
from sklearn.metrics import f1_score

from graftlm.errors import DataError
from graftlm.evaluation.compare_runs import VariantRuns, compare_runs
from graftlm.evaluation.comparison import MEAN, Comparison
from graftlm.evaluation.comparison_report import write_comparison_report
from graftlm.evaluation.comparison_table import markdown, notes, scores_table, summary, tables
from graftlm.evaluation.record import schema_rows, update_document
from graftlm.measure.statistics import holm, paired_bootstrap

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "study.md"


def outcomes(rng, seeds, items, share):
    return rng.random((seeds, items)) < share


def study(root, tables_, *, ids=None, folds=1, **changes):
    """compare_runs over runs with the given outcomes: variant → language → (seeds, items)."""
    variants = []
    for name, languages in tables_.items():
        folders = {}
        for seed in range(len(next(iter(languages.values())))):
            parts = []
            for fold in range(folds):
                right = {tag: np.array_split(rows[seed], folds)[fold] for tag, rows in languages.items()}
                named = {tag: np.array_split(np.array(ids[tag]), folds)[fold].tolist() for tag in ids or ()}
                parts.append(write_run(root / name / f"{seed}.{fold}", right, ids=named or None, seed=seed))
            folders[seed] = parts
        variants.append(VariantRuns(name, {}, folders))
    return compare_runs("s", variants, root=root, **({"planned": 1, "finished": 1, "resamples": 4000} | changes))


@pytest.fixture
def made(tmp_path):
    rng = np.random.default_rng(0)
    shares = {"a": 0.6, "b": 0.68, "c": 0.6}
    data = {
        name: {tag: outcomes(rng, 4, 90, share + (0.1 if tag == "eng" else 0)) for tag in ("eng", "deu", "fra")}
        for name, share in shares.items()
    }
    return data, study(tmp_path, data)


def test_scores_are_means_over_seeds_and_items(made):
    data, found = made
    for variant in found.variants:
        for score in variant.scores[:-1]:
            rows = data[variant.name][score.language]
            assert score.score.value == pytest.approx(rows.mean())
            assert score.by_seed == pytest.approx(rows.mean(axis=1))
            assert score.spread == pytest.approx(rows.mean(axis=1).std(ddof=1))
        mean = variant.scores[-1]
        assert mean.language == MEAN and not mean.is_source
        assert mean.score.value == pytest.approx(np.mean([data[variant.name][tag].mean() for tag in ("deu", "fra")]))
    assert found.languages == ("eng", "deu", "fra") and found.main == MEAN


def test_differences_are_the_paired_bootstrap_of_outcome_tables(made):
    data, found = made
    for name in ("b", "c"):
        for tag in ("eng", "deu", "fra"):
            ours = found.difference(name, tag)
            order = sorted(range(90), key=str)  # the order in which ids are drawn
            a, b = (data[one][tag][:, order].astype(float) for one in (name, "a"))
            expected = paired_bootstrap(a, b, resamples=4000, seed=0)
            assert (ours.value, ours.low, ours.high, ours.p) == pytest.approx(
                (expected.value, expected.low, expected.high, expected.p)
            )
        # the mean draws the same items in both languages: the same as one table of means
        joint = [np.mean([data[one][tag][:, order] for tag in ("deu", "fra")], axis=0) for one in (name, "a")]
        expected = paired_bootstrap(*joint, resamples=4000, seed=0)
        assert found.difference(name, MEAN).low == pytest.approx(expected.low)


def test_holm_is_over_the_means_and_over_all_other_rows(made):
    _, found = made
    for family in (
        [one for one in found.differences if one.language == MEAN],
        [one for one in found.differences if one.language != MEAN],
    ):
        assert [one.p_holm for one in family] == pytest.approx(holm(np.array([one.p for one in family])).tolist())
    assert len(found.differences) == 2 * 4


def test_parallel_sets_are_drawn_jointly_whatever_their_order(tmp_path):
    rng = np.random.default_rng(1)
    names = [f"s{number}" for number in range(60)]
    other = list(rng.permutation(60))
    first = {tag: outcomes(rng, 3, 60, 0.6) for tag in ("eng", "deu")}
    first["fra"] = first["deu"]
    second = {tag: outcomes(rng, 3, 60, 0.7) for tag in ("eng", "deu")}
    second["fra"] = second["deu"]
    mixed = {one: languages | {"fra": languages["deu"][:, other]} for one, languages in (("a", first), ("b", second))}
    ids = {"eng": names, "deu": names, "fra": [names[place] for place in other]}
    found = study(tmp_path, mixed, ids=ids)
    # two languages with one outcome for each sentence say no more than one of them
    assert found.difference("b", MEAN).low == pytest.approx(found.difference("b", "deu").low)
    assert found.difference("b", "fra").high == pytest.approx(found.difference("b", "deu").high)


def test_folds_are_scored_together(tmp_path):
    rng = np.random.default_rng(2)
    data = {
        name: {"eng": outcomes(rng, 3, 40, 0.7), "deu": outcomes(rng, 3, 40, share)}
        for name, share in (("a", 0.5), ("b", 0.6))
    }
    ids = {tag: [f"{number:03}" for number in range(40)] for tag in ("eng", "deu")}
    whole = study(tmp_path / "whole", data, ids=ids)
    parts = study(tmp_path / "parts", data, ids=ids, folds=4)
    assert parts.folds == 4 and parts.variants[0].scores[1].n == 40
    assert parts.differences == whole.differences and parts.noise_floor == whole.noise_floor


def test_a_metric_that_is_no_mean_over_items_is_resampled_itself(tmp_path):
    rng = np.random.default_rng(3)
    runs = {}
    for name in ("a", "b"):
        right = {"eng": outcomes(rng, 2, 80, 0.6), "deu": outcomes(rng, 2, 80, 0.6)}
        folders = {
            seed: [
                write_run(
                    tmp_path / name / str(seed), {tag: rows[seed] for tag, rows in right.items()}, metric="macro_f1"
                )
            ]
            for seed in range(2)
        }
        runs[name] = VariantRuns(name, {}, folders)
    found = compare_runs("s", list(runs.values()), root=tmp_path, planned=4, finished=4, resamples=500)

    def macro(name):
        values = []
        for folder in runs[name].folders.values():
            rows = [json.loads(line) for line in (folder[0] / "predictions.jsonl").read_text().splitlines()]
            rows = [row for row in rows if row["language"] == "deu"]
            values.append(f1_score([r["label"] for r in rows], [r["prediction"] for r in rows], average="macro"))
        return np.mean(values)

    assert found.difference("b", "deu").value == pytest.approx(macro("b") - macro("a"))
    assert found.main == "deu", "one language without labels needs no mean"


def test_a_seed_that_is_missing_on_one_side_is_left_out_of_the_difference(tmp_path):
    rng = np.random.default_rng(4)
    a, b = outcomes(rng, 3, 50, 0.5), outcomes(rng, 2, 50, 0.6)
    found = study(tmp_path, {"a": {"eng": a, "deu": a}, "b": {"eng": b, "deu": b}}, planned=6, finished=5)
    assert found.difference("b", "deu").value == pytest.approx(b.mean() - a[:2].mean())
    assert found.variants[0].seeds == (0, 1, 2) and found.variants[1].seeds == (0, 1)
    assert any("5 of 6 runs are finished" in line for line in notes(found))


def test_one_seed_says_so(tmp_path):
    rng = np.random.default_rng(5)
    found = study(
        tmp_path, {name: {"eng": outcomes(rng, 1, 50, 0.5), "deu": outcomes(rng, 1, 50, 0.5)} for name in "ab"}
    )
    assert found.noise_floor == {"eng": None, "deu": None} and found.variants[0].scores[0].spread is None
    assert "with one seed it says nothing of other seeds" in scores_table(found).caption
    assert any("Noise floor: unknown" in line for line in notes(found))


def test_other_items_are_an_error(tmp_path):
    rng = np.random.default_rng(6)
    for name, count in (("a", 20), ("b", 21)):
        write_run(tmp_path / name, {"eng": outcomes(rng, 1, count, 0.5)[0]})
    variants = [VariantRuns(name, {}, {0: [tmp_path / name]}) for name in ("a", "b")]
    with pytest.raises(DataError, match="not scored on the same items of eng"):
        compare_runs("s", variants, root=tmp_path, planned=2, finished=2)
    with pytest.raises(DataError, match="no run is finished"):
        compare_runs("s", [VariantRuns("a", {}, {})], root=tmp_path, planned=2, finished=0)


def test_without_the_first_variant_there_are_scores_and_no_differences(tmp_path):
    right = outcomes(np.random.default_rng(9), 1, 20, 0.5)[0]
    folders = {0: [write_run(tmp_path / "b", {"eng": right, "deu": right})]}
    variants = [VariantRuns("a", {}, {}), VariantRuns("b", {}, folders)]
    found = compare_runs("s", variants, root=tmp_path, planned=2, finished=1, failures={"a.seed0": "no memory"})
    assert found.differences == () and found.variants[1].scores[0].score.value == pytest.approx(right.mean())
    assert [title for title, _ in tables(found)] == ["Scores", "Gain and cost"] and "no memory" in markdown(found)
    found.write(tmp_path)
    assert "a.seed0" in write_comparison_report(tmp_path).read_text(encoding="utf-8")


def test_other_metrics_are_an_error(tmp_path):
    rng = np.random.default_rng(7)
    for name, metric in (("a", "accuracy"), ("b", "macro_f1")):
        write_run(tmp_path / name, {"eng": outcomes(rng, 1, 20, 0.5)[0]}, metric=metric)
    variants = [VariantRuns(name, {}, {0: [tmp_path / name]}) for name in ("a", "b")]
    with pytest.raises(DataError, match="another task, metric or source"):
        compare_runs("s", variants, root=tmp_path, planned=2, finished=2)


def test_written_and_read_again(tmp_path):
    made = made_up_comparison(tmp_path, seeds=2, items=40)
    assert Comparison.read(tmp_path) == made
    with pytest.raises(DataError, match="there is no comparison here"):
        Comparison.read(tmp_path / "runs")
    (tmp_path / "study.json").write_text(json.dumps({"schema": "graftlm.study/9"}))
    with pytest.raises(DataError, match="another schema version"):
        Comparison.read(tmp_path)


def test_tables_for_people(tmp_path):
    made = made_up_comparison(tmp_path, names=("standard", "gra|dual", "FUN"))
    text = markdown(made)
    assert "English, source\\*" in text, "the language that a choice was made on is marked"
    assert "Choices (checkpoint, tuned settings) were made on labels in English" in text
    assert "gra\\|dual, mean without labels" in text
    assert re.search(r"Noise floor: two sets of 5 seeds of one variant differ by up to \d\.\d points", text)
    titles = [title for title, _ in tables(made)]
    assert titles == ["Scores", "Against standard", "Gain and cost", "Tuned"]
    for _, table in tables(made):
        assert all(len(row) == len(table.columns) for row in table.rows)
    costs = dict(tables(made))["Gain and cost"].rows
    assert costs[0][5] == "1.00" and float(costs[1][5]) < 0.85


@pytest.mark.parametrize(
    ("gain", "verdict"), [(0.2, "better than it beyond chance"), (-0.2, "worse than it"), (0, "not told apart")]
)
def test_the_summary_says_what_is_so(tmp_path, gain, verdict):
    rng = np.random.default_rng(8)
    data = {
        name: {"eng": outcomes(rng, 4, 200, 0.6), "deu": outcomes(rng, 4, 200, 0.6 + plus)}
        for name, plus in (("a", 0), ("b", gain))
    }
    assert f"b is {verdict}" in summary(study(tmp_path, data))


def test_the_document_lists_the_fields_of_the_schema_and_no_others(tmp_path):
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| (.*) \|$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert rows == list(schema_rows(Comparison)), "python -m graftlm.evaluation.comparison docs/reference/study.md"
    assert all(meaning for _, _, meaning in rows)
    copy = tmp_path / "study.md"
    copy.write_text(DOCUMENT.read_text(encoding="utf-8").replace("| `name` |", "| `nome` |"), encoding="utf-8")
    update_document(Comparison, copy)
    assert copy.read_text(encoding="utf-8") == DOCUMENT.read_text(encoding="utf-8")


def test_the_example_in_the_document_is_a_comparison():
    example = re.search(r"```json\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)[1]
    assert Comparison.model_validate(json.loads(example)).schema_version == "graftlm.study/1"

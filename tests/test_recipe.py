"""Recipes: what is read, what is refused, and where each value came from."""

from pathlib import Path

import pytest

from graftlm.errors import RecipeError
from graftlm.recipe import differences, load_recipe, shipped

BASE = """\
name: topics
model: starter
task: classification
source: eng
data:
  train: train.jsonl
  test: {eng: eng.jsonl, no: {path: owner/set, split: test}}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "r.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_values_and_types(write):
    recipe = load_recipe(write(BASE + "training: {learning_rate: 1e-4, epochs: 2}\nreferences: [majority, standard]\n"))
    assert recipe.training.learning_rate == 0.0001
    assert recipe.training.epochs == 2.0
    assert list(recipe.data.test) == ["eng", "no"], "YAML 1.2: the language no is not False"
    assert recipe.data.test["no"].split == "test"
    assert recipe.references.majority
    assert recipe.references.standard is not None
    assert recipe.unfreezing is None


def test_a_recipe_is_frozen(write):
    recipe = load_recipe(write(BASE))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1


def test_source_language_no(write):
    assert load_recipe(write(BASE.replace("source: eng", "source: no"))).source == "no"


def test_every_value_knows_its_origin(write):
    recipe = load_recipe(
        write(BASE + "adapter:\n  r: 4\nreferences: [standard]\n"),
        ["seed=3", "data.test.deu=deu.csv", "unfreezing={schedule: gradual, every_n_steps: 5}"],
    )
    origins = {
        "name": "r.yaml:1",
        "data.train": "r.yaml:6",
        "data.dev": "default",
        "data.test.eng": "r.yaml:7",
        "data.test.deu": "override",
        "adapter.r": "r.yaml:9",
        "adapter.alpha": "default",
        "unfreezing.schedule": "override",
        "unfreezing.fisher": "default",
        "references.majority": "r.yaml:10",
        "training.epochs": "default",
        "seed": "override",
    }
    assert {key: recipe.origin(key) for key in origins} == origins
    lines = recipe.resolved().splitlines()
    assert "seed: 3  # override" in lines
    assert "  r: 4  # r.yaml:9" in lines
    assert "  alpha: 16  # default" in lines


def test_the_resolved_recipe_reads_as_the_same_recipe(write):
    text = (
        BASE + 'adapter: {method: none}\nlicences: {data: "CC: #1, it\'s \\"x\\""}\ntraining: {learning_rate: 1e-5}\n'
    )
    recipe = load_recipe(write(text))
    again = load_recipe(write(recipe.resolved(), "resolved.yaml"))
    assert again.values() == recipe.values()
    assert differences(recipe, again) == {}
    assert again.licences.data == 'CC: #1, it\'s "x"'


def test_overrides_win_and_change_nothing_else(write):
    path = write(BASE)
    recipe = load_recipe(path, ["training.learning_rate=2e-5"])
    assert differences(load_recipe(path), recipe) == {"training.learning_rate": (0.0005, 2e-05)}
    changed = recipe.changed("seed=1", "output.folder=elsewhere")
    assert differences(recipe, changed) == {"seed": (0, 1)}, "where results go is not part of what is computed"
    assert recipe.seed == 0
    assert changed.output.folder == "elsewhere"


def test_relocated_paths_lead_to_the_same_files(write, tmp_path):
    (tmp_path / "train.jsonl").touch()
    recipe = load_recipe(write(BASE))
    moved = recipe.relocated(tmp_path / "runs" / "topics")
    assert moved.data.train.path == "../../train.jsonl"
    assert moved.path(moved.data.train.path).resolve() == (tmp_path / "train.jsonl").resolve()
    assert moved.data.test["no"].path == "owner/set", "a hub id is no path"
    assert moved.model == "starter"


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("traning: 3\n", ["r.yaml:8", "'traning'", "did you mean 'training'"]),
        ("training:\n  epochs: 2\n  learning_rat: 1e-3\n", ["r.yaml:10", "did you mean 'learning_rate'"]),
        ("references: {standard: {learning_rat: 1}}\n", ["r.yaml:8", "did you mean 'learning_rate'"]),
        ("training: {learning_rate: fast}\n", ["r.yaml:8: training.learning_rate", "number", "'fast'"]),
        ('training: {learning_rate: "1e-4"}\n', ["training.learning_rate", "number", "'1e-4'"]),
        ("training: {epochs: true}\n", ["training.epochs", "number", "True"]),
        ("training: {learning_rate: .nan}\n", ["training.learning_rate", "finite"]),
        ("training: {arguments: {max_grad_norm: .inf}}\n", ["training.arguments.max_grad_norm", "finite"]),
        ("training: 5\n", ["r.yaml:8: training", "mapping", "5"]),
        ("adapter: {method: none, r: 8}\n", ["r.yaml:8: adapter", "takes no r"]),
        ("adapter: {method: bottleneck, alpha: 8}\n", ["r.yaml:8: adapter", "takes no alpha", "method: lora"]),
        ("adapter: {method: lora, kind: houlsby}\n", ["takes no kind", "method: bottleneck"]),
        ("adapter: {method: bottleneck, kind: pfeifer}\n", ["adapter.kind", "'pfeiffer'", "'pfeifer'"]),
        ("adapter: {method: bottleneck, reduction_factor: 4, bottleneck_size: 3}\n", ["say the same twice"]),
        ("adapter: {method: neutral_residues}\n", ["mixing: {share: 0.1, data: …}", "penalty_weight: 0"]),
        ("adapter: {method: lora, gate: relu}\n", ["takes no gate", "method: neutral_residues"]),
        ("adapter: {method: neutral_residues, gate: rellu}\n", ["adapter.gate", "'relu'", "'rellu'"]),
        ("mixing: {data: old.jsonl}\n", ["task: classification does not read mixing"]),
        ("mixing: {data: old.jsonl, share: 1.0}\n", ["r.yaml:8: mixing.share", "less than 1"]),
        ("mixing: {data: old.jsonl, share: -0.1}\n", ["mixing.share", "greater than or equal to 0"]),
        ("mixing: {share: 0.1}\n", ["mixing.data", "missing"]),
        ("adapter: {target_modules: [query, 3]}\n", ["r.yaml:8: adapter.target_modules", "string", "3"]),
        ("unfreezing: {schedule: fixd}\n", ["unfreezing.schedule", "'fixed'", "'fixd'"]),
        ("unfreezing: {schedule: fixed}\n", ["order", "schedule: fixed"]),
        ("unfreezing: {schedule: gradual, order: [1]}\n", ["order", "schedule: fixed"]),
        ("unfreezing: {every_n_steps: 0}\n", ["unfreezing.every_n_steps", "'auto'", "greater than or equal to 1"]),
        ("references: [majority, bogus]\n", ["r.yaml:8", "'bogus'", "majority, standard"]),
        ("training: {masking: 0.3}\n", ["classification does not read training.masking"]),
        ("training: {masking: 0}\n", ["r.yaml:8: training.masking", "greater than 0"]),
        ("seed: -1\n", ["r.yaml:8: seed", "-1"]),
        ("seed: 2020-01-01\n", ["r.yaml:8: seed", "integer"]),
        ("name: again\n", ["r.yaml:8", "duplicate key", "name"]),
        ("adapter:\n\tr: 3\n", ["r.yaml:9", "tab"]),
        ("adapter: !!python/object:os.system {}\n", ["r.yaml:8"]),
        ("adapter: {r: 3\n", ["r.yaml:"]),
    ],
)
def test_what_is_refused(write, extra, expected):
    message = refused(write(BASE + extra))
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.label=topic", ["causal_lm does not read data.label"]),
        ("data.text_b=other", ["causal_lm does not read data.text_b"]),
        ("training.masking=0.3", ["causal_lm does not read training.masking"]),
        ("data.old=[fra]", ["'fra' has no text in data.test", "eng, no"]),
        ("data.documents=chapters", ["data.documents", "'paragraphs'", "'chapters'"]),
    ],
)
def test_what_raw_text_has_no_use_for(write, override, expected):
    path = write(BASE.replace("task: classification", "task: causal_lm"))
    message = refused(path, override)
    for part in expected:
        assert part in message
    load_recipe(path, ["data.old=[no]", "data.documents=files"])
    assert "does not read data.old" in refused(write(BASE, "labels.yaml"), "data.old=[no]")


def test_relocated_patterns_lead_to_the_same_files(write, tmp_path):
    (tmp_path / "novels").mkdir()
    recipe = load_recipe(write(BASE.replace("task: classification", "task: causal_lm")), ["data.train=novels/*.txt"])
    assert recipe.relocated(tmp_path / "runs" / "x").data.train.path == "../../novels/*.txt"


def test_several_mistakes_are_named_at_once(write):
    message = refused(write(BASE + "training: {epochs: three, learning_rat: 1}\nsede: 1\n"))
    assert "training.epochs" in message
    assert "'learning_rate'" in message
    assert "'seed'" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.lr=3", ["unknown key 'training.lr'", "learning_rate"]),
        ("data.test.deu={pth: 3}", ["override", "unknown key 'data.test.deu.pth'", "did you mean 'path'"]),
        ("data.test.deutschland=x", ["language tag", "deutschland"]),
        ("data.test={}", ["data.test", "at least 1"]),
        ("name=a/b", ["override: name"]),
        ("name=..", ["override: name"]),
        ("seed", ["key=value", "seed"]),
        ("seed.x=1", ["seed"]),
        ("name.x=1", ["name is a single value"]),
        ("seed=[1", ["not YAML"]),
        ("data.train=null", ["data.train"]),
    ],
)
def test_overrides_that_are_refused(write, override, expected):
    message = refused(write(BASE), override)
    for part in expected:
        assert part in message


def test_missing_keys_files_and_no_mapping(write, tmp_path):
    assert "'data' is missing" in refused(write("name: x\n"))
    assert "no such recipe" in refused(tmp_path / "none.yaml")
    assert "folder" in refused(tmp_path)
    assert "mapping" in refused(write("- 1\n"))
    assert "mapping" in refused(write(""))
    (tmp_path / "latin.yaml").write_bytes("name: é\n".encode("latin-1"))
    assert "UTF-8" in refused(tmp_path / "latin.yaml")


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_recipes_are_short_and_say_what_they_are_for(name):
    lines = shipped()[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 30
    assert lines[0].startswith("# ")
    load_recipe(shipped()[name])


def test_a_recipe_for_each_task():
    assert {load_recipe(path).task for path in shipped().values()} == {
        "classification",
        "multi_label",
        "regression",
        "token_classification",
        "question_answering",
        "masked_lm",
        "causal_lm",
    }


@pytest.mark.parametrize(
    ("keys", "wanted"), [("", {"reduction_factor": 16.0}), (", bottleneck_size: 3", {"bottleneck_size": 3})]
)
def test_an_adapter_lists_the_keys_of_its_method_and_is_read_again(keys, wanted, tmp_path):
    text = shipped()["demo"].read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("adapter")]
    (tmp_path / "r.yaml").write_text("\n".join([*lines, f"adapter: {{method: bottleneck{keys}}}\n"]), encoding="utf-8")
    recipe = load_recipe(tmp_path / "r.yaml")
    rest = {"method": "bottleneck", "kind": "pfeiffer", "activation": "relu", "dropout": 0.0, "scaling": 1.0}
    assert recipe.values()["adapter"] == {**rest, "invertible": False, **wanted}
    (tmp_path / "again.yaml").write_text(recipe.resolved(), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml").values()["adapter"] == recipe.values()["adapter"]

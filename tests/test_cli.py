"""The command line: what it prints, what it refuses, how fast it says what it can do."""

import json
import subprocess
import sys

import pytest
import torch
from small import small_folder
from typer.testing import CliRunner

import graftlm.check
import graftlm.cli
from graftlm.cli import app, main
from graftlm.recipe import shipped


@pytest.fixture
def cli(monkeypatch):
    """Runs verbs in this process: (exit status, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        runner = CliRunner()
        with monkeypatch.context() as patch:
            patch.setattr(graftlm.cli, "app", lambda **_: app(list(arguments)))
            patch.setattr(graftlm.cli, "out", graftlm.cli.Console(width=200))
            patch.setattr(graftlm.cli, "err", graftlm.cli.Console(stderr=True, width=200))
            with runner.isolation() as (out, err, _):
                try:
                    main()
                    status = 0
                except SystemExit as exit_:
                    status = int(exit_.code or 0)
                return status, out.getvalue().decode(), err.getvalue().decode()

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a small recipe, and what training it printed."""
    folder = small_folder(tmp_path_factory.mktemp("cli"))
    done = subprocess.run(
        [sys.executable, "-m", "graftlm", "train", "recipe.yaml", "training.epochs=2", "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return folder, done


def test_help_names_the_verbs_without_loading_the_libraries():
    code = "import sys, graftlm.cli as c\ntry: c.app(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("[]"), "nothing heavy is imported"
    for verb in ("demo", "check", "train", "evaluate", "report", "recipes"):
        assert verb in done.stdout


def test_train_prints_json_and_nothing_else_on_standard_output(made):
    folder, done = made
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed == json.loads((folder / "runs/small/result.json").read_text())
    assert "16/16" in done.stderr, "the bar is on standard error"
    assert "Warning" not in done.stderr


def test_a_finished_run_is_shown_as_a_table(made, cli, monkeypatch):
    folder, _ = made
    monkeypatch.chdir(folder)
    status, out, err = cli("train", "recipe.yaml", "training.epochs=2")
    assert status == 0
    assert "German" in out
    assert "report: runs/small/report.html" in out
    assert "finished already" in err


def test_evaluate_and_report(made, cli, monkeypatch):
    folder, _ = made
    monkeypatch.chdir(folder)
    status, out, _ = cli("evaluate", "runs/small", "--test", "fra=test.deu.jsonl", "--json")
    assert status == 0
    ours = json.loads((folder / "runs/small/result.json").read_text())["scores"][1]["metrics"]
    assert [(score["language"], score["metrics"]) for score in json.loads(out)["scores"]] == [("fra", ours)]

    (folder / "runs/small/report.html").unlink()
    status, out, _ = cli("report", "runs/small")
    assert (status, out.strip()) == (0, "runs/small/report.html")
    assert (folder / "runs/small/report.html").is_file()


@pytest.mark.parametrize("precision", ["bf16", "float32"])
@pytest.mark.parametrize("factor", [8.0, 1.2])
def test_check_says_where_half_precision_is_slow(cli, tmp_path, monkeypatch, precision, factor):
    monkeypatch.chdir(small_folder(tmp_path, train=16))
    monkeypatch.setattr(graftlm.check, "_times_float32", lambda dtype: factor)
    status, out, err = cli(
        "check", "recipe.yaml", f"training.precision={precision}", "training.arguments={use_cpu: true}", "--json"
    )
    assert status == 0, err
    advice = json.loads(out)["advice"]
    if precision == "bf16" and factor == 8:
        assert advice == [
            "on this processor a product of matrices takes 8 times as long in bf16 as in float32: "
            "training.precision=float32"
        ]
    else:
        assert not advice


def test_products_are_timed():
    assert 0.2 < graftlm.check._times_float32(torch.float32) < 5


def test_check_shows_everything_and_writes_nothing(cli, tmp_path, monkeypatch):
    folder = small_folder(tmp_path)
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    schedule = "unfreezing={schedule: gradual, every_n_steps: 5}"
    status, out, err = cli("check", "recipe.yaml", schedule, "--json")
    assert status == 0, err
    found = json.loads(out)
    # LoRA of rank 8 on query and value of width 16: 2 · (16·8 + 8·16); the head: 2 · 16 + 2
    assert found["layers"] == {"layer.0": 512, "layer.1": 512, "layer.2": 512, "head": 34}
    assert found["steps"] == 32
    assert found["openings"] == [[0, ["layer.2"]], [5, ["layer.1"]], [10, ["layer.0"]]]
    assert found["memory"]["gradients_mb"] == pytest.approx((3 * 512 + 34) * 4 / 1e6)
    assert found["memory"]["optimizer_mb"] == pytest.approx(2 * (3 * 512 + 34) * 4 / 1e6)
    assert found["fresh"] == ["classifier"]
    texts = {(row["split"], row["language"]): row for row in found["texts"]}
    assert set(texts) == {("train", "eng"), ("dev", "eng"), ("test", "eng"), ("test", "deu")}
    assert texts["test", "deu"]["tokens_per_word"] == 1.0
    assert texts["test", "deu"]["unknown"] == 0.0
    assert found["example"].startswith("[BOS] w")
    assert found["step_seconds"] > 0

    status, out, _ = cli("check", "recipe.yaml", schedule)
    assert status == 0
    for part in ("learning_rate: 0.03  # recipe.yaml:8", "layer.2", "0: layer.2, 5: layer.1", "estimate", "unknown"):
        assert part in out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("train", "none.yaml"), "no such recipe"),
        (("train", "recipe.yaml", "training.lr=1"), "unknown key 'training.lr'"),
        (("train", "recipe.yaml", "data.train=[red]none.jsonl"), "[red]none.jsonl"),
        (("check", "recipe.yaml", "model=./none"), "no such model folder"),
        (("evaluate", "runs/none"), "there is no run here"),
        (("evaluate", "runs/small", "--test", "deu"), "LANGUAGE=PATH"),
        (("report", "runs/none"), "found:"),
        (("recipes", "copy", "none"), "demo"),
    ],
)
def test_errors_are_a_few_lines_and_status_2(made, cli, monkeypatch, arguments, expected):
    folder, _ = made
    monkeypatch.chdir(folder)
    status, out, err = cli(*arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert expected in err
    assert "Traceback" not in err
    assert out == ""


def test_recipes_are_listed_and_copied(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = cli("recipes")
    assert status == 0
    assert all(name in out for name in shipped())
    assert set(json.loads(cli("recipes", "--json")[1])) == set(shipped())
    assert cli("recipes", "copy", "demo")[0] == 0
    assert (tmp_path / "demo.yaml").read_bytes() == shipped()["demo"].read_bytes()
    status, _, err = cli("recipes", "copy", "demo")
    assert status == 2
    assert "not overwritten" in err


def test_only_the_first_process_of_a_launch_speaks():
    code = "from graftlm.cli import out, err; out.print('hello'); err.print('hello')"
    for rank, expected in (("0", "hello\n"), ("1", "")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={"RANK": rank, "PATH": ""}
        )
        assert (done.stdout, done.stderr) == (expected, expected)

"""`graftlm compare` as it is typed."""

import json

import pytest
from processes import python
from small import small_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a recipe, and what comparing two schedules printed."""
    folder = small_folder(tmp_path_factory.mktemp("verb"), train=16)
    return folder, graftlm(folder, "compare", "recipe.yaml", "training.max_steps=6", *VARY, "--seeds", "2")


VARY = ("--vary", "unfreezing.schedule=standard,gradual")


def graftlm(folder, *arguments):
    return python("-m", "graftlm", *arguments, folder=folder)


def test_lines_while_it_runs_and_tables_at_the_end(made):
    folder, done = made
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "studies/small-schedule: 4 runs, 0 of them finished"
    assert [line.split(":")[0] for line in lines[1:]] == [
        f"[{number}/4] {variant} · seed {seed}"
        for number, (seed, variant) in enumerate(
            ((seed, variant) for seed in (0, 1) for variant in ("standard", "gradual")), 1
        )
    ]
    for shown in ("Scores", "Against standard", "Gain and cost", "English, source*", "Noise floor:", "p, Holm"):
        assert shown in done.stdout
    assert "page: studies/small-schedule/study.html" in done.stdout
    assert (folder / "studies" / "small-schedule" / "study.md").is_file()


def test_the_second_time_it_reads_and_prints_json(made):
    folder, _ = made
    again = graftlm(folder, "compare", "recipe.yaml", "training.max_steps=6", *VARY, "--seeds", "2", "--json")
    assert again.returncode == 0 and again.stderr == "studies/small-schedule: 4 runs, 4 of them finished\n"
    read = json.loads(again.stdout)
    assert read["schema"] == "graftlm.study/1" and read["runs_finished"] == 4
    assert [variant["name"] for variant in read["variants"]] == ["standard", "gradual"]


def test_report_writes_the_page_again(made):
    folder, _ = made
    page = folder / "studies" / "small-schedule" / "study.html"
    page.unlink()
    done = graftlm(folder, "report", "studies/small-schedule")
    assert done.returncode == 0 and done.stdout.strip() == "studies/small-schedule/study.html" and page.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "something that varies"),
        ((*VARY, "--variant", "adapter.r=2"), "something that varies"),
        (("--vary", "adapter.r=2"), "nothing to compare with"),
        ((*VARY, "--shard", "3/2"), "a shard is written i/n"),
        (("--vary", "adapter.q=2,3"), "unknown key 'adapter.q'"),
        (("--vary", "adapter.r"), "what varies is written KEY=a,b,c"),
    ],
)
def test_mistakes_are_said_in_a_few_lines_before_anything_runs(made, arguments, message):
    folder, _ = made
    done = graftlm(folder, "compare", "recipe.yaml", *arguments, "--name", "mistake")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "studies" / "mistake").exists()


def test_a_study_file_takes_no_options_that_it_has_keys_for(made):
    folder, _ = made
    (folder / "study.yaml").write_text("name: a\nrecipe: recipe.yaml\nvary: {adapter.r: [2, 4]}\n")
    done = graftlm(folder, "compare", "study.yaml", "--seeds", "2")
    assert done.returncode == 2 and "--seeds beside study.yaml" in done.stderr

"""A ranking as a page: what was read is what was written, text is inert, the base model has its place."""

import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from graftlm.cli import app
from graftlm.errors import DataError
from graftlm.ranking_report import write_ranking
from graftlm.sources.pool import Skipped
from graftlm.sources.result import Ranking, ranked

RANKING = Ranking(
    method="esm-logme",
    model="org/base",
    rows=60,
    classes=2,
    sources=ranked([(f"task-{n}", -0.5 - n / 100, 0.01, f"org/task-{n}", None) for n in range(40)]),
    skipped=(Skipped("<b>bad</b>", "damaged"),),
    without_source=-0.525,
    seconds=1.5,
    notes=("scores in float32",),
)


def test_a_ranking_is_read_as_it_was_written(tmp_path):
    write_ranking(RANKING, tmp_path)
    assert Ranking.read(tmp_path) == RANKING == Ranking.read(tmp_path / "ranking.json")


def test_the_page_shows_the_best_and_the_base_model(tmp_path):
    page = write_ranking(RANKING, tmp_path).read_text()
    assert "task-0 comes first; 3 of 40 source tasks score above the base model as it is." in page
    assert page.count("no source task") == 2, "once for a wide page, once for a phone"
    assert "<b>bad" not in page and "&lt;b&gt;bad" in page and "scores in float32" in page
    assert "10 more are in the table" in page and page.count('<th scope="row">') == 40
    assert "default-src 'none'" in page and not re.search(r"(src|href)=\"http", page)


def test_nothing_above_the_base_model_is_said(tmp_path):
    page = write_ranking(replace(RANKING, without_source=0.0, classes=None), tmp_path).read_text()
    assert "None of 40 source tasks scores above" in page and "regression" in page


def test_the_verb_writes_the_page_again(tmp_path):
    write_ranking(RANKING, tmp_path).unlink()
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0 and (tmp_path / "ranking.html").is_file()


@pytest.mark.parametrize(
    "text", [None, "no json", "[]", '{"schema": "graftlm.ranking/9"}', '{"schema": "graftlm.ranking/1"}']
)
def test_what_is_no_ranking_is_an_error(tmp_path, text):
    if text is not None:
        (tmp_path / "ranking.json").write_text(text)
    with pytest.raises(DataError, match="ranking"):
        Ranking.read(tmp_path)

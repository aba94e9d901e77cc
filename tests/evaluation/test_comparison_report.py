"""The study page as a parser and a browser see it."""

import re

import pytest
from evaluation.made_up_study import made_up_comparison
from evaluation.test_report import HOSTILE, Page, assert_inert, in_chromium, server

from graftlm.evaluation.comparison import Failure
from graftlm.evaluation.comparison_report import write_comparison_report

__all__ = ["server"]  # a fixture


def page_of(folder, **changes):
    made_up_comparison(folder, **changes)
    text = write_comparison_report(folder).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return page_of(tmp_path_factory.mktemp("page"))


def test_the_questions_come_in_order(whole):
    text, page = whole
    assert_inert(text, page)
    assert [re.sub("<[^>]*>", "", title) for title in re.findall(r"<h2[^>]*>(.*?)</h2>", text)] == [
        "Is any of them better than standard?",
        "How well does each do in each language?",
        "What does the gain cost?",
        "How did training go?",
        "When did each layer train?",
        "What was compared?",
    ]
    assert len(text) < 600_000


def test_every_picture_is_described_and_its_ids_are_its_own(whole):
    text, page = whole
    pictures = page.all("svg")
    assert [picture["class"] for picture in pictures] == ["wide", "narrow"] * 3 + ["small"] * 2
    assert all(picture["role"] == "img" and len(picture["aria-label"]) > 30 for picture in pictures)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert "#01" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL), "colours are the page's own"


def test_what_the_page_says(whole):
    shown = whole[1].flat()
    assert "starter · 3 variants · 5 seeds · 15 of 15 runs" in shown
    assert "gradual is not told apart from it" in shown or "gradual is better than it beyond chance" in shown
    assert "* Choices (checkpoint, tuned settings) were made on labels in English" in shown
    assert "noise floor between sets of seeds" in shown and "What tuning chose" in shown
    assert "FUN, mean without labels" in shown


def test_hostile_names_and_errors_are_inert(tmp_path):
    failure = Failure(run=HOSTILE, error=f"{HOSTILE}\nsecond line")
    text, page = page_of(
        tmp_path, seeds=2, items=40, names=("standard", HOSTILE, "FUN"), name=HOSTILE, failures=(failure,)
    )
    assert_inert(text, page)
    assert "<script" not in text and "\u202e" not in text


def test_a_study_that_is_half_done_and_one_without_traces(tmp_path):
    text, page = page_of(tmp_path, seeds=1, items=40, runs_finished=2, runs_planned=9)
    assert_inert(text, page)
    assert "2 of 9 runs are finished" in page.flat() and "Noise floor: unknown" in page.flat()
    for trace in tmp_path.rglob("unfreezing.jsonl"):
        trace.unlink()
    for log in tmp_path.rglob("log.jsonl"):
        log.unlink()
    bare = write_comparison_report(tmp_path).read_text(encoding="utf-8")
    assert "When did each layer train" not in bare and "How did training go" not in bare


def test_in_chromium_nothing_leaves_the_page_and_no_name_runs(tmp_path, server):
    port, asked = server
    name = "<img src=http://leak.example/name><script>document.title='owned'</script>"
    text, _ = page_of(tmp_path, seeds=2, items=40, names=("standard", name, "FUN"), name=name)
    path = tmp_path / "study.html"
    # a planted picture would be asked for, if the policy did not forbid it: the check can fail
    planted = text.replace("<main>", "<main><img src=http://leak.example/planted>")
    path.write_text(planted, encoding="utf-8")
    dom = in_chromium(path, port)
    assert asked == []
    assert dom.count("<svg") == 8 and "<title>owned" not in dom and "<script" not in dom
    path.write_text(planted.replace("Content-Security-Policy", "X-None"), encoding="utf-8")
    in_chromium(path, port)
    assert asked == ["/planted"]

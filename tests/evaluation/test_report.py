"""The report as a parser and a browser see it: whole, self-contained, with every text inert."""

import json
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from evaluation.made_up_run import made_up_log, made_up_result, made_up_unfreezing, make_run

from graftlm.errors import DataError
from graftlm.evaluation.pictures import Trace
from graftlm.evaluation.report import write_report
from graftlm.evaluation.result import Interval, Licences
from graftlm.evaluation.summary import summary

VOID = {"meta", "link", "img", "br", "hr", "input"}
HOSTILE = "<script>alert('x')</script>\"'><img src=//evil.example/x onerror=alert(1)>&amp;$x_1$\u202egnp.exe\u2066"


class Page(HTMLParser):
    """Elements with their attributes, and the text; an end tag without its start tag is an error."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self.open = [], "", []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), [one for one, _ in self.open]))
        self.text += " " if tag in ("th", "td", "dd", "p", "h2") else ""
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), [one for one, _ in self.open]))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> inside {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1][0] != "style":
            self.text += data

    def all(self, *tags):
        return [attributes for tag, attributes, _ in self.elements if tag in tags]

    def flat(self):
        return " ".join(self.text.split())


def page_of(folder, result=None, **rows):
    text = write_report(make_run(folder, result, **rows)).read_text(encoding="utf-8")
    return text, Page(text)


def assert_inert(text, page):
    """Nothing that runs, nothing that is fetched."""
    assert {tag for tag, _, _ in page.elements} <= {
        "html", "head", "meta", "title", "style", "body", "main", "header", "section", "footer", "h1", "h2", "p",
        "h3", "ul", "li",
        "dl", "dt", "dd", "div", "small", "figure", "figcaption", "table", "caption", "thead", "tbody", "tr", "th",
        "td", "b", "bdi", "span", "code", "details", "summary",
        "svg", "g", "path", "defs", "clippath", "rect", "text", "use", "image", "tspan",
    }  # fmt: skip
    for tag, attributes, _ in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in ("src", "href", "xlink:href", "action", "srcset", "poster", "background"):
                assert value.startswith(("#", "data:image/png;base64,")), f"<{tag} {name}={value}>"
            assert not re.search(r"url\((?!#)", value or ""), f"<{tag} {name}={value}>"
    style = re.search(r"<style>(.*?)</style>", text, flags=re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    policies = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    head = [tag for tag, _, parents in page.elements if parents[-1:] == ["head"]]
    assert head[:2] == ["meta", "meta"], "the policy comes before anything that it is for"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The made-up run's report, its parsed page and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return *page_of(folder), folder


def test_a_whole_report(whole):
    text, page, folder = whole
    assert_inert(text, page)
    assert len(text) < 400_000
    shown = page.flat()
    assert "starter learned classification from labels in English and reaches 74.2 % accuracy there." in shown
    assert (
        "In five languages without labels it averages 62.8 %: best in French (66.7 %), worst in Czech (56.9 %)."
        in shown
    )
    assert "LoRA, r = 8 · fisher unfreezing every 20 steps · seed 0" in shown
    assert "4.3 % of training" in shown and "1.36 % of 7,214,592" in shown and "0.91 GB" in shown
    assert "unfreezing.schedule fisher override" in shown and "5 values left at their default" in shown
    assert "sampled (labels drawn from the model's own predictions, squared gradient per example); 64 examples" in shown
    assert "transformers 5.23.0" in shown and "CC0-1.0" in shown
    assert sorted(path.suffix for path in folder.iterdir()) == [".html", ".json", ".jsonl", ".jsonl", ".yaml"]


def test_the_questions_come_in_order(whole):
    text, *_ = whole
    assert re.findall(r"<h2[^>]*>([^<]*)</h2>", text) == [
        "How well does it do in each language?",
        "When did each layer train?",
        "How did training go?",
        "What did it cost?",
        "Which recipe was it?",
        "What is it made of?",
    ]


def test_every_picture_is_drawn_for_both_widths_in_the_colours_of_the_page_and_described(whole):
    text, page, _ = whole
    pictures = page.all("svg")
    assert [picture["class"] for picture in pictures] == ["wide", "narrow"] * 3
    for picture in pictures:
        assert picture["role"] == "img" and len(picture["aria-label"]) > 60
    labels = [picture["aria-label"] for picture in pictures]
    assert (
        "German 64.1 %" in labels[0]
        and "layer.9 at step 0, layer.8 at step 20" in labels[2]
        and "training loss from" in labels[4]
    )
    assert not re.search(r"#0[1-6]0[1-6]0[1-6]\b", text), "a marker colour is left"
    assert {"ink", "muted", "line", "accent", "second", "paper"} <= set(
        re.findall(r"var\(--(\w+)\)", "".join(re.findall("<svg.*?</svg>", text, re.S)))
    )
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
    assert {one or other for one, other in targets} <= set(ids)


def test_the_heat_map_has_the_cells_and_the_marks_it_was_given(tmp_path):
    rows = made_up_unfreezing(layers=4, steps=100, every=10, opens_every=30)
    text, _ = page_of(tmp_path, unfreezing=rows)
    cells = re.search(r'<g id="trace-wide-cells">(.*?)</g>', text, re.S)[1]
    assert cells.count("<path") + cells.count("<use") >= 4 * 10
    assert len(set(re.findall(r"fill: (#\w{6})", cells))) > 20
    trace = Trace.of(rows)
    assert trace.values.shape == (4, 10) and trace.layers == ("layer.0", "layer.1", "layer.2", "layer.3")
    assert trace.values[2, 3] == next(row["trace"] for row in rows if (row["layer"], row["step"]) == ("layer.2", 30))
    # top-down, but for the two in the middle
    assert trace.opened == {"layer.3": 0, "layer.1": 30, "layer.2": 60, "layer.0": 90}


def test_a_large_heat_map_is_an_image(tmp_path):
    text, page = page_of(tmp_path, unfreezing=made_up_unfreezing(layers=24, steps=4000, every=20, opens_every=100))
    assert_inert(text, page)
    assert page.all("image") and len(text) < 500_000


def test_a_run_with_nothing_but_a_result(tmp_path):
    bare = made_up_result(
        model=None, versions={}, licences=Licences(), selected_on=(),
        scores=[s.model_copy(update=dict.fromkeys(("majority", "standard", "gain"))) for s in made_up_result().scores],
    )  # fmt: skip
    text, page = page_of(tmp_path, bare, unfreezing=None, log=None, resolved=None)
    assert_inert(text, page)
    assert len(page.all("svg")) == 2
    assert "standard" not in page.flat() and "majority" not in page.flat() and "unknown" in page.flat()


@pytest.mark.parametrize("scores", [[], made_up_result().scores[:1], made_up_result().scores[1:2]])
def test_few_scores(tmp_path, scores):
    text, page = page_of(tmp_path, made_up_result(scores=scores))
    assert_inert(text, page)


def test_undefined_values_and_metrics_that_are_not_percent(tmp_path):
    metrics = [
        {"rmse": Interval(value=None), "pearson": Interval(value=-0.0001)},
        {"rmse": Interval(value=1.25, low=1.1, high=1.4), "pearson": Interval(value=0.5)},
        {"rmse": Interval(value=0.75, low=None, high=None), "pearson": Interval(value=None)},
    ]
    scores = [
        score.model_copy(
            update={
                "metrics": one,
                "majority": None,
                "standard": None,
                "gain": Interval(value=-0.25, low=-0.4, high=-0.1),
            }
        )
        for score, one in zip(made_up_result().scores, metrics, strict=False)
    ]
    text, page = page_of(
        tmp_path,
        made_up_result(metric="rmse", task="regression", scores=scores),
        log=[{"step": 1, "loss": float("nan")}],
    )
    assert_inert(text, page)
    assert "best in French (0.750), worst in German (1.250)" in page.flat(), "the smaller error is the better one"
    assert "is −0.250 on average; its 95 % interval lies below zero in 2 of 2 languages" in page.flat()
    assert "nan" not in page.flat().lower().split()


@pytest.mark.parametrize("trace", [None, 0.0])
def test_a_schedule_without_a_trace_shows_what_was_open(tmp_path, trace):
    rows = [row | {"trace": trace, "kind": None, "examples": 0} for row in made_up_unfreezing(layers=3, steps=60)]
    text, page = page_of(tmp_path, unfreezing=rows)
    assert_inert(text, page)
    assert "record_trace" in page.flat() and "tr(F) =" not in page.flat()
    assert "Chart of frozen and unfrozen layers" in page.all("svg")[2]["aria-label"]


def test_standard_training_without_a_trace_has_no_picture_of_its_layers(tmp_path):
    rows = [row | {"trace": None, "open": True, "opened": row["step"] == 0} for row in made_up_unfreezing(steps=20)]
    _, page = page_of(tmp_path, unfreezing=rows)
    assert len(page.all("svg")) == 4 and "When did each layer train?" not in page.flat()


def test_a_decision_without_a_measurement_is_no_gap(tmp_path):
    """The last layer is opened without measuring: there is nothing to choose between."""
    rows = made_up_unfreezing(layers=3, steps=60)
    kept, _ = page_of(tmp_path / "a", unfreezing=[row for row in rows if row["step"] != 40])
    without = [row | {"trace": None, "kind": None, "examples": 0} if row["step"] == 40 else row for row in rows]
    gap, _ = page_of(tmp_path / "b", unfreezing=without)
    colours = [
        re.findall(r"fill: (#\w{6})", re.search(r'<g id="trace-wide-cells">(.*?)</g>', text, re.S)[1])
        for text in (kept, gap)
    ]
    assert colours[0] == colours[1]
    assert Trace.of(without).opened == Trace.of(rows).opened


def test_the_picture_of_the_layers_ends_where_the_run_ends(tmp_path):
    text, _ = page_of(tmp_path, unfreezing=made_up_unfreezing(steps=100, every=20))
    ends = [
        max(int(tick) for tick in re.findall(r">(\d+)</text>", svg))
        for svg in re.findall("<svg.*?</svg>", text, re.S)[2:]
    ]
    assert ends == [300] * 4, "heat map and curves, wide and narrow, share their steps"


def test_the_error_of_the_trace_is_told(tmp_path):
    rows = [row | {"standard_error": row["trace"] * 0.27} for row in made_up_unfreezing()]
    _, page = page_of(tmp_path, unfreezing=rows)
    assert "standard error of a value is about 27 % of it" in page.flat()


@pytest.mark.parametrize(
    ("weak", "sentence"),
    [
        ([], None),
        ([1], "In German it is not clearly better"),
        ([1, 3], "In Spanish and German it is not clearly better"),
        (range(6), "In no language is it clearly better"),
    ],
)
def test_a_score_like_the_majority_is_called_that(weak, sentence):
    scores = [
        score.model_copy(update={"majority": 0.99 if number in weak else 0.1})
        for number, score in enumerate(made_up_result().scores)
    ]
    text = " ".join(summary(made_up_result(scores=scores)))
    assert (sentence in text) if sentence else ("clearly better" not in text)


def test_a_layer_that_never_opened_and_one_that_was_not_measured(tmp_path):
    rows = [
        row for row in made_up_unfreezing(layers=3, steps=60) if not (row["layer"] == "layer.1" and row["step"] == 20)
    ]
    rows = [row | {"open": False, "opened": False} if row["layer"] == "layer.0" else row for row in rows]
    text, page = page_of(tmp_path, unfreezing=rows)
    assert_inert(text, page)
    assert "layer.0 at step" not in page.all("svg")[2]["aria-label"]


def test_hostile_text_is_shown_and_does_nothing(tmp_path):
    first, second, *_ = made_up_result().scores
    scores = [
        first,
        second.model_copy(update={"language": HOSTILE, "metrics": second.metrics | {HOSTILE: Interval(value=0.5)}}),
    ]
    cost = made_up_result().cost.model_copy(update={"device": HOSTILE})
    result = made_up_result(
        name=HOSTILE, model=HOSTILE, source=HOSTILE, task=HOSTILE, scores=scores, cost=cost, selected_on=(HOSTILE,),
        versions={HOSTILE: HOSTILE}, licences=Licences(model=HOSTILE, data=HOSTILE, weights=HOSTILE),
        forgetting={HOSTILE: Interval(value=-0.1)},
    )  # fmt: skip
    rows = [
        row | {"layer": f"{HOSTILE}.{row['layer']}", "kind": HOSTILE} for row in made_up_unfreezing(layers=3, steps=40)
    ]
    resolved = f"name: {json.dumps(HOSTILE)}  # {HOSTILE}\n? {json.dumps(HOSTILE)}\n: {json.dumps(HOSTILE)}\n"
    text, page = page_of(tmp_path, result, unfreezing=rows, resolved=resolved)
    assert_inert(text, page)
    assert page.text.count("<script>alert('x')</script>") > 12, "shown as text wherever it stands"
    assert not {"\u202e", "\u2066"} & set(text), "characters that turn the direction of reading are written out"
    assert "\\u202egnp.exe" in page.text
    assert len(page.all("title")) == 1


def test_labels_in_scripts_that_matplotlib_has_no_glyphs_for(tmp_path):
    scores = [made_up_result().scores[0].model_copy(update={"language": "日本語-ქართული-हिन्दी"})]
    text, page = page_of(tmp_path, made_up_result(scores=scores))
    assert_inert(text, page)
    assert "日本語" in re.search("<svg.*?</svg>", text, re.S)[0]


def test_names_of_layers_of_encoder_and_decoder_are_kept(tmp_path):
    rows = [
        {"step": step, "layer": layer, "position": position, "trace": 0.1 + position, "open": True,
         "opened": step == 0, "kind": "exact", "examples": 8}
        for step in (0, 5)
        for position, layer in enumerate(["embeddings", "encoder.0", "encoder.1", "decoder.0"])
    ]  # fmt: skip
    text, _ = page_of(tmp_path, unfreezing=rows)
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert {"embeddings", "encoder.0", "encoder.1", "decoder.0", "layer, bottom to top"} <= set(drawn)


def test_the_same_folder_gives_the_same_bytes(whole):
    text, _, folder = whole
    assert write_report(folder).read_text(encoding="utf-8") == text


def test_a_broken_line_is_named(tmp_path):
    make_run(tmp_path, log=json.dumps(made_up_log()[0]) + "\n{broken\n")
    with pytest.raises(DataError, match=r"log\.jsonl:2"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_comment_in_a_value_is_not_taken_for_its_origin(tmp_path):
    _, page = page_of(tmp_path, resolved='name: "a  # b"\nseed: 0  # run.yaml:7\n')
    assert "name a # b seed 0 run.yaml:7" in page.flat()


@pytest.fixture
def server():
    """A web server of this machine and the paths that it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running.server_port, asked
        running.shutdown()
        thread.join()


def in_chromium(path, port):
    """The page's DOM once loaded; every .example host is our server, the browser's own errands find nobody."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += [
        "--disable-component-update",
        "--virtual-time-budget=2000",
        f"--user-data-dir={path.parent / 'chromium'}",
    ]
    options += [f"--host-resolver-rules=MAP *.example 127.0.0.1:{port}, MAP * ~NOTFOUND", "--dump-dom"]
    done = subprocess.run([found, *options, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_in_chromium_nothing_leaves_the_page_and_no_label_runs(tmp_path, server):
    port, asked = server
    label = "<img src=http://leak.example/label><script>document.title='owned'</script>\"><svg onload=alert(1)>"
    score = made_up_result().scores[1].model_copy(update={"language": label})
    path = write_report(make_run(tmp_path, made_up_result(name=label, scores=[score])))
    # a planted picture would be asked for, if the policy did not forbid it: the check can fail
    planted = path.read_text(encoding="utf-8").replace("<main>", "<main><img src=http://leak.example/planted>")
    path.write_text(planted, encoding="utf-8")
    dom = in_chromium(path, port)
    assert asked == []
    assert dom.count("<svg") == 6 and "<title>owned" not in dom and "<script" not in dom

    path.write_text(planted.replace("Content-Security-Policy", "X-None"), encoding="utf-8")
    in_chromium(path, port)
    assert asked == ["/planted"]

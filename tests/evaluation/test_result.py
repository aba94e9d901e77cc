"""result.json: what is written is read back, other versions are refused, and the documented schema is the real one."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation.made_up_run import made_up_result
from rich.console import Console

from graftlm.errors import DataError
from graftlm.evaluation.record import schema_rows, update_document, write_text
from graftlm.evaluation.result import Cost, Interval, Result

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "result.md"


def test_what_is_written_is_read_back(tmp_path):
    result = made_up_result()
    path = result.write(tmp_path)
    assert path == tmp_path / "result.json"
    assert Result.read(tmp_path) == Result.read(path) == result
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["schema"] == "graftlm.result/1"
    assert record["created"] == "2026-11-21T21:40:00Z"
    assert record["scores"][1]["metrics"]["accuracy"]["value"] == 0.641


def test_numbers_that_json_lacks_become_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    scores = [
        made_up_result().scores[0].model_copy(update={"metrics": {"accuracy": Interval(value=nan, low=-inf, high=inf)}})
    ]
    made_up_result(scores=scores, cost=made_up_result().cost.model_copy(update={"peak_memory_bytes": None})).write(
        tmp_path
    )
    text = (tmp_path / "result.json").read_text()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    record = json.loads(text, parse_constant=refuse)
    assert record["scores"][0]["metrics"]["accuracy"] == {"value": None, "low": None, "high": None}
    assert Result.read(tmp_path).primary(scores[0]).value is None


def test_an_unchecked_nan_is_an_error_and_leaves_the_old_file(tmp_path):
    path = made_up_result().write(tmp_path)
    before = path.read_text()
    cost = made_up_result().cost.model_copy(update={"train_seconds": float("nan")})  # model_copy does not validate
    with pytest.raises(ValueError, match="JSON compliant"):
        made_up_result().model_copy(update={"cost": cost}).write(tmp_path)
    assert path.read_text() == before
    assert Cost.model_validate(cost.model_dump()).train_seconds is None


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_text(path, "old")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"], "the temporary file is gone"


def test_a_written_file_has_the_rights_any_new_file_has(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "graftlm.result/2"}, r"another schema version[\s\S]*graftlm\.result/2[\s\S]*graftlm\.result/1"),
        ({"schema": None}, "another schema version"),
        ({"scorse": []}, "scorse"),
        ({"seed": "zero"}, "seed"),
        ({"created": "2026-11-21T21:40:00"}, "created"),
        ({"cost": {"steps": -1}}, r"cost\."),
    ],
)
def test_other_records_are_refused_with_the_reason(tmp_path, change, message):
    path = made_up_result().write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        Result.read(tmp_path)


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no result here[\s\S]*graftlm train"):
        Result.read(tmp_path)
    (tmp_path / "result.json").write_text('{"schema": ')
    with pytest.raises(DataError, match="not JSON"):
        Result.read(tmp_path)
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(DataError, match="another schema"):
        Result.read(tmp_path)


def test_source_comes_first_and_zero_shot_is_the_rest():
    result = made_up_result(scores=made_up_result().scores[::-1])
    assert [score.language for score in result.ordered] == ["eng", "ces", "por", "spa", "fra", "deu"]
    assert [score.language for score in result.zero_shot] == ["ces", "por", "spa", "fra", "deu"]


def test_the_table_for_the_terminal_and_for_markdown():
    table = made_up_result().table()
    assert table.columns == ("language", "accuracy", "macro F1", "majority", "standard", "gain")
    assert table.rows[0][:4] == ("English", "74.2 [68.0, 80.4]", "72.5", "25.0")
    assert "(204 items)" in table.caption
    lines = table.markdown().splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2].startswith("| English, source | 74.2 [68.0, 80.4] | 72.5 |")
    assert len({line.count("|") for line in lines}) == 1
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    assert "Portuguese" in (shown := console.export_text()) and "[57.9, 70.3]" in shown, (
        "brackets are not taken for rich's markup"
    )


def test_the_table_leaves_out_what_was_not_run_and_keeps_hostile_names_in_their_cell():
    score = (
        made_up_result()
        .scores[1]
        .model_copy(update={"standard": None, "gain": None, "majority": None, "language": "x|<b>\n`y`"})
    )
    table = made_up_result(scores=[score]).table()
    assert table.columns == ("language", "accuracy", "macro F1")
    assert "gain" not in table.caption
    row = table.markdown().splitlines()[2]
    assert row.startswith(r"| x\|&lt;b&gt; \`y\` | 64.1 [57.9, 70.3] |")


def test_the_document_lists_the_fields_of_the_schema_and_no_others():
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| (.*) \|$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert rows == list(schema_rows(Result)), "run: python -m graftlm.evaluation.result docs/reference/result.md"


def test_the_example_in_the_document_is_a_result():
    example = re.search(r"```json\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)[1]
    assert Result.model_validate(json.loads(example)).schema_version == "graftlm.result/1"


def test_every_field_is_described():
    assert all(meaning for _, _, meaning in schema_rows(Result))


def test_reading_a_result_loads_neither_torch_nor_matplotlib():
    heavy = {"torch", "matplotlib", "transformers", "sklearn"}
    code = f"import graftlm.evaluation.result, sys; print({heavy} & {{*sys.modules}})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


def test_the_document_can_be_brought_up_to_date(tmp_path):
    copy = tmp_path / "result.md"
    copy.write_text(DOCUMENT.read_text(encoding="utf-8").replace("| `name` |", "| `nome` |"), encoding="utf-8")
    update_document(Result, copy)
    assert copy.read_text(encoding="utf-8") == DOCUMENT.read_text(encoding="utf-8")

"""The script that times batches of maps runs, on whatever device there is."""

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "sources_speed"
if not FOLDER.is_dir():  # an installed package without the repository
    pytest.skip("the benchmarks are not in this installation", allow_module_level=True)


def test_the_gpu_script_writes_its_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    try:
        script = importlib.import_module("gpu")
        sizes = ["--sizes", "60,40,3", "30,40,2"]
        script.main([*sizes, "--maps", "3", "--ranked", "5", "--out", str(tmp_path / "rows.jsonl"), "--device", "cpu"])
        script.main([*sizes, "--seconds", "0", "--out", str(tmp_path / "none.jsonl"), "--device", "cpu"])
    finally:
        for name in ("gpu", "run"):
            sys.modules.pop(name, None)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    kinds = [row["what"].split(",")[0].split()[-1] for row in rows]
    assert kinds == ["batch", "threads"] * 4 + ["ranking"] * 2 and all(min(row["ms"]) > 0 for row in rows)
    assert max(row.get("error", 0) for row in rows) < 1e-4 and all("cpu" in row["device"] for row in rows)
    assert (tmp_path / "none.jsonl").read_text() == "" and "left out" in capsys.readouterr().out

"""A run belongs to its data: files that changed since are an error, for a finished run and for one that was stopped."""

import shutil
import subprocess

import pytest
from small import small_folder, small_recipe

from graftlm.errors import DataError
from graftlm.fingerprint import FILE, changed_files, write_digests
from graftlm.run import run_recipe
from graftlm.study.runner import finished


def test_the_file_is_what_sha256sum_reads(tmp_path):
    recipe = small_recipe(small_folder(tmp_path))
    write_digests(recipe, recipe.folder)
    names = {line.split("  ")[1] for line in (recipe.folder / FILE).read_text().splitlines()}
    assert names == {f"../../{name}" for name in ("train.jsonl", "dev.jsonl", "test.eng.jsonl", "test.deu.jsonl")}
    if tool := shutil.which("sha256sum"):
        assert subprocess.run([tool, "-c", FILE], cwd=recipe.folder, capture_output=True, check=False).returncode == 0
    (tmp_path / "test.deu.jsonl").write_text("{}\n")
    assert changed_files(recipe, recipe.folder) == ["../../test.deu.jsonl"]
    if tool:
        assert subprocess.run([tool, "-c", FILE], cwd=recipe.folder, capture_output=True, check=False).returncode == 1


def test_files_behind_a_pattern_count_one_by_one(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    base = small_recipe(small_folder(tmp_path))
    values = f"data={{train: {tmp_path}/*.txt, test: {{eng: {tmp_path}/b.txt}}}}"
    recipe = base.changed("task=causal_lm", values, "adapter.target_modules=auto", "references=[]")
    write_digests(recipe, recipe.folder)
    assert len((recipe.folder / FILE).read_text().splitlines()) == 2
    assert changed_files(recipe, recipe.folder) == []
    (tmp_path / "c.txt").write_text("a new novel")
    assert changed_files(recipe, recipe.folder) == ["../../c.txt"]


def test_neither_resumed_nor_taken_as_finished_on_other_data(tmp_path):
    recipe = small_recipe(small_folder(tmp_path), "training.max_steps=2", "references=[]")
    run_recipe(recipe, progress=False)
    assert finished(recipe)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    assert not finished(recipe), "a study notices as well"
    with pytest.raises(DataError, match=r"(?s)on other data.*changed since: \.\./\.\./train\.jsonl.*name=ANOTHER_NAME"):
        run_recipe(recipe, progress=False)
    (recipe.folder / "result.json").unlink()
    with pytest.raises(DataError, match="on other data"):
        run_recipe(recipe, progress=False)
    (tmp_path / "train.jsonl").unlink()
    assert changed_files(recipe, recipe.folder) == [], "what is gone cannot be compared; reading it is another error"

"""Rankings against the plain score of each mapped embedding; what is skipped; what is refused."""

import json
import random

import datasets
import numpy as np
import pytest
from sources.held import count_held
from tiny import tiny_model, tiny_tokenizer

import graftlm
from graftlm import DataError, EmbeddingSpaceMap, ModelError, SetupError, SourcePool
from graftlm.measure.evidence import by_svd
from graftlm.sources.embed import Embedder
from graftlm.sources.rank import rank_maps
from graftlm.sources.target import read_target

WIDTH = 16


@pytest.fixture(scope="module")
def embedder():
    return Embedder(tiny_model("bert", "base"), tokenizer=tiny_tokenizer(), pooling="mean")


def rows(count=60, seed=0):
    """Texts of "w0" … "w19" (class 0) and "w20" … "w39" (class 1), one word in four drawn from all."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        label = rng.randrange(2)
        words = [f"w{rng.randrange(40) if rng.random() < 0.25 else 20 * label + rng.randrange(20)}" for _ in range(5)]
        made.append({"text": " ".join(words), "label": label, "number": label + rng.gauss(0, 1)})
    return made


def maps(count=6, width=WIDTH, base="org/base"):
    rng = np.random.default_rng(1)
    found = []
    for number in range(count):
        bias = rng.normal(size=width).astype(np.float32)
        if number % 3 == 0:
            weight = (np.eye(width) + rng.normal(size=(width, width))).astype(np.float32)
            found.append(EmbeddingSpaceMap(base, f"org/task-{number}", bias=bias, weight=weight))
        else:
            up, down = rng.normal(size=(2, width, 2)).astype(np.float32)
            identity = number % 3 == 1
            found.append(EmbeddingSpaceMap(base, f"org/task-{number}", bias=bias, up=up, down=down, identity=identity))
    return found


def plain(esm, features, columns):
    return by_svd(esm(features.astype(float)), columns).score


COLUMNS = {"text_column": "text", "label_column": "label"}


@pytest.mark.parametrize("count", [60, 16, 12])
@pytest.mark.parametrize("label", ["label", "number"])
def test_scores_are_those_of_mapped_embeddings(embedder, count, label):
    data = rows(count)
    found = graftlm.rank_source_tasks(embedder, data, text_column="text", label_column=label, pool=maps())
    target = read_target(data, "text", label)
    features = embedder(target.texts)
    expected = {esm.task: plain(esm, features, target.columns) for esm in maps()}
    assert {one.name: one.score for one in found.sources} == pytest.approx(expected, abs=1e-8)
    assert [one.name for one in found.sources] == sorted(expected, key=expected.get, reverse=True)
    assert [one.rank for one in found.sources] == [1, 2, 3, 4, 5, 6]
    assert found.without_source == pytest.approx(by_svd(features.astype(float), target.columns).score, abs=1e-8)
    assert (found.rows, found.classes) == (count, 2 if label == "label" else None) and not found.skipped


@pytest.mark.parametrize("count", [60, 12])
def test_float32_ranks_alike_and_its_best_are_exact(embedder, count, tmp_path, monkeypatch):
    """Twelve maps, of which five are scored again (fifty, outside of this test); from a pool and from a list."""
    monkeypatch.setattr("graftlm.sources.rank._EXACT", 5)
    pool = SourcePool.create(tmp_path / "pool", base_model="org/base", width=WIDTH)
    pool.add_all(maps(12))
    exact = graftlm.rank_source_tasks(embedder, rows(count), pool=pool, **COLUMNS)
    for given in (pool, maps(12)):
        fast = graftlm.rank_source_tasks(embedder, rows(count), pool=given, precision="float32", **COLUMNS)
        assert [one.task for one in fast.sources[:5]] == [one.task for one in exact.sources[:5]]
        assert [one.score for one in fast.sources[:5]] == pytest.approx(
            [one.score for one in exact.sources[:5]], abs=1e-8
        )
        last = {one.task: one.score for one in exact.sources}
        assert all(abs(one.score - last[one.task]) < 1e-4 for one in fast.sources)
        assert "float32" in fast.notes[-1]


def test_a_source_that_helps_stands_above_those_that_do_not(embedder):
    """A map that moves the classes apart, made from the labels; ten that are noise."""
    data = rows(200)
    target = read_target(data, "text", "label")
    features = embedder(target.texts)
    moved = features + 3 * np.eye(2, WIDTH)[target.labels]
    helpful = EmbeddingSpaceMap.fit(features, moved, base_model="org/base", task="org/helpful")
    noise = [
        EmbeddingSpaceMap("org/base", f"n{i}", bias=np.zeros(WIDTH), weight=np.diag(np.arange(WIDTH) == i) * 1.0)
        for i in range(9)
    ]
    found = graftlm.rank_source_tasks(embedder, data, pool=[*noise, helpful], **COLUMNS)
    assert found.sources[0].name == "org/helpful"


def test_a_ranking_is_a_table_json_and_a_data_frame(embedder):
    found = graftlm.rank_source_tasks(embedder, rows(), pool=maps(30), **COLUMNS)
    lines = str(found).splitlines()
    assert lines[1].split()[:2] == ["1", found.sources[0].name] and "10 more" in lines[21]
    assert "no source task" in lines[22] and "30 source tasks for 60 rows (2 classes)" in lines[23]
    assert len(found.table(top=None).splitlines()) == 33
    record = json.loads(found.to_json())
    assert record["sources"][0]["name"] == found.sources[0].name and record["skipped"] == []
    frame = found.to_pandas()
    assert (
        list(frame.columns) == ["rank", "name", "score", "seconds", "task", "subset"] and len(frame) == len(found) == 30
    )
    assert all(one.seconds > 0 for one in found.sources) and found.seconds > found.embedding_seconds > 0


def test_equal_scores_have_equal_ranks(embedder):
    twice = [maps(1)[0], maps(1)[0], *maps(4)[1:]]
    found = graftlm.rank_source_tasks(embedder, rows(), pool=twice, **COLUMNS)
    same = [one.rank for one in found.sources if one.task == "org/task-0"]
    assert len(same) == 2 and same[0] == same[1] and len({one.name for one in found.sources}) == 5


def test_what_cannot_be_scored_is_named_and_counted(embedder, tmp_path):
    pool = SourcePool.create(tmp_path / "pool", base_model="org/base", width=WIDTH)
    pool.add_all(maps(4))
    broken = pool.folder / "maps" / pool.entries["org--task-2"].folder / "model.safetensors"
    broken.write_bytes(b"nothing")
    found = graftlm.rank_source_tasks(embedder, rows(), pool=pool.folder, **COLUMNS)
    assert len(found) == 3 and [one.name for one in found.skipped] == ["org--task-2"]
    assert "1 skipped" in str(found) and "org--task-2: " in str(found)

    huge = EmbeddingSpaceMap("org/base", "huge", bias=np.zeros(WIDTH), weight=np.full((WIDTH, WIDTH), 1e200))
    narrow = maps(1, width=5)
    found = graftlm.rank_source_tasks(embedder, rows(), pool=[*maps(2), huge, *narrow], **COLUMNS)
    assert {one.name for one in found.skipped} == {"huge", "org/task-0#3"} and len(found) == 2
    with pytest.raises(DataError, match="no source task could be scored"):
        graftlm.rank_source_tasks(embedder, rows(), pool=narrow, **COLUMNS)


@pytest.mark.parametrize(("threads", "held"), [(1, 1), (2, 7)])
def test_few_maps_are_in_memory_at_a_time(threads, held, tmp_path, monkeypatch):
    pool = SourcePool.create(tmp_path / "pool", base_model="org/base", width=WIDTH)
    pool.add_all(maps(18))
    most = count_held(monkeypatch)
    target = read_target(rows(), "text", "label")
    rank_maps(pool, np.random.default_rng(0).normal(size=(60, WIDTH)), target, threads=threads)
    assert len(most) == 18 and max(most) <= held


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("count", [60, 12])
def test_threads_change_the_time_alone(embedder, precision, count):
    damaged = EmbeddingSpaceMap("org/base", "huge", bias=np.zeros(WIDTH), weight=np.full((WIDTH, WIDTH), 1e200))
    given = [*maps(9), damaged, *maps(3, width=5)]
    alone, together = (
        graftlm.rank_source_tasks(embedder, rows(count), pool=given, precision=precision, threads=threads, **COLUMNS)
        for threads in (1, 3)
    )
    assert [(one.name, one.score) for one in together.sources] == [(one.name, one.score) for one in alone.sources]
    assert together.skipped == alone.skipped and len(alone) == 9


@pytest.mark.parametrize("threads", [0, True, 1.5])
def test_threads_are_counted(embedder, threads):
    with pytest.raises(SetupError, match="threads"):
        graftlm.rank_source_tasks(embedder, rows(), pool=maps(1), threads=threads, **COLUMNS)


def test_data_sets_of_every_kind(embedder):
    listed = rows()
    columns = {name: [row[name] for row in listed] for name in ("text", "label")}
    expected = graftlm.rank_source_tasks(embedder, listed, pool=maps(2), **COLUMNS).to_pandas().score.tolist()
    for data in (datasets.Dataset.from_list(listed), columns):
        found = graftlm.rank_source_tasks(embedder, data, pool=maps(2), **COLUMNS)
        assert found.to_pandas().score.tolist() == expected


def test_pairs_are_joined_as_in_the_release():
    data = [{"a": "w1 w2", "b": "w3", "label": 0}, {"a": "w4", "b": "w5", "label": 1}]
    assert read_target(data, ("a", "b"), "label").texts == ["w1 w2 [SEP] w3", "w4 [SEP] w5"]


GOOD = rows(8)


@pytest.mark.parametrize(
    ("data", "change", "kind", "message"),
    [
        ([], {}, DataError, "no row"),
        (GOOD, {"text_column": "body"}, DataError, "text_column 'body' does not exist"),
        (GOOD, {"label_column": "gold"}, DataError, "label_column 'gold' does not exist"),
        (datasets.Dataset.from_list(GOOD), {"text_column": "body"}, DataError, "does not exist"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(GOOD)}), {}, DataError, "several splits"),
        ("text", {}, DataError, "no data set"),
        ([{**GOOD[0], "text": None}, *GOOD], {}, DataError, "text is missing"),
        ([{**GOOD[0], "text": 3}, *GOOD], {}, DataError, "no string"),
        ([GOOD[0], {"text": "w1"}], {}, DataError, "missing in a row"),
        ([{**row, "label": "red"} for row in GOOD], {}, DataError, "labels are strings"),
        ([*GOOD, {"text": "w1", "label": None}], {}, DataError, "1 labels are missing"),
        ([*GOOD, {"text": "w1", "label": float("nan")}], {}, DataError, "1 labels are missing"),
        ([*GOOD, {"text": "w1", "label": -1}], {}, DataError, "labels are -1"),
        ([{**row, "label": [1, 2]} for row in GOOD], {}, DataError, "single numbers"),
        ([{**row, "label": 1} for row in GOOD], {}, DataError, "one class only"),
        ([{**row, "label": 1.5} for row in GOOD], {}, DataError, "constant"),
        (GOOD, {"pool": []}, DataError, "pool is empty"),
        (GOOD, {"pool": "nowhere"}, DataError, "no pool"),
        (GOOD, {"pool": None}, SetupError, "needs pool"),
        (GOOD, {"method": "magic"}, SetupError, "unknown method"),
        (GOOD, {"method": "leep"}, SetupError, "does not use pool"),
        (GOOD, {"models": {}}, SetupError, "does not use models"),
        (GOOD, {"task": "ranking"}, SetupError, "unknown task"),
        (GOOD, {"precision": "float16"}, SetupError, "precision"),
        (GOOD, {"batch_size": 4}, SetupError, "Embedder"),
        (GOOD, {"device": "gpu"}, SetupError, "no such device"),
        (GOOD, {"device": "cuda:99"}, SetupError, "allowed: cpu"),
        (GOOD, {"maps_at_once": 0}, SetupError, "maps_at_once"),
        (GOOD, {"maps_at_once": 4, "threads": 2}, SetupError, "without batches"),
        (GOOD, {"method": "size", "maps_at_once": 4}, SetupError, "size does not use maps_at_once"),
        (GOOD, {"method": "size", "device": "cpu"}, SetupError, "size does not use device"),
        (GOOD, {"text_column": ["a", "b", "c"]}, SetupError, "one column or two"),
    ],
    ids=str,
)
def test_bad_input_is_a_clear_error(embedder, data, change, kind, message):
    with pytest.raises(kind, match=message):
        graftlm.rank_source_tasks(embedder, data, **({"pool": maps(2)} | COLUMNS | change))


def test_a_pool_of_another_model_is_an_error(embedder, tmp_path):
    wide = SourcePool.create(tmp_path / "wide", base_model="org/base", width=20)
    wide.add_all(maps(1, width=20))
    with pytest.raises(DataError, match="another width"):
        graftlm.rank_source_tasks(embedder, rows(), pool=wide, **COLUMNS)
    empty = SourcePool.create(tmp_path / "empty", base_model="org/base", width=WIDTH)
    with pytest.raises(DataError, match="pool is empty"):
        graftlm.rank_source_tasks(embedder, rows(), pool=empty, **COLUMNS)
    empty.add_all(maps(2))
    named = tiny_model("bert", "base")
    named.config.name_or_path = "org/other"
    with pytest.raises(DataError, match="another base model"):
        graftlm.rank_source_tasks(named, rows(), pool=empty, tokenizer=tiny_tokenizer(), **COLUMNS)
    named.config.name_or_path = "org/base"
    found = graftlm.rank_source_tasks(named, rows(), pool=empty, tokenizer=tiny_tokenizer(), **COLUMNS)
    assert found.notes == () and found.model == "org/base"
    unknown = graftlm.rank_source_tasks(embedder, rows(), pool=empty, **COLUMNS)
    assert "is not known" in unknown.notes[0] and "is not known" in str(unknown)


def test_a_model_that_cannot_be_loaded_is_an_error():
    with pytest.raises(ModelError, match="cannot be loaded"):
        graftlm.rank_source_tasks("org/never-downloaded", rows(), pool=maps(1), **COLUMNS)

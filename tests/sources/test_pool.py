"""Pools: what goes in comes out, what is damaged is named, and ten thousand entries open quickly."""

import json
import os
import time
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

from graftlm import DataError, EmbeddingSpaceMap, SetupError, SourcePool
from graftlm.sources import hub
from graftlm.sources.pool import INDEX, MAPS

BASE = "org/base"


def esm(task="imdb", width=4, base=BASE, seed=0, **details):
    rng = np.random.default_rng(seed)
    weight, bias = rng.normal(size=(width, width)).astype(np.float32), np.zeros(width, np.float32)
    return EmbeddingSpaceMap(base, task, bias=bias, weight=weight, details=details)


@pytest.fixture
def pool(tmp_path):
    return SourcePool.create(tmp_path / "pool", base_model=BASE, width=4)


def weights(pool, name):
    return pool.folder / MAPS / pool.entries[name].folder / "model.safetensors"


def test_what_is_added_is_there_after_opening(pool):
    low = EmbeddingSpaceMap(BASE, "org/low", bias=np.ones(4), up=np.ones((4, 2)), down=np.ones((4, 2)), identity=True)
    pool.add(esm("glue", task_subset="mnli", num_examples=7))
    pool.add(low, name="by-hand")
    found = SourcePool.open(pool.folder)
    assert list(found.entries) == ["glue--mnli", "by-hand"] and (found.base_model, found.width) == (BASE, 4)
    first, second = found.entries.values()
    assert (first.task, first.subset, first.rows, first.architecture, first.rank) == ("glue", "mnli", 7, "linear", 4)
    assert (second.task, second.subset, second.rows, second.architecture) == (
        "org/low",
        None,
        None,
        "identity_low_rank",
    )
    assert (found.load("glue--mnli").weight == esm("glue").weight).all()
    assert found.load("by-hand").identity and found.verify() == []
    assert first.size == weights(found, "glue--mnli").stat().st_size


def test_an_entry_is_a_folder_in_the_format_of_the_hub(pool, tmp_path):
    entry = pool.add(esm())
    copied = SourcePool.create(tmp_path / "other", base_model=BASE, width=4)
    copied.add(pool.folder / MAPS / entry.folder)
    assert (copied.load("imdb").weight == esm().weight).all()


def test_nothing_but_index_and_maps_is_left(pool):
    pool.add(esm())
    pool.add(esm(seed=1), replace=True)
    assert sorted(os.listdir(pool.folder)) == [INDEX, MAPS]
    assert os.listdir(pool.folder / MAPS) == [pool.entries["imdb"].folder]
    assert (SourcePool.open(pool.folder).load("imdb").weight == esm(seed=1).weight).all()


def test_removed_entries_are_gone(pool):
    pool.add_all([esm("a"), esm("b"), esm("c")])
    pool.remove(["a", "c"])
    assert list(SourcePool.open(pool.folder).entries) == ["b"] and len(os.listdir(pool.folder / MAPS)) == 1
    with pytest.raises(DataError, match="no such entry"):
        pool.remove(["b", "z"])
    assert list(SourcePool.open(pool.folder).entries) == ["b"]


def test_what_another_process_added_stays(pool):
    other = SourcePool.open(pool.folder)
    other.add(esm("a"))
    pool.add(esm("b"))
    assert list(SourcePool.open(pool.folder).entries) == ["a", "b"]


def test_a_write_that_fails_leaves_the_pool_as_it_was(pool, monkeypatch):
    pool.add(esm("a"))

    def broken(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("graftlm.sources.pool.os.replace", broken)
        with pytest.raises(OSError, match="disk full"):
            pool.add(esm("b"))
    found = SourcePool.open(pool.folder)
    assert list(found.entries) == ["a"] and found.verify() == []
    assert sorted(os.listdir(pool.folder)) == [INDEX, MAPS]
    found.add(esm("b"))
    assert found.verify() == [] and len(os.listdir(found.folder / MAPS)) == 2


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (esm(base="org/other"), DataError, "another base model"),
        (esm(width=5), DataError, "another width"),
        (esm("a"), SetupError, "entry of this name"),
        ("nowhere", DataError, "no config.json"),
    ],
    ids=["base", "width", "name", "folder"],
)
def test_what_does_not_belong_is_refused(pool, wrong, kind, message):
    pool.add(esm("a"))
    with pytest.raises(kind, match=message):
        pool.add(wrong)
    assert list(SourcePool.open(pool.folder).entries) == ["a"]
    added, skipped = pool.add_all([esm("b"), wrong, esm("c")])
    assert [entry.name for entry in added] == ["b", "c"] and len(skipped) == 1 and message in skipped[0].problem


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "a/b", "a@b", "a b"])
def test_names_are_those_of_folders(pool, name):
    with pytest.raises(SetupError, match="name"):
        pool.add(esm(), name=name)


def damage(pool, name, how):
    path = weights(pool, name)
    if how == "missing":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(path.read_bytes()[:-4])
    elif how == "another width":
        path.unlink()
        other = esm(width=3).save(path.parent / "x")
        (other / "model.safetensors").rename(path)
    else:
        blob = bytearray(path.read_bytes())
        blob[-20] ^= 1
        path.write_bytes(blob)


@pytest.mark.parametrize("how", ["missing", "cut off", "another width"])
def test_damaged_entries_are_named_and_skipped(pool, how):
    pool.add_all([esm("a"), esm("b"), esm("c")])
    damage(pool, "b", how)
    skipped = []
    assert [entry.name for entry, _ in SourcePool.open(pool.folder).maps(skipped)] == ["a", "c"]
    assert [one.name for one in skipped] == ["b"] and skipped[0].problem
    assert [one.name for one in pool.verify()] == ["b"]
    with pytest.raises(DataError):
        pool.load("b")


def test_a_flipped_bit_is_found(pool):
    pool.add_all([esm("a"), esm("b")])
    damage(pool, "a", "one bit")
    assert [(one.name, "not those that were added" in one.problem) for one in pool.verify()] == [("a", True)]


def test_a_changed_config_is_found(pool):
    pool.add(esm("a"))
    path = weights(pool, "a").with_name("config.json")
    path.write_text(path.read_text().replace('"imdb"', '"x"').replace('"a"', '"b"'))
    assert "config.json" in pool.verify()[0].problem


def test_an_index_that_is_lost_is_made_anew(pool):
    pool.add_all([esm("a", num_examples=3), esm("b"), esm("c")])
    damage(pool, "b", "cut off")
    before = dict(pool.entries)
    (pool.folder / INDEX).write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="damaged"):
        SourcePool.open(pool.folder)
    found, skipped = SourcePool.rebuild(pool.folder)
    assert found.entries == {"a": before["a"], "c": before["c"]} and len(skipped) == 1
    assert SourcePool.open(pool.folder).entries == found.entries


def test_folders_without_a_pool_and_with_one(pool, tmp_path):
    with pytest.raises(DataError, match="no pool"):
        SourcePool.open(tmp_path)
    with pytest.raises(SetupError, match="already"):
        SourcePool.create(pool.folder, base_model=BASE, width=4)
    with pytest.raises(SetupError, match="width"):
        SourcePool.create(tmp_path / "x", base_model=BASE, width=0)
    with pytest.raises(DataError, match="no readable map"):
        SourcePool.rebuild(tmp_path)


def test_ten_thousand_entries_open_within_about_a_second(pool):
    from dataclasses import replace

    entry = pool.add(esm(lm_learning_rate=2e-5, developers="someone " * 20))
    pool.entries = {f"task-{number}": replace(entry, name=f"task-{number}") for number in range(10_000)}
    pool._write_index()
    started = time.process_time()
    found = SourcePool.open(pool.folder)
    assert len(found) == 10_000 and time.process_time() - started < 1


def test_the_hub_through_a_folder(pool, tmp_path, monkeypatch):
    """A collection of three: one map, one repository without weights, one data set."""
    good = esm("org/imdb").save(tmp_path / "hub" / "good")
    slug = "org/maps-0123456789abcdef01234567"
    asked = []

    def collection(name):
        assert name == slug
        items = [("org/good", "model"), ("org/empty", "model"), ("org/data", "dataset")]
        return SimpleNamespace(items=[SimpleNamespace(item_id=item, item_type=kind) for item, kind in items])

    def download(name, file):
        asked.append(file)
        if name == "org/empty":
            raise EntryNotFoundError(f"404: {file}")
        return str(good / file)

    monkeypatch.setattr(huggingface_hub, "get_collection", collection)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert hub.is_collection(slug) and not hub.is_collection("org/good")
    folders, problems = hub.fetch(hub.in_collection(slug))
    assert set(folders) == {"org/good"} and "404" in problems["org/empty"]
    added, skipped = pool.add_all(folders.values())
    assert [entry.name for entry in added] == ["org--imdb"] and not skipped
    assert set(asked) == {"config.json", "model.safetensors"}, "nothing that could be unpickled is downloaded"


def test_both_tags_of_published_maps_are_asked_for(monkeypatch):
    found = {"base_model:org/base": ["a", "b"], "BaseLM:org/base": ["b", "c"]}

    def listed(filter):
        assert filter[0] == "embedding_space_map"
        return [SimpleNamespace(id=name) for name in found[filter[1]]]

    monkeypatch.setattr(huggingface_hub, "list_models", listed)
    assert hub.published("org/base") == ["a", "b", "c"]


def connection_refused():
    """The error of the HTTP library that huggingface_hub uses, which is not an OSError."""
    kinds = [HfHubHTTPError.__mro__[1]]
    while kinds[-1].__name__ != "ConnectError":
        kinds = [*(more for kind in kinds for more in kind.__subclasses__() if not issubclass(more, OSError))]
        kinds.sort(key=lambda kind: kind.__name__ in ("RequestError", "TransportError", "NetworkError", "ConnectError"))
    return kinds[-1]("Connection refused")


@pytest.mark.parametrize(
    "error", [OfflineModeIsEnabled("offline"), TimeoutError("slow"), connection_refused()], ids=str
)
def test_a_hub_that_cannot_be_reached_is_an_error(error, monkeypatch):
    def unreachable(*_, **__):
        raise error

    for name in ("get_collection", "hf_hub_download", "list_models"):
        monkeypatch.setattr(huggingface_hub, name, unreachable)
    for call in (lambda: hub.fetch(["org/a"]), lambda: hub.in_collection("org/c"), lambda: hub.published("org/b")):
        with pytest.raises(DataError, match="cannot be reached"):
            call()


def test_the_real_client_without_a_network():
    with pytest.raises(DataError, match="cannot be reached"):
        hub.fetch(["org/never-downloaded"])


def test_json_of_the_index_is_that_of_the_file(pool):
    entry = pool.add(esm("a", text_column=["x", "y"]))
    assert json.loads(entry.config) == json.loads(weights(pool, "a").with_name("config.json").read_text())

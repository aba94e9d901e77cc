"""Rankings with maps scored in batches: those of threads, whatever is in a batch; on a GPU, where there is one."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sources.held import count_held
from sources.test_rank import WIDTH, maps, rows

from graftlm import EmbeddingSpaceMap, SetupError, SourcePool
from graftlm.sources import device as devices
from graftlm.sources.device import device_of
from graftlm.sources.rank import rank_maps
from graftlm.sources.scoring import InBatches, InThreads, dense, in_batches, scorer_of
from graftlm.sources.target import read_target

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def target():
    return read_target(rows(60), "text", "label")


@pytest.fixture(scope="module")
def features(target):
    """Embeddings that tell the classes in part, with a mean larger than their spread."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(2, WIDTH))[target.labels]
    return (rng.normal(size=(60, WIDTH)) + 0.5 * signal + 3 * rng.normal(size=WIDTH)).astype(np.float32)


def both(given, features, target, device, **options):
    """The ranking with threads and with batches."""
    return (
        rank_maps(given, features, target, threads=1, **options),
        rank_maps(given, features, target, device=device, maps_at_once=4, **options),
    )


def known(ranking):
    return {one.name: one.score for one in ranking.sources}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [60, 12])
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_batches_rank_as_threads_do(features, target, device, count, precision):
    """Linear and low-rank maps, one that overflows and two of another width; thirteen maps, four at a time."""
    huge = EmbeddingSpaceMap("org/base", "huge", bias=np.zeros(WIDTH), weight=np.full((WIDTH, WIDTH), 1e200))
    given = [
        *maps(9),
        huge,
        *maps(2, width=5),
        EmbeddingSpaceMap("b", "half", bias=np.zeros(WIDTH, np.float16), weight=np.eye(WIDTH, dtype=np.float16)),
    ]
    few = read_target(rows(60)[:count], "text", "label")
    threads, batches = both(given, features[:count], few, device, precision=precision)
    assert known(batches) == pytest.approx(known(threads), abs=1e-8)
    assert [one.name for one in batches.sources] == [one.name for one in threads.sources]
    assert [one.name for one in batches.skipped] == [one.name for one in threads.skipped] and len(batches.skipped) == 3
    assert batches.without_source == pytest.approx(threads.without_source, abs=1e-8)
    assert batches.notes == threads.notes and all(one.seconds > 0 for one in batches.sources)


def test_float32_ranks_alike_and_its_best_are_exact(features, target, monkeypatch):
    monkeypatch.setattr("graftlm.sources.rank._EXACT", 5)
    exact, fast = (both(maps(12), features, target, "cpu", precision=name)[1] for name in ("float64", "float32"))
    assert [one.name for one in fast.sources[:5]] == [one.name for one in exact.sources[:5]]
    best = {one.name for one in exact.sources[:5]}
    assert all(
        abs(known(fast)[name] - score) < (1e-8 if name in best else 1e-4) for name, score in known(exact).items()
    )
    assert known(fast) != known(exact)


@pytest.fixture
def pool(tmp_path):
    found = SourcePool.create(tmp_path / "pool", base_model="org/base", width=WIDTH)
    found.add_all(maps(18))
    return found


def test_what_cannot_be_read_is_named(pool, features, target):
    weights = {
        name: pool.folder / "maps" / pool.entries[f"org--task-{number}"].folder / "model.safetensors"
        for name, number in {"nan": 0, "cut off": 4, "missing": 5}.items()
    }
    tensors = load_file(weights["nan"])
    tensors["model.weight"][2, 3] = np.nan
    save_file(tensors, weights["nan"])
    weights["cut off"].write_bytes(weights["cut off"].read_bytes()[:-4])
    weights["missing"].unlink()
    threads, batches = both(pool, features, target, "cpu")
    assert batches.skipped == threads.skipped and len(batches.skipped) == 3 and len(batches) == 15
    assert known(batches) == pytest.approx(known(threads), abs=1e-8)


def test_two_batches_of_maps_are_in_memory_at_most(pool, features, target, monkeypatch):
    most = count_held(monkeypatch)
    rank_maps(pool, features, target, maps_at_once=3)
    assert len(most) == 18 and max(most) <= 6


def test_the_next_batch_is_read_while_one_is_scored():
    read, done = [], []

    def items():
        for number in range(5):
            read.append(number)
            yield number

    def work(batch):
        done.append(list(batch))
        return [number**2 for number in batch]

    assert list(in_batches(work, items(), 2)) == [(0, 0), (1, 1), (2, 4), (3, 9), (4, 16)]
    assert done == [[0, 1], [2, 3], [4]] and list(in_batches(work, [], 2)) == []

    def broken():
        yield 1
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(in_batches(work, broken(), 1))


def test_maps_are_multiplied_out_exactly():
    given = [*maps(6), *[esm for esm in maps(2) if esm.weight is not None]]
    weights, biases = dense(given, torch.device("cpu"))
    texts = np.random.default_rng(0).normal(size=(7, WIDTH))
    for esm, weight, bias in zip(given, weights.numpy(), biases.numpy(), strict=True):
        assert texts @ weight.T + bias == pytest.approx(esm(texts), abs=1e-12)
    linear = [esm for esm in given if esm.weight is not None]
    assert dense(linear, torch.device("cpu"))[0].dtype == torch.float32 and weights.dtype == torch.float64


class Machine:
    """What torch says of a machine with two GPUs of a kind."""

    def __init__(self, kind):
        self.kind = kind

    def is_available(self):
        return True

    def device_count(self):
        return 2

    def current_accelerator(self):
        return torch.device(self.kind)


def test_a_device_is_one_that_is_there(monkeypatch):
    monkeypatch.setattr(devices.torch, "accelerator", Machine("cuda"))
    assert device_of("cuda:1") == torch.device("cuda:1") and device_of("cuda").type == "cuda"
    assert device_of(torch.device("cpu")) == torch.device("cpu")
    for name in ("cuda:2", "mps", "meta", "gpu", ""):
        with pytest.raises(SetupError, match="allowed: cpu, cuda:0, cuda:1"):
            device_of(name)


def test_who_scores_is_chosen_by_the_device(features, target, monkeypatch):
    def chosen(**options):
        return type(scorer_of(features, target.columns, **options))

    assert chosen() is chosen(device=torch.device("cpu")) is chosen(device=torch.device("mps")) is InThreads
    assert chosen(device=torch.device("cuda")) is chosen(maps_at_once=3) is InBatches
    monkeypatch.setattr(devices.torch, "accelerator", Machine("mps"))
    assert "no float64" in rank_maps(maps(2), features, target, device="mps").notes[0]

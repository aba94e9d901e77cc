"""The n-grams that the starter decoder is held against: equal to counting by hand."""

import importlib.util
import math
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks/starter_decoder"
if not FOLDER.is_dir():  # an installed package without the repository
    pytest.skip("the benchmarks are not in this installation", allow_module_level=True)


@pytest.fixture(scope="module")
def benchmark_module():
    path = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("starter_decoder_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    for name in ("english", "corpus"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_byte_ngrams_are_those_of_a_naive_count(benchmark_module, order):
    rng = random.Random(0)
    texts = ["".join(rng.choice("abc dé") for _ in range(50)) for _ in range(4)]
    data = "\n".join(texts).encode()

    def probability(context: bytes, byte: int, length: int) -> float:
        lower = probability(context, byte, length - 1) if length else 1 / 256
        if length > len(context):
            return lower
        end = context[len(context) - length :]
        after = Counter(data[i + length] for i in range(len(data) - length) if data[i : i + length] == end)
        return (after[byte] + len(after) * lower) / (after.total() + len(after)) if after else lower

    read = "\nabd cé ab z".encode()
    bits = -sum(math.log2(probability(read[:i], read[i], order - 1)) for i in range(1, len(read)))
    assert benchmark_module.ByteNgrams(texts, order).bits(read.decode()[1:]) == pytest.approx(bits)

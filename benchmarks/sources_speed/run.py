"""How long scoring one Embedding Space Map takes, beside hf-dataset-selector. See README.md.

    python benchmarks/sources_speed/run.py --theirs PYTHON_OF_ITS_ENVIRONMENT [--maps 8] [--cores 2]

The contestants take turns: map by map with one core, where the clock is processor time; in groups of maps with more,
where it is the wall's. Each row is written at once.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from graftlm.measure.compiled import kernels
from graftlm.measure.evidence import by_svd
from graftlm.measure.logme import targets_of
from graftlm.measure.mapped import MappedEvidence
from graftlm.sources.scoring import in_threads

SIZES = [(1000, 768, 3), (5000, 768, 3), (1000, 384, 3), (5000, 384, 3), (1000, 768, 77)]
RANK = 8
EXACT = 1e-8


def target(rows: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings with a decaying spectrum and a mean larger than their spread, and labels that they tell in part."""
    rng = np.random.default_rng([rows, width, classes])
    labels = rng.permutation(np.arange(rows) % classes)
    spread = np.arange(1, width + 1) ** -0.7
    turn, _ = np.linalg.qr(rng.normal(size=(width, width)))
    signal = 0.5 * rng.normal(size=(classes, width))[labels]
    features = ((rng.normal(size=(rows, width)) + signal) * spread) @ turn + 0.3 * rng.normal(size=width)
    return features.astype(np.float32), labels


def maps(width: int, count: int):
    """Full matrices near the identity, and the nearest of low rank to their differences from it."""
    for number in range(count):
        rng = np.random.default_rng([width, number])
        move = 0.4 * rng.normal(size=(width, width)) / width**0.5
        left, singular, right = np.linalg.svd(move)
        low = (left[:, :RANK] * singular[:RANK], right[:RANK].T)
        bias = 0.1 * rng.normal(size=width)
        yield tuple(array.astype(np.float32) for array in (np.eye(width) + move, bias, *low))


class Theirs:
    """The other package, in its own process."""

    def __init__(self, python: str, folder: Path, cores: int):
        self.folder = folder
        script = Path(__file__).with_name("theirs.py")
        limits = {f"{name}_NUM_THREADS": str(cores) for name in ("OMP", "OPENBLAS", "MKL", "NUMBA")}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([python, str(script)], **pipes, text=True, env=os.environ | limits)

    def ask(self, **arrays: np.ndarray) -> dict:
        for name, array in arrays.items():
            np.save(self.folder / f"{name}.npy", array)
        request = {name: str(self.folder / f"{name}.npy") for name in arrays}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def timed(works: list, cores: int) -> list[tuple[float, float]]:
    """Seconds and score of each; with several cores at once, and then the seconds are equal shares of the whole."""
    clock = time.process_time if cores == 1 else time.perf_counter
    started = clock()
    scores = [found.score for _, found in in_threads(lambda work: work(), works, cores)]
    return [((clock() - started) / len(works), score) for score in scores]


def ranks(scores: list[float]) -> list[int]:
    return np.argsort(np.argsort(scores)).tolist()


def compare(rows: int, width: int, classes: int, count: int, cores: int, theirs: Theirs | None) -> list[dict]:
    features, labels = target(rows, width, classes)
    columns = targets_of(labels, "classification", rows)
    ours = {precision: MappedEvidence(features, columns, precision) for precision in ("float64", "float32")}
    if theirs:
        theirs.ask(features=features, labels=labels)
    found: dict[str, list[tuple[float, float]]] = {}
    exact = []
    size = 1 if cores == 1 else 4 * cores
    warm = list(maps(width, cores))
    timed_maps = list(maps(width, count))
    for group in [warm, *(timed_maps[start : start + size] for start in range(0, count, size))]:
        results = {
            name: timed([functools.partial(work, *one) for one in group], cores)
            for name, work in {
                "float64": lambda weight, bias, *_: ours["float64"].linear(weight, bias),
                "float32": lambda weight, bias, *_: ours["float32"].linear(weight, bias),
                f"rank {RANK}": lambda _, bias, up, down: ours["float64"].low_rank(up, down, bias, identity=True),
            }.items()
        }
        if theirs:
            answers = [theirs.ask(weight=weight, bias=bias) for weight, bias, *_ in group]
            results["hf-dataset-selector"] = [(answer["seconds"], answer["score"]) for answer in answers]
        if group is warm:
            continue  # what is made once: factors, and the other package's compilation
        exact += [by_svd(features.astype(float) @ w.T.astype(float) + b, columns).score for w, b, *_ in group]
        for name, result in results.items():
            found.setdefault(name, []).extend(result)
    made = []
    for name, results in found.items():
        seconds, scores = zip(*results, strict=True)
        row = {"n": rows, "d": width, "classes": classes, "what": name, "maps": count}
        row |= {"ms": [round(1000 * one, 3) for one in seconds]}
        if not name.startswith("rank"):
            row["error"] = float(np.abs(np.subtract(scores, exact)).max())
            row["same_ranks"] = ranks(scores) == ranks(exact)
        if name == "float64" and row["error"] > EXACT:
            raise SystemExit(f"float64 scores are {row['error']} off")
        if "hf-dataset-selector" in found and name != "hf-dataset-selector":
            ratios = [other / own for (own, _), (other, _) in zip(results, found["hf-dataset-selector"], strict=True)]
            row["times_as_fast"] = [round(ratio, 2) for ratio in ratios]
        made.append(row)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theirs", help="python of an environment with hf-dataset-selector; without it ours alone")
    parser.add_argument("--maps", type=int, default=8)
    parser.add_argument("--cores", type=int, default=1, help="for each contestant; with several, nothing else may run")
    parser.add_argument("--sizes", nargs="*", help="N,D,CLASSES …; all of them otherwise")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.jsonl"), help="appended to")
    chosen = parser.parse_args()
    sizes = [tuple(map(int, size.split(","))) for size in chosen.sizes] if chosen.sizes else SIZES
    where = {"machine": f"{platform.machine()} CPU", "cores": chosen.cores, "numpy": np.__version__}
    where |= {"numba": None if kernels() is None else importlib.metadata.version("numba")}
    with (
        tempfile.TemporaryDirectory() as folder,
        chosen.out.open("a", encoding="utf-8") as file,
        threadpool_limits(1, user_api="blas"),
    ):
        theirs = Theirs(chosen.theirs, Path(folder), chosen.cores) if chosen.theirs else None
        for size in sizes:
            for row in compare(*size, chosen.maps, chosen.cores, theirs):
                file.write(json.dumps(row | where) + "\n")
                file.flush()
                middle = f"{statistics.median(row['ms']):9.2f} ms a map"
                ratios = row.get("times_as_fast")
                if ratios:
                    middle += f", {statistics.median(ratios):6.1f} × ({min(ratios):.1f} to {max(ratios):.1f})"
                if "error" in row:
                    middle += f", error {row['error']:.0e}, ranks {'equal' if row['same_ranks'] else 'differ'}"
                print(
                    f"n {row['n']:5} d {row['d']:4} classes {row['classes']:3}  {row['what']:20} {middle}", flush=True
                )
        if theirs:
            theirs.process.stdin.close()
            theirs.process.wait()


if __name__ == "__main__":
    main()

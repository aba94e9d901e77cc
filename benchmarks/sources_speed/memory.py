"""Peak memory of a ranking against the number of maps and rows. See README.md.

    python benchmarks/sources_speed/memory.py

Each line is a process of its own. The entries of the pool share 32 files, which are read anew for each of them; with
fewer, equal scores would put more of them among the best, which are scored twice.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace

import numpy as np

from graftlm.sources.esm import EmbeddingSpaceMap
from graftlm.sources.pool import SourcePool
from graftlm.sources.rank import rank_maps
from graftlm.sources.target import Target

WIDTH, FILES = 768, 32


def one(rows: int, count: int) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(rows, WIDTH)).astype(np.float32)
    labels = np.arange(rows) % 3
    target = Target(["text"] * rows, labels, "classification", np.eye(3)[labels])
    with tempfile.TemporaryDirectory() as folder:
        pool = SourcePool.create(f"{folder}/pool", base_model="org/base", width=WIDTH)
        entries = []
        for number in range(FILES):
            weight = (np.eye(WIDTH) + 0.4 * rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32)
            esm = EmbeddingSpaceMap("org/base", f"task-{number}", bias=np.zeros(WIDTH, np.float32), weight=weight)
            entries.append(pool.add(esm))
        pool.entries = {f"task-{n}": replace(entries[n % FILES], name=f"task-{n}") for n in range(count)}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert len(rank_maps(pool, features, target, precision="float32")) == count
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{rows:6} rows, {count:6} maps: {after / 1024:7.0f} MiB at most, {before / 1024:.0f} of them before the first"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, type=int, metavar=("ROWS", "MAPS"))
    chosen = parser.parse_args()
    if chosen.one:
        one(*chosen.one)
        return
    for rows, count in ((1000, 300), (5000, 300), (1000, 10000)):
        subprocess.run([sys.executable, __file__, "--one", str(rows), str(count)], check=True)


if __name__ == "__main__":
    main()

"""How long scoring maps in batches takes on a GPU, beside the processor's cores. See README.md, section GPU.

    python benchmarks/sources_speed/gpu.py [--device cuda] [--maps 256] [--profile]

Synthetic embeddings as in run.py, maps near the identity that are made on the device. The clock is the wall's. Each row
is written at once, and no size is begun after --seconds.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from run import target
from torch.profiler import ProfilerActivity, profile

from graftlm.measure.batched import BatchedEvidence
from graftlm.measure.evidence import by_svd
from graftlm.measure.logme import targets_of
from graftlm.measure.mapped import PRECISIONS, MappedEvidence
from graftlm.sources.esm import EmbeddingSpaceMap
from graftlm.sources.pool import SourcePool
from graftlm.sources.rank import rank_maps
from graftlm.sources.scoring import in_threads
from graftlm.sources.target import Target

SIZES = [(1000, 768, 3), (200, 768, 3), (5000, 768, 3), (1000, 384, 3), (1000, 768, 77)]
CHECKED = 4  # maps whose score is held against the singular values
REPEATS = 3
FILES = 32  # of a pool that is ranked, of as many different maps


def maps_on(device: str, width: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Full matrices near the identity and their biases, in float32."""
    source = torch.Generator(device).manual_seed(width)
    move = torch.randn(count, width, width, generator=source, device=device)
    weights = torch.eye(width, device=device) + 0.4 * move / width**0.5
    return weights, 0.1 * torch.randn(count, width, generator=source, device=device)


def name_of(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device}"


def scoring(rows: int, width: int, classes: int, count: int, device: str, profiled: bool) -> list[dict]:
    """Milliseconds a map where all maps are on the device already, and on the processor's cores, one map a thread."""
    features, labels = target(rows, width, classes)
    columns = targets_of(labels, "classification", rows)
    cores, made = os.cpu_count() or 1, []
    for precision in PRECISIONS:
        many = BatchedEvidence(features, columns, precision, device)
        size = min(count, many.most)
        weights, biases = maps_on(device, width, size)
        host = [(weight.cpu().numpy(), bias.cpu().numpy()) for weight, bias in zip(weights, biases, strict=True)]
        found = many.linear(weights, biases)  # once without the clock
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            many.linear(weights, biases)
            times.append(1000 * (time.perf_counter() - started) / size)
        row = {"what": f"batch, {precision}", "maps": size, "ms": [round(one, 4) for one in times]}
        if device.startswith("cuda"):
            row["MiB_a_map"] = round(torch.cuda.max_memory_allocated(device) / 2**20 / size, 1)
        exact = [by_svd(features.astype(float) @ w.T.astype(float) + b, columns).score for w, b in host[:CHECKED]]
        row["error"] = max(abs(one.score - right) for one, right in zip(found, exact, strict=False))
        row["fallbacks"] = round(many.fallbacks / (REPEATS + 1))
        made.append(row)
        if profiled:
            shown(many, weights, biases)
        single, few = MappedEvidence(features, columns, precision), host[: 2 * cores]
        single.linear(*few[0])
        started = time.perf_counter()
        list(in_threads(lambda one, single=single: single.linear(*one), few, cores))
        milliseconds = 1000 * (time.perf_counter() - started) / len(few)
        made.append({"what": f"{cores} threads, {precision}", "maps": len(few), "ms": [round(milliseconds, 4)]})
        made[-2]["times_as_fast"] = round(milliseconds / statistics.median(times), 2)
    return made


def shown(many: BatchedEvidence, weights: torch.Tensor, biases: torch.Tensor) -> None:
    """What one batch spends its time on."""
    cuda = many.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        many.linear(weights, biases)
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=50))


def ranking(rows: int, width: int, classes: int, count: int, device: str) -> list[dict]:
    """Milliseconds a map of a whole ranking from a pool, whose entries share a few files that are read for each."""
    features, labels = target(rows, width, classes)
    aim = Target(["text"] * rows, labels, "classification", targets_of(labels, "classification", rows))
    weights, biases = (part.cpu().numpy() for part in maps_on(device, width, FILES))
    made = []
    with tempfile.TemporaryDirectory() as folder:
        pool = SourcePool.create(f"{folder}/pool", base_model="org/base", width=width)
        for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            pool.add(EmbeddingSpaceMap("org/base", f"file-{number}", bias=bias, weight=weight))
        files = list(pool.entries.values())
        pool.entries = {
            f"task-{number}": replace(files[number % FILES], name=f"task-{number}") for number in range(count)
        }
        for precision in PRECISIONS:
            batch = None if device.startswith("cuda") else min(count, 8)
            found = rank_maps(pool, features, aim, precision=precision, device=device, maps_at_once=batch)
            if len(found) != count:
                raise SystemExit(f"{len(found)} of {count} maps were scored")
            made.append(
                {"what": f"ranking, {precision}", "maps": count, "ms": [round(1000 * found.seconds / count, 4)]}
            )
    return made


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--maps", type=int, default=256, help="in a batch, at most")
    parser.add_argument("--ranked", type=int, default=1024, help="maps of the whole ranking")
    parser.add_argument("--sizes", nargs="*", help="N,D,CLASSES …; all of them otherwise")
    parser.add_argument("--seconds", type=float, default=400, help="after which nothing is begun")
    parser.add_argument("--profile", action="store_true", help="print what the batches of the first size spend time on")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("gpu.jsonl"), help="appended to")
    chosen = parser.parse_args(arguments)
    sizes = [tuple(map(int, size.split(","))) for size in chosen.sizes] if chosen.sizes else SIZES
    where = {"device": name_of(chosen.device), "cores": os.cpu_count(), "torch": torch.__version__}
    where["numpy"] = np.__version__
    works = [lambda: ranking(*sizes[0], chosen.ranked, chosen.device)]
    for number, size in enumerate(sizes):
        profiled = chosen.profile and number == 0
        works.insert(-1, lambda size=size, profiled=profiled: scoring(*size, chosen.maps, chosen.device, profiled))
    began = time.perf_counter()
    with chosen.out.open("a", encoding="utf-8") as file:
        for work, size in zip(works, [*sizes, sizes[0]], strict=True):
            if time.perf_counter() - began > chosen.seconds:
                print(f"{size}: left out, {chosen.seconds:.0f} s are over")
                continue
            for row in work():
                row = dict(zip(("n", "d", "classes"), size, strict=True)) | row
                file.write(json.dumps(row | where) + "\n")
                file.flush()
                rest = {
                    key: value
                    for key, value in row.items()
                    if key in ("times_as_fast", "error", "fallbacks", "MiB_a_map")
                }
                print(
                    f"{size}  {row['what']:22} {statistics.median(row['ms']):9.3f} ms a map  {rest or ''}", flush=True
                )


if __name__ == "__main__":
    main()

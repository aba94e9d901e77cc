"""A script of ours on several processes, as `torchrun` starts it.

Each process is forked from one that has imported the libraries already: importing them anew would take longer than
what the scripts do.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "datasets", "transformers.trainer", "peft", "graftlm.run"])
_SECONDS = 300


def launch(script: Path, folder: Path, processes: int, *more: str) -> list[Any]:
    """What each process has left in `folder`, RANK.pt."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if processes > 1:  # else a script on its own, which knows of no processes
        shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    begun = []
    for rank in range(processes):
        own = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
        arguments = (str(script), (str(folder), *more), own, folder / f"{rank}.err")
        begun.append(_SERVER.Process(target=_run, args=arguments))
        begun[-1].start()
    for process in begun:
        process.join(_SECONDS)
        process.kill()
    said = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.err"))]
    assert all(process.exitcode == 0 for process in begun), "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def _run(script: str, arguments: tuple[str, ...], environment: dict[str, str], errors: Path) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except BaseException:
        errors.write_text(traceback.format_exc(), encoding="utf-8")
        raise

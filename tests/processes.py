"""Other processes, without the wait: forked from one that has imported the libraries already.

    done = python("-m", "graftlm", "train", "recipe.yaml", folder=folder)    # as it is typed
    results = launch(SCRIPT, folder, processes=2)                            # as `torchrun --nproc-per-node=2 SCRIPT`

Importing them takes ten seconds of a slow core, more than what most of these processes do. Where the import itself is
the matter, use `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

_SECONDS = 300
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "datasets", "transformers.trainer", "peft", "graftlm.run"])


class Started:
    """A process that runs."""

    def __init__(self, *arguments: str, folder: Path, environment: dict[str, str] | None = None):
        self.arguments, self._said = arguments, Path(tempfile.mkdtemp(prefix="graftlm-tests-"))
        settings = (arguments, folder, environment or {}, self._said)
        self.process = _SERVER.Process(target=_run, args=settings)
        self.process.start()

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Waits for its end."""
        self.process.join(_SECONDS)
        self.process.kill()  # nothing where it has ended
        self.process.join()
        out, err = ((self._said / name).read_text(encoding="utf-8") for name in ("out", "err"))
        shutil.rmtree(self._said)
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode or 0, out, err)


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """As `python ARGUMENTS` in a folder, with what it printed."""
    return Started(*arguments, folder=folder).finish()


def group(*arguments: str, folder: Path, processes: int) -> list[subprocess.CompletedProcess[str]]:
    """As `torchrun`: so many processes that know of each other."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    each = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [Started(*arguments, folder=folder, environment=own) for own in each]
    return [one.finish() for one in started]


def launch(script: Path, folder: Path, processes: int, *more: str) -> list[Any]:
    """What each process of a script has left in `folder`, RANK.pt."""
    arguments = (str(script), str(folder), *more)
    done = (
        group(*arguments, folder=folder, processes=processes) if processes > 1 else [python(*arguments, folder=folder)]
    )
    assert all(one.returncode == 0 for one in done), "\n".join(one.stderr for one in done)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def _run(arguments: tuple[str, ...], folder: Path, environment: dict[str, str], said: Path) -> None:
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(said / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update({"OMP_NUM_THREADS": "1"} | environment)
    match arguments:
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case [script, *rest]:
            sys.argv = [script, *rest]
            sys.path.insert(0, str(Path(script).parent))
            runpy.run_path(script, run_name="__main__")

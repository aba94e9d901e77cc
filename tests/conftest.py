"""What holds for every test: no network, no user caches, one thread a worker, shapes of graftlm.measure enforced.

Set up on import and in `pytest_configure`, not in fixtures, so that the doctests under src/ get it too.
"""

from __future__ import annotations

import functools
import os
import shutil
import socket
import tempfile

import jinja2
import pytest
from jaxtyping import install_import_hook

collect_ignore = ["adapters/adapterhub/make.py"]  # runs in an environment of its own

_HF_HOME = tempfile.mkdtemp(prefix="graftlm-tests-hf-")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HOME": _HF_HOME,
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),  # CPU unless the caller names a device
}
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; subprocesses of a test inherit it

# Before anything imports graftlm.measure: wrong shapes raise while the tests run.
install_import_hook("graftlm.measure", "beartype.beartype")

_LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


class NetworkBlocked(RuntimeError):
    """A test tried to reach something other than this machine."""


def _refuse_beyond_loopback(method):
    def guarded(self, address, *args):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(_LOOPBACK):
            raise NetworkBlocked(f"tests have no network, and this one connects to {address[0]}:{address[1]}")
        return method(self, address, *args)

    return guarded


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-support-matrix", action="store_true", help="write docs/reference/support.md")


def pytest_configure(config: pytest.Config) -> None:
    from support_matrix import SupportMatrix

    config.addinivalue_line("markers", "supports(method, feature): a line of the support matrix, per architecture")
    config.pluginmanager.register(SupportMatrix(config))
    patch = pytest.MonkeyPatch()
    for name in ("connect", "connect_ex"):
        patch.setattr(socket.socket, name, _refuse_beyond_loopback(getattr(socket.socket, name)))
    # PEFT writes a model card with each checkpoint, from a template that is compiled anew each time: 0.2 s of it
    patch.setattr(jinja2.Environment, "compile", functools.cache(jinja2.Environment.compile))
    config.add_cleanup(patch.undo)
    config.add_cleanup(lambda: shutil.rmtree(_HF_HOME, ignore_errors=True))
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)

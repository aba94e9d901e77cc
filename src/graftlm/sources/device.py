"""The device that somebody names: one that is there, or an error that says which are."""

from __future__ import annotations

import torch

from graftlm.errors import SetupError


def device_of(name: str | torch.device) -> torch.device:
    """A device of this machine.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1`` …

    Raises:
        SetupError: no such device here.
    """
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if kind is not None else 0
    try:
        found = torch.device(name)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    there = kind is not None and found.type == kind.type and (found.index or 0) < count
    if found.type != "cpu" and not there:
        allowed = ["cpu", *(f"{kind.type}:{number}" for number in range(count) if kind is not None)]
        raise SetupError("no such device on this machine", found=repr(str(name)), allowed=allowed)
    return found

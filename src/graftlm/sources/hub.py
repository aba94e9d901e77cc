"""Embedding Space Maps that others have published, as folders on this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from tqdm.auto import tqdm

from graftlm.errors import DataError
from graftlm.sources.esm import CONFIG, WEIGHTS

TAG = "embedding_space_map"
# Those of the HTTP library, whichever huggingface_hub brings: a refused connection is one of its own errors.
_HTTP: Any = HfHubHTTPError.__bases__
_COLLECTION = re.compile(r"[^/\s]+/[^/\s]+-[0-9a-f]{24}")


def published(base_model: str) -> list[str]:
    """Hub ids of the maps that are tagged as those of a base model, by either tag in use."""
    with _reachable(base_model):
        found: dict[str, None] = {}
        for tag in (f"base_model:{base_model}", f"BaseLM:{base_model}"):
            found |= dict.fromkeys(info.id for info in huggingface_hub.list_models(filter=[TAG, tag]))
    return list(found)


def in_collection(slug: str) -> list[str]:
    """Hub ids of the models in a collection."""
    try:
        with _reachable(slug):
            items = huggingface_hub.get_collection(slug).items
    except _MissingFile as error:
        raise DataError(f"there is no such collection: {error}", found=slug) from error
    return [item.item_id for item in items if item.item_type == "model"]


def is_collection(name: str) -> bool:
    """Whether a name is written as that of a collection: OWNER/TITLE-0123456789abcdef01234567."""
    return _COLLECTION.fullmatch(name) is not None


def fetch(names: Sequence[str], *, progress: bool = False) -> tuple[dict[str, Path], dict[str, str]]:
    """Weights and config of each map: hub id → folder; and hub id → problem, where repository or file is not there.

    Only model.safetensors and config.json are asked for, so nothing that could be unpickled arrives.

    Raises:
        DataError: the hub cannot be reached.
    """
    folders: dict[str, Path] = {}
    problems: dict[str, str] = {}
    for name in tqdm(names, desc="fetching", unit="map", disable=not progress):
        try:
            with _reachable(name):
                paths = [Path(huggingface_hub.hf_hub_download(name, file)) for file in (CONFIG, WEIGHTS)]
            folders[name] = paths[0].parent
        except _MissingFile as error:
            problems[name] = str(error)
    return folders, problems


class _MissingFile(Exception):
    pass


@contextmanager
def _reachable(name: str) -> Iterator[None]:
    try:
        yield
    except LocalEntryNotFoundError as error:  # not here, and nobody to ask
        raise _unreachable(name, error) from error
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        raise _MissingFile(str(error).splitlines()[0]) from error
    except (HFValidationError, OSError, *_HTTP) as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> DataError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(
        f"the hub cannot be reached: {first}",
        found=name,
        fix="check the name and the connection (HF_HUB_OFFLINE, hf auth login); a folder needs neither",
    )

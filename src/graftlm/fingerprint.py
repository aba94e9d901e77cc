"""Whether the files that a run was made from are still the same: `data.sha256`, which `sha256sum -c` reads as well."""

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from glob import glob
from pathlib import Path

from graftlm.evaluation.record import write_text
from graftlm.recipe import Recipe

FILE = "data.sha256"


def write_digests(recipe: Recipe, folder: Path) -> None:
    """Writes the digest of every local data file, paths seen from the folder; nothing where there is none."""
    if digests := _digests(recipe, folder):
        write_text(folder / FILE, "".join(f"{digest}  {path}\n" for path, digest in digests.items()))


def changed_files(recipe: Recipe, folder: Path) -> list[str]:
    """The data files that are other ones than when the run was begun; files that are gone since are not counted."""
    if not (folder / FILE).is_file():
        return []
    lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
    before = {path: digest for digest, path in (line.split("  ", 1) for line in lines)}
    return [path for path, digest in _digests(recipe, folder).items() if before.get(path) != digest]


def _digests(recipe: Recipe, folder: Path) -> dict[str, str]:
    return {Path(os.path.relpath(path, folder)).as_posix(): _digest(path) for path in _files(recipe)}


def _files(recipe: Recipe) -> Iterator[Path]:
    """Local data and language adapters; the starter kit belongs to graftlm's version, a hub set to its revision."""
    patterns = {str(recipe.path(source.path)) for source in recipe.sources() if source.is_file()}
    for pattern in sorted(patterns):
        plain = [pattern] if Path(pattern).is_file() else glob(pattern, recursive=True)
        yield from map(Path, sorted(plain))
    for place in recipe.adapter.language_folders.values():
        found = (recipe.path(place) / part / "adapter_model.safetensors" for part in ("adapter", ""))
        yield from (file for file in found if file.is_file())


def _digest(path: Path) -> str:
    now = path.stat()
    return _read(path, now.st_mtime_ns, now.st_size)


@lru_cache(maxsize=4096)
def _read(path: Path, when: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

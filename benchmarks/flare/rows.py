"""What finished runs of the FLARE study said of their test sentences: a small file a run."""

import json
from pathlib import Path

from folds import write
from plan import TUNED, Job, Scale, name_of, tag_of, tuned_as


class Rows:
    """The rows in a folder, each read once."""

    def __init__(self, folder: Path, scale: Scale):
        self.folder, self.scale = folder, scale
        self._read: dict[str, dict] = {}

    def name(self, job: Job) -> str | None:
        """A run's name; None while its rate is not chosen."""
        rate = job.rate or (job.parts and self.chosen(job.parts, job.tag))
        return None if job.parts and rate is None else name_of(job.parts, job.tag, job.fold, job.seed, rate)

    def has(self, job: Job) -> bool:
        """Whether the run is finished."""
        name = self.name(job)
        return name is not None and self._row(name) is not None

    def __getitem__(self, job: Job) -> dict:
        if not self.has(job):
            raise KeyError(job)
        return self._read[self.name(job)]

    def put(self, row: dict) -> None:
        """Keeps a row."""
        write(self.folder / f"{row['run']}.json", json.dumps(row) + "\n")

    def chosen(self, parts: tuple, tag: str) -> float | None:
        """The rate with the best dev score in fold `TUNED`, of equal ones the smaller; None while one is missing."""
        tuned = tuned_as(parts)
        rows = {rate: self._row(name_of(tuned, tag_of(tuned, tag), TUNED, 0, rate)) for rate in self.scale.rates}
        known = {rate: row["dev"] for rate, row in rows.items() if row}
        return max(known, key=lambda rate: (known[rate], -rate)) if len(known) == len(rows) else None

    def load(self, path: Path) -> None:
        """Adds the rows that a study left."""
        self._read |= {row["run"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}

    def save(self, path: Path) -> None:
        """Writes all rows that were read."""
        write(path, "".join(json.dumps(self._read[name]) + "\n" for name in sorted(self._read)))

    def _row(self, name: str) -> dict | None:
        path = self.folder / f"{name}.json"
        if name not in self._read and path.exists():
            self._read[name] = json.loads(path.read_text(encoding="utf-8"))
        return self._read.get(name)

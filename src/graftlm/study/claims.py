"""Who does which run: claims in a folder that several processes and machines may share, without a server and without
locks that some file systems do not have.

A claim of NAME is the file `NAME.1`, made with O_EXCL, so one process gets it. Its holder touches it while it works. A
claim that was given back, or whose holder is dead, is followed by `NAME.2`, which again one process gets; files are
never deleted, so a number is given once. Dead is a holder of this machine whose process is gone, or of another one
that has not touched its claim for `LEASE` seconds, by the clock of the file system.
"""

import json
import os
import socket
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

LEASE = 120.0  # seconds
_BEAT = 15.0
_GIVEN_BACK = "given back\n"


def _machine() -> str:
    """This machine as far as process ids go: two containers may share a host name."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # Linux alone has these two
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _began(pid: int) -> str | None:
    """When a process began, so that a later one with the same id is not taken for it; None where nobody says."""
    stat = _stat(pid)
    return stat[19] if stat else None


def _stat(pid: int) -> list[str] | None:
    try:
        # the name of the command, in brackets, may hold spaces
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = _stat(pid)
    return stat is None or stat[0] != "Z"  # killed, and its parent has not asked yet


@dataclass(frozen=True)
class Holder:
    """Who holds a claim."""

    machine: str
    pid: int
    began: str | None

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        return cls(_machine(), os.getpid(), _began(os.getpid()))

    def gone(self) -> bool | None:
        """Whether the process has ended; None where that cannot be seen from here."""
        if self.machine != _machine():
            return None
        return not _runs(self.pid) or _began(self.pid) != self.began


@dataclass
class Claim:
    """A claim that this process holds, until it is given back."""

    path: Path
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT):
            try:
                os.utime(self.path)
            except OSError:  # the file system is away for a moment; the lease is eight beats long
                continue

    def give_back(self) -> None:
        """Lets others take it."""
        self._stop.set()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_GIVEN_BACK)


@dataclass(frozen=True)
class Claims:
    """The claims in a folder."""

    folder: Path
    lease: float = LEASE

    def take(self, name: str) -> Claim | None:
        """The claim of a name, or None where somebody alive holds it or was quicker."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = self._last(name)
        if number and not self._free(self._path(name, number)):
            return None
        path = self._path(name, number + 1)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return None
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(vars(Holder.here()), file)
            file.write("\n")
        return Claim(path)

    def held(self, name: str) -> bool:
        """Whether somebody alive holds it."""
        number = self._last(name)
        return bool(number) and not self._free(self._path(name, number))

    def holders(self, name: str) -> list[Holder]:
        """Everybody who ever held it, first to last."""
        return [self._holder(self._path(name, number)) for number in range(1, self._last(name) + 1)]

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.{number}"

    def _last(self, name: str) -> int:
        number = 0
        while self._path(name, number + 1).exists():
            number += 1
        return number

    def _holder(self, path: Path) -> Holder:
        return Holder(**json.loads(path.read_text(encoding="utf-8").splitlines()[0]))

    def _free(self, path: Path) -> bool:
        text = path.read_text(encoding="utf-8")
        if text.endswith(_GIVEN_BACK):
            return True
        try:
            gone = self._holder(path).gone()
        except (IndexError, ValueError):  # made and not yet written, or its maker died in between
            gone = None
        return self._silence(path) > self.lease if gone is None else gone

    def _silence(self, path: Path) -> float:
        """Seconds since the last sign of life, by the clock of the file system: those of machines differ."""
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".now.") as probe:
            os.utime(probe.name)
            return os.stat(probe.name).st_mtime - path.stat().st_mtime

"""Who works on what, among any number of processes that share a folder and know nothing else of each other.

    claims/shard-00000.0    made by the process that took shard 0
    claims/shard-00000.1    made by its successor, after .0 was given up or its process had died

The claim with the highest number counts.  It is created exclusively, so of several that come at once one
wins, and nobody touches the claim of another, so none can be taken away from a process that has just won it.
A thread touches the claim of a living process.  A claim is stale when its time stayed the same for
`stale_after` seconds of the observer's own clock (the clocks of machines differ), and at once if its process
ran on this machine and is gone.  Where an engine hangs its process lives: the thread ends it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from phoenix.files import UserError

GIVEN_UP = (0, 0)  # access and modification time of a claim whose process needs it no more


class Claims:
    """The claims in one folder, as one process sees them; it holds one of them at most.

    stale_after: seconds without a sign of life, the same for all; batch_timeout: seconds from `expect` until
    this process is taken for hung, 0 for ever.  Use it as a context: at the end what it holds is given up.
    """

    def __init__(self, folder: Path, stale_after: float = 60.0, batch_timeout: float = 0.0) -> None:
        self.folder, self.stale_after, self.batch_timeout = Path(folder), stale_after, batch_timeout
        self._deadline = math.inf
        self.held: Path | None = None
        self._last_seen: dict[str, tuple[int, float]] = {}  # claim -> its time, and since when on our clock
        self._ended, self._lock = threading.Event(), threading.Lock()

    def __enter__(self) -> Claims:
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.give_up()

    def take(self, names: Iterable[str]) -> str | None:
        """Claim one of these: the first that nobody ever claimed, else the first whose claim is stale."""
        numbers: dict[str, int] = {}
        for entry in os.listdir(self.folder):
            name, _, number = entry.rpartition(".")
            if number.isdecimal():  # else it is not ours
                numbers[name] = max(int(number), numbers.get(name, -1))
        for name in sorted(names, key=numbers.__contains__):
            newest = numbers.get(name, -1)
            if newest >= 0 and not self._is_stale(self.folder / f"{name}.{newest}"):
                continue
            if self._create(self.folder / f"{name}.{newest + 1}"):
                return name
        return None

    def is_held(self) -> bool:
        """False as soon as another process took over, which took this one for dead."""
        if self.held is None:
            return False
        name, _, number = self.held.name.rpartition(".")
        return not self.held.with_name(f"{name}.{int(number) + 1}").exists()

    def expect(self) -> None:
        """The next sign of progress, another call or `give_up`, must come within `batch_timeout`."""
        self._deadline = time.monotonic() + (self.batch_timeout or math.inf)

    def give_up(self) -> None:
        """Let others take what is held, if it is."""
        with self._lock:
            self._deadline, held, self.held = math.inf, self.held, None
            if held:
                with contextlib.suppress(OSError):  # then it becomes stale
                    os.utime(held, GIVEN_UP)

    def _create(self, path: Path) -> bool:
        with writing(path):
            try:
                file = open(path, "x", encoding="utf-8")  # noqa: SIM115
            except FileExistsError:
                return False
            self.held = path
            with file:
                json.dump([_machine(), os.getpid(), _start_of(os.getpid())], file)
        return True

    def _is_stale(self, path: Path) -> bool:
        now, changed = time.monotonic(), os.stat(path).st_mtime_ns
        if changed == GIVEN_UP[1]:
            return True
        before, since = self._last_seen.get(path.name, (None, now))
        if before != changed:
            self._last_seen[path.name] = (changed, now)
            since = now
        return now - since > self.stale_after or _is_dead(path)

    def _beat(self) -> None:
        while not self._ended.wait(self.stale_after / 6):
            with self._lock, contextlib.suppress(OSError):
                if time.monotonic() > self._deadline:
                    self._end()
                if self.held:
                    os.utime(self.held)

    def _end(self) -> None:
        """At once: what hangs in an engine hears neither an exception nor a signal."""
        try:
            what = f"{self.held.stem}: no answer to a batch in {self.batch_timeout:g} s, so this process ends"
            then = "start it again; if the engine is only slow, with a higher batch_timeout"
            print(f"\nerror: {what}; {then}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A disk that refuses becomes a UserError that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; free space or choose another place") from error


def _is_dead(path: Path) -> bool:
    """Its process ran on this machine and is gone; one that still writes its claim counts as living."""
    try:
        machine, pid, start = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
    return machine == _machine() and start is not None and _start_of(pid) != start


def _machine() -> str:
    """The machine since it started, and within it the numbering of processes: several may share a name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{os.uname().nodename} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return os.uname().nodename


def _start_of(pid: int) -> str | None:
    """When a process started, in ticks since the machine did; None if there is none, or no /proc to ask."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state, *fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]

"""A disk that loses at a power cut what was not synced: the journal of a run, replayed up to any event.

A file's bytes are safe as of its last fsync, the names in a folder as of the folder's.  What is not safe is
lost; or (torn) it is drawn for each file and folder: lost, kept, or a file kept in part.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from children import Event


@dataclasses.dataclass
class File:
    now: bytearray
    safe: bytes


@dataclasses.dataclass
class Folder:
    now: dict[str, File | Folder]
    safe: dict[str, File | Folder]


class Disk:
    def __init__(self, root: Path) -> None:
        """What lies below `root` at the start is safe."""
        self.root, self.top, self.files = root, _scan(root), {}

    def find(self, path: str) -> tuple[Folder, str]:
        """The folder that a path names something in, and that name."""
        *parts, name = Path(path).relative_to(self.root).parts or ("",)
        folder = self.top
        for part in parts:
            folder = folder.now[part]
        return folder, name

    def apply(self, event: Event) -> None:
        if event.path.endswith(" (deleted)"):
            return
        folder, name = self.find(event.path)
        if (
            name
            and name not in folder.now
            and event.inode in self.files
            and event.kind not in ("create", "mkdir")
        ):
            self._moved_unseen(folder, name, self.files[event.inode])
        entry = folder.now.get(name) if name else folder
        if event.kind == "create":
            folder.now[name] = self.files[event.inode] = File(bytearray(), b"")
        elif event.kind == "mkdir":
            folder.now[name] = Folder({}, {})
        elif event.kind == "write":
            entry.now.extend(bytes(max(0, event.offset - len(entry.now))))
            entry.now[event.offset : event.offset + len(event.data)] = event.data
        elif event.kind == "truncate":
            size = int(event.other)
            entry.now[:] = entry.now[:size] + bytes(max(0, size - len(entry.now)))
        elif event.kind == "rename":
            other, new = self.find(event.other)
            other.now[new] = folder.now.pop(name)
        elif event.kind == "unlink":
            del folder.now[name]
        elif event.kind == "fsync":
            entry.safe = bytes(entry.now) if isinstance(entry, File) else dict(entry.now)

    def keep(self, path: Path) -> None:
        """Take a file for safe as it is now."""
        folder, name = self.find(str(path))
        if name in folder.now:
            folder.safe[name] = folder.now[name]
            folder.now[name].safe = bytes(folder.now[name].now)

    def _moved_unseen(self, folder: Folder, name: str, file: File) -> None:
        for old in [other for other, entry in folder.now.items() if entry is file]:
            del folder.now[old]
        folder.now[name] = file

    def write(self, folder: Path, kept: str, draw: random.Random | None = None) -> None:
        """What is left, as real files: kept "all", "safe" or "torn"."""
        _write(self.top, folder, kept, draw)


def _scan(path: Path) -> File | Folder:
    if path.is_file():
        return File(bytearray(path.read_bytes()), path.read_bytes())
    entries = {entry.name: _scan(entry) for entry in path.iterdir()}
    return Folder(entries, dict(entries))


def _write(entry: File | Folder, path: Path, kept: str, draw: random.Random | None) -> None:
    choice = draw.choice(["all", "safe", "part"]) if kept == "torn" else kept
    if isinstance(entry, File):
        content = entry.safe if choice == "safe" else bytes(entry.now)
        if choice == "part" and content != entry.safe:
            # What was synced stays where the file only grew since.
            least = len(entry.safe) if content.startswith(entry.safe) else 0
            content = content[: draw.randint(least, len(content))]
        path.write_bytes(content)
        return
    path.mkdir(parents=True)
    for name, child in (entry.safe if choice == "safe" else entry.now).items():
        _write(child, path / name, kept, draw)

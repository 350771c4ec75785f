"""Files that are whole or absent: atomic writes, manifests, hashes, and `UserError`.

Everything Phoenix writes goes to a temporary name in the same folder, is flushed and synced, then renamed.
A folder is complete when its manifest exists, and the manifest is written last.
"""

import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any


class UserError(Exception):
    """One sentence for the person at the terminal: where, what was found, what was expected, what to do.

    Recipes print it after `error:` without a traceback and exit with 2.  What a name out of a file puts into
    it stays one line of plain text: no line break, no command to the terminal, no half of a surrogate pair.
    """

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


class Interrupted(Exception):  # noqa: N818
    """A signal asked the run to stop, and a checkpoint holds all of it: recipes exit with 75, the same
    command goes on."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or raise UserError that names the extra which installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"the package {module!r} is not usable here ({error}); "
            f"install it with: pip install 'phoenix-lm[{extra}]'"
        ) from None


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; when the block ends well, sync it and rename it to `path`.

    mode: "w" (text, UTF-8, newlines as given) or "wb".  If the block or the disk fails, nothing stays behind;
    an OSError (a full disk, a read-only folder) becomes a UserError that names the file.
    """
    path = Path(path)
    temporary = _beside(path, "tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path)
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a name too long, or a file where a folder should be
            temporary.unlink()
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; when the block ends well, it is synced and renamed to `path`.

    What a killed process left of this name goes first; if it was killed between moving the older folder
    away and putting the new one in its place, the older one comes back.  An older folder of that name is
    replaced as a whole if it is empty or Phoenix wrote it (manifest.json); UserError otherwise.  If the block
    or the disk fails, nothing stays, and the older folder is as before.
    """
    path = Path(path).resolve()
    temporary, old = _beside(path, "tmp"), _beside(path, "old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path)
        if path.exists() and not (path / "manifest.json").is_file() and any(path.iterdir()):
            raise UserError(
                f"{path}: holds files of others (no manifest.json); choose another folder or move it"
            )
        temporary.mkdir()
        yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            sync_folder(entry) if entry.is_dir() else sync_file(entry)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # there may be no older folder
            shutil.rmtree(old) if path.exists() else os.replace(old, path)
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise


def lock(path: Path, taken: str) -> int:
    """A file handle that holds `path` against other processes while it is open; a kill releases it.

    Raises UserError: `taken` if another process holds it; if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(path)  # not that of a run that ended between the two lines, with its folder
        return handle
    except (BlockingIOError, FileNotFoundError):
        raise UserError(taken) from None
    except OSError as error:
        raise UserError(f"cannot write {path.parent}: {error.strerror}; choose another folder") from None


def _beside(path: Path, end: str) -> Path:
    if path.name in ("", ".."):
        raise UserError(f"{path}: has no name of its own to write to; write the full path")
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.{end}")


def _clear_leftovers(path: Path) -> None:
    """Remove what dead processes of this machine left beside `path`; other machines may share the folder."""
    ours = re.compile(re.escape(f".{path.name}.{os.uname().nodename}.") + r"(\d{1,9})\.(tmp|old)")
    for entry in path.parent.iterdir():
        found = ours.fullmatch(entry.name)
        if not found or _lives(int(found[1])):
            continue
        if found[2] == "old" and not path.exists():
            os.replace(entry, path)
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    """Another process has this number; one that has our own is dead, as in a container started again."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return pid != os.getpid()


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror or error}; free space or choose another place")


def sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")


def read_json(path: Path, what: str = "JSON file") -> Any:
    """The value in a JSON file; UserError names the file and the line where it does not parse."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: there is no such file; expected the {what}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; expected the {what}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; expected the {what}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected the {what}") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4,300 digits
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path}, line {line}: not valid JSON ({error}); expected the {what}") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: ValueError for a key that stands twice, of which readers take the first or the last."""
    if len(value := dict(pairs)) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r:.80} stands twice in one object")
    return value


def read_json_lines(path: Path) -> list[Any]:
    """The values in a file of JSON lines, none if there is no file; what follows a line that a kill cut off
    is left out.
    """
    rows = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in filter(None, text.split("\n")):  # not splitlines: text may hold U+2028
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """A file's entry in a manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def json_digest(value: dict[str, Any]) -> str:
    """Hex sha256 of a JSON object without its entry `digest`, whatever the order of its keys."""
    rest = {key: entry for key, entry in value.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def verify_folder(folder: Path) -> None:
    """Hash the files that manifest.json states; UserError names the first that is not what was written.

    A folder without a manifest, such as a model of another maker, passes.
    """
    path = Path(folder) / "manifest.json"
    if not path.exists():
        return
    try:
        entries = {inside(folder, name): dict(entry) for name, entry in read_json(path)["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: is damaged; copy or make the folder again") from None
    for file, entry in entries.items():
        if not file.is_file() or describe_file(file) != entry:
            raise UserError(f"{file}: is missing or not what was written (sha256); copy or make it again")


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, for a plain file name found in data; UserError if it would lead out of the folder."""
    plain = name not in ("", ".", "..") and name.isprintable() and not set(name) & {"/", "\\"}
    if not plain or len(name.encode()) > 255 or (Path(folder) / name).is_symlink():
        raise UserError(
            f"{folder}: {name!r} is not the plain name of a file in this folder; remove or correct it"
        )
    return Path(folder) / name

"""Files are whole or absent, whatever fails and whenever."""

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix import files
from phoenix.files import (
    UserError,
    atomic_folder,
    atomic_write,
    inside,
    read_json,
    read_json_lines,
    require,
    sha256,
    write_json,
)


class Faults:
    """The `at`-th call of a patched function raises ENOSPC; `once=False`: every later one too."""

    def __init__(self, monkeypatch, at: int, once: bool = True):
        self.calls, self.at, self.once = 0, at, once
        for name in ("fsync", "replace"):
            monkeypatch.setattr(files.os, name, self.wrap(getattr(os, name)))
        monkeypatch.setattr("builtins.open", self.wrap(open))

    def wrap(self, function):
        def wrapped(*args, **kwargs):
            self.calls += 1
            if self.calls == self.at or (self.calls > self.at and not self.once):
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return wrapped


def write_one(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text)


def write_folder(path: Path, text: str) -> None:
    with atomic_folder(path) as folder:
        (folder / "rows").mkdir()
        (folder / "rows" / "1.txt").write_text(text)
        (folder / "manifest.json").write_text("{}")


def content(path: Path) -> str | None:
    if path.is_dir():
        return (path / "rows" / "1.txt").read_text()
    return path.read_text() if path.exists() else None


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("write", [write_one, write_folder])
def test_the_nth_failure_leaves_the_old_or_the_new_whole(tmp_path, monkeypatch, write, older, once):
    failures = 0
    for at in range(1, 30):
        folder = tmp_path / str(at)
        folder.mkdir()
        path = folder / "größe"
        if older:
            write(path, "old")
        with monkeypatch.context() as patch:
            faults = Faults(patch, at, once)
            try:
                write(path, "new")
            except UserError as error:
                failures += 1
                assert "größe" in str(error) and "No space left" in str(error)
        left = list(folder.iterdir())
        if older and not once and write is write_folder and left != [path]:
            path.exists() or left[0].rename(path)  # even the way back failed: the older folder stands beside
        else:
            assert left in ([], [path])
        assert content(path) in ({"old", "new"} if older else {None, "new"})
        write(path, "again")
        assert content(path) == "again"
        if faults.calls < at:
            break
    assert failures >= 4 and content(path) == "again"


@pytest.mark.parametrize("mode, data", [("w", "ä\n\r\n"), ("wb", b"\x00\xff")])
def test_bytes_arrive_as_given(tmp_path, mode, data):
    path = tmp_path / "new" / "folder" / "file"
    with atomic_write(path, mode) as file:
        file.write(data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)


def test_an_exception_in_the_block_leaves_the_older_file(tmp_path):
    path = tmp_path / "file"
    write_one(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "below", tmp_path / ("x" * 300), Path("/"), tmp_path / ".."):
        with pytest.raises(UserError, match="write"):
            write_one(path, "text")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/")):
        with pytest.raises(UserError, match="write"):
            write_folder(path, "text")


def test_a_folder_of_others_is_never_replaced(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    write_folder(home, "an empty folder may be replaced")
    (home / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"home: holds files of others \(no manifest.json\)"):
        write_folder(home, "new")
    assert content(home) == "an empty folder may be replaced"


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "big_disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big_disk")
    write_folder(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "big_disk") == "new"
    assert len(list(tmp_path.iterdir())) == 2


def test_json_round_trip_and_hash(tmp_path):
    value = {"Straße": [1, 2.5, None, True, "„x“"]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "Straße" in (tmp_path / "a.json").read_text(encoding="utf-8")
    (tmp_path / "empty").write_bytes(b"")
    assert sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize(
    "data, message",
    [
        (b'{\n"a": 1,\n}', "line 3"),
        (b"", "line 1"),
        (b'{"a": \xff}', "byte 6 is not UTF-8"),
        (b'{"b": {"a": 1, "a": 1}}', "the key 'a' stands twice in one object"),
        (b"[" * 100_000, "line 1"),
        (b"9" * 5000, "line 1"),
    ],
)
def test_json_that_does_not_parse_is_named(tmp_path, data, message):
    path = tmp_path / "value.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"value\.json.*{message}.*expected the list of names"):
        read_json(path, "list of names")


@pytest.mark.parametrize("tail", [b"", b'{"a": "Gr\xc3', b"\n\n"])
def test_json_lines_up_to_a_kill(tmp_path, tail):
    values = [{"a": "Gr\u00fc\u00dfe\u2028\u0085 "}, [1], None]
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    (tmp_path / "rows.jsonl").write_bytes(text.encode() + tail)
    assert read_json_lines(tmp_path / "rows.jsonl") == values
    assert read_json_lines(tmp_path / "none.jsonl") == []


def test_json_that_is_no_file_is_named(tmp_path):
    (tmp_path / "file").write_text("{}")
    for path in (tmp_path / "absent", tmp_path / "file" / "below", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="expected the JSON file"):
            read_json(path)


HOSTILE = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/etc/passwd",
    "a\\b",
    "a\0b",
    "a\nb",
    "\x1b[2J",
    "x" * 300,
    "ä" * 200,
]


@pytest.mark.parametrize("name", [*HOSTILE, "a\ud800b"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="not the plain name"):
        inside(tmp_path, name)


def test_links_are_refused_and_plain_names_pass(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="'link' is not the plain name"):
        inside(tmp_path / "folder", "link")
    assert inside(tmp_path, "model-00001 of 2.größe") == tmp_path / "model-00001 of 2.größe"


@given(st.text(max_size=300))
def test_any_name_stays_inside_or_is_refused(name):
    try:
        path = inside(Path("/folder"), name)
    except UserError:
        return
    assert os.path.normpath(path) == f"/folder/{name}"
    json.dumps(name).encode()


@given(st.text(st.characters(exclude_categories=[])))
def test_an_error_is_one_line_of_text_whatever_it_quotes(name):
    text = str(UserError(f"rows.jsonl, line 3: found {name}; correct it"))
    assert text.isprintable() and text.encode() and (not name.isprintable() or name in text)


def test_require_names_the_extra():
    assert require("json", extra="data") is json
    with pytest.raises(UserError, match=r"'no_such_package'.*pip install 'phoenix-lm\[data\]'"):
        require("no_such_package", extra="data")

"""Files of a source: local ones, and those of a hub that a small server on this machine plays."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from phoenix.data.reading import READERS
from phoenix.data.sources import Source, named, pinned, resolve
from phoenix.files import UserError

ULTRACHAT = [
    f"data/{split}-{number:05d}-of-00002-ab12.parquet"
    for split in ("train_sft", "train_gen", "test_sft")
    for number in range(2)
]


@pytest.fixture
def folder(tmp_path):
    """Files of rows at several depths, beside what are none."""
    names = [*ULTRACHAT, "train.jsonl", "more/train/0.csv", "a[1].jsonl.gz", "odd.json", "strain.csv"]
    others = ["README.md", "load.py", "dataset_infos.json", ".cache/x.jsonl", "__pycache__/x.json"]
    for name in [*names, *others]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    return tmp_path, sorted(names)


def names(folder, **source):
    return [file.relative_to(folder).as_posix() for file in resolve(Source(**source)).files]


def test_a_folder_a_file_and_a_glob(folder):
    folder, rows = folder
    assert sorted(names(folder, path=str(folder))) == rows
    for row in rows:
        assert names(folder, path=str(folder / row)) == [row]
    assert names(folder, path=f"{folder}/*.json*") == ["a[1].jsonl.gz", "odd.json", "train.jsonl"]
    assert sorted(names(folder, path=f"{folder}/**/*")) == rows
    assert names(folder, path=f"{folder}/d*/test*") == ULTRACHAT[4:]
    assert resolve(Source(str(folder))).revision is None


def test_relative_paths_are_found_from_where_one_stands(folder, monkeypatch):
    monkeypatch.chdir(folder[0])
    for path in ("train.jsonl", "./train.jsonl", "t*.jsonl", f"../{folder[0].name}/t*.jsonl"):
        assert [file.name for file in resolve(Source(path)).files] == ["train.jsonl"]


@pytest.mark.parametrize(("split", "expected"), [
    ("train_sft", ULTRACHAT[:2]),
    ("test_sft", ULTRACHAT[4:]),
    ("train", ["more/train/0.csv", "train.jsonl"]),
])  # fmt: skip
def test_a_split_is_the_files_whose_name_holds_it_whole(folder, split, expected):
    assert names(folder[0], path=str(folder[0]), split=split) == expected


def test_mistakes_are_one_sentence(folder):
    folder, _ = folder
    for source, words in [
        (Source(f"{folder}/nothing"), ["nothing does not exist", "hf://datasets/ORG/NAME"]),
        (Source("https://huggingface.co/datasets/org/set"), ["does not exist", "hf://datasets/ORG/NAME"]),
        (Source(f"{folder}/*.txt"), ["no file of rows", *READERS]),
        (Source(f"{folder}/load.py"), ["load.py", *READERS]),
        (Source(f"{folder}", split="dev"), ["split 'dev'", "strain, test_sft, train, train_gen, train_sft"]),
        (Source(f"{folder}/train.jsonl", revision="main"), ["not on the hub"]),
        (Source("hf://datasets/alone"), ["hf://datasets/ORG/NAME"]),
        (Source("hf://datasets/org/set@v1", revision="v2"), ["revision is 'v2'"]),
        (Source("hf://datasets/org/set/rows.jsonl@v1"), ["no data set of the hub", "NAME[@REVISION][/PATH"]),
    ]:
        with pytest.raises(UserError) as error:
            resolve(source)
        assert all(word in str(error.value) for word in words), error.value
        assert "\n" not in str(error.value)


def test_the_label_is_the_last_part_of_the_path():
    for path, label in [
        ("hf://datasets/org/set@refs/convert/parquet", "set"), ("hf://datasets/org/set/", "set"),
        ("hf://datasets/org/set@v1/more/rows.jsonl", "rows.jsonl"), ("rows/a.jsonl", "a.jsonl"),
        ("data@home/rows.jsonl", "rows.jsonl"), ("@mine/rows.jsonl", "rows.jsonl"),
        ("/x/rows@v2.jsonl", "rows@v2.jsonl"), (".", "."),
    ]:  # fmt: skip
        assert Source(path).label == label
    assert Source("rows", name="mine").label == "mine"


def test_names_differ():
    sources = [Source(path) for path in ("a/x.jsonl", "b/x.jsonl (2)", "b/x.jsonl", "c/x.jsonl", "y")]
    found = named(sources)
    assert [source.label for source in found] == ["x.jsonl", "x.jsonl (2)", "x.jsonl (3)", "x.jsonl (4)", "y"]
    assert [source.path for source in found] == [source.path for source in sources] and named(found) == found


def test_a_set_of_the_hub_is_pinned_to_its_commit():
    for path in ("hf://datasets/org/set", "hf://datasets/org/set@main"):
        assert pinned(path, "0ff1ce") == "hf://datasets/org/set@0ff1ce"
        assert pinned(f"{path}/a/b*.jsonl", "0ff1ce") == "hf://datasets/org/set@0ff1ce/a/b*.jsonl"
        assert pinned(path, None) == path
    assert pinned("a@b/rows.jsonl", None) == "a@b/rows.jsonl"


COMMIT = hashlib.sha1(b"first").hexdigest()
HUB_FILES = {
    **{name: f"PAR1 {name}".encode() for name in ULTRACHAT},
    "more/rows.jsonl": b'{"text": "a"}\n', "more/[x].jsonl": b'{"text": "b"}\n', "moreover.jsonl": b"{}",
    "load.py": b"1 / 0",
    "dataset_infos.json": b"{}", "README.md": b"#",
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """org/set at COMMIT (main, v1, refs/pr/1); org/gated; org/broken fails; whatever else does not exist."""

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0].strip("/").replace("%5B", "[").replace("%5D", "]")
        kind, _, rest = path.partition("datasets/")
        repo, rest = "/".join(rest.split("/")[:2]), rest.split("/")[2:]
        if repo == "org/broken":
            return self.answer(500, b"boom")
        if repo != "org/set":
            code = "GatedRepo" if repo == "org/gated" else "RepoNotFound"
            return self.answer(403 if repo == "org/gated" else 404, X_Error_Code=code, X_Error_Message="no")
        verb, revision, name = rest[0], rest[1].replace("%2F", "/"), "/".join(rest[2:])
        if revision not in ("main", "v1", "refs/pr/1", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="no revision")
        if kind == "api/":
            digests = {name: hashlib.sha1(data).hexdigest() for name, data in HUB_FILES.items()}
            files = [{"type": "file", "path": name, "rfilename": name, "oid": oid,
                      "size": len(HUB_FILES[name])} for name, oid in digests.items()]  # fmt: skip
            info = {"id": repo, "sha": COMMIT, "siblings": files, "tags": [], "private": False}
            body = json.dumps(files if verb == "tree" else info).encode()
            return self.answer(200, body, Content_Type="application/json")
        body = HUB_FILES[name]
        return self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """ask(offline=False, **fields of Source) -> (names of the files, revision) or the error's sentence.

    In a process of its own: huggingface_hub reads the environment when it is imported.
    """
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    script = (
        "import json, sys\nfrom phoenix.data.sources import *\n"
        "try:\n  found = resolve(Source(**json.loads(sys.argv[1])))\n"
        "except UserError as error:\n  print(json.dumps(str(error)))\n"
        "else:\n  more = found.revision, str(found.join), found.source.license_join\n"
        "  print(json.dumps([list(map(str, found.files)), *more]))"
    )

    def ask(offline=False, **fields):
        others = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        address = f"http://127.0.0.1:{server.server_port}"
        environment = {**others, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"),
                       "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", script, json.dumps(fields)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    ask.server = server
    yield ask
    server.shutdown()
    server.server_close()


def in_repo(paths):
    return [path.partition(f"/snapshots/{COMMIT}/")[2] for path in paths]


def test_a_split_of_a_hub_set_is_fetched_once_at_a_commit_and_found_offline(hub):
    files, revision, *_ = hub(path="hf://datasets/org/set", split="train_sft")
    assert in_repo(files) == ULTRACHAT[:2] and revision == COMMIT
    assert [Path(file).read_bytes() for file in files] == [HUB_FILES[name] for name in ULTRACHAT[:2]]
    fetched = [line for line in hub.server.asked if line.startswith("GET /datasets")]
    assert len(fetched) == 2 and all("train_sft" in line for line in fetched)

    hub.server.asked.clear()
    assert hub(path="hf://datasets/org/set", split="train_sft", offline=True)[:2] == [files, revision]
    assert not hub.server.asked
    said = hub(path="hf://datasets/org/set", split="test_sft", offline=True)
    assert "org/set" in said and "cache" in said  # not only what happens to lie there


@pytest.mark.parametrize(("path", "fields", "expected"), [
    ("hf://datasets/org/set@v1/more/rows.jsonl", {}, ["more/rows.jsonl"]),
    ("hf://datasets/org/set@refs%2Fpr%2F1/more/rows.jsonl", {}, ["more/rows.jsonl"]),
    ("hf://datasets/org/set@refs/pr/1/more/rows.jsonl", {}, ["more/rows.jsonl"]),
    ("hf://datasets/org/set/more", {}, ["more/[x].jsonl", "more/rows.jsonl"]),
    ("hf://datasets/org/set/data/t*_sft*", {"revision": "v1"}, [*ULTRACHAT[4:], *ULTRACHAT[:2]]),
    (f"hf://datasets/org/set@{COMMIT}", {}, [*sorted(ULTRACHAT), "more/[x].jsonl", "more/rows.jsonl",
                                                      "moreover.jsonl"]),
])  # fmt: skip
def test_files_folders_and_globs_of_the_hub_without_its_scripts(hub, path, fields, expected):
    files, revision, *_ = hub(path=path, **fields)
    assert in_repo(files) == expected and revision == COMMIT
    assert not [line for line in hub.server.asked if "load.py" in line]


def test_a_join_on_the_hub_becomes_a_local_file(hub, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    join = "hf://datasets/org/set@v1/more/rows.jsonl"
    files, _, local, stated = hub(path=str(tmp_path / "rows.jsonl"), license_join=join)
    assert in_repo([local]) == ["more/rows.jsonl"] and files == [str(tmp_path / "rows.jsonl")]
    assert stated == f"hf://datasets/org/set@{COMMIT}/more/rows.jsonl"
    said = hub(path=str(tmp_path / "rows.jsonl"), license_join="hf://datasets/org/set/data")
    assert "license_join hf://datasets/org/set/data has 6 files" in said


@pytest.mark.parametrize(("path", "words"), [
    ("hf://datasets/org/nothing", ["org/nothing does not exist"]),
    ("hf://datasets/org/gated", ["org/gated is gated", "HF_TOKEN"]),
    ("hf://datasets/org/set@v9", ["no revision 'v9'"]),
    ("hf://datasets/org/set/nowhere", ["no file of rows", "README.md"]),
    ("hf://datasets/org/broken", ["org/broken", "500"]),
])  # fmt: skip
def test_what_the_hub_refuses_is_one_sentence(hub, path, words):
    said = hub(path=path)
    assert isinstance(said, str) and said.startswith(path) and "\n" not in said
    assert all(word in said for word in words), said


def test_a_split_that_a_hub_set_lacks_and_a_hub_that_is_gone(hub):
    said = hub(path="hf://datasets/org/set", split="train")
    assert "no file of the split 'train'" in said and "test_sft, train_gen, train_sft" in said
    hub.server.shutdown()
    hub.server.server_close()
    said = hub(path="hf://datasets/org/set", split="train_sft")
    assert "hub cannot be reached" in said and "\n" not in said

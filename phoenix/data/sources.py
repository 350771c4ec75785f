"""Where rows come from: one [[sources]] table of a config -> files on this disk.

A source is a file, a folder, a glob, or a data set of the Hugging Face hub.  Only files of rows are taken
(reading.READERS lists their endings): no script of a data set is ever fetched or run.
"""

import dataclasses
import glob
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from phoenix.config import option
from phoenix.data.reading import READERS
from phoenix.files import UserError, require


@dataclass(frozen=True)
class Source:
    """Rows of one origin: where they lie, how many are taken, who may use them."""

    path: str = option("file, folder, glob, or hf://datasets/ORG/NAME[/PATH-OR-GLOB][@REVISION]")
    name: str | None = option("in tables and the data card; none: the last part of path", None)
    format: str | None = option("schema of the rows (phoenix/data/formats.py); none: by their fields", None)
    split: str | None = option("only files whose name holds it between - . or /, as train_sft", None)
    revision: str | None = option("commit, tag or branch on the hub; none: the newest", None)
    weight: float = option("share of the kept rows taken; 2.5: twice each, half of them again", 1.0,
                           bounds="above 0")  # fmt: skip
    cap: int | None = option("rows at most, after all filters and the weight", None, bounds="above 0")
    license: str | None = option("SPDX name, for rows that state none", None)
    license_table: str | None = option(
        "licence by a field of the row: a name in recipes/licenses, or the path of such a file", None
    )
    license_join: str | None = option(
        "file of rows (Open-Platypus) whose licence a row takes by its English instruction", None
    )
    generator: str | None = option("model that wrote the answers", None)
    generator_license: str | None = option("terms of its output, which the policy judges as well", None)
    attribution: str | None = option("whom to name", None)
    url: str | None = option("page of the data set", None)
    language: str | None = option("expected of the answers (filter language); none: not checked", None)
    held_out: bool = option("all its rows go to the split eval", False)

    @property
    def label(self) -> str:
        """`name`, or the last part of `path` without a revision."""
        return self.name or Path(self.path.partition("@")[0]).name


@dataclass(frozen=True)
class Resolved:
    """A source and its files, sorted; revision: the commit of a data set of the hub."""

    source: Source
    files: tuple[Path, ...]
    revision: str | None


def resolve(source: Source) -> Resolved:
    """The files of a source; those of the hub are downloaded into its cache, or found there.

    A license_join on the hub is fetched, too, and stands as a path in the source of the result.
    Raises UserError for a path without a file of rows, a split that no file has, what the hub refuses.
    """
    if (source.license_join or "").startswith("hf://"):
        files = resolve(Source(source.license_join)).files
        if len(files) > 1:
            raise UserError(f"license_join {source.license_join} has {len(files)} files; name one of them")
        source = dataclasses.replace(source, license_join=str(files[0]))
    if source.path.startswith("hf://"):
        return _download(source)
    if source.revision:
        raise UserError(f"{source.path}: has a revision, but is not on the hub (hf://...); remove revision")
    path = Path(source.path)
    if path.is_file():
        found = {path.name: path}
    elif path.is_dir():
        found = _below(path)
    else:
        found = {file: Path(file) for file in glob.glob(source.path, recursive=True) if Path(file).is_file()}
        if not found:
            raise UserError(f"{path}: no such file or folder, and no file fits it as a glob; correct path")
    return Resolved(source, _of_split(source, found), None)


def _of_split(source: Source, found: dict[str, Path]) -> tuple[Path, ...]:
    """The files of rows among those of a source (name -> path) that belong to its split."""
    rows = {name: path for name, path in found.items() if _fits(name, _patterns()) and _fits(name, ["*"])}
    if not rows:
        names = ", ".join(sorted(found)[:5]) or "none"
        raise UserError(
            f"{source.path}: no file of rows (files: {names}); expected one that ends in {', '.join(READERS)}"
        )
    files = [path for name, path in rows.items() if _fits(name, _patterns(source.split))]
    if not files:
        splits = ", ".join(sorted(set(map(_split_of, rows))))
        raise UserError(f"{source.path}: no file of the split {source.split!r}; there are {splits}")
    return tuple(sorted(files))


def _patterns(split: str | None = None) -> list[str]:
    """Globs of the files of rows: all, or those of a split (train: train.csv, data/train-00000-of-00001.csv,
    train/0.csv, but not train_sft.csv)."""
    if split is None:
        return [f"*{ending}" for ending in READERS]
    split = glob.escape(split)
    ends = [end for ending in READERS for end in (ending, f"[-./]*{ending}")]
    return [f"{start}{split}{end}" for start in ("", "*[-./]") for end in ends]


def _fits(name: str, patterns: list[str]) -> bool:
    hidden = any(part.startswith((".", "__")) for part in name.split("/"))
    about = name.rpartition("/")[2] in ABOUT
    return not (hidden or about) and any(fnmatchcase(name, pattern) for pattern in patterns)


def _below(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def _split_of(name: str) -> str:
    """data/train_sft-00000-of-00003-ab12.parquet -> train_sft, train/0.parquet -> train."""
    stem = re.sub(r"(-\d+-of-\d+.*)?(\.[a-z]+)+$", "", name)
    folder, _, last = stem.rpartition("/")
    return folder.rpartition("/")[2] if last.isdigit() and folder else last


def _download(source: Source) -> Resolved:
    found = HUB.fullmatch(source.path)
    if not found:
        raise UserError(f"{source.path}: expected hf://datasets/ORG/NAME[/PATH-OR-GLOB][@REVISION]")
    repo, inside, revision = found[1], (found[2] or "").strip("/"), source.revision or found[3]
    if found[3] and found[3] != revision:
        raise UserError(f"{source.path}: revision is {revision!r}, too; state one of them")
    is_folder = not glob.has_magic(inside) and not inside.endswith(tuple(READERS))
    lead = f"{inside}/" if inside and is_folder else ""
    patterns = [lead + pattern for pattern in _patterns(source.split)] if is_folder else [inside]
    hub = require("huggingface_hub", "hub")
    try:
        folder = Path(
            hub.snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns=patterns,
                ignore_patterns=["**/.*", *ABOUT],
            )
        )  # fmt: skip
        files = {name: path for name, path in _below(folder).items() if _fits(name, patterns)}
        if not files:
            names = hub.HfApi().list_repo_files(repo, repo_type="dataset", revision=folder.name)
            files = {name: folder / name for name in names}
    except Exception as error:  # the hub's, httpx' or requests', by its version
        raise UserError(_refused(source.path, repo, revision, error)) from None
    return Resolved(source, _of_split(source, files), folder.name)


def _refused(path: str, repo: str, revision: str | None, error: Exception) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    said = next((said for kind, said in HUB_ERRORS.items() if kind in kinds), None)
    said = said or f"cannot be fetched ({type(error).__name__}: {str(error).strip().splitlines()[0]:.200})"
    return f"{path}: {said.format(repo=repo, revision=revision)}"


HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:/([^@]*))?(?:@(.+))?")
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json")  # no rows
# Type of the hub's error -> what is wrong and what to do; the first that fits.
HUB_ERRORS = {
    "GatedRepoError": "{repo} is gated; accept its terms on its page and set HF_TOKEN",
    "RepositoryNotFoundError": "{repo} does not exist on the hub, or is private; correct it or set HF_TOKEN",
    "RevisionNotFoundError": "{repo} has no revision {revision!r}; correct it",
    "LocalEntryNotFoundError": "the hub cannot be reached, and the cache lacks files of {repo}; go online",
}

"""Where rows come from: one [[sources]] table of a config -> files on this disk.

A source is a file, a folder, a glob, or a data set of the Hugging Face hub.  Only files of rows are taken
(reading.READERS lists their endings): no script of a data set is ever fetched or run.
"""

import dataclasses
import glob
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path
from urllib.parse import unquote

from phoenix.config import check_bounds, option
from phoenix.data.formats import FORMATS
from phoenix.data.reading import READERS
from phoenix.files import UserError, require


@dataclass(frozen=True)
class Source:
    """Rows of one origin: where they lie, how many are taken, who may use them."""

    path: str = option("file, folder, glob, or hf://datasets/ORG/NAME[@REVISION][/PATH-OR-GLOB]")
    name: str | None = option("in tables and the data card; none: the last part of path", None)
    format: str | None = option("schema of the rows; none: by their fields", None, tuple(FORMATS))
    split: str | None = option("only files whose name holds it between - . or /, as train_sft", None)
    revision: str | None = option("commit, tag or branch on the hub; none: the newest", None)
    weight: float = option("share of the kept rows taken; 2.5: twice each, half of them again", 1.0,
                           bounds="of at least 0")  # fmt: skip
    cap: int | None = option("rows at most, after all filters and the weight", None, bounds="above 0")
    license: str | None = option("SPDX name, for rows that state none", None)
    license_table: str | None = option("licence by a field of the row: open_platypus, or a *.toml", None)
    license_join: str | None = option("file of rows whose licence a row takes by its instruction", None)
    generator: str | None = option("model that wrote the answers", None)
    generator_license: str | None = option("terms of its output, which the policy judges as well", None)
    attribution: str | None = option("whom to name", None)
    url: str | None = option("page of the data set", None)
    language: str | None = option("expected of the answers (filter language); none: not checked", None)
    held_out: bool = option("all its rows go to the split eval", False)

    def __post_init__(self) -> None:
        """Raises UserError for a number out of bounds, and for what is no code of a language."""
        check_bounds(self)
        if not re.fullmatch("[a-z]{2}", self.language or "de"):
            raise UserError(f"{self.path}: language is {self.language!r}; expected a code such as 'de'")

    @property
    def label(self) -> str:
        """`name`, or the last part of `path`: no folder above it."""
        hub = HUB.fullmatch(self.path)
        return self.name or Path((hub and (hub[3] or hub[1])) or self.path).name or self.path


@dataclass(frozen=True)
class Resolved:
    """A source and its files, sorted; the commit of a data set of the hub; the file of license_join."""

    source: Source
    files: tuple[Path, ...]
    revision: str | None
    join: Path | None = None


def named(sources: Iterable[Source]) -> tuple[Source, ...]:
    """The sources by names that differ: one that an earlier source has, too, gets a number."""
    found: dict[str, Source] = {}
    for source in sources:
        tries = (f"{source.label} ({n})" if n > 1 else source.label for n in count(1))
        name = next(name for name in tries if name not in found)
        found[name] = dataclasses.replace(source, name=name)
    return tuple(found.values())


def pinned(path: str, revision: str | None) -> str:
    """hf://datasets/ORG/NAME@REVISION/PATH; another path, or without a revision, as it is."""
    hub = HUB.fullmatch(path)
    inside = f"/{hub[3]}" if hub and hub[3] else ""
    return f"hf://datasets/{hub[1]}@{revision}{inside}" if hub and revision else path


def resolve(source: Source) -> Resolved:
    """The files of a source; those of the hub are downloaded into its cache, offline found there.

    A license_join on the hub is fetched, too; the source of the result names it with its commit.
    Raises UserError for a path without a file of rows, a split that no file has, what the hub refuses.
    """
    if source.license_join:
        join = resolve(Source(source.license_join))
        if len(join.files) > 1:
            raise UserError(f"license_join {source.license_join} has {len(join.files)} files; name one")
        stated = dataclasses.replace(source, license_join=pinned(source.license_join, join.revision))
        found = resolve(dataclasses.replace(source, license_join=None))
        return dataclasses.replace(found, source=stated, join=join.files[0])
    if source.path.startswith("hf://"):
        return _download(source)
    if source.revision:
        raise UserError(f"{source.path}: has a revision, but is not on the hub (hf://...); remove revision")
    files = _files(source.path)
    if not (files or glob.has_magic(source.path) or Path(source.path).is_dir()):
        expected = "expected a file, a folder, a glob or hf://datasets/ORG/NAME"
        raise UserError(f"{source.path} does not exist; {expected}; correct it")
    return Resolved(source, _rows(source, files, files), None)


def _files(path: str) -> dict[str, Path]:
    """Name within a folder, or within the folder that a glob starts from -> file: all that lie there."""
    start = Path(path)
    if start.is_dir():
        return {file.relative_to(start).as_posix(): file for file in start.rglob("*") if file.is_file()}
    found = [start] if start.is_file() else map(Path, glob.glob(path, recursive=True))
    fixed = Path(path[: re.search(r"[*?[]|$", path).start()] + "_").parent  # "_": a folder's last "/"
    return {file.relative_to(fixed).as_posix(): file for file in found if file.is_file()}


def _rows(source: Source, files: dict[str, Path], there: Collection[str]) -> tuple[Path, ...]:
    """The files of rows that belong to a source's split; UserError, which lists what is there, if none."""
    patterns = _patterns(source.split)
    if chosen := sorted(file for name, file in files.items() if _fits(name, patterns)):
        return tuple(chosen)
    splits = {_split_of(name) for name in there if _fits(name, _patterns(None))}
    wanted = f"the split {source.split!r}" if source.split else f"rows ({', '.join(READERS)})"
    names = sorted((source.split and splits) or there)[:10]
    raise UserError(f"{source.path}: no file of {wanted}; there are {', '.join(names) or 'none'}; correct it")


def _fits(name: str, patterns: list[str]) -> bool:
    return not ABOUT.search(name) and any(fnmatchcase(name, pattern) for pattern in patterns)


def _patterns(split: str | None) -> list[str]:
    """Globs of a split's files: of train.csv, data/train-00000-of-00001.csv, train/0.csv, no train_sft."""
    starts = ("", "*[-./]") if split else ("*",)
    middles = (glob.escape(split), f"{glob.escape(split)}[-./]*") if split else ("",)
    return [start + middle + ending for start in starts for middle in middles for ending in READERS]


def _split_of(name: str) -> str:
    """data/train_sft-00000-of-00003-ab12.parquet -> train_sft, train/0.parquet -> train."""
    *_, folder, last = ("", *re.sub(r"(-\d+-of-\d+.*)?(\.[a-z]+)+$", "", name).split("/"))
    return folder if folder and last.isdigit() else last


def _download(source: Source) -> Resolved:
    found = HUB.fullmatch(source.path)
    inline = found and found[2] and unquote(found[2])
    if not found or (inline and source.revision not in (None, inline)):
        what = f"but revision is {source.revision!r}" if found else "is no data set of the hub"
        raise UserError(f"{source.path}: {what}; expected hf://datasets/ORG/NAME[@REVISION][/PATH-OR-GLOB]")
    repo, inside, revision = found[1], (found[3] or "").strip("/"), source.revision or inline
    lead = f"{inside}/" if inside and not glob.has_magic(inside) else inside
    of_split = [lead + pattern for pattern in _patterns(source.split)]
    patterns = [inside] if inside.endswith(tuple(READERS)) else of_split
    hub = require("huggingface_hub", "hub")
    try:
        folder = hub.snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns)
        files = {name: file for name, file in _files(folder).items() if _fits(name, patterns)}
        there = files or hub.HfApi().list_repo_files(repo, repo_type="dataset", revision=Path(folder).name)
    except Exception as error:  # the hub's own, or of its client of HTTP, by its version
        kinds = {kind.__name__ for kind in type(error).__mro__}
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        said = next(said for kind, said in HUB_ERRORS.items() if kind in kinds)
        said = said.format(repo=repo, revision=revision, reason=reason)
        raise UserError(f"{source.path}: {said}") from None
    return Resolved(source, _rows(source, files, there), Path(folder).name)


# As huggingface_hub's HfFileSystem reads them: repository, revision, path.
HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/([^@]*))?")
ABOUT = re.compile(r"(^|/)([.]|__|(dataset_infos?|dataset_dict|config)\.json$)")  # hidden, or about the rows
# Type of the hub's error -> what is wrong and what to do; the first that fits.
UNREACHED = "the hub cannot be reached, and the cache lacks files of {repo} ({reason}); go online"
HUB_ERRORS = {
    "GatedRepoError": "{repo} is gated; accept its terms on its page and set HF_TOKEN",
    "RepositoryNotFoundError": "{repo} does not exist on the hub, or is private; correct it or set HF_TOKEN",
    "RevisionNotFoundError": "{repo} has no revision {revision!r}; correct it",
    **dict.fromkeys(("LocalEntryNotFoundError", "OfflineModeIsEnabled"), UNREACHED),
    "Exception": "cannot be fetched ({reason}); try again",
}

"""Rows of any known format -> token store: may they be used, are they fit, what is learned from them.

    python recipes/prepare.py                                                      the shipped German sample
    python recipes/prepare.py input='["rows.jsonl"]' model_name_or_path=models/base output=stores/mine
    python recipes/prepare.py recipes/configs/paper_data.toml                      the paper's mixture

sources -> rows -> licence -> filters -> template -> tokens and loss mask (worker processes, in parts) ->
duplicates, held-out split, weights (over all rows) -> shards, manifest, report, data card.  A store is the
same for any number of workers.  It is built beside its place and renamed when it is whole; a killed run
leaves its parts, and the same command goes on from there.  --help lists all fields.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import phoenix
from phoenix import chat
from phoenix.config import check_bounds, option, run_recipe
from phoenix.data.card import count, examples, summary, write_cards
from phoenix.data.filters import FILTERS, RowFilters, lot, row_keys
from phoenix.data.formats import KINDS, RowError, to_row
from phoenix.data.licenses import POLICIES, Licenses, unlicensed_sentence
from phoenix.data.near_duplicates import signature
from phoenix.data.parts import REASONS, Lines, Outcome, Part, excerpt, make_parts, parts_folder, spans
from phoenix.data.preview import Document, preview_page, preview_text
from phoenix.data.reading import parse
from phoenix.data.rendering import render_row, surely_too_long, unfit
from phoenix.data.selection import Rows, gather, near_duplicate_finder, select
from phoenix.data.sources import Resolved, Source, named, resolve
from phoenix.data.store import FORMAT_VERSION, MANIFEST, StoreWriter
from phoenix.files import UserError, atomic_folder, atomic_write, describe_file, json_digest, write_json
from phoenix.tokenizer import Tokenizer

QUICKSTART = Path(__file__).parent / "configs" / "quickstart_prepare.toml"
STRUCTURE = ("empty", "equal_answers", "tie", "duplicate")
MOST_SUBSETS = 10_000  # that the manifest lists; beyond, a row's own source is not kept


@dataclass(frozen=True)
class PrepareConfig:
    """Rows of any known format (phoenix/data/formats.py) -> token store.

    `sources` names data sets, each with its licence; `input` is the short form for files of your own.
    """

    output: Path = option("folder of the store; a store that stands there is replaced")
    model_name_or_path: Path = option("folder of the model whose tokenizer is used")
    sources: tuple[Source, ...] = option("tables [[sources]] of", ())
    input: tuple[Path, ...] = option("files of rows: .jsonl, .jsonl.gz, .json, .csv, .parquet", ())
    eval_input: tuple[Path, ...] = option("files whose rows are all held out", ())
    license: str | None = option("licence (SPDX) of rows of input and eval_input that state none", None)
    license_policy: str = option(
        "nc: none that forbids commercial use; strict: only those known to permit it; stated: any known one; "
        "auto: stated if there are sources, else none", "auto", ("auto", *POLICIES))  # fmt: skip
    kind: str = option("conversations and texts, or preference pairs", "documents", tuple(KINDS))
    chat_template: str | None = option("its name; none: the one that the model's folder states", None)
    max_length: int = option("most tokens of a row (a pair: longer answer)", 2048, bounds="of at least 2")
    max_prompt_length: int | None = option(
        "pairs: cut the start of a longer prompt, whole turns where possible", None, bounds="above 0"
    )
    filters: tuple[str, ...] = option("what drops rows", STRUCTURE, FILTERS)
    length_ratio: tuple[float, float] = option(
        "filter length_ratio: characters of a translation to its original's, least and most", (0.5, 2.0)
    )
    near_duplicate_threshold: float = option(
        "filter near_duplicate: similarity (Jaccard) of word 5-grams", 0.8, bounds="above 0, at most 1"
    )
    test_sets: tuple[str, ...] = option(
        "filter test_set: drops rows of such a source or category", ("theoremqa", "truthful_qa")
    )
    eval_files: tuple[Path, ...] = option("filter contaminated: files of test questions", ())
    eval_fraction: float = option(
        "share of rows held out, each drawn by its text and the seed", 0.0, bounds="of at least 0 and below 1"
    )
    on_bad_row: str = option("a row of no known format, or in disorder", "error", ("error", "drop"))
    seed: int = option("of the held-out split and of weights", 42)
    num_workers: int = option(
        "processes; 0: one a core, but no more than one for 4 MB of input", 0, bounds="of at least 0"
    )
    shard_tokens: int = option("tokens of a shard of the store at most", 2**23, bounds="above 0")
    preview: int = option("show so many rows exactly as they will be trained", 0, bounds="of at least 0")

    @property
    def files(self) -> tuple[Path, ...]:
        """Those of `input`, then those of `eval_input`."""
        return (*self.input, *self.eval_input)

    @property
    def all_sources(self) -> tuple[Source, ...]:
        """Those of `input`, `sources`, those of `eval_input`."""
        own = [Source(str(path), license=self.license) for path in self.input]
        held_out = [Source(str(path), license=self.license, held_out=True) for path in self.eval_input]
        return named((*own, *self.sources, *held_out))

    @property
    def pieces(self) -> int:
        """Documents of a row."""
        return 3 if self.kind == "pairs" else 1

    @property
    def policy(self) -> str:
        return self.license_policy.replace("auto", "stated" if self.sources else "none")


def main(config: PrepareConfig) -> Path:
    """Write the store; returns its folder.  Raises UserError."""
    check(config)
    renderer = Renderer(config, [resolve(source) for source in config.all_sources])
    tokenizer, inputs = renderer.tokenizer, [describe(*file, renderer) for file in renderer.files]
    with parts_folder(config.output) as work, atomic_folder(config.output) as folder:
        parts = scan(config, renderer, inputs, work)
        rows = gather(parts, [number for _, number in renderer.files])
        near = None
        if "near_duplicate" in config.filters:
            near = near_duplicate_finder(parts, work, config.near_duplicate_threshold)
        shares = [(source.weight, source.cap) for source in renderer.sources]
        twins = select(rows, shares, near, dedup="duplicate" in config.filters)
        written = write_store(config, renderer, parts, rows, folder)
        count(inputs, parts, rows)
        manifest = {**made_with(config, renderer), "phoenix_version": phoenix.__version__, **written}
        manifest |= {"data_sources": [*map(source_entry, renderer.found)], "inputs": inputs}
        shown = previews(config, parts, rows, inputs)
        if shown:
            with atomic_write(folder / "preview.html") as file:
                file.write(preview_page(shown, tokenizer))
        paths = [entry["path"] for entry in inputs]
        write_cards(folder, manifest, examples(parts, rows, twins, paths, tokenizer))
        write_json(folder / MANIFEST, manifest)
    print(preview_text(shown, tokenizer) + summary(manifest) + f"\nwrote {config.output}")
    return config.output


def check(config: PrepareConfig) -> None:
    """Everything cheap, before anything expensive."""
    missing = [str(path) for path in config.files if not path.is_file()]
    if missing or not (config.input or config.sources):
        raise UserError(f"input: no such file: {', '.join(missing) or 'the list is empty'}; correct it")
    check_bounds(config)
    if not any(source.weight for source in config.all_sources if not source.held_out):
        raise UserError("sources: none to train on; expected a weight above 0 of one that is not held out")
    if (config.max_prompt_length or 0) >= config.max_length:
        sizes = f"max_prompt_length is {config.max_prompt_length}, max_length {config.max_length}"
        raise UserError(f"{sizes}: no answer would fit; lower the first, or raise the second")
    if config.output.exists() and not (config.output / MANIFEST).is_file():
        raise UserError(f"{config.output} exists and is no token store; choose another output, or remove it")


class Renderer:
    """Raw rows -> outcomes: all that a worker does."""

    def __init__(self, config: PrepareConfig, found: Sequence[Resolved] = ()) -> None:
        self.config, self.tokenizer = config, Tokenizer.from_pretrained(config.model_name_or_path)
        self.template = config.chat_template or self.tokenizer.chat_template
        if self.template is None:
            where, names = config.model_name_or_path, ", ".join(chat.TEMPLATES)
            raise UserError(f"{where} states no chat template; set chat_template to one of {names}")
        trial = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        chat.render(trial, self.tokenizer, self.template)  # ends here if the tokenizer lacks what it needs
        self.found, self.sources = tuple(found), [each.source for each in found]
        self.files = [(path, number) for number, each in enumerate(found) for path in each.files]
        self.licenses = [Licenses(each.source, config.policy, each.join) for each in found]
        settings = (config.length_ratio, config.test_sets, config.eval_files)
        self.filters = RowFilters(config.filters, *settings, {source.language for source in self.sources})

    def __call__(self, file: int, lines: Lines) -> list[Outcome]:
        path, number = self.files[file]
        return [self.outcome(path, number, line, parse(path, line, raw)) for line, raw in lines]

    def outcome(self, path: Path, number: int, line: int, raw: dict[str, Any]) -> Outcome:
        source, licenses = self.sources[number], self.licenses[number]
        try:
            row = to_row(raw, (path, line), self.config.kind, source.format)
        except RowError as error:
            return self.bad_row(line, raw, str(error), error.reason)
        if origin := licenses.origin(raw):
            row = replace(row, source=origin)
        licence = licenses.of(raw, row.license)
        if dropped := licenses.why_dropped(licence):
            return Outcome(line, dropped, licence or "no licence is known", excerpt(raw))
        limit, most = self.config.max_prompt_length, self.tokenizer.max_token_bytes
        if surely_too_long(row, most * self.config.max_length, prompt_is_cut=limit is not None):
            return Outcome(line, "too_long", "by its characters alone", excerpt(raw))
        if dropped := self.filters.why_dropped(row, raw, source.language):
            return Outcome(line, *dropped, excerpt(raw))
        try:
            documents, is_cut = render_row(row, self.tokenizer, self.template, max_prompt_length=limit)
        except (UserError, ValueError) as error:  # ValueError: a character without a token
            return self.bad_row(line, raw, f"{path}, line {line}: {error}")
        if dropped := unfit(documents, self.config.max_length):
            return Outcome(line, *dropped, excerpt(raw))
        key, prompt_key = row_keys(row)
        held_out = source.held_out or lot(prompt_key, self.config.seed) < self.config.eval_fraction
        return Outcome(
            line, provenance=(row.source if row.source != path.name else "", licence or "not stated"),
            keys=(key, prompt_key), held_out=held_out, lot=lot(key, -1 - self.config.seed),
            documents=documents, prompt_is_cut=is_cut,
            signature=signature(row) if "near_duplicate" in self.config.filters else None,
        )  # fmt: skip

    def bad_row(self, line: int, raw: dict[str, Any], why: str, reason: str = "bad_row") -> Outcome:
        if reason in self.config.filters:
            return Outcome(line, reason, why, excerpt(raw))
        if self.config.on_bad_row == "drop":
            return Outcome(line, "bad_row", why, excerpt(raw))
        raise UserError(f"{why}; correct the row, or set on_bad_row=drop") from None


def scan(config: PrepareConfig, renderer: Renderer, inputs: list[dict], work: Path) -> list[Part]:
    """The parts of all files, made by worker processes or found where a killed run left them."""
    size = sum(entry["bytes"] for entry in inputs)
    workers = config.num_workers or min(os.cpu_count() or 1, 1 + size // 2**22)
    shape = {**made_with(config, renderer), "phoenix_version": phoenix.__version__}
    # What stands in other files than those of rows: it may change between a kill and the next run.
    shape["licenses"] = [[each.field, each.table, each.joined] for each in renderer.licenses]
    shape["eval_files"] = [describe_file(path) for path in config.eval_files]
    folders = [work / json_digest({**shape, **entry, "file": n}) for n, entry in enumerate(inputs)]
    files, parts = [path for path, _ in renderer.files], []
    made = make_parts(zip(files, folders), workers, Renderer, (config, renderer.found), config.pieces)
    with tqdm(unit=" rows", disable=None) as bar:
        for number, of_source in groupby(made, lambda part: renderer.files[part.file][1]):
            before = len(parts)
            for part in of_source:
                bar.update(len(part["reason"]))
                parts.append(part)
            if all((part["reason"] == REASONS.index("no_license")).all() for part in parts[before:]):
                raise UserError(unlicensed_sentence(renderer.sources[number], config.policy))
    if not parts:
        raise UserError("input: the files hold no row at all; expected rows of a known format; give others")
    return parts


def write_store(
    config: PrepareConfig, renderer: Renderer, parts: list[Part], rows: Rows, folder: Path
) -> dict[str, Any]:
    """The kept rows -> shards.  Returns the manifest's entries of the splits, and of sources and licences."""
    held_out = config.eval_fraction or any(source.held_out for source in renderer.sources)
    size, names = renderer.tokenizer.vocab_size, ("train", "eval") if held_out else ("train",)
    writers = {name: StoreWriter(folder, name, size, config.shard_tokens) for name in names}
    numbers: dict[tuple[str, str, str], int] = {}  # (source, what a row states as its own, licence)
    for part, here in zip(parts, spans(parts)):
        copies, is_eval, stated = rows.copies[here], rows.held_out[here], part.notes["provenance"]
        label, of_row = renderer.sources[renderer.files[part.file][1]].label, part["provenance"]
        known = np.zeros(len(stated), np.int32)
        for index in np.unique(of_row[copies > 0]):
            origin = (label, *stated[index])
            if len(numbers) >= MOST_SUBSETS and origin not in numbers:
                origin = (label, "", origin[-1])
            known[index] = numbers.setdefault(origin, len(numbers))
        for name, writer in writers.items():
            which = np.repeat(np.arange(len(copies)), np.where(is_eval == (name == "eval"), copies, 0))
            origins = np.stack([np.full(len(which), part.file), part["line"][which]], 1)
            writer.add_rows(*part.gather(which), origins, known[of_row[which]])
    reasons = Counter({name: int((rows.reason == code).sum()) for code, name in enumerate(REASONS)})
    entries = [dict(zip(("source", "subset", "license"), origin)) for origin in numbers]
    return {"splits": {n: closed(w, +reasons) for n, w in writers.items()}, "provenance": entries}


def closed(writer: StoreWriter, counts: Counter) -> dict[str, Any]:
    if not writer.rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        do = "change eval_fraction (0: none held out)" if counts["kept"] else "look at these filters"
        raise UserError(f"no row is left for the split {writer.split!r}: {reasons}; {do}")
    return writer.close()


def previews(config: PrepareConfig, parts: list[Part], rows: Rows, inputs: list[dict]) -> list[Document]:
    """The first rows kept, with what is the template's own."""
    shown, names = [], ("prompt", "chosen", "rejected") if config.kind == "pairs" else ("whole",)
    for part, here in zip(parts if config.preview else (), spans(parts)):
        kept = np.flatnonzero(rows.copies[here])[: config.preview - len(shown) // len(names)]
        for line, documents in zip(part["line"][kept], part.documents(kept)):
            where = f"{inputs[part.file]['path']}, line {line}"
            shown += [Document(f"{where}, {name}", *arrays) for name, arrays in zip(names, documents)]
    return shown


def describe(path: Path, number: int, renderer: Renderer) -> dict[str, Any]:
    """A file's entry in the manifest, to which `count` adds what became of its rows."""
    source = {"data_source": number, "source": renderer.sources[number].label}
    return {"path": str(path), **source, **describe_file(path)}


def source_entry(found: Resolved) -> dict[str, Any]:
    """A source in the manifest: all that its table states, and the commit of a data set of the hub."""
    stated = {name: value for name, value in asdict(found.source).items() if value is not None}
    revision = {"revision": found.revision} if found.revision else {}
    return {**stated, "name": found.source.label, **revision}


def made_with(config: PrepareConfig, renderer: Renderer) -> dict[str, Any]:
    """What the manifest says of how the rows were made, less their files: if it differs, the rows may.

    "config": every field that shapes the store; the digests stand for the folder of the tokenizer.
    """
    tokenizer, template = renderer.tokenizer, renderer.template
    shaping = {**asdict(config), "chat_template": template, "license_policy": config.policy}
    for name in ("output", "model_name_or_path", "num_workers", "preview"):
        del shaping[name]
    return {
        "format_version": FORMAT_VERSION, "kind": config.kind,
        "tokenizer_digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size,
        "chat_template": template, "template_digest": chat.template_digest(template),
        "max_length": config.max_length, "seed": config.seed, "eval_fraction": config.eval_fraction,
        "config": json.loads(json.dumps(shaping, default=str)),  # paths
    }  # fmt: skip


if __name__ == "__main__":
    run_recipe(main, PrepareConfig, QUICKSTART)

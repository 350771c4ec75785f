"""Rows of chat -> token store, section 3.2 of the paper: whole conversations of at most max_length tokens.

    python recipes/prepare.py                                                      the shipped German sample
    python recipes/prepare.py input='["rows.jsonl"]' model_name_or_path=models/base output=stores/mine

read -> one of the known formats -> filters -> template -> tokens and loss mask -> shards, manifest.  A store
is the same for any number of worker processes.  It is built beside its place and renamed when it is whole:
a killed run leaves nothing that looks like a store, and the same command makes it.  --help lists all fields.
"""

import json
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent import futures
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

import phoenix
from phoenix import chat
from phoenix.config import check_bounds, option, run_recipe
from phoenix.data.filters import lot, row_keys, why_dropped
from phoenix.data.formats import KINDS, Row, RowError, read_rows, to_row
from phoenix.data.preview import Document, preview_page, preview_text
from phoenix.data.rendering import Arrays, render_row, surely_too_long
from phoenix.data.store import FORMAT_VERSION, MANIFEST, StoreWriter
from phoenix.files import UserError, atomic_folder, atomic_write, sha256, write_json
from phoenix.tokenizer import Tokenizer

QUICKSTART = Path(__file__).parent / "configs" / "quickstart_prepare.toml"
CHUNK = 32  # rows that go to a worker at once
Chunk = tuple[int, list[tuple[int, dict[str, Any]]]]  # number of the file, its (line, row)


@dataclass(frozen=True)
class PrepareConfig:
    """Rows of any known format (phoenix/data/formats.py) -> token store."""

    input: tuple[Path, ...] = option("files of rows: .jsonl, .jsonl.gz, .json, .csv, .parquet")
    output: Path = option("folder of the store; a store that stands there is replaced")
    model_name_or_path: Path = option("folder of the model whose tokenizer is used")
    kind: str = option("conversations and texts, or preference pairs", "documents", tuple(KINDS))
    chat_template: str | None = option("its name; none: the one that the model's folder states", None)
    max_length: int = option("a row (a pair: prompt and longer answer) of more tokens is dropped", 2048)
    max_prompt_length: int | None = option(
        "pairs: cut the start of a longer prompt, whole turns where possible", None, bounds="above 0"
    )
    eval_input: tuple[Path, ...] = option("files whose rows are all held out", ())
    eval_fraction: float = option(
        "share of rows held out, each drawn by its text and the seed", 0.0, bounds="of at least 0 and below 1"
    )
    dedup: bool = option("keep the first of rows with the same turns; hold out no prompt of training", True)
    on_bad_row: str = option("a row of no known format, or in disorder", "error", ("error", "drop"))
    license: str | None = option("licence of rows that state none", None)
    seed: int = option("of the held-out split", 42)
    num_workers: int = option(
        "processes; 0: one a core, but no more than one for 4 MB of input", 0, bounds="of at least 0"
    )
    shard_tokens: int = option("tokens of a shard of the store at most", 2**23, bounds="above 0")
    preview: int = option("show so many rows exactly as they will be trained", 0, bounds="of at least 0")

    @property
    def files(self) -> tuple[Path, ...]:
        """Those of `input`, then those of `eval_input`."""
        return (*self.input, *self.eval_input)


class Outcome(NamedTuple):
    """What became of a row: the filter that dropped it, or its documents."""

    line: int
    dropped: str | None
    license: str = ""
    key: int = 0
    prompt_key: int = 0
    documents: tuple[Arrays, ...] = ()
    prompt_is_cut: bool = False


def main(config: PrepareConfig) -> Path:
    """Write the store; returns its folder.  Raises UserError."""
    check(config)
    renderer = Renderer(config)
    tokenizer = renderer.tokenizer
    counts, licenses, cuts = ([Counter() for _ in config.files] for _ in range(3))
    # Keys of the rows kept, and of the prompts trained on: 90 MB for a million rows, and nothing else grows.
    seen: set[int] = set()
    shown: list[Document] = []
    with atomic_folder(config.output) as folder:
        names = ("train", "eval") if config.eval_fraction or config.eval_input else ("train",)
        parts = ("prompt", "chosen", "rejected") if config.kind == "pairs" else ("whole",)
        writers = {n: StoreWriter(folder, n, tokenizer.vocab_size, config.shard_tokens) for n in names}
        for number, row in tqdm(outcomes(config, renderer), unit=" rows", disable=None):
            held_out = number >= len(config.input) or lot(row.prompt_key, config.seed) < config.eval_fraction
            again = row.key in seen or (held_out and row.prompt_key in seen)
            dropped = row.dropped or ("duplicate" if again else None)
            counts[number][dropped or "kept"] += 1
            if dropped:
                continue
            if config.dedup:
                seen |= {row.key} if held_out else {row.key, row.prompt_key}
            licenses[number][row.license] += 1
            cuts[number]["prompts_cut"] += row.prompt_is_cut
            split = "eval" if held_out else "train"
            writers[split].add([document[:2] for document in row.documents], (number, row.line))
            if len(shown) < config.preview * len(parts):
                where = f"{config.files[number]}, line {row.line}"
                shown += [Document(f"{where}, {part}", *arrays) for part, arrays in zip(parts, row.documents)]
        splits = {name: closed(writer, sum(counts, Counter())) for name, writer in writers.items()}
        inputs = list(map(describe, config.files, counts, licenses, cuts))
        manifest = {**made_with(config, renderer), "phoenix_version": phoenix.__version__}
        manifest |= {"splits": splits, "inputs": inputs}
        if shown:
            with atomic_write(folder / "preview.html") as file:
                file.write(preview_page(shown, tokenizer))
        write_json(folder / MANIFEST, manifest)
    cut = sum(entry.get("prompts_cut", 0) for entry in manifest["inputs"])
    said = f"\n{cut} prompts were cut to {config.max_prompt_length} tokens\n" if cut else "\n"
    print(preview_text(shown, tokenizer) + table(manifest) + f"\n{said}wrote {config.output}")
    return config.output


def check(config: PrepareConfig) -> None:
    """Everything cheap, before anything expensive."""
    missing = [str(path) for path in config.files if not path.is_file()]
    if missing or not config.input:
        raise UserError(f"input: no such file: {', '.join(missing) or 'the list is empty'}; correct it")
    check_bounds(config)
    if config.max_length < 2:
        raise UserError(f"max_length must be 2 at least, not {config.max_length}; raise it")
    if (config.max_prompt_length or 0) >= config.max_length:
        sizes = f"max_prompt_length is {config.max_prompt_length}, max_length {config.max_length}"
        raise UserError(f"{sizes}: no answer would fit; lower the first, or raise the second")
    if config.output.exists() and not (config.output / MANIFEST).is_file():
        raise UserError(f"{config.output} exists and is no token store; choose another output, or remove it")


def closed(writer: StoreWriter, counts: Counter) -> dict[str, Any]:
    if not writer.rows:
        if not counts:
            raise UserError(
                "input: the files hold no row at all; expected rows of a known format; give others"
            )
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        do = "change eval_fraction (0: none held out)" if counts["kept"] else "look at these filters"
        raise UserError(f"no row is left for the split {writer.split!r}: {reasons}; {do}")
    return writer.close()


class Renderer:
    """Raw rows -> outcomes: all that a worker does."""

    def __init__(self, config: PrepareConfig) -> None:
        self.config, self.tokenizer = config, Tokenizer.from_pretrained(config.model_name_or_path)
        self.template = config.chat_template or self.tokenizer.chat_template
        if self.template is None:
            where, names = config.model_name_or_path, ", ".join(chat.TEMPLATES)
            raise UserError(f"{where} states no chat template; set chat_template to one of {names}")
        trial = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        chat.render(trial, self.tokenizer, self.template)  # ends here if the tokenizer lacks what it needs

    def __call__(self, chunk: Chunk) -> list[tuple[int, Outcome]]:
        number, rows = chunk
        return [(number, self.outcome(self.config.files[number], line, row)) for line, row in rows]

    def outcome(self, path: Path, line: int, raw: dict[str, Any]) -> Outcome:
        try:
            row = to_row(raw, (path, line), self.config.kind)
            if dropped := why_dropped(row) or self.surely_too_long(row):
                return Outcome(line, dropped)
            limit = self.config.max_prompt_length
            documents, is_cut = render_row(row, self.tokenizer, self.template, max_prompt_length=limit)
        except (UserError, ValueError) as error:  # ValueError: a character without a token
            if self.config.on_bad_row == "drop":
                return Outcome(line, "bad_row")
            where = "" if isinstance(error, RowError) else f"{path}, line {line}: "
            raise UserError(f"{where}{error}; correct the row, or set on_bad_row=drop") from None
        if dropped := self.why_dropped(documents):
            return Outcome(line, dropped)
        licence = row.license or self.config.license or "not stated"
        return Outcome(line, None, licence, *row_keys(row), documents, is_cut)

    def surely_too_long(self, row: Row) -> str | None:
        most = self.config.max_length * self.tokenizer.max_token_bytes
        prompt_is_cut = self.config.max_prompt_length is not None
        return "too_long" if surely_too_long(row, most, prompt_is_cut=prompt_is_cut) else None

    def why_dropped(self, documents: tuple[Arrays, ...]) -> str | None:
        first, *answers = (len(tokens) for tokens, _, _ in documents)
        if first + max(answers, default=0) > self.config.max_length:
            return "too_long"
        learned = [mask for _, mask, _ in documents[1:]] or [documents[0][1][1:]]
        return None if all(mask.any() for mask in learned) else "no_target"


def made_with(config: PrepareConfig, renderer: Renderer) -> dict[str, Any]:
    """What the manifest says of how the rows were made, less their files: if it differs, the rows may.

    "config": every field that shapes the store; the digests stand for the folder of the tokenizer.
    """
    tokenizer, template = renderer.tokenizer, renderer.template
    others = ("output", "model_name_or_path", "num_workers", "preview")
    shaping = {name: value for name, value in asdict(config).items() if name not in others}
    return {
        "format_version": FORMAT_VERSION, "kind": config.kind,
        "tokenizer_digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size,
        "chat_template": template, "template_digest": chat.template_digest(template),
        "max_length": config.max_length, "seed": config.seed, "eval_fraction": config.eval_fraction,
        "config": json.loads(json.dumps({**shaping, "chat_template": template}, default=str)),  # paths
    }  # fmt: skip


def outcomes(config: PrepareConfig, renderer: Renderer) -> Iterator[tuple[int, Outcome]]:
    """(number of the file, outcome) of every row, in the order of the files."""
    size = sum(path.stat().st_size for path in config.files)
    workers = config.num_workers or min(os.cpu_count() or 1, 1 + size // 2**22)
    if workers == 1:
        for chunk in chunks(config):
            yield from renderer(chunk)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "phoenix.chat", "phoenix.data.formats"])
    pool = futures.ProcessPoolExecutor(workers, context, start_worker, (config,))
    jobs = (pool.submit(run_worker, chunk) for chunk in chunks(config))
    try:
        waiting = deque(islice(jobs, 4 * workers))  # what is read ahead must not fill the memory
        while waiting:
            yield from waiting.popleft().result()
            waiting.extend(islice(jobs, 1))
    except futures.process.BrokenProcessPool:
        raise UserError("a worker was killed (no memory?); start again with a lower num_workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def chunks(config: PrepareConfig) -> Iterator[Chunk]:
    for number, path in enumerate(config.files):
        rows = read_rows(path)
        while chunk := list(islice(rows, CHUNK)):
            yield number, chunk


def start_worker(config: PrepareConfig) -> None:
    global _renderer
    _renderer = Renderer(config)
    # A parent that was killed sends no signal: without this its workers would wait for ever.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_worker(chunk: Chunk) -> list[tuple[int, Outcome]]:
    return _renderer(chunk)


def describe(path: Path, counts: Counter, licenses: Counter, cuts: Counter) -> dict[str, Any]:
    """An input in the manifest: what it is, and what became of its rows."""
    dropped = {reason: counts[reason] for reason in sorted(counts) if reason != "kept"}
    rows = {"rows": sum(counts.values()), "dropped": dropped, "kept": counts["kept"]}
    file = {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256(path)}
    return {**file, **rows, **+cuts, "licenses": dict(sorted(licenses.items()))}


def table(manifest: dict[str, Any]) -> str:
    """What went in, what each filter dropped, what came out."""
    reasons = sorted({reason for entry in manifest["inputs"] for reason in entry["dropped"]})
    keys = ("rows", "documents", "tokens", "target_tokens")
    lines = [("input", "rows in", *reasons, "rows out")]
    for entry in manifest["inputs"]:
        dropped = (entry["dropped"].get(reason, 0) for reason in reasons)
        lines.append((entry["path"], entry["rows"], *dropped, entry["kept"]))
    lines += [("",), ("split", *keys)]
    lines += [(name, *(entry[key] for key in keys)) for name, entry in manifest["splits"].items()]
    width = max(len(line[0]) for line in lines)
    rows = (f"{name:{width}}" + "".join(f"{x:>14}" for x in values) for name, *values in lines)
    return "\n".join(map(str.rstrip, rows))


if __name__ == "__main__":
    run_recipe(main, PrepareConfig, QUICKSTART)

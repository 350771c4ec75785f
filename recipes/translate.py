"""Rows of any known format -> the same rows in another language, section 3.1 of the paper.

    python recipes/translate.py input=rows.jsonl output=runs/de engine=vllm model=models/alma-13b language=de
    torchrun --nproc-per-node=8 recipes/translate.py recipes/configs/phoenix_translate.toml   one engine a GPU

collect the unique segments of all rows -> translate them shard by shard -> put the rows together.  Any number
of processes may start on one output folder, join late or be killed: they share the shards by files in it, and
what is translated is safe batch by batch.  The same command goes on.  --help lists all fields.
"""

import contextlib
import dataclasses
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from phoenix.config import check_bounds, option, run_recipe
from phoenix.files import UserError, atomic_write, describe_file, json_digest, read_json, sha256, write_json
from phoenix.translate import assembly, pipeline
from phoenix.translate.assembly import Assembler, References, Translations, read_corrections
from phoenix.translate.checks import check_scoring
from phoenix.translate.claims import Claims
from phoenix.translate.engines import EngineConfig, check_engine, open_engine
from phoenix.translate.language import Language, load_language
from phoenix.translate.ledger import Ledger, Prices, Progress
from phoenix.translate.page import print_sample, table, what_is_not_translated, write_page
from phoenix.translate.pipeline import Parts, Record, Shards, Stop, Translator, Worker

QUICKSTART = Path(__file__).parent / "configs" / "quickstart_translate.toml"
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TranslateConfig(EngineConfig):
    """Rows of any known format (phoenix/translate/fields.py) -> the same rows in another language."""

    input: Path | tuple[Path, ...] = option("file or files of rows: .jsonl, .jsonl.gz, .json, .csv, .parquet")
    output: Path = option("folder of the run, which any number of processes may share")
    language: str = option("target: a name in recipes/languages, or the path of such a file", "de")
    errors: str = option("bytes that are not UTF-8: an error, or U+FFFD", "strict", ("strict", "replace"))
    tasks: str = option(
        "rows whose task translation destroys: left out, kept as they are with a mark, or translated",
        "mark", ("skip", "mark", "translate"),
    )  # fmt: skip
    max_chars: int = option("longer lines are cut at the ends of sentences", 600, bounds="above 0")
    translate_json: bool = option("of JSON, the strings that are values and have several words", False)
    shard_size: int = option("segments of a shard: 10 to 60 seconds of work", 4096, bounds="above 0")
    batch_size: int = option("segments that are asked, and then safe, at a time", 1024, bounds="above 0")
    max_attempts: int = option(
        "at a segment that the checks fail: again, and the last time in smaller pieces", 3, bounds="above 0"
    )
    on_failure: str = option(
        "what failed to the end stays in the source language, or its row is dropped", "keep", ("keep", "drop")
    )
    corrections: Path | None = option("file of rows with source and translation, applied last", None)
    references: str | None = option("for chrF and BLEU: a field of the rows, or a file of such rows", None)
    comet_model: Path | None = option("for COMET beside these: its checkpoint, model.ckpt", None)
    merge: str = option("all rows when all is done, or now those that are", "all", ("all", "partial"))
    sample: int = option(
        "translate so many random segments, show them with an estimate for all, and stop", 0,
        bounds="of at least 0",
    )  # fmt: skip
    gpus: float | None = option("of a process; none: tensor_parallel_size", None, bounds="of at least 0")
    gpu_price_per_hour: float = option("EUR, of one GPU", 2.0, bounds="of at least 0")
    api_price_per_character: float = option("EUR, of what is sent", 0.0, bounds="of at least 0")
    api_price_per_million_tokens: tuple[float, float] = option("EUR, of prompts and of replies", (0.0, 0.0))
    stale_after: float = option(
        "seconds without a sign of life until others take over", 60.0, bounds="above 0"
    )
    batch_timeout: float = option(
        "seconds of a batch until its engine is taken for hung; 0: never", 3600.0, bounds="of at least 0"
    )

    @property
    def files(self) -> tuple[Path, ...]:
        return self.input if isinstance(self.input, tuple) else (self.input,)

    @property
    def prices(self) -> Prices:
        gpus = self.tensor_parallel_size * (self.engine == "vllm") if self.gpus is None else self.gpus
        tokens = self.api_price_per_million_tokens
        return Prices(gpus, self.gpu_price_per_hour, self.api_price_per_character, tokens)


def main(config: TranslateConfig) -> Path:
    """Translate; returns the file of rows.  Raises UserError, and Interrupted if a signal asked to stop."""
    with Stop() as stop:
        check(config)
        language, corrections = load_language(config.language), read_corrections(config.corrections)
        with Claims(config.output / "claims", config.stale_after, config.batch_timeout) as claims:
            shards = collect(config, identity(config, language), claims, stop)
            while config.merge == "all" and not is_merged(config):
                if sampled := translate(config, shards, language, claims, stop):
                    return show_sample(config, shards, sampled)
                if claims.take(["merge"]):
                    put_together(config, shards, language, corrections, stop)
                    claims.give_up()
                else:
                    stop.wait()
            if config.merge == "partial":
                put_together(config, shards, language, corrections, stop)
    path = output_file(config, "translated.jsonl")
    if is_first():
        ledger = read_json(output_file(config, "ledger.json"))
        print(f"{table(ledger)}\nwrote {path}{what_is_not_translated(ledger)}")
    return path


def collect(config: TranslateConfig, run: Row, claims: Claims, stop: Stop) -> Shards:
    """1. Rows -> unique segments in shards: by the first process that comes, while the others wait."""
    path, manifest = config.output / "run.json", config.output / "segments" / "manifest.json"
    while not manifest.exists():
        if config.merge == "partial":
            raise UserError(f"{config.output}: nothing is translated yet; start without merge=partial first")
        if claims.take(["collect"]) is None:
            stop.wait()
            continue
        if not manifest.exists():
            write_json(path, run)
            pipeline.collect(config.output, taken_apart(config, "collect", stop), config.shard_size)
        claims.give_up()
    pipeline.compare(path, run)
    model = read_label(config)["model"]  # also where all is done, and no engine is opened
    if config.model and model not in (None, model_name(config)):
        raise UserError(f"{config.output} is translated by {model}; set model=, or choose another output")
    return Shards(config.output)


def translate(
    config: TranslateConfig, shards: Shards, language: Language, claims: Claims, stop: Stop
) -> dict[str, Record]:
    """2. Shards -> journal -> done, until all are done, whoever did it; returns the sample if one is set."""
    if not shards.open_ones():
        return {}
    sampled: dict[str, Record] = {}
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        stop.opening = True
        engine = stack.enter_context(contextlib.closing(open_engine(config, language)))
        stop.opening = False
        shards.book_loading(time.monotonic() - began)
        settings = {**engine.settings(), "lingua": find_spec("lingua") is not None}  # it decides flags
        name = model_name(config) or settings.get("model")
        label = {"engine": config.engine, "model": name, "prompt": settings.get("prompt")}
        pipeline.agree(config.output / "engine.json", {"label": label, "settings": settings}, claims, stop)
        progress = Progress(shards.manifest, config.prices, show=is_first())
        bar = stack.enter_context(contextlib.closing(progress))
        translator = Translator(engine, language, config.max_attempts)
        worker = Worker(shards, translator, claims, stop, config.batch_size, bar.add)
        tried = set()
        while open_ones := [number for number in shards.open_ones() if number not in tried]:
            stop.check()
            bar.see_done(open_ones)
            number = worker.claim(open_ones)
            if number is None:
                stop.wait()
                continue
            records = worker.translate(number, config.sample - len(sampled) if config.sample else None)
            claims.give_up()
            if config.sample:
                tried.add(number)
                sampled |= records
            if config.sample and len(sampled) >= config.sample:
                break
    return sampled


def put_together(
    config: TranslateConfig, shards: Shards, language: Language, corrections: dict[str, str], stop: Stop
) -> None:
    """3. Done -> rows in the order of the input, report, ledger; nothing if a finished shard is damaged.

    The ledger comes last: what it states is whole.
    """
    translations, ledger = Translations(config.output), Ledger(config.prices, shards.loading())
    for number in range(len(shards.sizes)):
        records = shards.finished(number)
        if not records and config.merge == "all":
            return  # it is open again
        records = records or pipeline.final(shards.journalled(number), config.max_attempts)
        translations.add(records)
        ledger.add(records)
    label = read_label(config) | {"language": language.code}
    assembler = Assembler(translations, language, label, corrections, config.on_failure == "drop")
    rows, left, references = Counter(), Counter(), References(config.references)
    with atomic_write(output_file(config, "translated.jsonl"), "wb") as file:
        for where, row, task, parts in taken_apart(config, "put together", stop):
            outcome, made = ("task", {}) if task and config.tasks == "skip" else assembler(row, parts, task)
            rows[outcome] += 1
            other = references.next()
            if outcome == "written":
                file.write(pipeline.to_json(made) + b"\n")
                rows["register_mixed"] += made["translation"]["register"] == "mixed"
                rows["with_source_kept"] += made["translation"]["kept_in_source"] > 0
                if parts:
                    references.add(where, row, other, made)
                    left.update(pipeline.left_texts(row, parts))
    summary = {"complete": config.merge == "all", "rows": dict(rows), "fields_left_as_they_are": dict(left)}
    summary |= {
        "input": shards.counts,
        "corrections": len(corrections),
        "corrections_used": len(assembler.used),
    }
    summary |= ledger.totals()
    summary |= references.scores(config.comet_model)
    write_page(output_file(config, "report.html"), f"Translation in {config.output}", summary, ledger)
    file = describe_file(output_file(config, "translated.jsonl"))
    summary |= {"made": {"with": merge_digest(config), "label": label, "file": file}}
    write_json(output_file(config, "ledger.json"), summary | {"digest": json_digest(summary)})


def show_sample(config: TranslateConfig, shards: Shards, sampled: dict[str, Record]) -> Path:
    """Print the sample beside its translation, and what the whole will take; also as sample.html."""
    ledger = Ledger(config.prices, shards.loading())
    ledger.add(sampled)
    summary, total = ledger.totals(), shards.manifest["unique_characters"]
    summary["time_and_money"]["comparison"] = ledger.comparison(total)
    shown = [(source, record.text, record.flags) for source, record in sampled.items()]
    path, title = config.output / "sample.html", f"{len(shown)} random segments of {config.output}"
    write_page(path, title, summary, ledger, shown=shown)
    print_sample(shown)
    hours = ledger.seconds * total / max(ledger.characters, 1) / 3600
    unique = shards.manifest["unique"]
    print(f"\nestimate for all {unique:,} segments ({total:,} characters), from this sample:")
    print(f"at most {hours:.3g} h of one process, since larger batches run faster\n")
    print(table(summary) + f"\nwrote {path}; the same command without sample= goes on")
    return path


def check(config: TranslateConfig) -> None:
    """Everything cheap, before anything expensive."""
    check_bounds(config)
    if not (config.output / "engine.json").exists():  # else it may be that no engine is needed
        check_engine(config)
    check_scoring(config.references, config.comet_model)
    if not all(0 <= price < math.inf for price in config.api_price_per_million_tokens):
        raise UserError("api_price_per_million_tokens: a price is below 0 or no number; correct it")
    folder, files = config.output, [*config.files, *filter(None, [config.table])]
    missing = [str(path) for path in files if not path.is_file()]
    if missing or not config.files:
        raise UserError(f"there is no file {', '.join(missing) or 'at all'}; correct input or table")
    names = [path.name for path in folder.iterdir() if path.name != "claims"] if folder.is_dir() else []
    is_file = folder.exists() and not folder.is_dir()
    if is_file or (names and "run.json" not in names and not all(name.startswith(".") for name in names)):
        raise UserError(f"{folder} exists and is no run of translation; choose another output")


def identity(config: TranslateConfig, language: Language) -> Row:
    """What makes a run this one and no other; prices, batches and what comes last may change."""
    names = "engine prompt_format errors tasks max_chars translate_json shard_size max_attempts".split()
    settings = {name: getattr(config, name) for name in names}
    settings["table"] = config.table and sha256(config.table)
    files = [f"{path.name}, sha256 {sha256(path)[:16]}" for path in config.files]
    settings["input"] = {str(number): file for number, file in enumerate(files, 1)}
    return {"format_version": 1, **settings, "language": dataclasses.asdict(language)}


def read_label(config: TranslateConfig) -> Row:
    """What made the translations, as the processes agreed; none did if there was nothing to translate."""
    path = config.output / "engine.json"
    nobody = {"engine": config.engine, "model": None, "prompt": None}
    return read_json(path)["label"] if path.exists() else nobody


def model_name(config: TranslateConfig) -> str | None:
    return Path(config.model).name if config.engine == "vllm" and config.model else config.model


def taken_apart(
    config: TranslateConfig, doing: str, stop: Stop
) -> Iterator[tuple[str, Row, str | None, Parts]]:
    """(file and line, row, task that keeps it from being translated, its texts in pieces) of all rows."""
    rows = pipeline.read_input(config.files, config.errors)
    for where, row in tqdm(rows, desc=doing, unit=" rows", disable=None if is_first() else True):
        stop.check()
        task, parts = pipeline.take_apart(row, where, config.max_chars, config.translate_json)
        yield where, row, task, parts if task is None or config.tasks == "translate" else {}


def merge_digest(config: TranslateConfig) -> str:
    """Of what decides how done shards become rows and a ledger."""
    names = ("on_failure", "references", "merge")
    files = [str(config.corrections or ""), config.references or ""]
    digests = [sha256(Path(name)) if Path(name).is_file() else None for name in files]
    values = {name: str(getattr(config, name)) for name in (*names, "comet_model", "prices")}
    return json_digest(values | {"files": digests})


def is_merged(config: TranslateConfig) -> bool:
    """The rows are there, whole, and as this config wants them."""
    path, rows = output_file(config, "ledger.json"), output_file(config, "translated.jsonl")
    return assembly.is_made(path, rows, merge_digest(config))


def output_file(config: TranslateConfig, name: str) -> Path:
    """A partial one has a name of its own, so that translated.jsonl is always the whole."""
    stem, _, ending = name.partition(".")
    return config.output / (name if config.merge == "all" else f"{stem}.partial.{ending}")


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    run_recipe(main, TranslateConfig, QUICKSTART)

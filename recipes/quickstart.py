"""The whole way on the shipped sample with one command: base model, stores, fine-tuning, preferences.

    python recipes/quickstart.py                                     the fine-tuning takes most of the time
    python recipes/quickstart.py max_steps=3 prompts=4 max_new_tokens=24      the same way, short

Steps that are finished are found and skipped; a stopped one goes on with the same command.  Writes
runs/quickstart/summary.json (figures of the base model and both trained ones) and report.html.
"""

import contextlib
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import dpo
import import_gguf
import prepare
import sft
import torch

from phoenix import chat, report
from phoenix.config import check_bounds, load_config, option, run_recipe
from phoenix.data import language, reading
from phoenix.data.formats import Conversation, to_row
from phoenix.eval.language import judge, shares, spread
from phoenix.eval.scoring import bits_per_byte
from phoenix.files import UserError, read_json, read_json_lines, require, sha256, write_json
from phoenix.generation import Sampling, generate_all
from phoenix.model.mistral import Mistral
from phoenix.tokenizer import Tokenizer
from phoenix.train.distributed import resolve_dtype
from phoenix.train.metrics import measure_gemm
from phoenix.train.reference import model_digest
from phoenix.train.run import is_done

Table = dict[str, Any]


@dataclass(frozen=True)
class QuickstartConfig:
    """From nothing to a fine-tuned model, measured on held-out prompts before and after."""

    output_dir: Path = option("folder of run, summary and report", default=Path("runs/quickstart"))
    prepare_config: Path = option("config of recipes/prepare.py, for sft", default=prepare.QUICKSTART)
    sft_config: Path = option("config of recipes/sft.py", default=sft.QUICKSTART)
    prepare_dpo_config: Path = option("config of recipes/prepare.py, for dpo", default=dpo.PAIRS)
    dpo_config: Path = option("config of recipes/dpo.py", default=dpo.QUICKSTART)
    held_out: Path = option("prompts with answers to measure on", Path("recipes/sample/held_out.jsonl"))
    max_steps: int | None = option("end each training after this many steps", None, bounds="above 0")
    prompts: int = option("measure on so many held-out prompts; 0: on all", 0, bounds="of at least 0")
    max_new_tokens: int = option("tokens of a reply; references have about 300", 512, bounds="above 0")
    temperature: float = option("0: always the most probable token", 0.8, bounds="of at least 0")
    top_p: float = option("draw from the most probable tokens up to this", 0.9, bounds="above 0, at most 1")
    seed: int = option("of the drawing", default=0)
    dtype: str = option("of the measurement", "auto", ("auto", "bfloat16", "float32"))


def main(config: QuickstartConfig) -> Path:
    """Run what is not finished, print the figures; returns the path of the report.  Raises UserError."""
    check_bounds(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        say(f"2048^3 matrix product, {dtype}: {measure_gemm(device, dtype) / 1e9:,.0f} GFLOP/s on {device}")
    require("py3langid", extra="language")
    rows = held_out_rows(config)
    stages = load_stages(config)
    base = stages["sft"][1].model_name_or_path
    if base == import_gguf.BASE_MODEL and not (base / "manifest.json").exists():
        say(f"1 of 7: importing the base model into {base}")
        with timed(config, "base_model"):
            import_gguf.main(import_gguf.ImportConfig())
    else:
        say(f"1 of 7: the base model is there: {base}")
    for preparation, training in stages.values():
        make_store(config, preparation, training)
    manifest = read_json(stages["sft"][0].output / "manifest.json", "manifest of the store")
    template = manifest["chat_template"]

    say(f"3 of 7: the base model on {len(rows)} held-out prompts")
    results = {"base": measure(config, "base", base, template, rows)}
    for number, (name, (_, training)) in zip((4, 6), stages.items()):
        trained = training.output_dir / "model"
        goes_on = begin_run(training)
        if is_done(training.output_dir) and (trained / "manifest.json").exists():
            say(f"{number} of 7: the model of {name} is there: {trained}")
        else:
            say(f"{number} of 7: training into {training.output_dir}")
            with timed(config, name, goes_on=goes_on):
                RECIPES[name].main(training)
        say(f"{number + 1} of 7: the model of {name} on {len(rows)} held-out prompts")
        results[name] = measure(config, name, trained, template, rows)

    figures = {
        name: {stage: result["figures"][name] for stage, result in results.items()} for name in FIGURES
    }
    seconds = read_json(config.output_dir / "seconds.json", "seconds of the steps")
    pairs = preferences(config)
    write_json(config.output_dir / "summary.json", {**figures, "preferences": pairs, "seconds": seconds})
    table = [(FIGURES[name], *values.values()) for name, values in figures.items()]
    shown = list(zip(*(result["replies"] for result in results.values())))
    path = write_report(config, table, pairs, shown, seconds)
    print_results(table, pairs, shown[:: max(1, len(shown) // 5)][:5], seconds)
    say(f"report: {path}\ncurves of a training: report.html in its folder\n"
        f"talk to it: python recipes/chat.py model_name_or_path={trained}")  # fmt: skip
    return path


def load_stages(config: QuickstartConfig) -> dict[str, tuple]:
    """Preparation and training of both stages; the second starts where the first ends."""
    stages, start = {}, {}
    prepared = {"sft": config.prepare_config, "dpo": config.prepare_dpo_config}
    for name, kind in KINDS.items():
        training = load_config(kind, [], getattr(config, f"{name}_config"))
        steps, output_dir = config.max_steps or training.max_steps, config.output_dir / name
        training = replace(training, output_dir=output_dir, max_steps=steps, **start)
        stages[name] = load_config(prepare.PrepareConfig, [], prepared[name]), training
        start = {"model_name_or_path": output_dir / "model"}
    return stages


def make_store(
    config: QuickstartConfig, preparation: prepare.PrepareConfig, training: sft.SFTConfig | dpo.DPOConfig
) -> None:
    there = (preparation.output / "manifest.json").exists()
    differs = made_otherwise(preparation) if there else []
    if there and not differs:
        say(f"2 of 7: the token store is there: {preparation.output}")
        return
    if there and training.output_dir.exists():
        raise UserError(f"{preparation.output} was made from other rows or settings ({', '.join(differs)}), "
                        f"and {training.output_dir} was trained on it; remove both")  # fmt: skip
    say(f"2 of 7: preparing the token store {preparation.output}")
    with timed(config, "prepare", goes_on=training.output_dir.name == "dpo"):
        prepare.main(preparation)


def preferences(config: QuickstartConfig) -> Table:
    """On held-out pairs, before and after dpo: share whose chosen answer is preferred, mean margin."""
    rows = [row for row in read_json_lines(config.output_dir / "dpo" / "metrics.jsonl") if "eval_loss" in row]
    names = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
    return {name: [row[name] for row in (rows[0], rows[-1])] for name in names} if rows else {}


def held_out_rows(config: QuickstartConfig) -> list[Table]:
    """The rows to measure on, `prompts` of them: evenly from each language, so from all categories."""
    rows = [row for _, row in reading.read_rows(config.held_out)]
    languages = sorted({row["language"] for row in rows})
    if languages != ["de", "en"]:
        raise UserError(f"{config.held_out}: languages are {languages}; expected rows of 'de' and of 'en'")
    return spread(rows, config.prompts)


def made_otherwise(preparation: prepare.PrepareConfig) -> list[str]:
    """What a store's manifest states otherwise than its preparation would now; an older one states less."""
    manifest = read_json(preparation.output / "manifest.json", "manifest of the store")
    stated = {**manifest, **manifest.get("config", {})}
    stated["files of rows"] = {entry["path"]: entry["sha256"] for entry in manifest["inputs"]}
    expected = prepare.made_with(preparation, prepare.Renderer(preparation))
    expected |= expected.pop("config")
    expected["files of rows"] = {str(path): sha256(path) for path in preparation.files if path.is_file()}
    return [name for name, value in expected.items() if stated.get(name, value) != value]


def begin_run(training: sft.SFTConfig | dpo.DPOConfig) -> bool:
    """Record the model that a run starts from; True if its folder was there.

    UserError if the folder holds a run of another config, or one that started from another model, as an
    earlier fine-tuning gave it: continued, it would be neither of both.
    """
    folder, there = training.output_dir, training.output_dir.exists()
    path, start = folder / "config.toml", folder / "start.json"
    digest = model_digest(training.model_name_or_path)
    if path.exists():
        found = load_config(type(training), [], path)
        for field in fields(training):
            if getattr(found, field.name) != getattr(training, field.name):
                raise UserError(f"{path}: {field.name} is {getattr(found, field.name)}; expected "
                                f"{getattr(training, field.name)}; remove {folder}, or choose "
                                "another output_dir")  # fmt: skip
        if start.exists() and read_json(start, "start of a run").get("model") != digest:
            raise UserError(f"{folder}: its training started from another model than now stands in "
                            f"{training.model_name_or_path}; remove {folder} to train it again")  # fmt: skip
    write_json(start, {"model": digest})
    return there


def measure(config: QuickstartConfig, stage: str, folder: Path, template: str, rows: list[Table]) -> Table:
    """Figures and replies of a model on held-out rows, kept in STAGE.json, found there if nothing changed."""
    key = {name: str(value) for name, value in asdict(config).items() if name != "max_steps"}
    files = sorted([*folder.iterdir(), config.held_out])
    key |= {
        "template": template,
        "files": str([(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]),
    }
    path = config.output_dir / f"{stage}.json"
    if path.exists() and (kept := read_json(path, "measurement"))["key"] == key:
        say(f"  found in {path}")
        return kept
    with timed(config, f"measure_{stage}"):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = Tokenizer.from_pretrained(folder)
        chat.apply_template(tokenizer, template)
        model = Mistral.from_pretrained(folder, dtype=resolve_dtype(config.dtype, device), device=device)
        bits = {}
        for name in ("de", "en"):
            conversations = [row["messages"] for row in rows if row["language"] == name]
            bits[f"bits_per_byte_{name}"] = bits_per_byte(model, tokenizer, conversations, template)
        sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, seed=config.seed)
        replies = generate_all(model, tokenizer, [row["messages"][:-1] for row in rows], sampling)
        index = language.run_index(training_texts(config))
        judged = [judge(row, reply, index) for row, reply in zip(rows, replies)]
        result = {"key": key, "figures": {**bits, **shares(judged)}, "replies": judged}
        write_json(path, result)
    return result


def training_texts(config: QuickstartConfig) -> Iterator[str]:
    for path in load_config(prepare.PrepareConfig, [], config.prepare_config).input:
        for line, raw in reading.read_rows(path):
            row = to_row(raw, (path, line))
            yield from (
                (turn["content"] for turn in row.messages) if isinstance(row, Conversation) else [row.text]
            )


def print_results(table: list[tuple], pairs: Table, shown: list[tuple[Table, ...]], seconds: Table) -> None:
    say(f"\n{'':48}{'base':>10}{'sft':>10}{'dpo':>10}")
    for name, *values in table:
        say(f"{name:48}" + "".join(map(cell, values)))
    for name, (before, after) in pairs.items():
        say(f"held-out pairs, {name:32}{'':10}{cell(before)}{cell(after)}")
    for replies in shown:
        say("\n" + readable(replies[0]["prompt"], 104))
        columns = [textwrap.wrap(readable(one["reply"], 300), 33) for one in replies]
        for number in range(max(map(len, columns))):
            cells = (column[number] if number < len(column) else "" for column in columns)
            say("  " + " | ".join(f"{cell:33}" for cell in cells).rstrip())
    say("\n" + textwrap.fill(EXPECT, 104) + "\n")
    say("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))


def cell(value: float | int | None) -> str:
    """A figure in ten columns; a dash for none, as of no replies, or of a loss that was not finite."""
    text = "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    return f"{text:>10}"


def readable(text: str, length: int) -> str:
    """One line of at most `length` characters, without what would steer a terminal."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return textwrap.shorten(text, length, placeholder=" ...")


def write_report(config: QuickstartConfig, table: list, pairs: Table, shown: list, seconds: Table) -> Path:
    stages = ("base", "sft", "dpo")
    replies = ((one[0]["prompt"], one[0]["reference"], *(reply["reply"] for reply in one)) for one in shown)
    sections = [report.paragraph(EXPECT), report.table(("on held-out prompts", *stages), table)]
    pair_rows = ((name, *values) for name, values in pairs.items())
    sections.append(report.table(("on held-out pairs", "before dpo", "after"), pair_rows))
    for name in RECIPES:
        rows = read_json_lines(config.output_dir / name / "metrics.jsonl")
        sections.append(report.heading(f"Training: {name}"))
        sections += [report.metric_curves(rows, *group) for group in report.TRAINING_CURVES]
    sections += [
        report.heading("Replies"), report.side_by_side(("prompt", "reference", *stages), replies),
        report.heading("Seconds"), report.table(("step", "seconds"), seconds.items()),
        report.heading("Settings"), report.table(("field", "value"), asdict(config).items()),
    ]  # fmt: skip
    return report.write_report(config.output_dir / "report.html", "Quickstart: base, sft and dpo", sections)


@contextlib.contextmanager
def timed(config: QuickstartConfig, name: str, *, goes_on: bool = False) -> Iterator[None]:
    """Keep the seconds of a step in seconds.json, over stops and restarts."""
    path, start = config.output_dir / "seconds.json", time.perf_counter()
    kept = read_json(path, "seconds of the steps") if path.exists() else {}
    try:
        yield
    finally:
        earlier = kept.get(name, 0.0) if goes_on else 0.0
        write_json(path, {**kept, name: round(earlier + time.perf_counter() - start, 1)})


def say(text: str) -> None:
    print(text, flush=True)


EXPECT = (
    "A model of 135 million parameters learns from this sample to answer in German, in the tone and form "
    "that is asked for (a letter, a list, a summary), to stay in English where it is asked in English, and "
    "to end its answer. It does not learn the language itself, nor facts, arithmetic or working code: expect "
    "German words in German order with wrong endings, invented words and little sense. Language "
    "identification says little about that, since the base model's echoes and loops count as German too: "
    "read the replies, and trust the bits per byte on answers that it has not seen. A larger model and more "
    "data change this; the steps stay the same."
)
RECIPES = {"sft": sft, "dpo": dpo}
KINDS = {"sft": sft.SFTConfig, "dpo": dpo.DPOConfig}
FIGURES = {
    "bits_per_byte_de": "bits per byte, German reference answers",
    "bits_per_byte_en": "bits per byte, English reference answers",
    "german_reply_share": "German prompts: decided replies in German",
    "undecided_share": "German prompts: language undecided",
    "ended_share": "German prompts: ended by the stop token",
    "echo_or_loop_share": "German prompts: echo or loop",
    "english_reply_share": "English prompts: replies in English",
    "equal_replies": "replies equal to another",
    "repeats_training": "replies with 12 words in a row of a training row",
}

if __name__ == "__main__":
    run_recipe(main, QuickstartConfig)

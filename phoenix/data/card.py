"""What a data set says of itself: counts of its inputs, report.html, and README.md, the data card.

Both are functions of the manifest and of a few rows.  A card holds no time and no folder of this machine, so
the same data give the same card; its head is what the Hugging Face hub reads.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phoenix import report
from phoenix.data.licenses import CONDITIONS, HUB_NAMES
from phoenix.data.parts import EXAMPLES, EXCERPT, REASONS, Part, spans
from phoenix.data.selection import Rows
from phoenix.data.sources import pinned
from phoenix.files import atomic_write
from phoenix.tokenizer import Tokenizer

Examples = dict[str, list[tuple[str, str, str]]]  # filter, or "kept" -> (file and line, why, text)


def count(inputs: Sequence[dict[str, Any]], parts: Sequence[Part], rows: Rows) -> None:
    """Add to each file's entry what became of its rows: rows = the sum of dropped + kept."""
    reasons, repeated, cuts = (Counter[Any]() for _ in range(3))
    licenses: list[Counter] = [Counter() for _ in inputs]
    for part, here in zip(parts, spans(parts)):
        counts = np.bincount(rows.reason[here], minlength=len(REASONS)).tolist()
        reasons.update({(part.file, name): n for name, n in zip(REASONS, counts)})
        kept = rows.copies[here] > 0
        repeated[part.file] += int(rows.copies[here].sum() - kept.sum())
        cuts[part.file] += int((part["prompt_is_cut"] & kept).sum())
        stated = [licence for _, licence in part.notes["provenance"]]
        licenses[part.file].update(stated[i] for i in part["provenance"][kept].tolist())
    for number, entry in enumerate(inputs):
        found = {name: reasons[number, name] for name in REASONS if reasons[number, name]}
        dropped = {name: found[name] for name in sorted(found) if name != "kept"}
        entry |= {"rows": sum(found.values()), "dropped": dropped, "kept": found.get("kept", 0)}
        more = {"prompts_cut": cuts[number], "repeated": repeated[number]}
        entry |= {name: n for name, n in more.items() if n}
        entry["licenses"] = dict(sorted(licenses[number].items()))


def examples(
    parts: Sequence[Part], rows: Rows, twins: np.ndarray, paths: Sequence[str], tokenizer: Tokenizer
) -> Examples:
    """Up to EXAMPLES rows that each filter dropped, and as many that were kept, from all over the data."""
    found: Examples = {}
    names = {i: name for name, i in tokenizer.special_ids.items()}
    starts = np.array([span.start for span in spans(parts)])

    def place(row: int) -> tuple[Part, int]:
        number = int(starts.searchsorted(row, "right")) - 1
        return parts[number], row - starts[number]

    def where(row: int) -> str:
        part, number = place(row)
        return f"{paths[part.file]}, line {part['line'][number]}"

    def text(row: int) -> str:
        part, number = place(row)
        [documents] = part.documents(np.array([number]))
        return "\n\n".join(excerpt(tokens) for tokens, *_ in documents)

    def excerpt(tokens: np.ndarray) -> str:
        stream, shown = tokenizer.stream(), tokens[: EXCERPT // 3].tolist()
        text = "".join(names.get(i) or stream.feed(i) for i in shown) + stream.flush()
        return text + " ..." * (len(tokens) > len(shown))

    for part in parts:
        for reason, shown in part.notes["examples"].items():
            more = ((f"{paths[part.file]}, line {line}", why, raw) for line, why, raw in shown)
            found[reason] = [*found.get(reason, ()), *more][:EXAMPLES]
    for reason in ("kept", *REASONS[REASONS.index("weight") :]):
        which = np.flatnonzero(rows.reason == REASONS.index(reason))
        for row in which[:: -(-len(which) // EXAMPLES) or 1]:
            twin, split = twins[row], "eval" if rows.held_out[row] else "train"
            same = twin >= 0 and f"as {where(twin)}:\n\n{text(twin)}"
            why = same or f"{split} × {rows.copies[row]}"
            found.setdefault(reason, []).append((where(row), why, text(row)))
    return {reason: found[reason] for reason in REASONS if reason in found}


def summary(manifest: dict[str, Any]) -> str:
    """What went in, what each filter dropped, what came out; for a terminal."""
    header, files = _counts("input", [(entry["path"], entry) for entry in manifest["inputs"]])
    splits = [(name, *map(entry.get, SPLIT)) for name, entry in manifest["splits"].items()]
    lines = [header, *files, ("",), ("split", *SPLIT), *splits]
    width = max(len(line[0]) for line in lines)
    rows = (f"{name:{width}}" + "".join(f"  {x or 0:>14}" for x in values) for name, *values in lines)
    cut = sum(entry.get("prompts_cut", 0) for entry in manifest["inputs"])
    limit = manifest["config"]["max_prompt_length"]
    said = f"\n\n{cut} prompts were cut to {limit} tokens" if cut else ""
    return "\n".join(map(str.rstrip, rows)) + said + "\n"


def write_cards(folder: Path, manifest: dict[str, Any], shown: Examples) -> None:
    """report.html, for who makes a store, and README.md, the data card, for who gets it."""
    files = [(entry["path"], entry) for entry in manifest["inputs"]]
    sections = []
    for title, *cells in (*_tables(manifest), ("Files", *_counts("file", files))):
        sections += [report.heading(title), report.table(*cells)]
    number = sum((Counter(entry["dropped"], kept=entry["kept"]) for _, entry in files), Counter())
    for reason, found in shown.items():
        sections += [report.heading(f"{reason}: {len(found)} of {number[reason]:,} rows")]
        sections += [report.paragraph(MEANINGS[reason]), report.side_by_side(("row", "why", "text"), found)]
    report.write_report(folder / "report.html", "Preparation", sections)
    about = "This folder is a token store of Phoenix; recipes/export_data.py gives its rows as text."
    kept = [text for _, _, text in shown.get("kept", ())]
    samples = kept[:: -(-len(kept) // 3) or 1]
    write_data_card(folder / "README.md", manifest, ["viewer: false"], about, samples)


def write_data_card(
    path: Path, manifest: dict[str, Any], head: Iterable[str], about: str, samples: Sequence[str]
) -> None:
    """README.md of a data set, with what the hub reads at its head.

    manifest: of a token store, or its entries kind, splits and inputs alone; head: further lines of YAML;
    about: what it is; samples: rows, of which three are shown.
    """
    sources, rows = by_source(manifest), sum(entry["rows"] for entry in manifest["splits"].values())
    licenses = {name for entry in sources.values() for name in entry["licenses"]}
    languages = {entry.get("language") or "" for entry in manifest.get("data_sources", ())}
    codes = sorted(filter(re.compile("[a-z]{2,3}").fullmatch, languages))
    kind = "preference pairs" if manifest["kind"] == "pairs" else "conversations and texts"
    lines = [
        "---", *license_head(licenses), "task_categories:", "- text-generation", "size_categories:",
        f"- {SIZES[max(0, len(str(rows)) - 3)]}",
        *(["language:", *(f'- "{code}"' for code in codes)] if codes else []),  # a bare no is false
        *head, "---", "", f"# {_plain(', '.join(sources))}", "", f"{rows:,} rows: {kind}. {about}", "",
    ]  # fmt: skip
    for title, header, cells in _tables(manifest):
        marked = (f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header)))
        lines += [f"## {title}", "", *marked, *(f"| {' | '.join(map(_plain, row))} |" for row in cells), ""]
    lines += ["## Rows", "", *(line for text in samples[:3] for line in _fenced(text))]
    with atomic_write(path) as file:
        file.write("\n".join([*lines, "## Limits", "", *LIMITS, ""]))


def license_head(licenses: Iterable[str]) -> list[str]:
    """Lines of YAML: the hub's name of a single licence; else "other" and a name, or "unknown"."""
    names = sorted(licenses)
    hub = HUB_NAMES.get(names[0]) if len(names) == 1 else None
    if hub or names in ([], ["not stated"]):
        return [f"license: {hub or 'unknown'}"]
    return ["license: other", f"license_name: {re.sub('[^a-z0-9.]+', '-', '-and-'.join(names).lower())}"]


def by_source(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The counts of each source's files added up: rows, kept, repeated, dropped, licenses."""
    sources: dict[str, dict[str, Any]] = {}
    for entry in manifest["inputs"]:
        mine = sources.setdefault(entry["source"], {"dropped": Counter(), "licenses": Counter()})
        mine |= {name: mine.get(name, 0) + entry.get(name, 0) for name in ("rows", "kept", "repeated")}
        for name in ("dropped", "licenses"):
            mine[name].update(entry[name])
    return sources


def _tables(manifest: dict[str, Any]) -> Iterator[tuple[str, Sequence[str], list[tuple]]]:
    """Heading, names of the columns, and rows of each table that card and report share."""
    sources, splits = by_source(manifest), manifest["splits"]
    stated = {entry["name"]: dict(entry) for entry in manifest.get("data_sources", ())}
    known = [name for name in SPLIT if any(name in entry for entry in splits.values())]
    yield "Splits", ("split", *known), [(name, *map(entry.get, known)) for name, entry in splits.items()]
    for entry in stated.values():
        entry |= {name: _name(entry.get(name)) for name in ("license_table", "license_join")}
    origins = [(name, stated.get(name, {})) for name in sources]
    cells = [(name, _where(origin), *map(origin.get, STATED)) for name, origin in origins]
    yield "Sources", ("source", "from", *(name.replace("_", " ") for name in STATED)), cells
    yield "Rows of each source", *_counts("source", sources.items())
    licenses = [(*item, name) for name, entry in sources.items() for item in entry["licenses"].items()]
    cells = [(license, name, number, _asks(license)) for license, number, name in sorted(licenses)]
    yield "Licences", ("licence", "source", "rows out", "what it asks"), cells
    if config := manifest.get("config"):
        yield "Steps", ("step", "rows that it drops", "number", "left"), _steps(sources.values(), splits)
        names = [Path(path).name for path in config["eval_files"]]
        more = {name: manifest[name] for name in ("phoenix_version", "tokenizer_digest", "template_digest")}
        shown = {**config, "eval_files": names, **more}
        lists = {name: value if isinstance(value, list) else [value] for name, value in shown.items()}
        cells = [(name, ", ".join(map(str, lists[name]))) for name in lists if name not in OF_FILES]
        yield "Settings", ("setting", "value"), cells


def _counts(what: str, entries: Iterable[tuple[str, dict]]) -> tuple[Sequence[str], list[tuple]]:
    found = [(name, entry, entry["dropped"]) for name, entry in entries]
    reasons = [reason for reason in REASONS if any(dropped.get(reason) for _, _, dropped in found)]
    cells = [
        (name, entry["rows"], *map(dropped.get, reasons), entry["kept"], entry.get("repeated"))
        for name, entry, dropped in found
    ]
    return (what, "rows in", *reasons, "rows out", "repeated"), cells


def _steps(sources: Collection[dict[str, Any]], splits: dict[str, dict[str, Any]]) -> list[tuple]:
    """From the rows read to the rows written: each line takes from what the one before it left."""
    left, repeated = (sum(entry[name] for entry in sources) for name in ("rows", "repeated"))
    dropped = sum((entry["dropped"] for entry in sources), Counter())
    steps: list[tuple] = [("read", None, None, left)]
    for name in filter(dropped.get, REASONS):
        left -= dropped[name]
        steps.append((name, MEANINGS[name], dropped[name], left))
    written = sum(entry["rows"] for entry in splits.values())
    return [*steps, ("written", f"none; with {repeated:,} copies, by weights above 1", None, written)]


def _where(source: dict[str, Any]) -> str | None:
    """A set of the hub with its commit, or the name of a path; the page."""
    path = pinned(source.get("path", ""), source.get("revision"))
    return " ".join(filter(None, (_name(path), source.get("url")))) or None


def _name(path: str | None) -> str | None:
    """Of a path on this machine the last part; the folders above it are nobody's business."""
    return path if path is None or path.startswith("hf://") else Path(path).name


def _asks(license: str) -> str:
    names = re.split(" AND | OR ", license)
    found = {condition for name in names for condition in CONDITIONS.get(name, ("own",))}
    return "; ".join(asks for condition, asks in ASKS.items() if condition in found)


def _plain(value: Any) -> str:
    """One line of Markdown that shows the value itself, whatever stands in it."""
    text = f"{value:,}" if type(value) is int else "" if value is None else str(value)
    return re.sub(r"([\\`*_{}\[\]<>|#~!&])", r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> list[str]:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}text", text, fence, ""]


SPLIT = ("rows", "documents", "tokens", "target_tokens")
STATED = (
    "language", "license", "license_table", "license_join", "generator", "generator_license", "attribution",
    "weight", "cap", "held_out",
)  # fmt: skip
OF_FILES = ("input", "eval_input", "sources", "shard_tokens")  # settings that other tables tell, or none asks
MEANINGS = {
    "kept": "as they are trained",
    "bad_row": "of no known format, or in disorder",
    "no_license": "of unknown licence",
    "license": "whose licence, or whose generator's terms, the policy forbids",
    "empty": "with a turn without one visible character",
    "equal_answers": "pairs whose two answers are the same",
    "tie": "pairs whose chosen answer is not rated higher",
    "test_set": "whose source is a test set",
    "language": "with an answer in another language than expected",
    "length_ratio": "much shorter or longer than what they translate",
    "refusal": "with an answer that refuses, or speaks of itself as an AI",
    "contaminated": "that share words with a test question",
    "too_long": "of more tokens than max_length",
    "no_target": "without a token that is learned",
    "weight": "not drawn for their source's share",
    "duplicate": "with the text of an earlier row; held-out pairs with a prompt of the training split",
    "near_duplicate": "with nearly the text of an earlier row",
    "cap": "beyond the most that is taken of their source",
}
ASKS = {
    "by": "attribution: name the authors and the licence, and say what was changed",
    "sa": "share-alike: publish what is made of it under this licence",
    "nc": "no commercial use",
    "nd": "no derivatives, as a translation is one",
    "own": "terms that are not known here: read them, or ask who made it",
}
LIMITS = (
    "- Licences and terms are as the sources state them. Nobody checked them, and this is no legal advice.",
    "- Filters find what they look for. Rows may still be wrong, personal, harmful, or in a test set.",
    "- Answers that a model wrote repeat its mistakes; a translated row repeats those of its translation.",
)
SIZES = "n<1K 1K<n<10K 10K<n<100K 100K<n<1M 1M<n<10M 10M<n<100M 100M<n<1B 1B<n<10B".split()

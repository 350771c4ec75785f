"""What a token store says of itself: counts of its inputs, report.html, and README.md, the data card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phoenix import report
from phoenix.data.parts import EXAMPLES, EXCERPT, REASONS, Part, spans
from phoenix.data.selection import Rows
from phoenix.tokenizer import Tokenizer

Examples = dict[str, list[tuple[str, str, str]]]  # filter -> (file and line, why, text)


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
    """The first EXAMPLES rows that each filter dropped."""
    found: Examples = {}
    add = lambda reason, *example: found.setdefault(reason, []).append(example)  # noqa: E731
    is_full = lambda reason: len(found.get(reason, ())) >= EXAMPLES  # noqa: E731
    places = list(spans(parts))
    starts = np.array([place.start for place in places])

    def where(row: int) -> str:
        number = int(starts.searchsorted(row, "right")) - 1
        part = parts[number]
        return f"{paths[part.file]}, line {part['line'][row - starts[number]]}"

    for part in parts:
        for reason, shown in part.notes["examples"].items():
            for line, why, excerpt in shown:
                if not is_full(reason):
                    add(reason, f"{paths[part.file]}, line {line}", why, excerpt)
    for reason in REASONS[REASONS.index("duplicate") :]:
        for row in np.flatnonzero(rows.reason == REASONS.index(reason))[:EXAMPLES]:
            number = int(starts.searchsorted(row, "right")) - 1
            [documents] = parts[number].documents(np.array([row - starts[number]]))
            why = f"as {where(twins[row])}" if twins[row] >= 0 else ""
            add(reason, where(row), why, tokenizer.decode(documents[0][0][: EXCERPT // 3].tolist()))
    return {reason: found[reason] for reason in REASONS if reason in found}


def summary(manifest: dict[str, Any]) -> str:
    """What went in, what each filter dropped, what came out; for a terminal."""
    reasons = [name for name in REASONS if any(name in entry["dropped"] for entry in manifest["inputs"])]
    keys = ("rows", "documents", "tokens", "target_tokens")
    lines = [("input", "rows in", *reasons, "rows out")]
    for entry in manifest["inputs"]:
        dropped = (entry["dropped"].get(reason, 0) for reason in reasons)
        lines.append((entry["path"], entry["rows"], *dropped, entry["kept"]))
    lines += [("",), ("split", *keys)]
    lines += [(name, *(entry[key] for key in keys)) for name, entry in manifest["splits"].items()]
    width = max(len(line[0]) for line in lines)
    rows = (f"{name:{width}}" + "".join(f"{x:>14}" for x in values) for name, *values in lines)
    cut = sum(entry.get("prompts_cut", 0) for entry in manifest["inputs"])
    limit = manifest["config"]["max_prompt_length"]
    said = f"\n\n{cut} prompts were cut to {limit} tokens" if cut else ""
    return "\n".join(map(str.rstrip, rows)) + said + "\n"


def write_cards(folder: Path, manifest: dict[str, Any], shown: Examples) -> None:
    """report.html, for who makes the store, and README.md, the data card, for who gets it."""
    sections = [report.heading("Files"), report.paragraph("later")]
    for reason, found in shown.items():
        sections += [report.heading(reason), report.side_by_side(("row", "why", "text"), found)]
    report.write_report(folder / "report.html", "Preparation", sections)

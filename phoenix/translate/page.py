"""report.html of a run of translation: totals, flags with examples side by side, lengths, costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phoenix import report
from phoenix.translate.checks import FLAGS
from phoenix.translate.ledger import Ledger


def write_page(
    path: Path, title: str, summary: Mapping[str, Any], ledger: Ledger, *, shown: Iterable[tuple] = ()
) -> Path:
    """Write the page; returns its path.

    summary: what ledger.json holds, tables by name; shown: (source, translation, flags) of a sample.
    """
    sections = [report.table(("total", ""), _flat(summary))]
    shown = [(source, text, ", ".join(flags)) for source, text, flags in shown]
    if shown:
        sections += [report.heading("Sample"), report.side_by_side(("source", "translation", "flags"), shown)]
    costs = [tuple(line.values()) for line in summary["time_and_money"]["comparison"]]
    sections += [report.heading("Costs"), report.table(("way", "basis", "EUR"), costs)]
    if ledger.ratios:
        points = [(ratio, ledger.ratios[ratio]) for ratio in sorted(ledger.ratios)]
        name = "Characters of a translation per character of its source"
        sections += [report.curves(name, {"segments": points})]
    sections += [report.heading("Flags"), report.table(("flag", "segments", "is"), _flags(ledger))]
    for flag, examples in sorted(ledger.examples.items()):
        of_all = f" of {ledger.flags[flag]}" if flag in ledger.flags else ""
        sections += [report.heading(f"{flag}: {len(examples)}{of_all}")]
        sections += [report.side_by_side(("source", "translation"), examples)]
    return report.write_report(path, title, sections)


def table(summary: Mapping[str, Any]) -> str:
    """The numbers of a summary for a terminal, and the costs."""
    lines = [(name, f"{value:,}") for name, value in _flat(summary) if isinstance(value, int | float)]
    lines += [(f"{line['way']}, EUR", f"{line['eur']:,.2f}  ({line['basis']})")
              for line in summary["time_and_money"]["comparison"]]  # fmt: skip
    width = max(len(name) for name, _ in lines)
    return "\n".join(plain(f"{name:{width}}  {value}") for name, value in lines)


def what_is_not_translated(ledger: Mapping[str, Any]) -> str:
    """A line for the terminal, or none."""
    if ledger["made"]["label"]["engine"] == "identity":
        return "\nnothing was translated: the engine 'identity' copies"
    rows, failed = ledger["rows"].get("with_source_kept", 0), ledger["failed"]
    what = f"{failed:,} of {ledger['segments']:,} segments failed, so {rows:,} rows hold text as it was"
    return f"\n{what}; see report.html" if failed else ""


def print_sample(shown: Iterable[tuple[str, str, Iterable[str]]]) -> None:
    """Each (source, translation, flags) for the terminal."""
    for source, text, flags in shown:
        print(f"- {plain(source)}\n  {plain(text)}", *(f"[{flag}]" for flag in flags))


def plain(text: str) -> str:
    """For a terminal: no command to it, no line break."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _flags(ledger: Ledger) -> list[tuple]:
    kinds = {True: "a failure: tried again, then kept in the source language or dropped", False: "noted"}
    return [(flag, count, kinds[FLAGS.get(flag, True)]) for flag, count in ledger.flags.most_common()]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested tables as one; lists are left out, and what is only for the next start."""
    for name, value in values.items():
        if name in ("made", "digest"):
            continue
        name = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}, ")
        elif not isinstance(value, list | bool) and value is not None:
            yield name, value

"""report.html of any stage: one file without scripts or outside resources, readable in light and in dark.

A report is a list of sections, each a piece of HTML made by `paragraph`, `table`, `curves` or `side_by_side`;
these escape all text that they are given.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from phoenix.files import UserError, atomic_write, read_json_lines

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640, 240, 64, 12, 28  # of a chart, in its own units
MAX_POINTS = 400  # of a curve; longer ones are averaged


def write_report(path: Path, title: str, sections: Iterable[str]) -> Path:
    """Write a page of sections; returns its path."""
    page = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
    page += '<meta name="viewport" content="width=device-width"><style>' + STYLE + "</style></head>\n<body>"
    with atomic_write(path) as file:
        file.write("\n".join((page, f"<h1>{_text(title)}</h1>", *sections, "</body></html>\n")))
    return Path(path)


def heading(text: str) -> str:
    return f"<h2>{_text(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>"


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """Rows of cells; numbers stand right, None is a dash."""
    return _rows(header, rows, "table")


def side_by_side(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """Texts beside each other in columns of one width, with their line breaks."""
    return _rows(header, rows, "texts")


def curves(title: str, series: dict[str, Points]) -> str:
    """A chart of named curves of (x, y) over common axes; points that are not finite numbers are left out."""
    kept = {name: _thin([p for p in points if _finite(p)]) for name, points in series.items()}
    points = [point for curve in kept.values() for point in curve]
    if not points:
        return ""
    (x_low, x_high), (y_low, y_high) = (_limits([point[i] for point in points]) for i in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        right, down = (x - x_low) / (x_high - x_low), (y_high - y) / (y_high - y_low)
        return LEFT + right * (WIDTH - LEFT - 12), TOP + down * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y, line in ((y, place(x_low, y)[1]) for y in _ticks(y_low, y_high)):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{line:.1f}" y2="{line:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{line + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in _ticks(x_low, x_high):
        parts.append(f'<text x="{place(x, 0)[0]:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{x:.6g}</text>')
    for number, curve in enumerate(kept.values()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        parts.append(f'<polyline class="c{number % 4}" points="{path}"/>')
        parts += [f'<circle class="c{number % 4}" r="2.5" cx="{x:.1f}" cy="{y:.1f}"/>'
                  for x, y in (place(*point) for point in curve) if len(curve) <= 20]  # fmt: skip
    names = "".join(f'<span class="c{i % 4}">{_text(name)}</span>' for i, name in enumerate(kept))
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{_text(title)} {names}</figcaption>{svg}</figure>"


def training_report(run_folder: Path) -> Path:
    """Write report.html of a run folder from metrics.jsonl, samples.jsonl and config.toml; returns its path.

    Raises UserError if there is no metrics.jsonl.
    """
    folder = Path(run_folder)
    rows, samples = (read_json_lines(folder / name) for name in ("metrics.jsonl", "samples.jsonl"))
    if not rows:
        raise UserError(f"{folder / 'metrics.jsonl'}: no row; expected the metrics of a training run")
    sections = [curve for group in TRAINING_CURVES if (curve := metric_curves(rows, *group))]
    if samples:
        sections += [heading("Answers before and after"), _samples(samples)]
    last = {name: value for row in rows for name, value in row.items()}
    config = folder / "config.toml"
    sections += [heading("Last values"), table(("metric", "value"), last.items())]
    if config.exists():
        sections += [heading("Config"), f"<pre>{_text(config.read_text(encoding='utf-8'))}</pre>"]
    return write_report(folder / "report.html", f"Training run {folder}", sections)


def metric_curves(rows: Sequence[dict[str, Any]], title: str, names: Sequence[str]) -> str:
    """A chart of metrics over their step; "" if no row has them."""
    series = {name: [(row["step"], row[name]) for row in rows if row.get(name) is not None] for name in names}
    return curves(title, {name: points for name, points in series.items() if points})


def _samples(samples: list[dict[str, Any]]) -> str:
    first, last = min(row["step"] for row in samples), max(row["step"] for row in samples)
    replies: dict[str, dict[int, str]] = {}
    for row in samples:
        replies.setdefault(row["prompt"], {})[row["step"]] = row["reply"]
    rows = [(prompt, by_step.get(first, ""), by_step.get(last, "")) for prompt, by_step in replies.items()]
    return side_by_side(("prompt", f"step {first}", f"step {last}"), rows)


def _rows(header: Sequence[Any], rows: Iterable[Sequence[Any]], kind: str) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><tr>{head}</tr>\n{body}</table></div>'


def _cell(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, float):
        value = f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    return f"<td{' class=number' if number else ''}>{'–' if value is None else _text(value)}</td>"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _finite(point: tuple) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in point)


def _thin(points: list) -> list:
    size = math.ceil(len(points) / MAX_POINTS)
    groups = (points[start : start + size] for start in range(0, len(points), size or 1))
    return [tuple(sum(values) / len(group) for values in zip(*group)) for group in groups]


def _limits(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between low and high, 3 to 6 of them: 0.13, 0.94 -> 0.2, 0.4, 0.6, 0.8."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(size * power for size in (0.2, 0.5, 1, 2) if (high - low) / (size * power) <= 5.5)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


TRAINING_CURVES = [
    ("Loss", ("loss", "eval_loss")),
    ("Share of target tokens predicted right", ("mean_token_accuracy", "eval_mean_token_accuracy")),
    ("Rewards (beta times the log-prob above the reference's)", ("rewards/chosen", "rewards/rejected")),
    ("Margin of the rewards", ("rewards/margins", "eval_rewards/margins")),
    ("Share of pairs whose chosen answer is preferred", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("Log-prob of an answer", ("logps/chosen", "logps/rejected")),
    ("Mean logit", ("logits/chosen", "logits/rejected")),
    ("Share of chosen answers less probable than under the reference", ("chosen_fall", "eval_chosen_fall")),
    ("Tokens of an answer", ("chosen_length", "rejected_length")),
    ("Learning rate", ("learning_rate",)),
    ("Gradient norm", ("grad_norm",)),
    ("Tokens per second", ("tokens_per_second",)),
]
STYLE = """
:root { color-scheme: light dark; --fg: #1c1c1c; --bg: #fff; --line: #d5d5d5; --c0: #1b6ac9; --c1: #d1541f;
  --c2: #2b8a3e; --c3: #8b3fb0; }
@media (prefers-color-scheme: dark) { :root { --fg: #e4e4e4; --bg: #17181a; --line: #44474c; --c0: #6fb1ff;
  --c1: #ff9b6b; --c2: #6fd284; --c3: #cf9bf0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } .wide { overflow-x: auto; }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.texts { table-layout: fixed; width: 100%; min-width: 40rem; }
.texts td { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { overflow-x: auto; border: 1px solid var(--line); padding: .6rem; }
figure { margin: 1rem 0; max-width: 46rem; } figcaption { font-weight: 600; }
figcaption span { font-weight: 400; margin-left: 1rem; } svg text { fill: var(--fg); font-size: 11px; }
.grid { stroke: var(--line); } polyline { fill: none; stroke-width: 1.6; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
figcaption span { color: var(--c); } polyline { stroke: var(--c); } circle { fill: var(--c); }
"""

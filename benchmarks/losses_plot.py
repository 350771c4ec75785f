"""Draws docs/losses.svg: each loss and its gradient against the margin.

    python benchmarks/losses_plot.py

Beta is 0.1, and the margin is shared out evenly: c = d/2, r = -d/2.  Losses that grow with 1/beta are shown
times beta squared.  The SVG is written by hand, so that nothing but torch is needed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from phoenix.files import atomic_write  # noqa: E402
from phoenix.losses import dpo_loss  # noqa: E402

TARGET = ROOT / "docs" / "losses.svg"
BETA, REACH = 0.1, 60.0
# label: loss_type, keywords, factor, colour, dashes
CURVES = {
    "sigmoid": ("sigmoid", {}, 1, "#000000", ""),
    "sigmoid, e = 0.1": ("sigmoid", {"label_smoothing": 0.1}, 1, "#000000", "5 3"),
    "robust, e = 0.1": ("robust", {"label_smoothing": 0.1}, 1, "#7f7f7f", "2 2"),
    "exo_pair": ("exo_pair", {}, 1, "#8c564b", ""),
    "hinge": ("hinge", {}, 1, "#1f77b4", ""),
    "ipo × beta²": ("ipo", {}, BETA**2, "#d62728", ""),
    "sppo_hard × beta²": ("sppo_hard", {}, BETA**2, "#d62728", "5 3"),
    "nca_pair": ("nca_pair", {}, 1, "#2ca02c", ""),
    "bco_pair, D = 0": ("bco_pair", {"reward_mean": 0.0}, 1, "#2ca02c", "5 3"),
    "apo_zero": ("apo_zero", {}, 1, "#9467bd", ""),
    "apo_down": ("apo_down", {}, 1, "#9467bd", "5 3"),
    "discopop": ("discopop", {}, 1, "#ff7f0e", ""),
}
PANEL, HEIGHT, LEFT, TOP = 330, 300, 50, 40  # of one panel; margins around it
RANGES = {"loss": (-0.5, 4.0), "gradient of the loss by the margin": (-0.2, 0.1)}


def curve(loss_type: str, keywords: dict, factor: float) -> dict[str, list[tuple[float, float]]]:
    margin = torch.linspace(-REACH, REACH, 161, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(margin)
    losses, *_ = dpo_loss(margin / 2, -margin / 2, zero, zero, beta=BETA, loss_type=loss_type, **keywords)
    [slopes] = torch.autograd.grad(losses.sum(), margin)
    values = (factor * losses.detach(), factor * slopes)
    return {name: list(zip(margin.tolist(), y.tolist())) for name, y in zip(RANGES, values)}


def draw() -> str:
    curves = {label: curve(*settings[:3]) for label, settings in CURVES.items()}
    width, height = 2 * PANEL + 3 * LEFT + 130, HEIGHT + 2 * TOP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for place, (name, (low, high)) in enumerate(RANGES.items()):
        left = LEFT + place * (PANEL + LEFT)

        def x_of(x: float, left: float = left) -> float:
            return left + (x + REACH) / (2 * REACH) * PANEL

        def y_of(y: float, low: float = low, high: float = high) -> float:
            return TOP + (high - y) / (high - low) * HEIGHT

        lines += axes(name, left, x_of, y_of, low, high)
        lines.append(f'<clipPath id="panel{place}"><rect x="{left}" y="{TOP}" width="{PANEL}" '
                     f'height="{HEIGHT}"/></clipPath>')  # fmt: skip
        for label, points in curves.items():
            path = " ".join(f"{x_of(x):.0f},{y_of(max(-9.0, min(9.0, y))):.1f}" for x, y in points[name])
            lines.append(
                f'<polyline clip-path="url(#panel{place})" points="{path}" {stroke(label)} fill="none"/>'
            )
    for row, label in enumerate(CURVES):
        x, y = 2 * (PANEL + LEFT) + 15, TOP + 10 + 20 * row
        lines.append(f'<line x1="{x}" x2="{x + 28}" y1="{y}" y2="{y}" {stroke(label)}/>')
        lines.append(f'<text x="{x + 34}" y="{y + 4}">{label}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def stroke(label: str) -> str:
    *_, colour, dashes = CURVES[label]
    return f'stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dashes or "none"}"'


def axes(name: str, left: float, x_of, y_of, low: float, high: float) -> list[str]:
    grid = 'stroke="#dddddd"'
    lines = [f'<text x="{left}" y="{TOP - 14}" font-weight="bold">{name}</text>']
    for x in (-60, -40, -20, 0, 20, 40, 60):
        lines.append(f'<line x1="{x_of(x)}" x2="{x_of(x)}" y1="{TOP}" y2="{TOP + HEIGHT}" {grid}/>')
        lines.append(f'<text x="{x_of(x)}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{x}</text>')
    lines.append(
        f'<text x="{left + PANEL / 2}" y="{TOP + HEIGHT + 33}" text-anchor="middle">'
        "margin c − r in nats, beta = 0.1</text>"
    )
    ticks = [low + i * (high - low) / 9 for i in range(10)] if high > 1 else [i / 20 for i in range(-4, 3)]
    for y in ticks:
        lines.append(f'<line x1="{left}" x2="{left + PANEL}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}" {grid}/>')
        text = f"{y:g}".replace("-", "−")
        lines.append(f'<text x="{left - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{text}</text>')
    return lines


if __name__ == "__main__":
    with atomic_write(TARGET) as file:
        file.write(draw())
    print(f"wrote {TARGET}")

"""Draws the README's picture: divergence from full precision against bits a weight.

    python benchmarks/quality_by_bits.py

reads quality_by_bits.csv, whose rows are of the tables in README.md beside it, and writes
docs/figures/quality-by-bits.svg.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "figures" / "quality-by-bits.svg"
WIDTH, HEIGHT = 780, 350
LEFT, RIGHT, TOP, BOTTOM = 64, 560, 24, 280
BITS = (2.1, 4.2)
DIVERGENCE = (0.1, 4.0)
TICKS = (0.1, 0.2, 0.5, 1, 2, 4)
CLASSES = {
    "round to nearest": "nearest",
    "GPTQ": "gptq",
    "AutoRound, its best run": "autoround",
    "LRQuant+ and rounding": "plus",
    "the same, tuned end to end": "tuned",
}
STYLE = """
svg { --ink: #1f2430; --quiet: #5b6476; --line: #d5d9e4; --nearest: #7a8194; --gptq: #b4500f;
  --autoround: #00838f; --plus: #3f51b5; --tuned: #2e7d32;
  font: 13px system-ui, "Segoe UI", sans-serif; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6e8ee; --quiet: #a3abbd; --line: #3a4052;
  --nearest: #9aa2b5; --gptq: #ffab70; --autoround: #5fd3de;
  --plus: #9fa8ff; --tuned: #7ccf80; } }
text { fill: var(--ink); dominant-baseline: central; }
.quiet { fill: var(--quiet); }
.middle { text-anchor: middle; } .end { text-anchor: end; }
.grid { stroke: var(--line); stroke-width: 1; }
polyline { fill: none; stroke-width: 2; }
"""


def x_of(bits: float) -> float:
    """Where so many bits a weight are, in pixels."""
    return LEFT + (bits - BITS[0]) / (BITS[1] - BITS[0]) * (RIGHT - LEFT)


def y_of(divergence: float) -> float:
    """Where a divergence is, in pixels; its axis is logarithmic."""
    low, high = map(math.log, DIVERGENCE)
    return BOTTOM - (math.log(divergence) - low) / (high - low) * (BOTTOM - TOP)


def axes(schemes: dict[str, float]) -> list[str]:
    """Grid lines, their labels, and the schemes under the bits that they take."""
    lines = []
    for tick in TICKS:
        y = y_of(tick)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="quiet end" x="{LEFT - 8}" y="{y:.1f}">{tick:g}</text>')
    for scheme, bits in schemes.items():
        x = x_of(bits)
        shift = {"W3A16": -24, "W3A16g64": 24}.get(scheme, 0)  # neighbours: 3.03 and 3.28 bits
        for row, label in enumerate((scheme, f"{bits:.2f}")):
            lines.append(
                f'<text class="quiet middle" x="{x + shift:.1f}" y="{BOTTOM + 16 + 16 * row}">'
                f"{label}</text>"
            )
    middle = (LEFT + RIGHT) / 2
    lines.append(
        f'<text class="middle" x="{middle}" y="{HEIGHT - 12}">bits a weight, scales counted</text>'
    )
    lines.append(f'<text x="{LEFT}" y="10">KL divergence from full precision (log)</text>')
    return lines


def series(method: str, points: list[tuple[float, float]]) -> list[str]:
    """One method: a line through its points."""
    colour = f"var(--{CLASSES[method]})"
    places = [(x_of(bits), y_of(divergence)) for bits, divergence in sorted(points)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in places]
    return [f'<polyline stroke="{colour}" points="{line}"/>', *dots]


def legend(lines: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Names at the right, in the order of the lines' last points."""
    drawn = []
    for row, method in enumerate(lines):
        y, colour = TOP + 20 + 26 * row, f"var(--{CLASSES[method]})"
        drawn.append(f'<circle cx="{RIGHT + 20}" cy="{y}" r="5" fill="{colour}"/>')
        drawn.append(f'<text x="{RIGHT + 32}" y="{y}">{escape(method)}</text>')
    return drawn


def main() -> None:
    """Write the picture."""
    with (HERE / "quality_by_bits.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    schemes = {row["scheme"]: float(row["bits"]) for row in rows}
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        point = float(row["bits"]), float(row["divergence"])
        lines.setdefault(row["method"], []).append(point)
    drawn = [each for method, points in lines.items() for each in series(method, points)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>Quality against bits a weight</title>",
        "<desc>KL divergence from full precision of SmolLM2-135M, by method and scheme</desc>",
        f"<style>{STYLE}</style>",
        *(*axes(schemes), *drawn, *legend(lines)),
        "</svg>",
    ]
    PICTURE.write_text("\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

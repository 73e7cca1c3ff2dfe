"""How the pictures of an evaluation look: what all of them share. Needs matplotlib.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; markers and lines
repeat what colours say.
"""

from __future__ import annotations

from typing import Any

from arkcache.evaluation.figures import FULL

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F")
MARKERS = "osD^vP*X<>"
LINES = ("-", "--", "-.", ":")
STYLE: Any = {
    "font.size": 9,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.7,
    "axes.titlesize": 10,
}
_LABEL_CHARS = 36


def styles(methods: list[str]) -> dict[str, dict[str, Any]]:
    """How each method is drawn: colour, marker and line repeat with different periods."""
    found = {}
    for number, method in enumerate(one for one in dict.fromkeys(methods) if one != FULL):
        found[method] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINES[number % len(LINES)],
        }
    common: dict[str, Any] = {"linewidth": 1.3, "elinewidth": 0.8, "capsize": 2, "markersize": 6}
    common["markeredgecolor"] = "white"
    common["markeredgewidth"] = 0.6
    full = {FULL: {"color": "black", "marker": "s", "linestyle": "none"}}
    return {method: common | style for method, style in (full | found).items()}


def folded(label: str) -> str:
    """A label in lines that are short enough, broken after commas where it has any."""
    parts = label.replace(",", ",\0").split("\0")
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(part) > _LABEL_CHARS:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)

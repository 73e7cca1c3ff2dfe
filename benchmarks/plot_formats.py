"""Draw what the formats of pages cost: answers and KL divergence by bytes per token.

    python benchmarks/plot_formats.py                      # runs the sweep, some minutes
    python benchmarks/plot_formats.py --from docs/formats.json

Left, every format attends as many tokens; right, as many as fit in the same bytes of the device
tier. The figures are written beside the picture, as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import (
    FixedLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

import arkcache
from arkcache.demo import sweep

OUT = Path(__file__).resolve().parents[1] / "docs" / "formats.png"
GREY = "#555555"
KINDS: dict[str, dict[str, Any]] = {
    "16 bits": {"color": "#222222", "marker": "s", "linestyle": "none"},
    "as it is": {"color": "#1f4e9c", "marker": "o", "markersize": 7, "linewidth": 1},
    "keys and values rotated": {
        "color": "#e08214",
        "marker": "^",
        "markerfacecolor": "white",
        "linewidth": 1,
        "linestyle": "--",
    },
}
"""How each kind of point is drawn; shapes tell them apart where colours do not."""
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
}


def main() -> None:
    """Run or read the sweep, then draw."""
    arguments = parse_arguments()
    try:
        result = read(arguments.source) if arguments.source else measure(arguments)
    except arkcache.ArkCacheError as error:
        sys.exit(f"plot_formats: {error}")
    except KeyboardInterrupt:
        print("\nplot_formats: interrupted; nothing was written.", file=sys.stderr)
        sys.exit(130)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figures = arguments.out.with_suffix(".json")
    figures.write_text(json.dumps(result.to_dict(), indent=1, default=str) + "\n")
    draw(result, arguments.out)
    print(f"{arguments.out} and {figures}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--from", dest="source", type=Path, help="JSON of `arkcache sweep`")
    parser.add_argument("--out", type=Path, default=OUT, help="picture; the JSON lies beside it")
    parser.add_argument("--draws", type=int, default=3, help="texts, averaged")
    parser.add_argument("--facts", type=int, default=32)
    parser.add_argument("--context", type=int, default=8192, help="tokens")
    parser.add_argument("--budget", type=int, default=512, help="tokens, at equal tokens")
    parser.add_argument(
        "--reference-tokens", type=int, default=256, help="whose 16-bit bytes all get"
    )
    parser.add_argument("--model", help="a folder or id; the shipped model if left out")
    return parser.parse_args()


def read(path: Path) -> sweep.Result:
    """A sweep from its JSON. Raises `InputError` where there is none."""
    try:
        return sweep.Result.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise arkcache.InputError(
            f"{path}: expected what `arkcache sweep --json` printed ({error})"
        ) from None


def measure(arguments: argparse.Namespace) -> sweep.Result:
    """Run the sweep; each stage is told on stderr."""
    settings = sweep.Settings(
        context_tokens=arguments.context,
        num_facts=arguments.facts,
        num_draws=arguments.draws,
        budget_tokens=arguments.budget,
        reference_tokens=arguments.reference_tokens,
        model=arguments.model,
    )
    told = {""}

    def progress(stage: str, _done: int, _total: int) -> None:
        if stage not in told:
            print(stage, file=sys.stderr, flush=True)
        told.add(stage)

    return sweep.run(settings, progress)


def draw(result: sweep.Result, path: Path) -> None:
    """Two columns, equal tokens and equal bytes; two rows, answers and divergence."""
    settings = result.settings
    titles = {
        sweep.EQUAL_TOKENS: f"Equal tokens: a budget of {settings['budget_tokens']}",
        sweep.EQUAL_BYTES: f"Equal bytes: a device tier of {settings['device_bytes'] / 1024:,.0f} "
        "KiB",
    }
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, 2, figsize=(8.4, 5.2), sharex="col", sharey="row", layout="constrained"
        )
        for column, (mode, title) in enumerate(titles.items()):
            rows = [row for row in result.rows if row.mode == mode]
            draw_points(axes[0, column], rows, answers=True)
            draw_points(axes[1, column], rows, answers=False)
            draw_full_cache(axes[0, column], result, named=column == 0)
            set_ticks(axes[1, column], rows)
            axes[0, column].set_title(title, fontweight="bold")
        axes[1, 0].set_yscale("log")
        axes[1, 0].set_ylim(*spread([row.kl for row in result.rows if row.mode != "full"]))
        for column, mode in enumerate(titles):
            label_points(axes[1, column], [row for row in result.rows if row.mode == mode])
        axes[0, 0].margins(y=0.1)
        axes[0, 0].yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes[0, 0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes[0, 0].set_ylabel("right answers")
        axes[1, 0].set_ylabel("KL to the full cache, nats")
        axes[1, 0].set_xlabel("host bytes per token")
        axes[1, 1].set_xlabel("tokens attended per step")
        axes[1, 0].legend(frameon=False, loc="upper right")
        figure.savefig(path, dpi=200)
        plt.close(figure)


def draw_points(axes: Axes, rows: list[sweep.Row], *, answers: bool) -> None:
    """One point for each format: 16 bits, as it is, rotated."""
    axes.set_xscale("log")
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    for label, style in KINDS.items():
        own = [row for row in rows if kind_of(row) == label]
        places = [x_of(row) for row in own]
        values = [row.num_right / row.num_questions if answers else row.kl for row in own]
        axes.plot(places, values, label=label, **style)


def draw_full_cache(axes: Axes, result: sweep.Result, *, named: bool) -> None:
    """A line where the full cache answers."""
    (full,) = (row for row in result.rows if row.mode == "full")
    share = full.num_right / full.num_questions
    axes.axhline(share, color=GREY, linewidth=0.9, linestyle=":", zorder=1)
    if not named:
        return
    axes.annotate(
        "full cache",
        (0.72, share),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color=GREY,
    )


def set_ticks(axes: Axes, rows: list[sweep.Row]) -> None:
    """A tick for every format, and room at both ends."""
    ticks = sorted({round(x_of(row)) for row in rows})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(*spread(list(map(float, ticks)), 0.09))


def label_points(axes: Axes, rows: list[sweep.Row]) -> None:
    """The name of each format below its points; above them where lines come from below."""
    worst = max(rows, key=lambda row: row.kl)
    for name in dict.fromkeys(row.format for row in rows):
        own = sorted((row for row in rows if row.format == name), key=lambda row: row.kl)
        above = name == worst.format
        axes.annotate(
            "16 bits" if name == "K16V16" else name,
            (x_of(own[0]), own[-1 if above else 0].kl),
            xytext=(0, 7 if above else -8),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=8.5,
        )


def kind_of(row: sweep.Row) -> str:
    """Which of `KINDS` a row is."""
    if row.format == "K16V16":
        return "16 bits"
    return "as it is" if row.rotation == "none" else "keys and values rotated"


def spread(values: list[float], margin: float = 0.14) -> tuple[float, float]:
    """Limits of a logarithmic axis that leave some of its length free at both ends."""
    low, high = min(values), max(values)
    room = (high / low) ** margin
    return low / room, high * room


def x_of(row: sweep.Row) -> float:
    """Bytes per token at equal tokens; at equal bytes the tokens that they hold."""
    return row.host_bytes_per_token if row.mode == sweep.EQUAL_TOKENS else row.attended_tokens


if __name__ == "__main__":
    main()
